"""Stop and go: signals finish the step and save, on all ranks together; a rank that hangs ends the run in time."""

import os
import re
import signal
import time

import pytest
from conftest import TRAIN, children, ended, faulty, lives, refused, run, started, torchrun, wait_until
from test_resume import assert_like, reached

from core import checkpoint
from core.runlog import read_metrics

STEPS = 30
COMMAND = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--val-every", 4, "--sample-every", 10)


@pytest.fixture(scope="module")
def undisturbed(world):
    """The same run by one process and by two ranks, whose sums round differently."""
    run("train.py", *COMMAND, "--run", "unstopped-0", cwd=world)
    torchrun(2, "train.py", *COMMAND, "--run-name", "unstopped-2", cwd=world)
    return world / "logs"


def stop(process, ranks, pick, number, folder, step=6):
    """Send a signal to what `pick` takes of the processes once a step is reached; what it all ended with."""
    assert wait_until(lambda: reached(folder, step), process)
    for pid in pick(process, children(process.pid)):
        os.kill(pid, number)
    result = ended(process)
    assert not any(lives(pid) for pid in children(process.pid))
    return result


PROCESS, ONE_RANK, ALL_RANKS = (lambda p, c: [p.pid]), (lambda p, c: c[1:2]), (lambda p, c: c)


@pytest.mark.parametrize(
    ("number", "ranks", "pick"),
    [
        (signal.SIGTERM, 0, PROCESS),
        (signal.SIGUSR1, 0, PROCESS),
        (signal.SIGINT, 0, PROCESS),
        (signal.SIGHUP, 0, PROCESS),
        (signal.SIGTERM, 2, ONE_RANK),
        (signal.SIGUSR1, 2, ALL_RANKS),
    ],
)
def test_a_signal_finishes_the_step_saves_and_the_same_command_goes_on(world, undisturbed, number, ranks, pick):
    name = f"stopped-{number.name}-{ranks}"
    folder = world / "logs" / name
    with started("train.py", *COMMAND, "--run-name", name, cwd=world, ranks=ranks) as process:
        result = stop(process, ranks, pick, number, folder)
    assert result.returncode == 0, result.stderr
    step = int(re.search(rf"stopped after step (\d+) of {STEPS}", result.stdout)[1])
    assert [checkpoint.step_of(path) for path in checkpoint.listed(folder)] == [step]
    assert reached(folder, step)
    assert not reached(folder, step + 1)
    arguments = ("train.py", *COMMAND, "--run-name", name)
    said = (torchrun(ranks, *arguments, cwd=world) if ranks else run(*arguments, cwd=world)).stdout
    assert f"resuming logs/{name}/checkpoints/step_{step:06d}: step {step} of {STEPS}" in said
    assert_like(folder, undisturbed / f"unstopped-{ranks}", STEPS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_passes_the_signal_on(world, number):
    folder = world / f"logs/launcher-{number.name}"
    command = ("train.py", *COMMAND, "--steps", 1000, "--run-name", folder.name)
    with started(*command, cwd=world, ranks=2) as process:
        result = stop(process, 2, PROCESS, number, folder)
    step = int(re.search(r"stopped after step (\d+) of 1,000", result.stdout)[1])
    assert [checkpoint.step_of(path) for path in checkpoint.listed(folder)] == [step]


def test_a_second_ctrl_c_quits_at_once(world):
    folder = world / "logs/impatient"
    slow = ("--batch-tokens", 1_048_576)  # a step of a minute
    with started("train.py", *COMMAND, *slow, "--run", folder.name, cwd=world) as process:
        assert wait_until((folder / "metrics.jsonl").is_file, process)
        assert wait_until(lambda: "val" in (folder / "metrics.jsonl").read_text(), process)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.wait(timeout=10)
        _, stderr = process.communicate()
    assert process.returncode == 130
    assert "SIGINT: finishing the step, then saving; Ctrl-C again quits without saving" in stderr
    assert not checkpoint.listed(folder)


def test_nohup_keeps_ignoring_sighup(world):
    folder = world / "logs/nohup"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; the process started inherits it
    try:
        with started("train.py", *COMMAND, "--run", folder.name, cwd=world) as process:
            assert "stopped" not in stop(process, 0, PROCESS, signal.SIGHUP, folder).stdout
    finally:
        signal.signal(signal.SIGHUP, before)
    assert reached(folder, STEPS)


def test_a_hung_rank_ends_the_run_within_the_time_stated(world, tmp_path):
    """One of two ranks stands still and the other waits for it."""
    script = faulty(tmp_path / "hangs.py", "rank == 1 and call == 6", "time.sleep(1000)")
    command = ("--steps", 1000, "--hang-timeout", 4, "--run-name", "hung")
    with started(script, *COMMAND, *command, cwd=world, ranks=2) as process:
        assert wait_until(lambda: reached(world / "logs/hung", 4), process)
        begin = time.monotonic()
        result = ended(process)
    assert 3 < time.monotonic() - begin < 14
    assert result.returncode
    assert "Timeout (0:00:04)!" in result.stderr
    assert "hangs.py" in result.stderr  # where it stood


def test_a_run_that_goes_on_is_not_hung(world):
    """However long it takes: each step is a multiple of the time allowed for a micro-batch, and so is the run."""
    command = ("--steps", 3, "--batch-tokens", 65_536, "--micro-batch", 16, "--hang-timeout", 0.4)
    run("train.py", *COMMAND, *command, "--run", "slow", cwd=world)
    seconds = [line["seconds"] for line in read_metrics(world / "logs/slow") if line["split"] == "train"]
    assert seconds[-1] > 1


def test_a_second_process_on_the_run_is_refused(world):
    folder = world / "logs/twice"
    command = ("train.py", *COMMAND, "--steps", 100_000, "--run", folder.name)
    with started(*command, cwd=world) as process:
        assert wait_until(lambda: reached(folder, 3), process)
        said = refused(run(*command, cwd=world, check=False))
        assert said.startswith("another process is writing logs/twice: ")
        assert "--run" in said
        before = reached(folder, 3)
        assert before
        assert process.poll() is None
