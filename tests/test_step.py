"""What surrounds a step: batches read ahead in order, a micro-batch that fits, and a profile of where time goes."""

import gzip
import json
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch
from conftest import TRAIN, resolved, train_here

from core.data.shards import TokenOrder, Windows, open_dataset, prefetched
from core.distributed import Ranks
from core.files import read_metrics
from core.train import memory
from core.train.optim import optimizers
from core.train.recipe import Schedule
from core.train.setup import fitting_micro_batch, micro_batches, open_loader, resolve_computation, warm_up
from core.train.validation import Validation
from model import GPT, PRESETS

RECIPE = (*TRAIN, "--data", "data/small", "--lr", "2e-3", "--val-tokens", "1280")
CPU = Ranks(0, 1, torch.device("cpu"))


def test_the_loader_gives_the_micro_batches_of_all_steps_in_order(world):
    dataset = open_dataset(world / "data/small")
    config = resolved(batch_tokens=1024, micro_batch=4, steps=9)
    schedule = Schedule(config)
    windows = Windows(dataset, "train", 64)
    order = TokenOrder(dataset.manifest_hash, 5, 64, len(windows))
    loaded = list(open_loader(config, schedule, CPU, windows, order, range(3, 9)))
    wanted = [batch for step in range(3, 9) for batch in micro_batches(config, schedule, CPU, windows, order, step)]
    assert len(loaded) == len(wanted) == 24
    for found, batch in zip(loaded, wanted, strict=True):
        assert all(torch.equal(*tensors) for tensors in zip(found, batch, strict=True))


def test_no_step_compiles_what_the_warm_up_has_compiled(monkeypatch):
    """Nor does any shape pass the compiler's limit, beyond which it would leave the rest uncompiled."""
    monkeypatch.setattr("core.train.recipe.FIRST_PHASE", 2)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    grown = {"recipe": "speedrun", "first_batch_tokens": 64, "batch_tokens": 512, "short_seq_len": 16, "steps": 40}
    config = resolved(**grown, micro_batch=8)
    schedule = Schedule(config)
    torch._dynamo.reset()
    compiled = torch.compile(GPT(PRESETS["tiny"]), dynamic=False, backend="eager")
    graphs = torch._dynamo.utils.counters["stats"]
    warm_up(compiled, config, schedule, CPU, 0)
    made = graphs["unique_graphs"]
    for sequences, piece in schedule.shapes(0):
        tokens = torch.zeros(2, sequences * 64 // piece, piece, dtype=torch.long)
        compiled(*tokens).backward()
    assert graphs["unique_graphs"] == made
    assert made >= len(schedule.shapes(0)) >= 5


def test_items_are_made_ahead_by_one_thread_but_not_without_bound():
    made, threads = [], set()

    def items():
        for i in range(20):
            made.append(i)
            threads.add(threading.current_thread())
            yield i

    coming = prefetched(items(), 3, lambda: None)
    assert next(coming) == 0
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert made == [0, 1, 2, 3]  # the one taken, and three ahead
    assert list(coming) == list(range(1, 20))
    assert threads.isdisjoint({threading.current_thread()})
    assert len(threads) == 1


def test_what_fails_while_reading_ahead_fails_where_it_is_needed():
    def items():
        yield from range(3)
        raise OSError("the disk is gone")

    coming = prefetched(items(), 8, lambda: None)
    assert [next(coming) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(coming)


@pytest.mark.parametrize(
    "free, two, three, most",
    [
        (1000, 120, 170, 17),  # 900 bytes with the margin, of which 20 are needed whatever the size
        (1000, 100, 150, 18),
        (100, 120, 170, 1),
        (10, 120, 170, 0),
    ],
)
def test_the_most_sequences_that_fit(free, two, three, most):
    assert memory.fitting(free, two, three) == most
    assert two - 2 * (three - two) + most * (three - two) <= 0.9 * free or most == 0


@pytest.mark.parametrize("number, most, divisor", [(512, 100, 64), (24, 8, 8), (30, 8, 6), (7, 6, 1), (4, 0, 1)])
def test_the_largest_divisor(number, most, divisor):
    assert memory.largest_divisor(number, most) == divisor


@pytest.mark.parametrize(
    "world_size, begun, bytes_a_weight", [(1, False, 8), (1, True, 0), (2, False, 12), (2, True, 4)]
)
def test_moments_and_buckets_are_kept_room_for(monkeypatch, world_size, begun, bytes_a_weight):
    """While gradients accumulate, DDP's buckets lie beside them."""
    model, config = GPT(PRESETS["tiny"]), resolved(world_size, batch_tokens=1024)
    ranks = Ranks(0, world_size, torch.device("cpu"))
    optimizer = optimizers(model, config, CPU)
    if begun:
        optimizer.parts[0].state[next(model.parameters())] = {"step": 1}
    monkeypatch.setattr("core.train.setup.largest_micro_batch", lambda *given: given[3])
    config = resolve_computation(config, ranks)
    assert fitting_micro_batch(model, optimizer, config, ranks) == bytes_a_weight * model.num_parameters()


def test_the_micro_batch_is_chosen_told_and_changes_nothing_else(world, capsys):
    """2048 tokens are 32 sequences of 64: on the CPU eight at once."""
    auto = [word for word in RECIPE if word not in ("--micro-batch", "16")]
    train_here(*auto, "--run", "chosen", "--steps", 3, cwd=world)
    assert "--micro-batch 8\n" in capsys.readouterr().out
    train_here(*auto, "--micro-batch", 8, "--run", "given", "--steps", 3, cwd=world)
    chosen, given = (world / f"logs/{name}/checkpoints/step_000003/model.safetensors" for name in ("chosen", "given"))
    assert chosen.read_bytes() == given.read_bytes()
    assert json.loads((world / "logs/chosen/run.json").read_text())["micro_batch"] == 8


def test_a_deterministic_run_goes_on_with_the_micro_batch_that_it_had(world):
    """Another one, which more or less free memory might suggest, would round otherwise."""
    run = [word for word in RECIPE if word not in ("--micro-batch", "16")]
    run += ["--run", "same", "--deterministic", "--steps", 4, "--save-every", 2]
    train_here(*run, "--micro-batch", 4, cwd=world)
    shutil.rmtree(world / "logs/same/checkpoints/step_000004")
    train_here(*run, cwd=world)
    torch.use_deterministic_algorithms(False)
    assert json.loads((world / "logs/same/run.json").read_text())["micro_batch"] == 4


def test_validation_takes_the_steps_loss_for_whole_batches_and_the_model_for_the_rest(world):
    """A compiled loss would be compiled again for the few windows that are left."""
    model, sizes = GPT(replace(PRESETS["tiny"], vocab_size=664)), []

    def loss(inputs, targets):
        sizes.append(len(inputs))
        return model(inputs, targets)

    validation = Validation(open_dataset(world / "data/small"), CPU, loss, 64, 40 * 64, 16, "float32")
    validation.run(model)
    assert sizes == [16, 16]


def test_a_profile_of_a_few_steps(world, capsys):
    train_here(*RECIPE, "--run", "profiled", "--steps", 8, "--profile", cwd=world)
    said = capsys.readouterr().out
    table = said[said.index("ms a step") :].splitlines()
    assert len([line for line in table if "%" in line]) == 11  # the ten costliest, and all
    assert any("aten::" in line for line in table[1:11])
    shares = [float(line.split()[1].rstrip("%")) for line in table[1:11]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) > 50
    with gzip.open(world / "logs/profiled/trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = [event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep")]
    assert len(set(steps)) == 3
    assert [line["step"] for line in read_metrics(world / "logs/profiled") if line["split"] == "train"] == [
        *range(1, 9)
    ]
