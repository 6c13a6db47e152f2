"""Stop and go: signals finish the step and save, on all ranks together; a rank that hangs ends the run in time."""

import contextlib
import itertools
import os
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import TRAIN, children, ended, faulty, lives, refused, run, started, wait_until
from test_resume import assert_like, reached

import train
from core import checkpoint
from core.files import read_metrics

STEPS = 16
COMMAND = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--val-every", 4)


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def settings(**changes):
    tiny = {"preset": "tiny", "seq_len": 64, "batch_tokens": 2048, "micro_batch": 16, "device": "cpu"}
    return train.Config(**(tiny | {"data": "data/small", "steps": STEPS, "val_every": 4, "log_every": 1} | changes))


@pytest.fixture(scope="module")
def undisturbed(world):
    with contextlib.chdir(world):
        train.main(settings(run="unstopped"))
    return world / "logs/unstopped"


def send_in_step(monkeypatch, number, step):
    """Let this process send itself a signal in the middle of a step."""
    train_step, steps = train.train_step, itertools.count(1)

    def interrupted(*args):
        if next(steps) == step:
            os.kill(os.getpid(), number)
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", interrupted)


# The step after the one in which it came is launched already; at a multiple of 4 validation is due, and waits.
@pytest.mark.parametrize(
    ("number", "step", "last"),
    [
        (signal.SIGTERM, 1, 2),
        (signal.SIGUSR1, 6, 7),
        (signal.SIGINT, 7, 8),
        (signal.SIGHUP, 8, 8),
        (signal.SIGTERM, STEPS - 1, STEPS),
        (signal.SIGTERM, STEPS, STEPS),
    ],
)
def test_a_signal_finishes_the_step_saves_and_the_same_command_goes_on(
    here, undisturbed, monkeypatch, capsys, number, step, last
):
    folder = Path(f"logs/stopped-{number.name}-{step}")
    handlers = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)]
    with monkeypatch.context() as patch:
        send_in_step(patch, number, step)
        train.main(settings(run=folder.name))
    assert [checkpoint.step_of(path) for path in checkpoint.listed(folder)] == [last]
    said = capsys.readouterr().out
    assert (f"stopped after step {last} of {STEPS}: the same command goes on" in said) == (last < STEPS)
    assert read_metrics(folder)[-1]["split"] == ("train" if last < STEPS else "val")
    train.main(settings(run=folder.name))
    said = capsys.readouterr().out
    assert f"resuming logs/{folder.name}/checkpoints/step_{last:06d}: step {last} of {STEPS}" in said
    assert_like(folder, undisturbed, STEPS)
    after = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)]
    assert after == handlers


def stop(process, pick, number, folder, step=6):
    """Send a signal to what `pick` takes of the processes once a step is reached; what it all ended with."""
    assert wait_until(lambda: reached(folder, step), process)
    ranks = children(process.pid)
    for pid in pick(process.pid, ranks):
        os.kill(pid, number)
    result = ended(process)
    assert not any(lives(pid) for pid in ranks)
    return result


def test_a_signal_to_one_rank_stops_all_after_the_same_step(world):
    folder, command = world / "logs/stopped-rank", ("train.py", *COMMAND, "--steps", 1000, "--run-name", "stopped-rank")
    with started(*command, cwd=world, ranks=2) as process:
        result = stop(process, lambda launcher, ranks: ranks[1:], signal.SIGUSR1, folder)
    assert result.returncode == 0, result.stderr
    step = int(re.search(r"stopped after step (\d+) of 1,000", result.stdout)[1])
    assert [checkpoint.step_of(path) for path in checkpoint.listed(folder)] == [step]
    assert reached(folder, step)
    assert not reached(folder, step + 1)


def test_torchrun_passes_the_signal_on(world):
    folder, command = world / "logs/stopped-all", ("train.py", *COMMAND, "--steps", 1000, "--run-name", "stopped-all")
    with started(*command, cwd=world, ranks=2) as process:
        result = stop(process, lambda launcher, ranks: [launcher], signal.SIGTERM, folder)
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
            assert "stopped" not in stop(process, lambda pid, ranks: [pid], signal.SIGHUP, folder).stdout
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


def test_a_rank_that_fails_says_so_before_it_waits_for_others(world, tmp_path):
    """As it would for NCCL's group to be destroyed."""
    script = faulty(tmp_path / "fails.py", "rank == 1 and call == 6", "raise ValueError('only here')")
    script.write_text(
        "import time, torch\ntorch.distributed.destroy_process_group = lambda: time.sleep(30)\n" + script.read_text()
    )
    with started(script, *COMMAND, "--steps", 1000, "--run-name", "failed", cwd=world, ranks=2) as process:
        assert wait_until(lambda: reached(world / "logs/failed", 2), process)
        begin = time.monotonic()
        result = ended(process)
    assert "error: only here" in result.stderr
    assert result.returncode
    assert time.monotonic() - begin < 20


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
