"""Runs under SIGKILL at random moments, of one process or one of two ranks; `make soak` kills each run 25 times."""

import os
import random
import signal
import time

import pytest
from conftest import TRAIN, children, lives, on_ranks, run, started, train_here, wait_until
from test_resume import assert_like, reached

from core.checkpoint import list_checkpoints
from core.files import METRICS

KILLS = int(os.environ.get("SOAK_KILLS", "1"))
STEPS = 12 * KILLS + 24
COMMAND = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--val-every", 6, "--save-every", 3, "--keep", 2)


def last_step(folder):
    path = folder / METRICS
    return path.read_text(encoding="utf-8").count('"split": "train"') if path.is_file() else 0


def writing(folder):
    return any((folder / "checkpoints").glob(".step_*"))


def send(pids, number):
    for pid in pids:
        os.kill(pid, number)


def suspend(pids, condition):
    """Suspend the processes while a condition is true that holds for a short time only."""
    while True:
        assert wait_until(condition)
        send(pids, signal.SIGSTOP)
        if condition():
            return
        send(pids, signal.SIGCONT)


def kill_at_random(folder, process, ranks, rng, during_a_write):
    """Kill the process, or one of its ranks, within the next steps, once a checkpoint exists."""
    target = last_step(folder) + rng.randint(1, 8)
    assert wait_until(lambda: last_step(folder) >= target and list_checkpoints(folder), process)
    pids = children(process.pid) if ranks else [process.pid]
    if during_a_write:
        suspend(pids, lambda: writing(folder))
    else:
        time.sleep(rng.uniform(0, 0.1))
    os.kill(rng.choice(pids), signal.SIGKILL)
    if during_a_write:
        assert writing(folder)
        send(pids, signal.SIGCONT)
    assert process.wait(timeout=60)


def train(world, ranks, name):
    arguments = ("train.py", *COMMAND, "--run-name", name)
    return on_ranks(ranks, *arguments, cwd=world) if ranks else run(*arguments, cwd=world)


@pytest.fixture(scope="module")
def undisturbed(world):
    train_here(*COMMAND, "--run", "undisturbed-0", cwd=world)
    on_ranks(2, "train.py", *COMMAND, "--run-name", "undisturbed-2", cwd=world)  # its sums round differently
    return world / "logs"


@pytest.mark.parametrize("ranks", [0, 2] if KILLS > 1 else [2])  # test_resume.py kills one process at chosen moments
def test_a_run_killed_at_random_moments_ends_like_an_undisturbed_one(world, undisturbed, ranks):
    name, rng = f"killed-{ranks}", random.Random(ranks)
    folder = world / "logs" / name
    for kill in range(KILLS):
        with started("train.py", *COMMAND, "--run-name", name, cwd=world, ranks=ranks) as process:
            kill_at_random(folder, process, ranks, rng, during_a_write=(kill + ranks) % 3 == 0)
    assert "resuming from " in train(world, ranks, name).stdout
    assert_like(folder, undisturbed / f"undisturbed-{ranks}", STEPS)


def test_torchrun_restarts_the_run_after_a_rank_dies(world, undisturbed):
    """Also with --resume never, which refuses only a second start of the command."""
    folder, launch = world / "logs/restarted", ("--standalone", "--max-restarts=1")
    command = ("train.py", *COMMAND, "--resume", "never", "--run-name", folder.name)
    with started(*command, cwd=world, ranks=2, launch=launch) as process:
        assert wait_until(lambda: reached(folder, 8), process)
        first = children(process.pid)
        os.kill(first[1], signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert not any(lives(pid) for pid in first)
    assert "resuming from logs/restarted/checkpoints/step_00000" in stdout
    assert_like(folder, undisturbed / "undisturbed-2", STEPS)
