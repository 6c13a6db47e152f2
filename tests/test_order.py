"""Promise 2: the order of tokens is a pure function of (manifest hash, seed, sequence length, i), for any ranks."""

import json
import resource
import tempfile
from collections import Counter
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import resolved

from core.data import shards
from core.data.shards import TokenOrder, Windows, open_dataset
from core.distributed import Ranks
from core.files import sha256
from core.train.loader import TokenDropout, micro_batches, open_loader
from core.train.schedule import Schedule

SEQ_LEN = 16
# Three epochs of ten windows, computed once. If they changed, every resumed run would train on other tokens.
FROZEN = [7, 3, 2, 1, 9, 8, 6, 0, 4, 5, 8, 6, 1, 5, 4, 2, 0, 3, 7, 9, 1, 4, 8, 2, 6, 7, 5, 0, 3, 9]
FIRST_SHIFTS = [271, 486, 901, 768, 789]  # of the epochs 1 to 5
FIRST_KEPT = [0, 2, 3, 5, 6, 8, 9, 10, 12, 13, 14, 15]


def write_dataset(folder, sizes):
    """Train shards of these sizes, with the token ids 0, 1, 2, ... over all shards."""
    shards, first = [], 0
    for number, size in enumerate(sizes):
        name = f"train_{number:06d}.npy"
        np.save(folder / name, np.arange(first, first + size, dtype=np.uint16))
        shards.append({"file": name, "split": "train", "tokens": size, "sha256": ""})
        first += size
    (folder / "manifest.json").write_text(json.dumps({"vocab_size": first, "end_of_text_id": 0, "shards": shards}))
    return open_dataset(folder)


# Exactly three windows; one token too few for three; less than a window; a single token; one token more than two.
@pytest.mark.parametrize("sizes", [[3 * SEQ_LEN + 1, 3 * SEQ_LEN, 5, 1, 2 * SEQ_LEN + 2], [SEQ_LEN + 1], [500, 1000]])
def test_each_token_except_the_first_of_a_shard_is_a_target_once(tmp_path, sizes):
    windows = Windows(write_dataset(tmp_path, sizes), "train", SEQ_LEN)
    inputs, targets = windows.batch(range(len(windows)))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (len(windows), SEQ_LEN)
    assert torch.equal(inputs + 1, targets)
    expected, first = [], 0
    for size in sizes:
        used = (size - 1) // SEQ_LEN * SEQ_LEN
        expected += range(first + 1, first + 1 + used)
        assert size - 1 - used < SEQ_LEN
        first += size
    assert targets.flatten().tolist() == expected


def test_more_shards_than_a_process_can_open_are_checked_and_read(tmp_path):
    """A mapped shard takes a file descriptor. The usual limit is 1,024."""
    write_dataset(tmp_path, [2 * SEQ_LEN + 1] * 1100)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        shard["sha256"] = sha256(tmp_path / shard["file"])
    path.write_text(json.dumps(manifest))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        dataset = open_dataset(tmp_path)
        shards.verify(dataset, Ranks(0, 1, torch.device("cpu")))
        windows = Windows(dataset, "train", SEQ_LEN)
        order = TokenOrder(dataset.manifest_hash, 1, SEQ_LEN, len(windows))[range(len(windows))]
        inputs, _ = windows.batch(order)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(windows) == 2200
    first = [(i // 2) * (2 * SEQ_LEN + 1) + i % 2 * SEQ_LEN for i in order.tolist()]
    assert inputs[:, 0].tolist() == first


def test_epochs_contain_each_window_once_in_different_orders():
    order = TokenOrder("hash", seed=1, seq_len=SEQ_LEN, windows=100)
    epochs = [order[range(100 * e, 100 * e + 100)].tolist() for e in range(4)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(100)]}) == 5


def test_order_is_independent_of_earlier_accesses():
    expected = TokenOrder("hash", seed=1, seq_len=SEQ_LEN, windows=7)[range(70)].tolist()
    order = TokenOrder("hash", seed=1, seq_len=SEQ_LEN, windows=7)
    for i in np.random.RandomState(0).permutation(70):
        assert order[range(i, i + 1)].tolist() == [expected[i]]
    assert order[range(33, 51)].tolist() == expected[33:51]
    assert TokenOrder("hash", seed=1, seq_len=SEQ_LEN, windows=7)[range(60, 64)].tolist() == expected[60:64]


def test_order_depends_on_data_seed_and_sequence_length():
    keys = [("hash", 1, 16), ("hasg", 1, 16), ("hash", 2, 16), ("hash", 1, 32)]
    orders = {tuple(TokenOrder(*key, windows=50)[range(50)].tolist()) for key in keys}
    assert len(orders) == len(keys)


def test_order_is_that_of_earlier_versions():
    order = TokenOrder("0123abcd", seed=1337, seq_len=1024, windows=10)
    assert order[range(30)].tolist() == FROZEN


def test_shift_of_an_epoch_is_a_pure_function_of_the_key_and_spares_the_first_epoch():
    key = ("0123abcd", 1337, 1024)
    shifts = TokenOrder(*key, windows=10, shifted=True).shifts(range(500))
    assert shifts.dtype == np.int64
    epochs = shifts.reshape(50, 10)
    assert (epochs == epochs[:, :1]).all()
    assert len(set(epochs[:, 0])) >= 48
    assert shifts.max() < 1024
    assert shifts[::10][:6].tolist() == [0, *FIRST_SHIFTS]  # a resumed run must compute the same
    assert TokenOrder(*key, windows=10, shifted=True).shifts(range(395, 402)).tolist() == shifts[395:402].tolist()
    assert not TokenOrder(*key, windows=10).shifts(range(500)).any()
    others = [("0123abce", 1337, 1024), ("0123abcd", 1338, 1024)]
    assert all(TokenOrder(*other, 10, shifted=True).shifts(range(10, 11)) != FIRST_SHIFTS[0] for other in others)
    order, fixed = (TokenOrder(*key, windows=10, shifted=shifted)[range(500)] for shifted in (True, False))
    assert np.array_equal(order, fixed)


@pytest.mark.parametrize("shift", [0, 1, 7, SEQ_LEN - 1])
def test_shifted_windows_begin_later_and_end_within_their_shard(tmp_path, shift):
    sizes = [SEQ_LEN + 1, 3 * SEQ_LEN + 5, 2 * SEQ_LEN]
    dataset = write_dataset(tmp_path, sizes)
    windows = Windows(dataset, "train", SEQ_LEN)
    inputs, targets = windows.batch(range(len(windows)), np.full(len(windows), shift))
    first, end = [0, *np.cumsum(sizes)[:-1]], np.cumsum(sizes)
    starts = [(shard, first[shard] + i * SEQ_LEN) for shard in range(3) for i in range((sizes[shard] - 1) // SEQ_LEN)]
    expected = [min(start + shift, end[shard] - SEQ_LEN - 1) for shard, start in starts]
    assert inputs[:, 0].tolist() == expected  # the text counts 0, 1, 2, ...
    assert torch.equal(targets, inputs + 1)


@pytest.fixture(scope="module")
def dataset(world):
    return open_dataset(world / "data/small")


def as_tuples(inputs, targets):
    """Sequences as hashable values: the inputs of a window and its last target."""
    return [(*i.tolist(), t[-1].item()) for i, t in zip(inputs, targets, strict=True)]


def step_sequences(dataset, step, world_size, micro_batch):
    """The sequences of all micro-batches of a step, for each rank."""
    recipe = resolved(batch_tokens=16 * 64, micro_batch=micro_batch, steps=step + 1)
    windows = Windows(dataset, "train", 64)
    order = TokenOrder(dataset.manifest_hash, 5, 64, len(windows), shifted=True)
    shares = []
    for rank in range(world_size):
        ranks = Ranks(rank, world_size, torch.device("cpu"))
        batches = list(micro_batches(Schedule(recipe), micro_batch, ranks, windows, order, step))
        assert all(inputs.shape == targets.shape == (micro_batch, 64) for inputs, targets in batches)
        shares.append([sequence for batch in batches for sequence in as_tuples(*batch)])
    return shares


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_step_has_the_same_sequences_for_any_number_of_ranks_and_any_micro_batch(dataset, world_size, micro_batch):
    windows = Windows(dataset, "train", 64)
    order = TokenOrder(dataset.manifest_hash, 5, 64, len(windows), shifted=True)
    for step in (0, 1, len(windows) // 16):  # the last one contains the end of an epoch
        shares = step_sequences(dataset, step, world_size, micro_batch)
        assert [len(share) for share in shares] == [16 // world_size] * world_size
        sequences = range(16 * step, 16 * step + 16)
        inputs, targets = windows.batch(order[sequences], order.shifts(sequences))
        assert Counter(sequence for share in shares for sequence in share) == Counter(as_tuples(inputs, targets))


def dropped(sequences, micro_batch=1, rate=0.3):
    """Inputs (n, 64), of id 1 before the dropout, of sequences in epochs of 20; 0 is end-of-text."""
    dropout = TokenDropout(rate, seed=5, end_of_text_id=0, epoch_sequences=20)
    inputs = torch.ones(len(sequences), 64, dtype=torch.long)
    for first in range(0, len(sequences), micro_batch):
        dropout(inputs[first : first + micro_batch], sequences[first : first + micro_batch])
    return inputs


def test_token_dropout_is_a_function_of_the_sequence_and_spares_the_first_epoch():
    whole = dropped(range(200))
    assert whole[:20].all()
    assert (whole[20:] == 0).float().mean().item() == pytest.approx(0.3, abs=0.015)
    assert len({tuple(row) for row in whole[20:].tolist()}) == 180
    assert torch.equal(dropped(range(200), micro_batch=50), whole)
    assert torch.equal(dropped(range(90, 131), micro_batch=7), whole[90:131])
    assert dropped(range(200), rate=0.0).all()
    # As of the first version: a resumed run must compute the same.
    assert whole[20].nonzero().flatten()[:12].tolist() == FIRST_KEPT


def test_loader_drops_inputs_after_the_first_epoch_and_never_targets(dataset):
    windows = len(Windows(dataset, "train", 64))
    steps = range(windows // 16 - 1, windows // 16 + 3)  # the second one contains the end of the epoch
    loaded = {}
    for rate in (0.0, 0.5):
        recipe = resolved(batch_tokens=16 * 64, steps=steps.stop, token_dropout=rate)
        loader = open_loader(
            dataset, recipe, seed=5, micro_batch=16, ranks=Ranks(0, 1, torch.device("cpu")), steps=steps
        )
        loaded[rate] = [torch.cat(tensors) for tensors in zip(*loader, strict=True)]
    (plain, targets), (inputs, same_targets) = loaded[0.0], loaded[0.5]
    assert torch.equal(targets, same_targets)
    first_epoch = windows - 16 * steps.start
    assert torch.equal(plain[:first_epoch], inputs[:first_epoch])
    changed = inputs != plain
    assert changed[first_epoch:].float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (inputs[changed] == dataset.manifest["end_of_text_id"]).all()


def test_loader_shifts_windows_after_the_first_epoch(dataset):
    windows = Windows(dataset, "train", 64)
    steps = range(len(windows) // 16 - 1, len(windows) // 16 + 3)  # the second one contains the end of the epoch
    sequences = range(16 * steps.start, 16 * steps.stop)
    loaded = {}
    for name in ("fixed", "shifted"):
        recipe = resolved(batch_tokens=16 * 64, steps=steps.stop, windows=name)
        loader = open_loader(
            dataset, recipe, seed=5, micro_batch=16, ranks=Ranks(0, 1, torch.device("cpu")), steps=steps
        )
        order = TokenOrder(dataset.manifest_hash, 5, 64, len(windows), shifted=name == "shifted")
        loaded[name] = [torch.cat(tensors) for tensors in zip(*loader, strict=True)]
        assert all(map(torch.equal, loaded[name], windows.batch(order[sequences], order.shifts(sequences))))
    first_epoch = len(windows) - sequences.start
    same = (loaded["fixed"][0] == loaded["shifted"][0]).all(1)
    assert same[:first_epoch].all()
    assert not same[first_epoch:].any()


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    sizes=st.lists(st.integers(1, 150), min_size=1, max_size=5),
    shares=st.lists(st.sampled_from([(w, m) for w in (1, 2, 3, 4, 6, 12) for m in (1, 2, 3, 4) if 12 % (w * m) == 0])),
    seed=st.integers(0, 2**32),
)
def test_epoch_contains_each_window_once_where_ranks_change_between_steps(sizes, shares, seed):
    """Steps of 12 sequences; the number of ranks and the micro-batch change in each step, as in a resume."""
    hypothesis.assume(any(size > SEQ_LEN for size in sizes))
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder), sizes)
        windows = Windows(dataset, "train", SEQ_LEN)
        order = TokenOrder(dataset.manifest_hash, seed, SEQ_LEN, len(windows))
        seen = Counter(dict.fromkeys(as_tuples(*windows.batch(range(len(windows)))), 0))
        assert len(seen) == len(windows)
        for step in range(2 * len(windows)):
            world_size, micro_batch = shares[step % len(shares)] if shares else (1, 12)
            recipe = resolved(batch_tokens=12 * SEQ_LEN, micro_batch=micro_batch, seq_len=SEQ_LEN, steps=step + 1)
            schedule = Schedule(recipe)
            for rank in range(world_size):
                ranks = Ranks(rank, world_size, torch.device("cpu"))
                for inputs, targets in micro_batches(schedule, micro_batch, ranks, windows, order, step):
                    seen.update(as_tuples(inputs, targets))
            assert seen.total() == 12 * (step + 1)
            assert max(seen.values()) - min(seen.values()) <= 1  # every window once before any window twice
        assert set(seen.values()) == {24}
