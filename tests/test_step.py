"""Around a training step: prefetched batches in order, a micro-batch that fits, a profile, expected time, metrics."""

import gzip
import json
import platform
import shutil
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TRAIN, execute, resolved, train_here
from torch import nn

import train
from core.data.shards import TokenOrder, Windows, open_dataset, prefetched
from core.distributed import Ranks
from core.files import read_metrics
from core.train import memory
from core.train.compilation import compile_shapes, log_expected_time
from core.train.depth import Depth
from core.train.loader import micro_batches, open_loader
from core.train.optim import build_optimizer
from core.train.sampling import blank_batch
from core.train.schedule import Schedule
from core.train.setup import System, fit_micro_batch
from core.train.validation import Validation
from model import GPT, PRESETS

COMMAND = (*TRAIN, "--data", "data/small", "--lr", "2e-3", "--val-tokens", "1280")
CPU = Ranks(0, 1, torch.device("cpu"))
PLAIN = System(dtype="float32", compile=False, fused="off", activation_checkpointing=False, micro_batch=None)


def test_loader_yields_the_micro_batches_of_all_steps_in_order(world):
    dataset = open_dataset(world / "data/small")
    recipe = resolved(batch_tokens=1024, micro_batch=4, steps=9)
    loaded = list(open_loader(dataset, recipe, seed=5, micro_batch=4, ranks=CPU, steps=range(3, 9)))
    windows = Windows(dataset, "train", 64)
    order = TokenOrder(dataset.manifest_hash, 5, 64, len(windows))
    expected = [
        batch for step in range(3, 9) for batch in micro_batches(Schedule(recipe), 4, CPU, windows, order, step)
    ]
    assert len(loaded) == len(expected) == 24
    for found, batch in zip(loaded, expected, strict=True):
        assert all(torch.equal(*tensors) for tensors in zip(found, batch, strict=True))


def test_no_step_compiles_what_compile_shapes_has_compiled(monkeypatch):
    """All shapes are within the compiler's limit of graphs, beyond which it leaves a function uncompiled."""
    monkeypatch.setattr("core.train.schedule.FIRST_PHASE_STEPS", 2)
    grown = {"recipe": "speedrun", "first_batch_tokens": 64, "batch_tokens": 512, "short_seq_len": 16, "steps": 40}
    recipe = resolved(**grown, shallow_fraction=0.5, micro_batch=8)
    shapes = [shape for shallow in (True, False) for shape, _ in Schedule(recipe).splits(0, 8, 1, shallow)]
    torch._dynamo.reset()
    compiled = torch.compile(GPT(PRESETS["tiny"]), dynamic=False, backend="eager")
    graphs = torch._dynamo.utils.counters["stats"]
    with torch._dynamo.config.patch(recompile_limit=1):  # monkeypatch would remove the option at the end
        for shallow in (False, True):
            compile_shapes(compiled, recipe, replace(PLAIN, compile=True), 8, CPU, 0, shallow)
        count = graphs["unique_graphs"]
        for shape in shapes:
            compiled(*blank_batch(shape, CPU.device), **shape.forward_kwargs).backward()
    assert graphs["unique_graphs"] == count
    assert count >= len(set(shapes)) == len(shapes) >= 6


class SlowLoss(nn.Module):
    """A loss that takes 0.1 s per sequence, and 5 s more in its first call, on a clock of its own."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.weight, self.shapes, self.clock = nn.Parameter(torch.ones(())), [], 0.0
        monkeypatch.setattr("core.train.compilation.time", SimpleNamespace(perf_counter=lambda: self.clock))

    def forward(self, inputs, targets):
        self.clock += 0.1 * len(inputs) + (0 if self.shapes else 5)
        self.shapes.append((*inputs.shape, *targets.shape))
        return self.weight * 1


def log_time_of_first_step(loss_fn, recipe, micro_batch, ranks=CPU):
    run = SimpleNamespace(recipe=recipe, system=PLAIN, ranks=ranks)
    log_expected_time(loss_fn, *Schedule(recipe).split(0, micro_batch, ranks.world_size), run)


def test_expected_time_of_a_slow_step_is_logged(monkeypatch, capsys):
    """128 sequences of 0.1 s; only one micro-batch of 4 is timed."""
    loss_fn = SlowLoss(monkeypatch)
    log_time_of_first_step(loss_fn, resolved(batch_tokens=128 * 64, steps=3), 4)
    assert capsys.readouterr().out == "expected time per step: 13 s (32 micro-batches of 4 sequences)\n"
    assert loss_fn.shapes == [(1, 64, 1, 64), (4, 64, 4, 64)]
    assert loss_fn.weight.grad is None


def test_expected_time_of_a_very_slow_step_is_that_of_one_sequence(monkeypatch, capsys):
    """A micro-batch of 128 would take 12.8 s in silence."""
    loss_fn = SlowLoss(monkeypatch)
    log_time_of_first_step(loss_fn, resolved(batch_tokens=128 * 64, steps=3), 128)
    assert capsys.readouterr().out == "expected time per step: 13 s (1 micro-batch of 128 sequences)\n"
    assert loss_fn.shapes == [(1, 64, 1, 64), (1, 64, 1, 64)]


@pytest.mark.parametrize("sequences, is_logged", [(8, False), (16, True)])
def test_expected_time_is_logged_for_steps_of_more_than_a_second(monkeypatch, capsys, sequences, is_logged):
    log_time_of_first_step(SlowLoss(monkeypatch), resolved(batch_tokens=sequences * 64, steps=3), 2)
    assert ("expected time per step" in capsys.readouterr().out) == is_logged


def test_expected_time_is_that_of_the_share_of_a_rank(monkeypatch, capsys):
    two = Ranks(0, 2, torch.device("cpu"))
    log_time_of_first_step(SlowLoss(monkeypatch), resolved(2, batch_tokens=128 * 64, steps=3), 4, two)
    assert capsys.readouterr().out == "expected time per step: 6 s (16 micro-batches of 4 sequences)\n"


@pytest.mark.parametrize("compiled", [True, False])
def test_a_run_that_compiles_nothing_times_a_micro_batch_instead(monkeypatch, compiled):
    called, recipe, model = [], resolved(batch_tokens=128 * 64, steps=3), GPT(PRESETS["tiny"])
    monkeypatch.setattr(train.compilation, "compile_shapes", lambda *_: called.append(True))
    monkeypatch.setattr(train.compilation, "log_expected_time", lambda *_: called.append(False))
    system = replace(PLAIN, compile=compiled)
    run = SimpleNamespace(recipe=recipe, system=system, ranks=CPU, micro_batch=4, step=0)
    train.prepare_steps(run, Schedule(recipe), model, Depth(model))
    assert called == [compiled]


def test_new_metric_of_the_step_appears_in_metrics_jsonl(world, monkeypatch):
    """By its name, next to the metrics that every run has."""
    train_step, calls = train.train_step, []

    def with_new_metric(loss_fn, *args, **kwargs):
        metrics = train_step(loss_fn, *args, **kwargs)
        calls.append(metrics)
        return metrics | {"twice_the_loss": 2 * metrics["loss"], "calls": torch.tensor(float(len(calls)))}

    monkeypatch.setattr(train, "train_step", with_new_metric)
    train_here(*COMMAND, "--run", "metric", "--steps", 3, cwd=world)
    lines = [line for line in read_metrics(world / "logs/metric") if line["split"] == "train"]
    assert [line["calls"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["twice_the_loss"] == pytest.approx(2 * line["loss"])
        assert line["grad_norm"] > 0
        assert "stop_requested" not in line


def test_items_are_prefetched_by_one_thread_up_to_a_limit():
    started, threads = [], set()

    def items():
        for i in range(20):
            started.append(i)
            threads.add(threading.current_thread())
            yield i

    prefetching = prefetched(items(), 3, lambda: None)
    assert next(prefetching) == 0
    deadline = time.monotonic() + 10
    while len(started) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert started == [0, 1, 2, 3]  # the one in use, and three ahead
    assert list(prefetching) == list(range(1, 20))
    assert threads.isdisjoint({threading.current_thread()})
    assert len(threads) == 1


def test_error_while_prefetching_is_raised_at_its_item():
    def items():
        yield from range(3)
        raise OSError("the disk failed")

    prefetching = prefetched(items(), 8, lambda: None)
    assert [next(prefetching) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk failed"):
        next(prefetching)


@pytest.mark.parametrize(
    "free, two, three, largest",
    [
        (1000, 120, 170, 17),  # 900 bytes without the margin, 20 of which are needed for any number
        (1000, 100, 150, 18),
        (100, 120, 170, 1),
        (10, 120, 170, 0),
    ],
)
def test_largest_number_of_sequences_that_fits(free, two, three, largest):
    assert memory.fitting_sequences(free, two, three) == largest
    assert two - 2 * (three - two) + largest * (three - two) <= 0.9 * free or largest == 0


@pytest.mark.parametrize("number, limit, divisor", [(512, 100, 64), (24, 8, 8), (30, 8, 6), (7, 6, 1), (4, 0, 1)])
def test_largest_divisor(number, limit, divisor):
    assert memory.largest_divisor(number, limit) == divisor


@pytest.mark.parametrize(
    "world_size, has_state, bytes_per_parameter", [(1, False, 8), (1, True, 0), (2, False, 12), (2, True, 4)]
)
def test_memory_is_reserved_for_moments_and_buckets(monkeypatch, world_size, has_state, bytes_per_parameter):
    """While gradients accumulate, the buckets of DDP need memory in addition to them."""
    model, recipe = GPT(PRESETS["tiny"]), resolved(world_size, batch_tokens=1024)
    ranks = Ranks(0, world_size, torch.device("cpu"))
    optimizer = build_optimizer(model, recipe, CPU)
    if has_state:
        inputs = torch.zeros(1, 64, dtype=torch.long)
        model(inputs, inputs).backward()
        optimizer.step(skip=torch.zeros(()))
    monkeypatch.setattr("core.train.setup.largest_micro_batch", lambda *args: args[3])
    reserved = fit_micro_batch(model, optimizer, recipe, PLAIN, ranks)
    assert reserved == bytes_per_parameter * model.num_parameters()


def test_chosen_micro_batch_is_logged_and_changes_no_weight(world, capsys):
    """2048 tokens are 32 sequences of 64; on a CPU the micro-batch is 8."""
    auto = [word for word in COMMAND if word not in ("--micro-batch", "16")]
    train_here(*auto, "--run", "chosen", "--steps", 3, cwd=world)
    assert "--micro-batch 8\n" in capsys.readouterr().out
    train_here(*auto, "--micro-batch", 8, "--run", "given", "--steps", 3, cwd=world)
    chosen, given = (world / f"logs/{name}/checkpoints/step_000003/model.safetensors" for name in ("chosen", "given"))
    assert chosen.read_bytes() == given.read_bytes()
    assert json.loads((world / "logs/chosen/run.json").read_text())["micro_batch"] == 8


def test_deterministic_run_resumes_with_its_micro_batch(world):
    """Another micro-batch, which another amount of free memory might allow, would round differently."""
    run = [word for word in COMMAND if word not in ("--micro-batch", "16")]
    run += ["--run", "same", "--deterministic", "--steps", 4, "--save-every", 2]
    train_here(*run, "--micro-batch", 4, cwd=world)
    shutil.rmtree(world / "logs/same/checkpoints/step_000004")
    train_here(*run, cwd=world)
    torch.use_deterministic_algorithms(False)
    assert json.loads((world / "logs/same/run.json").read_text())["micro_batch"] == 4


def test_validation_uses_the_loss_of_the_step_for_full_batches_and_the_model_for_the_last(world):
    """A compiled loss would be compiled again for the few windows of the last batch."""
    model, sizes = GPT(replace(PRESETS["tiny"], vocab_size=664)), []

    def loss_fn(inputs, targets):
        sizes.append(len(inputs))
        return model(inputs, targets)

    validation = Validation(
        open_dataset(world / "data/small"),
        CPU,
        loss_fn,
        seq_len=64,
        max_tokens=40 * 64,
        batch_size=16,
        dtype="float32",
    )
    validation.run(model)
    assert sizes == [16, 16]


def test_profile_lists_the_slowest_kernels_and_writes_a_trace(world, capsys):
    train_here(*COMMAND, "--run", "profiled", "--steps", 8, "--profile", cwd=world)
    output = capsys.readouterr().out
    table = output[output.index("ms/step") :].splitlines()
    assert len([line for line in table if "%" in line]) == 11  # the ten slowest, and the total
    assert any("aten::" in line for line in table[1:11])
    shares = [float(line.split()[1].rstrip("%")) for line in table[1:11]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) > 50
    with gzip.open(world / "logs/profiled/trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = [event["name"] for event in events if str(event.get("name")).startswith("ProfilerStep")]
    assert len(set(steps)) == 3
    lines = [line for line in read_metrics(world / "logs/profiled") if line["split"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 9))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for malloc of glibc")
def test_a_process_on_a_cpu_reuses_freed_memory():
    """The system would clear each page of a freed tensor again: 8,192 page faults for 32 MiB."""
    script = """
import resource, torch
from core.distributed import process_group
with process_group("cpu"):
    faults = []
    for _ in range(40):
        tensors = [torch.zeros(2**23) for _ in range(3)]
        del tensors
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-11])
"""
    faults = int(execute([sys.executable, "-c", script], ROOT, True, {}).stdout)
    assert faults < 100
