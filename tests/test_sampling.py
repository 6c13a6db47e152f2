"""Sampled softmax: which tokens the loss of a step takes, and that a model learns by it what it learns by all."""

import importlib.util
import json
import os
import shutil
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import numpy as np
import pytest
import torch
from conftest import on_ranks, refused, resolved, run, train_here

from core import ops
from core.data.shards import TokenOrder, Windows, open_dataset
from core.distributed import Ranks
from core.files import read_metrics, sha256
from core.train.loader import micro_batches, open_loader
from core.train.recipe import RECIPES, SMALL_VOCABULARY
from core.train.sampling import CandidateSampler, inclusion_probabilities
from core.train.schedule import Schedule
from model import PRESETS

VOCAB = 3_000
CPU = Ranks(0, 1, torch.device("cpu"))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists only for Linux")
TRAIN = ("--preset", "tiny", "--seq-len", 64, "--recipe", "speedrun", "--device", "cpu", "--data", "data/wide")
TRAIN += ("--first-batch-tokens", 512, "--batch-tokens", 1024, "--micro-batch", 16)
# train.py at the scale of the fixture `small_scale`.
SMALL_SCALE = """
import train
from core import cli
from core.train import recipe, schedule

schedule.FIRST_PHASE_STEPS, recipe.SMALL_VOCABULARY = 4, 0
schedule.candidate_count = lambda step_tokens: 500 + step_tokens // 3
cli.run(train.main, train.Config, "")
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder with data/wide: shards of 3,000 token ids, which have the frequencies of a text (Zipf)."""
    root = tmp_path_factory.mktemp("sampling")
    folder = root / "data/wide"
    folder.mkdir(parents=True)
    frequencies = 1 / (np.arange(VOCAB) + 3.0)
    shards = []
    for split, size in (("val", 3_000), ("train", 90_000)):
        path = folder / f"{split}_000000.npy"
        draws = np.random.RandomState(len(shards)).random_sample(size) * frequencies.sum()
        np.save(path, np.searchsorted(np.cumsum(frequencies), draws).astype(np.uint16))
        shards.append({"file": path.name, "split": split, "tokens": size, "sha256": sha256(path)})
    manifest = {"vocab_size": VOCAB, "end_of_text_id": 0, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture
def source(wide):
    dataset = open_dataset(wide / "data/wide")
    windows = Windows(dataset, "train", 64)
    order = TokenOrder(dataset.manifest_hash, 5, 64, len(windows))
    return windows, order, CandidateSampler(dataset, windows, order, seed=5)


@pytest.fixture
def small_scale(monkeypatch):
    """Steps of few tokens sample from a small vocabulary, after a short first phase."""
    monkeypatch.setattr("core.train.schedule.FIRST_PHASE_STEPS", 4)
    monkeypatch.setattr("core.train.schedule.candidate_count", lambda step_tokens: 500 + step_tokens // 3)
    monkeypatch.setattr("core.train.recipe.SMALL_VOCABULARY", 0)


def speedrun(**options):
    shape = PRESETS["tiny"]
    return resolved(shape=shape, recipe="speedrun", first_batch_tokens=512, batch_tokens=2048, **options)


@pytest.mark.parametrize("size", [0, 1, 30, 97, 100])
def test_probabilities_are_proportional_to_the_weights_up_to_one(size):
    weights = np.sort(np.random.RandomState(0).random_sample(100) ** 4 + 1e-6)[::-1]
    probabilities = inclusion_probabilities(weights, size)
    assert probabilities.sum() == pytest.approx(size)
    assert probabilities.min() >= 0
    below = probabilities < 1 - 1e-9
    ratios = probabilities[below] / weights[below]
    assert np.allclose(ratios, ratios[:1])
    assert probabilities[~below] == pytest.approx(1)
    assert below.tolist() == sorted(below)  # the largest weights come first


def test_candidates_are_all_targets_and_different_other_tokens(source):
    windows, order, sampler = source
    sequences = range(32, 64)
    candidates = sampler.draw(sequences, 1000)
    _, targets = windows.batch(order[sequences])
    unique = set(targets.flatten().tolist())
    assert len(candidates.ids) == len(set(candidates.ids.tolist())) == 1000 > len(unique)
    assert torch.equal(candidates.ids[candidates.index(targets)], targets)
    is_target = torch.tensor([i in unique for i in candidates.ids.tolist()])
    assert (candidates.offsets[is_target] == 0).all()
    assert (candidates.offsets >= 0).all()
    assert candidates.offsets.max() > 1
    again, other = sampler.draw(sequences, 1000), sampler.draw(range(64, 96), 1000)
    assert torch.equal(again.ids, candidates.ids)
    assert not torch.equal(other.ids, candidates.ids)


class SameWindows:
    """An order in which all steps have the same text."""

    def __getitem__(self, sequences):
        return np.arange(len(sequences))

    def shifts(self, sequences):
        return np.zeros(len(sequences), dtype=np.int64)


def test_each_step_draws_another_sample(source, wide):
    sampler = CandidateSampler(open_dataset(wide / "data/wide"), source[0], SameWindows(), seed=5)
    first, second = sampler.draw(range(32), 1000), sampler.draw(range(32, 64), 1000)
    count = int((first.offsets == 0).sum())
    assert torch.equal(first.ids[:count], second.ids[:count])
    assert not torch.equal(first.ids, second.ids)


def test_a_sampled_token_stands_for_those_that_are_not_drawn(source):
    """The sum of any values over the vocabulary is that over the candidates, each times exp(offset), on average."""
    sampler = source[2]
    values = np.random.RandomState(1).random_sample(VOCAB)
    sums = []
    for first in range(0, 1280, 32):
        candidates = sampler.draw(range(first, first + 32), 1000)
        sums.append((values[candidates.ids] * np.exp(candidates.offsets.numpy())).sum())
    assert np.mean(sums) == pytest.approx(values.sum(), rel=0.01)
    assert np.std(sums) < 0.1 * values.sum()


def test_the_whole_vocabulary_is_taken_where_the_targets_are_more_than_the_candidates(source, capsys):
    windows, order, sampler = source
    sequences = range(32)
    count = len(set(windows.batch(order[sequences])[1].flatten().tolist()))
    assert sampler.draw(sequences, count - 1) is None
    assert (sampler.draw(sequences, count).offsets == 0).all()
    assert len(sampler.draw(sequences, VOCAB).ids) == VOCAB
    assert sampler.draw(sequences, VOCAB + 1) is None
    assert capsys.readouterr().out == (  # once
        f"warning: a step has {count} different targets, more than the {count - 1} candidates of its softmax: such "
        f"steps take the whole vocabulary\n"
    )


def test_candidates_depend_on_the_step_alone(source, small_scale):
    """For any number of ranks and any micro-batch, rows of a step have the same candidates and the same targets."""
    windows, order, sampler = source
    for step in (3, 4, 6):
        found = []
        for world_size, micro_batch in ((1, 8), (2, 4), (2, 1)):
            schedule = Schedule(speedrun(steps=9, micro_batch=micro_batch, world_size=world_size))
            rows, drawn = [], set()
            for rank in range(world_size):
                ranks = Ranks(rank, world_size, torch.device("cpu"))
                for batch in micro_batches(schedule, micro_batch, ranks, windows, order, step, None, sampler):
                    inputs, targets, *candidates = batch
                    drawn.add(tuple(tuple(each.tolist()) for each in candidates))
                    ids = candidates[0][targets] if candidates else targets
                    rows += [(*pair[0].tolist(), *pair[1].tolist()) for pair in zip(inputs, ids, strict=True)]
            assert len(drawn) == 1
            found.append((sorted(rows), drawn))
        assert found[0] == found[1] == found[2]
        assert (found[0][1] == {()}) == (step == 3)  # the first phase takes the whole vocabulary


def test_the_number_of_candidates_grows_with_the_step():
    """In steps of 32,768 to 131,072 tokens; the first phase and larger steps take the whole vocabulary."""
    recipe = resolved(recipe="speedrun", shape=PRESETS["gpt2"], seq_len=1024, tokens=300_000_000)
    schedule = Schedule(recipe)
    counts = {len(schedule.sequences(step)): schedule.candidates(step) for step in range(0, recipe.steps, 100)}
    assert counts == {16: 0, 32: 10_240, 64: 16_384, 128: 20_480, 256: 0}
    full = Schedule(replace(recipe, softmax="full"))
    assert not any(full.candidates(step) for step in range(0, recipe.steps, 100))


@needs_triton
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_loss_over_all_tokens_in_another_order_is_that_of_the_whole_vocabulary(dtype):
    """With the plain body and with the kernel. Rows of the padding get no gradient."""
    torch.manual_seed(0)
    ids, x, targets = torch.randperm(300), torch.randn(4, 6, 32), torch.randint(300, (4, 6))
    weight = torch.randn(384, 32) * 0.3
    ops.select_kernels(dtype)
    try:
        results = []
        for batch in ((targets,), (torch.argsort(ids)[targets], ids, torch.zeros(300))):
            own_x, own_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
            loss = ops.linear_cross_entropy(own_x, own_weight, batch[0], 300, *batch[1:])
            loss.backward()
            results.append((loss.detach(), own_x.grad, own_weight.grad))
    finally:
        ops.select_kernels(None)
    for full, sampled in zip(*results, strict=True):
        torch.testing.assert_close(sampled, full, rtol=1e-4, atol=1e-6)
    assert not results[1][2][300:].any()


@needs_triton
def test_a_sampled_loss_moves_no_other_rows(monkeypatch):
    """Plain body and kernel agree on loss and gradients, with offsets; rows outside of the candidates have none."""
    torch.manual_seed(1)
    ids, offsets = torch.randperm(300)[:40], 2 * torch.rand(40)
    x, weight, targets = torch.randn(2, 5, 16), torch.randn(384, 16), torch.randint(40, (2, 5))
    results = []
    for dtype in (None, torch.float32):
        monkeypatch.setattr(ops, "KERNEL_DTYPE", dtype)
        own_x, own_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = ops.linear_cross_entropy(own_x, own_weight, targets, 300, ids, offsets)
        loss.backward()
        results.append((loss.detach(), own_x.grad, own_weight.grad))
    for plain, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-6)
    moved = results[0][2].abs().sum(1) > 0
    assert set(moved.nonzero().flatten().tolist()) == set(ids.tolist())
    logits = x @ weight[ids].T + offsets
    expected = torch.logsumexp(logits, -1) - logits.gather(-1, targets[..., None])[..., 0]
    assert results[0][0].item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_training_by_a_sample_learns_what_training_by_all_tokens_learns(wide, small_scale):
    """The validation loss, which takes the whole vocabulary, falls as far: the offsets correct for the sampling."""
    losses = {}
    for softmax in ("full", "sampled"):
        options = ("--steps", 60, "--softmax", softmax, "--run", softmax, "--val-every", 1000)
        train_here(*TRAIN, *options, cwd=wide)
        lines = read_metrics(wide / "logs" / softmax)
        losses[softmax] = [line["loss"] for line in lines if line["split"] == "val"]
        assert len([line for line in lines if line["split"] == "train"]) == 60
    assert losses["full"][0] == losses["sampled"][0] > losses["full"][1] + 1
    assert losses["sampled"][1] == pytest.approx(losses["full"][1], abs=0.05)
    assert losses["sampled"][1] != losses["full"][1]


def test_a_resumed_run_ends_bit_for_bit_like_an_undisturbed_one(wide, small_scale):
    command = (*TRAIN, "--steps", 12, "--save-every", 4, "--keep", 9, "--run", "resumed")
    train_here(*command, cwd=wide)
    checkpoints = wide / "logs/resumed/checkpoints"
    expected = (checkpoints / "step_000012/model.safetensors").read_bytes()
    for name in ("step_000008", "step_000012"):
        shutil.rmtree(checkpoints / name)
    train_here(*command, cwd=wide)
    assert (checkpoints / "step_000012/model.safetensors").read_bytes() == expected


def test_two_ranks_train_like_one(wide, small_scale):
    script = wide / "small_scale.py"
    script.write_text(SMALL_SCALE)
    train_here(*TRAIN, "--steps", 12, "--run", "one", cwd=wide)
    on_ranks(2, script, *TRAIN[:-2], "--micro-batch", 4, "--steps", 12, "--run", "two", cwd=wide)
    one, two = ([line["loss"] for line in read_metrics(wide / "logs" / name)] for name in ("one", "two"))
    assert len(one) == 14
    assert two == pytest.approx(one, rel=1e-5)


def test_speedrun_samples_from_large_vocabularies_where_no_token_repeats(wide):
    assert RECIPES["speedrun"].softmax == "sampled"
    assert RECIPES["original"].softmax == "full"
    for vocab_size, softmax in ((SMALL_VOCABULARY, "full"), (SMALL_VOCABULARY + 1, "sampled")):
        assert speedrun(steps=9, vocab_size=vocab_size).softmax == softmax
    for unique_tokens, softmax in ((9 * 512 - 1, "full"), (9 * 512, "sampled")):
        assert speedrun(steps=9, unique_tokens=unique_tokens).softmax == softmax
    assert speedrun(steps=200, unique_tokens=1000, softmax="sampled").softmax == "sampled"
    for name, options in (("original", {"steps": 300}), ("speedrun", {"steps": 160})):
        with pytest.raises(ValueError, match=r"would have no effect: it is for steps of at most 131,072 tokens after"):
            resolved(recipe=name, shape=PRESETS["gpt2"], seq_len=1024, softmax="sampled", **options)
    result = run("train.py", *TRAIN, "--softmax", "sampled", cwd=wide, check=False)
    assert refused(result) == (
        "--softmax sampled needs a vocabulary of more than 40,960 token ids, the shards have 3,000. Use --softmax full"
    )


def test_flops_count_the_rows_of_the_head_that_are_used():
    shape = PRESETS["gpt2"]
    assert shape.flops_per_token(1024) - shape.flops_per_token(1024, 10_257) == 6 * 40_000 * 768


def test_the_loader_draws_candidates_only_for_a_sampled_softmax(wide, small_scale):
    dataset = open_dataset(wide / "data/wide")
    for softmax, lengths in (("full", [2, 2]), ("sampled", [2, 4])):
        recipe = speedrun(steps=9, softmax=softmax, vocab_size=VOCAB)
        loader = open_loader(dataset, recipe, seed=5, micro_batch=32, ranks=CPU, steps=range(3, 5))
        assert [len(batch) for batch in loader] == lengths
