"""Checkpoints are written asynchronously, old ones are deleted, and a full disk stops no run."""

import os
import re
import signal
import threading
from pathlib import Path

import pytest
import torch
from conftest import TRAIN, ended, fill, refused, started, tiny_config, train_here, wait_until
from processes import OWN_START
from test_resume import assert_like, reached

import train
from core import checkpoint
from core.data.shards import open_dataset
from core.distributed import Ranks
from core.files import METRICS
from core.train import saver
from core.train.schedule import Schedule
from model import GPT, PRESETS

STEPS = 60
FULL = (
    "could not be written: ",
    "metrics.jsonl can't be written (No space left on device); its lines are kept in memory",
)
COMMAND = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--val-every", 20, "--save-every", 5, "--keep-every", 0)


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def steps_saved(run):
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(Path("logs", run))]


def test_training_continues_while_a_checkpoint_is_written(here, monkeypatch):
    """The write of step 4 waits for step 7, and still contains the state after step 4."""
    train.main(tiny_config(run="immediate", steps=12, save_every=4))
    write, waited = checkpoint.save, threading.Event()

    def slow(folder, *args, **options):
        if not waited.is_set():
            assert wait_until(lambda: reached(folder, 7), seconds=20)
            waited.set()
        return write(folder, *args, **options)

    monkeypatch.setattr(saver.checkpoint, "save", slow)
    train.main(tiny_config(run="delayed", steps=12, save_every=4))
    assert waited.is_set()
    delayed, immediate = (Path("logs", run, "checkpoints/step_000004") for run in ("delayed", "immediate"))
    assert (delayed / "model.safetensors").read_bytes() == (immediate / "model.safetensors").read_bytes()
    assert_same(*(torch.load(path / checkpoint.TRAINING_STATE, weights_only=True) for path in (delayed, immediate)))


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for key in state.keys() - {"seconds"}:
        if isinstance(state[key], dict):
            assert_same(state[key], expected[key])
        elif isinstance(state[key], torch.Tensor):
            assert torch.equal(state[key], expected[key]), key
        else:
            assert state[key] == expected[key]


def nested_state():
    """Tensors in each kind of container that a training state may have."""
    return {
        "tensor": torch.ones(3),
        "dict": {"moment": torch.ones(3)},
        "list": [torch.ones(3), {"inner": torch.ones(3)}],
        "tuple": (torch.ones(3), [torch.ones(3)]),
        "values": ["adamw", (0.9, 0.95), 3, None, True],
    }


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for each in inner for tensor in tensors_of(each)]


def test_a_snapshot_copies_tensors_in_all_containers():
    """A later step changes the original in place, and the next snapshot uses the same memory."""
    state = nested_state()
    snapshot = saver.copy_to_host(state)
    copies = tensors_of(snapshot)
    assert len(copies) == 6
    for value in (2.0, 3.0):
        for tensor in tensors_of(state):
            tensor.fill_(value)
        assert all(bool((copy == value - 1).all()) for copy in copies)
        snapshot = saver.copy_to_host(state, snapshot)
        assert [copy.data_ptr() for copy in tensors_of(snapshot)] == [copy.data_ptr() for copy in copies]
        assert all(bool((copy == value).all()) for copy in tensors_of(snapshot))
    kinds = {key: type(value) for key, value in state.items()}
    assert {key: type(value) for key, value in snapshot.items()} == kinds
    assert snapshot["values"] == nested_state()["values"]


def test_an_old_checkpoint_that_can_not_be_deleted_is_no_failure_of_the_new_one(here):
    ranks, lines, folder = Ranks(0, 1, torch.device("cpu")), [], Path("logs/undeletable")
    folder.mkdir(parents=True)
    (folder / METRICS).touch()
    model, dataset = GPT(PRESETS["tiny"], seed=1), open_dataset("data/small")
    with saver.Saver(folder, dataset, ranks, keep=1, keep_multiple=0, step=0, log=lines.append) as writer:
        (folder / "checkpoints/.step_000001.old/in-use").mkdir(parents=True)
        for step in (1, 2, 3):
            writer.save(model, {"step": step})
        writer.finish()
    assert steps_saved("undeletable") == [1, 3]
    assert [line.split(" | ")[0] for line in lines if "saved" in line] == [
        f"saved {folder}/checkpoints/step_00000{step}" for step in (1, 2, 3)
    ]
    warning = next(line for line in lines if "deleted" in line)
    assert warning.startswith(f"warning: old checkpoint {folder}/checkpoints/step_000001 can't be deleted completely (")
    assert "Directory not empty" in warning


def test_the_saver_records_and_logs_how_long_each_checkpoint_took(here, monkeypatch):
    ranks, lines, folder = Ranks(0, 1, torch.device("cpu")), [], Path("logs/timed")
    folder.mkdir(parents=True)
    (folder / METRICS).touch()
    clock = iter([10.0, 10.25, 20.0, 20.5])  # start and end of the snapshots
    monkeypatch.setattr(saver.DeviceClock, "mark", lambda self: next(clock))
    model, dataset = GPT(PRESETS["tiny"], seed=1), open_dataset("data/small")
    with saver.Saver(folder, dataset, ranks, keep=3, keep_multiple=0, step=0, log=lines.append) as writer:
        for step in (1, 2):
            writer.save(model, {"step": step})
        writer.finish()
    assert writer.blocked_seconds == [0.25, 0.5]
    assert len(writer.write_seconds) == 2
    assert all(0 < seconds < 60 for seconds in writer.write_seconds)
    saved = [line for line in lines if line.startswith("saved ")]
    assert saved == [
        f"saved {folder}/checkpoints/step_{step:06d} | blocked training {blocked} ms | written in {seconds:.1f} s"
        for step, blocked, seconds in zip((1, 2), (250, 500), writer.write_seconds, strict=True)
    ]


@pytest.mark.parametrize(
    ("keep", "keep_every", "remaining"),
    [
        (1, 0, [21]),
        (2, 0, [20, 21]),
        (2, 3, [6, 12, 18, 20, 21]),
        (1, 1, [*range(2, 21, 2), 21]),
        (99, 5, [*range(2, 21, 2), 21]),
    ],
)
def test_the_newest_and_every_nth_checkpoint_are_kept(here, keep, keep_every, remaining):
    name = f"kept-{keep}-{keep_every}"
    train.main(tiny_config(run=name, steps=21, save_every=2, keep=keep, keep_every=keep_every))
    assert steps_saved(name) == remaining
    assert not list(Path("logs", name, "checkpoints").glob(".*"))


def test_permanent_checkpoints_stay_when_a_resume_has_other_intervals(here, monkeypatch):
    intervals = [
        {"save_every": 2, "keep_every": 2, "keep": 2},  # permanent: 4, 8, 12
        {"save_every": 5, "keep_every": 3, "keep": 1},  # 15
        {"save_every": 7, "keep_every": 0, "keep": 1},
    ]
    lr_scale = Schedule.lr_scale
    for options, last in zip(intervals, (13, 16, 22), strict=True):

        def stopping(self, step, last=last):
            if step == last:  # not done any more
                os.kill(os.getpid(), signal.SIGTERM)
            return lr_scale(self, step)

        monkeypatch.setattr(Schedule, "lr_scale", stopping)
        train.main(tiny_config(run="changed", steps=30, **options))
    assert steps_saved("changed") == [4, 8, 12, 15, 22]
    folder = Path("logs/changed")
    assert {checkpoint.step_of(path) for path in saver.permanent_checkpoints(folder)} == {4, 8, 12, 15}
    (folder / "run.json").write_text("{")  # unknown intervals: nothing that exists is deleted
    assert len(saver.permanent_checkpoints(folder)) == 5


def test_a_failed_write_deletes_no_older_checkpoint(here, monkeypatch):
    write = checkpoint.save

    def broken(folder, model, state, **options):
        if state["step"] in (6, 8):
            raise OSError(28, "No space left on device")
        return write(folder, model, state, **options)

    monkeypatch.setattr(saver.checkpoint, "save", broken)
    train.main(tiny_config(run="gaps", steps=8 + 1, save_every=2, keep=2, keep_every=0))
    assert steps_saved("gaps") == [4, 9]


def test_remains_of_a_killed_write_are_removed_at_the_start(here):
    remains = Path("logs/remains/checkpoints/.step_000003.unfinished")
    remains.mkdir(parents=True)
    (remains / "model.safetensors").write_bytes(b"half")
    train.main(tiny_config(run="remains", steps=2))
    assert [path.name for path in remains.parent.iterdir()] == ["step_000002"]


@pytest.fixture
def small_disk(world, disk):
    """logs/full is on a disk of 3 MB, which has space for three checkpoints of 0.7 MB."""
    (disk / "full").mkdir()
    (world / "logs").mkdir(exist_ok=True)
    (world / "logs/full").unlink(missing_ok=True)
    (world / "logs/full").symlink_to(disk / "full")
    yield disk
    (world / "logs/full").unlink()


def suspend_when(process, condition):
    """Suspend the run as soon as the condition is true."""
    assert wait_until(condition, process)
    process.send_signal(signal.SIGSTOP)


def test_a_full_disk_stops_no_run_and_the_next_save_works_once_there_is_space(world, small_disk):
    """While it is full, lines of metrics.jsonl don't fit either; at the end none of them is missing."""
    train_here(*COMMAND, "--run", "large-disk", cwd=world)
    folder = world / "logs/full"
    with started("train.py", *COMMAND, "--run", "full", cwd=world, **OWN_START) as process:
        suspend_when(process, (folder / "checkpoints/step_000010").exists)
        fill(small_disk / "ballast")
        process.send_signal(signal.SIGCONT)
        lines = [process.stdout.readline()]
        while not all(any(text in line for line in lines) for text in FULL):
            assert process.poll() is None
            lines.append(process.stdout.readline())
        process.send_signal(signal.SIGSTOP)
        complete = checkpoint.list_checkpoints(folder)
        assert checkpoint.step_of(complete[-1]) >= 10
        assert all(checkpoint.find_damage(path) is None for path in complete)
        (small_disk / "ballast").unlink()
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=60) == 0
    assert re.search(
        r"the checkpoint of step \d+ could not be written: .* \(0\.00 GB free\); earlier checkpoints are intact",
        "".join(lines),
    )
    assert_like(folder, world / "logs/large-disk", STEPS)


def test_a_disk_that_stays_full_ends_in_one_error_and_a_rerun_resumes(world, small_disk, capsys):
    with started("train.py", *COMMAND, "--run", "full", cwd=world) as process:
        suspend_when(process, (world / "logs/full/checkpoints/step_000010").exists)
        fill(small_disk / "ballast")
        process.send_signal(signal.SIGCONT)
        result = ended(process)
    message = refused(result)
    assert message.startswith(f"the checkpoint of step {STEPS} could not be written: ")
    assert message.endswith("Fix this and rerun the same command to resume from the one before")
    assert "the run ends early | last good checkpoint: logs/full/checkpoints/step_0000" in result.stdout
    (small_disk / "ballast").unlink()
    train_here(*COMMAND, "--run", "full", cwd=world)
    assert "resuming from logs/full/checkpoints/step_0000" in capsys.readouterr().out
    assert_like(world / "logs/full", world / "logs/large-disk", STEPS)
