"""Signals stop a run between two micro-batches, on all ranks together; a rank that hangs ends the run in time."""

import contextlib
import itertools
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    TRAIN,
    children,
    ended,
    ended_ranks,
    faulty,
    lives,
    on_ranks,
    refused,
    run,
    started,
    started_ranks,
    tiny_config,
    train_here,
    wait_until,
)
from test_resume import assert_like, reached

import train
from core import checkpoint
from core.distributed import Ranks
from core.files import METRICS, read_metrics
from core.train import validation
from core.train.interrupts import Interrupts

STEPS = 16
MICRO_BATCHES = 2  # per step
VAL_BATCHES = 6  # per validation
COMMAND = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--val-every", 4)
RANKS_COMMAND = (*COMMAND, "--micro-batch", 2)  # 8 micro-batches per step and rank, 24 batches per validation
HUGE_STEP = ("--batch-tokens", 1_048_576)  # 1024 micro-batches: about 20 s on one CPU core
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def settings(**options):
    return tiny_config(**({"steps": STEPS, "val_every": 4, "log_every": 1} | options))


@pytest.fixture(scope="module")
def undisturbed(world):
    with contextlib.chdir(world):
        train.main(settings(run="undisturbed"))
    return world / "logs/undisturbed"


@pytest.fixture(scope="module")
def undisturbed_ranks(world):
    """The run on two ranks, whose sums round differently."""
    on_ranks(2, "train.py", *RANKS_COMMAND, "--run-name", "undisturbed-ranks", cwd=world)
    return world / "logs/undisturbed-ranks"


def send_in_forward(monkeypatch, module, number, count):
    """Make this process send itself a signal in a forward pass: the `count`-th that `module` computes."""
    autocast, calls = module.autocast, itertools.count(1)

    def interrupted(*args):
        if next(calls) == count:
            os.kill(os.getpid(), number)
        return autocast(*args)

    monkeypatch.setattr(module, "autocast", interrupted)


def saved_steps(folder):
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(folder)]


def lines_of(folder, split):
    return [line["step"] for line in read_metrics(folder) if line["split"] == split]


# A signal in the first micro-batch of a step abandons the step; in its last micro-batch the step completes.
@pytest.mark.parametrize(
    ("number", "step", "micro_batch", "saved"),
    [
        (signal.SIGTERM, 1, 1, 0),
        (signal.SIGTERM, 1, 2, 1),
        (signal.SIGUSR1, 6, 1, 5),
        (signal.SIGINT, 7, 2, 7),
        (signal.SIGHUP, 8, 2, 8),  # validation of step 8 waits for the resume
        (signal.SIGTERM, 9, 1, 8),
        (signal.SIGTERM, STEPS - 1, 2, STEPS - 1),
        (signal.SIGTERM, STEPS, 1, STEPS - 1),
        (signal.SIGTERM, STEPS, 2, STEPS),
    ],
)
def test_a_signal_saves_the_last_complete_step_and_the_same_command_resumes(
    here, undisturbed, monkeypatch, capsys, number, step, micro_batch, saved
):
    folder = Path(f"logs/stopped-{number.name}-{step}-{micro_batch}")
    handlers = [signal.getsignal(name) for name in SIGNALS]
    with monkeypatch.context() as patch:
        send_in_forward(patch, train, number, MICRO_BATCHES * (step - 1) + micro_batch)
        train.main(settings(run=folder.name))
    assert saved_steps(folder) == ([saved] if saved else [])
    output = capsys.readouterr().out
    stopped = f"stopped after step {saved}/{STEPS}. Rerun the same command to resume"
    assert (stopped in output) == (saved < STEPS)
    assert lines_of(folder, "train") == list(range(1, saved + 1))
    validated = [s for s in range(0, saved + 1, 4) if s < step or s == STEPS]
    assert lines_of(folder, "val") == validated
    train.main(settings(run=folder.name))
    output = capsys.readouterr().out
    resuming = f"resuming from logs/{folder.name}/checkpoints/step_{saved:06d} | step {saved}/{STEPS}"
    assert (resuming in output) == (saved > 0)
    assert_like(folder, undisturbed, STEPS)
    assert [signal.getsignal(name) for name in SIGNALS] == handlers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_a_checkpoint_where_standard_error_is_closed(here, monkeypatch, number):
    """Ctrl-C also ends the `tee` that reads the output; SIGHUP means that the terminal is closed."""
    folder, stderr, (reader, writer) = Path(f"logs/closed-{number.name}"), os.dup(2), os.pipe()
    os.close(reader)
    os.dup2(writer, 2)
    try:
        send_in_forward(monkeypatch, train, number, MICRO_BATCHES * 4)
        train.main(settings(run=folder.name))
    finally:
        os.dup2(stderr, 2)
        os.close(writer)
        os.close(stderr)
    assert saved_steps(folder) == [4]


@pytest.mark.parametrize("step", [0, 8])
@pytest.mark.parametrize("like_gpus", [False, True], ids=["one-process", "as-several-gpus"])
def test_a_signal_ends_a_validation_and_the_resume_repeats_it(here, undisturbed, monkeypatch, step, like_gpus):
    """Several GPUs would complete the step that follows."""
    folder = Path(f"logs/stopped-validation-{step}-{like_gpus}")
    with monkeypatch.context() as patch:
        if like_gpus:
            patch.setattr(Interrupts, "stop_step", lambda self, ranks: False)
        send_in_forward(patch, validation, signal.SIGTERM, VAL_BATCHES * step // 4 + 3)
        train.main(settings(run=folder.name))
    assert saved_steps(folder) == ([step] if step else [])
    assert lines_of(folder, "train") == list(range(1, step + 1))
    assert lines_of(folder, "val") == list(range(0, step, 4))
    train.main(settings(run=folder.name))
    assert_like(folder, undisturbed, STEPS)


def test_a_signal_between_two_evaluations_repeats_only_the_missing_one(here, monkeypatch):
    options = {"eval_lambada": "data/stories/lambada.txt", "eval_every": 4, "steps": 8}
    train.main(settings(run="undisturbed-lambada", **options))
    folder = Path("logs/stopped-lambada")
    with monkeypatch.context() as patch:
        send_in_forward(patch, validation, signal.SIGTERM, 2 * VAL_BATCHES)  # the last batch after step 4
        train.main(settings(run=folder.name, **options))
    assert (lines_of(folder, "val"), lines_of(folder, "lambada")) == ([0, 4], [0])
    train.main(settings(run=folder.name, **options))
    assert_like(folder, Path("logs/undisturbed-lambada"), 8)


def test_the_evaluations_of_the_last_step_complete(here, undisturbed, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        send_in_forward(patch, validation, signal.SIGTERM, VAL_BATCHES * STEPS // 4 + 1)
        train.main(settings(run="stopped-last"))
    assert "stopped after" not in capsys.readouterr().out
    assert_like(Path("logs/stopped-last"), undisturbed, STEPS)


def stop(process, pick, number, folder, step=6):
    """Send a signal to the processes that `pick` selects, once a step is reached; returns the result of the run."""
    assert wait_until(lambda: reached(folder, step), process)
    ranks = children(process.pid)
    for pid in pick(process.pid, ranks):
        os.kill(pid, number)
    result = ended(process)
    assert not any(lives(pid) for pid in ranks)
    return result


@pytest.mark.parametrize("ranks", [1, 2], ids=["one-process", "two-ranks"])
def test_a_huge_step_ends_within_seconds_of_a_signal(world, ranks):
    """The signal comes in step 1: nothing is saved, and a rerun starts with step 1."""
    folder = world / f"logs/huge-{ranks}"
    command = ("train.py", *COMMAND, *HUGE_STEP, "--steps", 100, "--run-name", folder.name)
    with started_ranks(ranks, *command, cwd=world) as processes:
        assert wait_until(lambda: folder.joinpath(METRICS).is_file() and lines_of(folder, "val") == [0], processes[0])
        time.sleep(0.5)
        start = time.monotonic()
        processes[-1].send_signal(signal.SIGTERM)
        result = ended_ranks(processes)
    assert time.monotonic() - start < 20  # the step would take minutes
    assert result.returncode == 0, result.stderr
    assert "stopped after step 0/100. Rerun the same command to resume" in result.stdout
    assert not checkpoint.list_checkpoints(folder)
    assert not lines_of(folder, "train")


def stop_in_slow_step(world, tmp_path, name, command, micro_batches, ranks=1):
    """Run a training whose micro-batches take 1 s from the second one of step 6 on, and stop its last rank there."""
    marker = tmp_path / "in_step_6"
    fault = f"open({str(marker)!r}, 'w').close(); time.sleep(1)"
    script = faulty(tmp_path / "slow.py", f"call > {5 * micro_batches + 1}", fault)
    with started_ranks(ranks, script, *command, "--run-name", name, cwd=world) as processes:
        assert wait_until(marker.is_file, processes[0])
        start = time.monotonic()
        processes[-1].send_signal(signal.SIGTERM)
        result = ended_ranks(processes)
    assert time.monotonic() - start < 20  # the step would take minutes
    assert result.returncode == 0, result.stderr
    assert f"stopped after step 5/{STEPS}." in result.stdout
    assert saved_steps(world / "logs" / name) == [5]


def test_a_slow_step_is_abandoned_and_the_resume_repeats_it(world, tmp_path):
    command = (*COMMAND, "--micro-batch", 4)
    stop_in_slow_step(world, tmp_path, "slow-step", command, micro_batches=8)
    for name in ("slow-step", "fast-step"):
        train_here(*command, "--run", name, cwd=world)
    assert_like(world / "logs/slow-step", world / "logs/fast-step", STEPS)


def test_a_signal_to_one_of_two_ranks_abandons_the_step_of_both(world, tmp_path, undisturbed_ranks):
    stop_in_slow_step(world, tmp_path, "slow-step-ranks", RANKS_COMMAND, micro_batches=8, ranks=2)
    on_ranks(2, "train.py", *RANKS_COMMAND, "--run-name", "slow-step-ranks", cwd=world)
    assert_like(world / "logs/slow-step-ranks", undisturbed_ranks, STEPS)


SIGNAL_IN_VALIDATION = """
import os, signal
import train
from core import cli
from core.train import validation

count, autocast = 0, validation.autocast

def interrupted(*args):
    global count
    count += 1
    if os.environ["RANK"] == "1" and count == 24 + 5:  # in the second validation, after step 4
        os.kill(os.getpid(), signal.SIGTERM)
    return autocast(*args)

validation.autocast = interrupted
cli.run(train.main, train.Config, "")
"""


def test_a_signal_to_one_rank_ends_the_validation_of_both(world, tmp_path, undisturbed_ranks):
    script, folder = tmp_path / "in_validation.py", world / "logs/stopped-validation-ranks"
    script.write_text(SIGNAL_IN_VALIDATION, encoding="utf-8")
    command = (*RANKS_COMMAND, "--run-name", folder.name)
    assert f"stopped after step 4/{STEPS}" in on_ranks(2, script, *command, cwd=world).stdout
    assert (lines_of(folder, "val"), saved_steps(folder)) == ([0], [4])
    on_ranks(2, "train.py", *command, cwd=world)
    assert_like(folder, undisturbed_ranks, STEPS)


def test_several_gpus_complete_their_step():
    """Their agreement is part of the step's own all_reduce; without a process group another one would fail."""
    interrupts = Interrupts(hang_timeout=1, is_main=True)
    interrupts.stop_requested = True
    assert not interrupts.stop_step(Ranks(0, 2, torch.device("cuda")))
    assert interrupts.stop_step(Ranks(0, 1, torch.device("cuda")))
    assert interrupts.stop_now(Ranks(0, 1, torch.device("cuda")))


def test_a_signal_to_one_rank_stops_all_after_the_same_step(world):
    folder, command = world / "logs/stopped-rank", ("train.py", *COMMAND, "--steps", 1000, "--run-name", "stopped-rank")
    with started_ranks(2, *command, cwd=world) as processes:
        assert wait_until(lambda: reached(folder, 6), processes[0])
        processes[1].send_signal(signal.SIGUSR1)
        result = ended_ranks(processes)
    step = int(re.search(r"stopped after step (\d+)/1000\.", result.stdout)[1])
    assert saved_steps(folder) == [step]
    assert reached(folder, step)
    assert not reached(folder, step + 1)


def test_torchrun_forwards_the_signal(world):
    folder, command = world / "logs/stopped-all", ("train.py", *COMMAND, "--steps", 1000, "--run-name", "stopped-all")
    with started(*command, cwd=world, ranks=2) as process:
        result = stop(process, lambda launcher, ranks: [launcher], signal.SIGTERM, folder)
    step = int(re.search(r"stopped after step (\d+)/1000\.", result.stdout)[1])
    assert saved_steps(folder) == [step]


def test_a_second_ctrl_c_quits_at_once(world, tmp_path):
    """The first one waits for the micro-batch, which takes a minute."""
    folder, marker = world / "logs/impatient", tmp_path / "in_step_1"
    script = faulty(tmp_path / "slow.py", "call == 1", f"open({str(marker)!r}, 'w').close(); time.sleep(60)")
    with started(script, *COMMAND, "--run", folder.name, cwd=world) as process:
        assert wait_until(marker.is_file, process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.wait(timeout=10)
        _, stderr = process.communicate()
    assert process.returncode == 130
    assert "SIGINT: stopping, then saving a checkpoint; press Ctrl-C again to quit without saving" in stderr
    assert not checkpoint.list_checkpoints(folder)


def test_nohup_still_ignores_sighup(world):
    folder = world / "logs/nohup"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; the started process inherits it
    try:
        with started("train.py", *COMMAND, "--run", folder.name, cwd=world) as process:
            assert "stopped" not in stop(process, lambda pid, ranks: [pid], signal.SIGHUP, folder).stdout
    finally:
        signal.signal(signal.SIGHUP, before)
    assert reached(folder, STEPS)


def test_a_hung_rank_ends_the_run_within_the_hang_timeout(world, tmp_path):
    """One of two ranks hangs and the other waits for it."""
    script = faulty(tmp_path / "hangs.py", "rank == 1 and call == 6", "time.sleep(1000)")
    command = ("--steps", 1000, "--hang-timeout", 4, "--run-name", "hung")
    with started(script, *COMMAND, *command, cwd=world, ranks=2) as process:
        assert wait_until(lambda: reached(world / "logs/hung", 4), process)
        start = time.monotonic()
        result = ended(process)
    assert 3 < time.monotonic() - start < 14
    assert result.returncode
    assert "Timeout (0:00:04)!" in result.stderr
    assert "hangs.py" in result.stderr  # the stack trace shows where


def test_a_rank_that_fails_reports_its_error_before_it_waits_for_others(world, tmp_path):
    """Destroying a process group of NCCL waits for the other ranks."""
    script = faulty(tmp_path / "fails.py", "rank == 1 and call == 6", "raise ValueError('only here')")
    slow_end = "import time, torch\ntorch.distributed.destroy_process_group = lambda: time.sleep(30)\n"
    script.write_text(slow_end + script.read_text(encoding="utf-8"), encoding="utf-8")
    with started(script, *COMMAND, "--steps", 1000, "--run-name", "failed", cwd=world, ranks=2) as process:
        assert wait_until(lambda: reached(world / "logs/failed", 2), process)
        start = time.monotonic()
        result = ended(process)
    assert "error: only here" in result.stderr
    assert result.returncode
    assert time.monotonic() - start < 20


def test_a_slow_run_is_not_hung(world, tmp_path):
    """The run takes longer than the timeout, which applies to one micro-batch."""
    script = faulty(tmp_path / "slow.py", "True", "time.sleep(0.5)")
    command = ("--steps", 2, "--batch-tokens", 4096, "--micro-batch", 16, "--hang-timeout", 1.5)
    run(script, *COMMAND, *command, "--run", "slow", cwd=world)
    seconds = [line["seconds"] for line in read_metrics(world / "logs/slow") if line["split"] == "train"]
    assert seconds[-1] > 2  # in eight micro-batches


def test_a_second_process_on_the_run_is_refused(world):
    folder = world / "logs/twice"
    command = ("train.py", *COMMAND, "--steps", 100_000, "--run", folder.name)
    with started(*command, cwd=world) as process:
        assert wait_until(lambda: reached(folder, 3), process)
        message = refused(run(*command, cwd=world, check=False))
        assert message.startswith("another process is writing logs/twice. ")
        assert "--run" in message
        assert reached(folder, 3)
        assert process.poll() is None
