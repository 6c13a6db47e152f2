"""Checkpoints off the critical path: written while training goes on, few are kept, and a full disk stops nothing."""

import re
import signal
import threading
from pathlib import Path

import pytest
import torch
from conftest import TRAIN, ended, fill, refused, started, train_here, wait_until
from test_resume import assert_like, reached

import train
from core import checkpoint
from core.train import saver

TINY = {"preset": "tiny", "seq_len": 64, "batch_tokens": 2048, "micro_batch": 16, "device": "cpu", "data": "data/small"}
STEPS = 60
FULL = ("could not be written: ", "metrics.jsonl can't be written (No space left on device): its lines wait in memory")
COMMAND = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--val-every", 20, "--save-every", 5, "--keep-every", 0)


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def steps_saved(run):
    return [checkpoint.step_of(path) for path in checkpoint.listed(Path("logs", run))]


def test_training_goes_on_while_a_checkpoint_is_written(here, monkeypatch):
    """The write of step 4 waits for step 7, and holds what was true after step 4 all the same."""
    train.main(train.Config(**TINY, run="at-once", steps=12, save_every=4))
    write, waited = checkpoint.save, threading.Event()

    def slow(folder, *args):
        if not waited.is_set():
            assert wait_until(lambda: reached(folder, 7), seconds=20)
            waited.set()
        return write(folder, *args)

    monkeypatch.setattr(saver.checkpoint, "save", slow)
    train.main(train.Config(**TINY, run="behind", steps=12, save_every=4))
    assert waited.is_set()
    ours, theirs = (Path("logs", run, "checkpoints/step_000004") for run in ("behind", "at-once"))
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert_same(*(torch.load(path / checkpoint.TRAINING_STATE, weights_only=True) for path in (ours, theirs)))


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours.keys() - {"seconds"}:
        if isinstance(ours[key], dict):
            assert_same(ours[key], theirs[key])
        elif isinstance(ours[key], torch.Tensor):
            assert torch.equal(ours[key], theirs[key]), key
        else:
            assert ours[key] == theirs[key]


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"),
    [
        (1, 0, [21]),
        (2, 0, [20, 21]),
        (2, 3, [6, 12, 18, 20, 21]),
        (1, 1, [*range(2, 21, 2), 21]),
        (99, 5, [*range(2, 21, 2), 21]),
    ],
)
def test_the_newest_stay_and_every_so_many_for_good(here, keep, keep_every, left):
    name = f"kept-{keep}-{keep_every}"
    train.main(train.Config(**TINY, run=name, steps=21, save_every=2, keep=keep, keep_every=keep_every))
    assert steps_saved(name) == left
    assert not list(Path("logs", name, "checkpoints").glob(".*"))


def test_none_is_deleted_for_one_that_could_not_be_written(here, monkeypatch):
    write = checkpoint.save

    def broken(folder, model, state, *args):
        if state["step"] in (6, 8):
            raise OSError(28, "No space left on device")
        return write(folder, model, state, *args)

    monkeypatch.setattr(saver.checkpoint, "save", broken)
    train.main(train.Config(**TINY, run="gaps", steps=8 + 1, save_every=2, keep=2, keep_every=0))
    assert steps_saved("gaps") == [4, 9]


def test_remains_of_a_killed_write_are_removed_at_the_start(here):
    remains = Path("logs/remains/checkpoints/.step_000003.unfinished")
    remains.mkdir(parents=True)
    (remains / "model.safetensors").write_bytes(b"half")
    train.main(train.Config(**TINY, run="remains", steps=2))
    assert [path.name for path in remains.parent.iterdir()] == ["step_000002"]


@pytest.fixture
def small_disk(world, disk):
    """logs/full lies on a disk of 3 MB, room for three checkpoints of 0.7 MB."""
    (disk / "full").mkdir()
    (world / "logs").mkdir(exist_ok=True)
    (world / "logs/full").unlink(missing_ok=True)
    (world / "logs/full").symlink_to(disk / "full")
    yield disk
    (world / "logs/full").unlink()


def frozen(process, true):
    """Stop the run as soon as that is true."""
    assert wait_until(true, process)
    process.send_signal(signal.SIGSTOP)


def test_a_full_disk_stops_nothing_and_the_next_save_works_once_there_is_room(world, small_disk):
    """While it is full not even the lines of metrics.jsonl fit; in the end none of them is missing."""
    train_here(*COMMAND, "--run", "roomy", cwd=world)
    folder = world / "logs/full"
    with started("train.py", *COMMAND, "--run", "full", cwd=world) as process:
        frozen(process, (folder / "checkpoints/step_000010").exists)
        fill(small_disk / "ballast")
        process.send_signal(signal.SIGCONT)
        said = [process.stdout.readline()]
        while not all(any(text in line for line in said) for text in FULL):
            assert process.poll() is None
            said.append(process.stdout.readline())
        process.send_signal(signal.SIGSTOP)
        whole = checkpoint.listed(folder)
        assert checkpoint.step_of(whole[-1]) >= 10
        assert all(checkpoint.problem(path) is None for path in whole)
        (small_disk / "ballast").unlink()
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=60) == 0
    text = "".join(said)
    assert re.search(
        r"the checkpoint of step \d+ could not be written: .* \(0\.00 GB free\); earlier checkpoints are whole", text
    )
    assert_like(folder, world / "logs/roomy", STEPS)


def test_a_disk_that_stays_full_ends_in_a_sentence_that_says_where_it_goes_on(world, small_disk, capsys):
    with started("train.py", *COMMAND, "--run", "full", cwd=world) as process:
        frozen(process, (world / "logs/full/checkpoints/step_000010").exists)
        fill(small_disk / "ballast")
        process.send_signal(signal.SIGCONT)
        result = ended(process)
    said = refused(result)
    assert said.startswith(f"the checkpoint of step {STEPS} could not be written: ")
    assert "the same command goes on" in said
    assert f"its last good checkpoint: {Path('logs/full/checkpoints/step_0000')}" in result.stdout
    (small_disk / "ballast").unlink()
    train_here(*COMMAND, "--run", "full", cwd=world)
    assert "resuming logs/full/checkpoints/step_0000" in capsys.readouterr().out
    assert_like(world / "logs/full", world / "logs/roomy", STEPS)
