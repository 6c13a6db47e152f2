"""benchmarks/scaling.py: the slowest rank determines the time of a step, and no rank outlives the benchmark."""

import json
import signal
import sys
from pathlib import Path

import pytest
from conftest import children, lives, run, started, wait_until

from benchmarks import commands, common, evaluate, prepare, scaling
from benchmarks.common import TimingConfig

TINY = ("--device", "cpu", "--preset", "tiny", "--seq-len", 64)


def rank(with_sync, no_sync, all_reduce_ms=0.0):
    variants = {"with_sync": with_sync, "no_sync": no_sync}
    figures = {name: {"step_s": seconds, "peak_gib": 3.0 + seconds[0]} for name, seconds in variants.items()}
    return figures | {"all_reduce_ms": all_reduce_ms}


def threads(pid):
    return len(list(Path(f"/proc/{pid}/task").glob("*")))


def test_the_slowest_rank_determines_the_time_of_a_step():
    """Efficiency is the speed per GPU relative to the first row."""
    config = scaling.Config(timing=TimingConfig(batch_tokens=1000, device="cpu"), gpus=(2, 4))
    fast, slow = rank([1.0, 1.0, 1.0], [0.9, 0.9, 0.9], 5.0), rank([1.0, 2.0, 4.0], [0.8, 2.5, 2.5], 7.0)
    measured = {2: [rank([4.0] * 3, [4.0] * 3)] * 2, 4: [fast, slow, fast, fast]}
    first, row = (scaling.summarize(config, count, measured) for count in (2, 4))
    assert (first["efficiency"], first["tokens_per_second"]) == (1.0, 250.0)
    assert row["step_ms"] == [2000.0, 1000.0, 4000.0]
    assert row["tokens_per_second"] == 500.0
    assert row["efficiency"] == 1.0  # twice the GPUs, half the time
    assert row["ten_billion_tokens_s"] == 1e10 / 500
    assert row["with_sync_ms"] == [1000.0, 2000.0, 1000.0, 1000.0]
    assert row["no_sync_ms"] == [900.0, 2500.0, 900.0, 900.0]
    assert (row["all_reduce_ms"], row["peak_gib"]) == (7.0, 4.0)
    per_gpu = scaling.Config(timing=TimingConfig(batch_tokens=1000, device="cpu"), per_gpu=True)
    row = scaling.summarize(per_gpu, 4, measured)
    assert (row["batch_tokens"], row["tokens_per_second"], row["efficiency"]) == (4000, 2000.0, 2.0)


def test_steps_on_one_rank_and_on_two(world):
    options = ("--gpus", 1, 2, "--micro-batch", 1, "--batch-tokens", 128, "--steps", 2)
    output = run("benchmarks.scaling", *TINY, *options, cwd=world).stdout
    found = json.loads((world / "logs/benchmarks/scaling.json").read_text(encoding="utf-8"))
    assert [row["gpus"] for row in found["rows"]] == [1, 2]
    assert [len(found["ranks"][count]) for count in ("1", "2")] == [1, 2]
    for ranks in found["ranks"].values():
        assert all(len(each["with_sync"]["step_s"]) == 2 * len(ranks) for each in ranks)
    assert all(len(each["no_sync"]["step_s"]) == 4 and each["all_reduce_ms"] > 0 for each in found["ranks"]["2"])
    for row in found["rows"]:
        assert f"{row['tokens_per_second'] / 1e3:,.1f}" in output
        assert f"{row['efficiency']:.1%}" in output


@pytest.mark.parametrize(
    "gpus, timing, message",
    [
        ((0, 1), {}, "--gpus 0 must be between 1 and"),
        ((1, 99_999), {}, "--gpus 99999 must be between 1 and"),
        ((), {"micro_batch": 0}, "--micro-batch 0 must be above 0"),
        ((1, 2), {"micro_batch": 4, "batch_tokens": 256}, r"2 ranks = 512\. Use --batch-tokens"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_timed(monkeypatch, gpus, timing, message):
    monkeypatch.setattr(scaling, "run_on", None)  # can't be called
    config = scaling.Config(timing=TimingConfig(device="cpu", preset="tiny", seq_len=64, **timing), gpus=gpus)
    with pytest.raises(ValueError, match=message):
        scaling.main(config)


def test_no_rank_outlives_a_benchmark_that_is_terminated(world):
    options = ("--gpus", 1, "--micro-batch", 1, "--batch-tokens", 64, "--steps", 1_000_000)
    with started("benchmarks.scaling", *TINY, *options, cwd=world) as process:
        # Until the rank has the threads of its process group: torchrun itself leaks a rank that is just starting.
        assert wait_until(
            lambda: [r for parent in children(process.pid) for r in children(parent) if threads(r) > 1], process
        )
        (launcher,) = children(process.pid)
        (rank,) = children(launcher)
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
        assert not lives(launcher)
        assert not lives(rank)


def test_commands_import_the_project_from_any_folder_and_fail_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "benchmarks.prepare"]
    assert "--plain-loop" in common.run_command([*command, "--help"], capture=True)
    with pytest.raises(ValueError, match=r"-m benchmarks\.prepare --rounds none ended with status 2; its output is"):
        common.run_command([*command, "--rounds", "none"])


@pytest.mark.parametrize(
    ("module", "required", "option", "value"),
    [
        *((evaluate, "ckpt", name, 0) for name in ("rounds", "plain_questions", "batch_sizes")),
        *((commands, "ckpt", name, 0) for name in ("questions", "batch_sizes")),
        *((module, "ckpt", "passages", -1) for module in (evaluate, commands)),
        *((prepare, "source", name, 0) for name in ("rounds", "workers")),
    ],
)
def test_a_count_below_one_is_refused_before_anything_is_timed(module, required, option, value):
    config = module.Config(**{required: "none", option: (value,) if option == "batch_sizes" else value})
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} {value} must be above 0"):
        module.main(config)
