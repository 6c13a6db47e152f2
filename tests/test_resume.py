"""Promise 3: a run killed at any moment and started again by the same command ends as one never killed, bit for bit."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TRAIN, run, train_here

import train
from core import checkpoint
from core.files import METRICS, read_metrics

STEPS = 24
COMMAND = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--val-every", 6, "--warmup-steps", 3, "--keep", 99)
TIMES = ("seconds", "tokens_per_second")  # the one thing that may differ


@pytest.fixture(scope="module")
def whole(world):
    """The run that nobody killed."""
    train_here(*COMMAND, "--save-every", 5, "--run", "whole", cwd=world)
    return world / "logs/whole"


@pytest.fixture
def copied(whole, tmp_path, monkeypatch):
    """A copy of that run and its data in a folder of its own, for runs within this process."""
    shutil.copytree(whole.parents[1] / "data/small", tmp_path / "data/small")
    shutil.copytree(whole, tmp_path / "logs/whole")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "logs/whole"


def settings(**changes):
    """The same command for a call within this process."""
    tiny = {"preset": "tiny", "seq_len": 64, "batch_tokens": 2048, "micro_batch": 16, "device": "cpu"}
    mine = {"data": "data/small", "steps": STEPS, "val_every": 6, "warmup_steps": 3, "save_every": 5, "run": "whole"}
    return train.Config(**(tiny | mine | {"keep": 99} | changes))


def go_back(folder, step):
    """Forget all checkpoints after a step."""
    for path in (folder / "checkpoints").iterdir():
        if path.name > f"step_{step:06d}":
            shutil.rmtree(path)


def start_and_kill(world, command, moment):
    """Start training and kill it, as a power cut would, as soon as `moment` says so."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train.py", *map(str, command)]
    process = subprocess.Popen(command, cwd=world, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if moment():
            process.send_signal(signal.SIGSTOP)
            if moment():  # still so, now that it stands
                break
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    ended = process.poll()
    process.kill()
    process.wait()
    assert ended is None, "the run ended before it could be killed"
    assert time.monotonic() < deadline


def reached(folder, step):
    """Whether metrics.jsonl tells of a step."""
    path = folder / METRICS
    return path.is_file() and f'"step": {step},' in path.read_text()


def assert_like(folder, whole, steps=STEPS):
    last = f"checkpoints/step_{steps:06d}"
    assert (folder / last / "model.safetensors").read_bytes() == (whole / last / "model.safetensors").read_bytes()
    ours, theirs = (read_metrics(run) for run in (folder, whole))
    places = [[(line["step"], line["split"]) for line in lines] for lines in (ours, theirs)]
    assert places[0] == places[1]
    for mine, other in zip(ours, theirs, strict=True):
        assert {k: v for k, v in mine.items() if k not in TIMES} == {k: v for k, v in other.items() if k not in TIMES}
    assert not list((folder / "checkpoints").glob(".*")), "remains of an unfinished checkpoint"


def test_killed_at_three_moments_it_ends_as_if_undisturbed(world, whole):
    """Before the first checkpoint; as soon as one shows, which must be whole; while one is written."""
    folder, command = world / "logs/killed", (*COMMAND, "--run", "killed")
    shown = folder / "checkpoints/step_000010"

    def writing():
        return reached(folder, 14) and any((folder / "checkpoints").glob(".step_*.unfinished"))

    start_and_kill(world, (*command, "--save-every", 5), lambda: reached(folder, 2))
    assert not shown.parent.exists()
    start_and_kill(world, (*command, "--save-every", 5), shown.exists)
    assert checkpoint.problem(shown) is None
    start_and_kill(world, (*command, "--save-every", 1), writing)
    assert writing()
    assert "resuming " in run("train.py", *command, "--save-every", 1, cwd=world).stdout
    assert_like(folder, whole)


def test_a_finished_run_says_so_and_is_left_alone(world, whole):
    before = (whole / METRICS).read_bytes()
    said = run(
        "train.py", *COMMAND, "--save-every", 5, "--run", "whole", cwd=world
    ).stdout  # exit status 0, or it raises
    assert f"logs/whole is finished: {STEPS} steps" in said
    assert (whole / METRICS).read_bytes() == before


@pytest.mark.parametrize(
    "change, was",
    [
        ({"preset": "demo"}, "tiny"),
        ({"seed": 7}, 1337),
        ({"lr": 0.001}, 0.0006),
        ({"steps": 30}, STEPS),
        ({"batch_tokens": 4096}, 2048),
        ({"seq_len": 32}, 64),
        ({"warmup_steps": 4}, 3),
        ({"final_lr_fraction": 0.2}, 0.1),
        ({"weight_decay": 0.0}, 0.1),
        ({"grad_clip": 2.0}, 1.0),
        ({"optimizer": "muon"}, "adamw"),
        ({"init": "aligned"}, "gpt2"),
        ({"init_from": "logs/whole"}, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_setting_is_refused_with_both_values(copied, change, was):
    ((name, now),) = change.items()
    go_back(copied, 20)
    with pytest.raises(
        ValueError, match=f"whole was begun with {name} {was}, now it is {now}: .*--init-from logs/whole"
    ):
        train.main(settings(**change))
    assert not (copied / "checkpoints/step_000024").exists()


def test_a_run_from_before_a_setting_existed_is_refused_with_a_way_on(copied):
    with pytest.raises(ValueError, match="begun by an earlier version of this project, without polish: finish it with"):
        checkpoint.load_training_state(copied / "checkpoints/step_000020", {"seed": 1337, "polish": 3})


def test_other_data_are_refused_with_both_hashes(world, copied):
    """The same tokens cut into other shards: their windows and their order are others."""
    source = ("--source", "data/stories/stories.jsonl", "--encoding", "data/stories", "--val-tokens", "6000")
    out = copied.parents[1] / "data/other"
    run("fineweb.py", *source, "--out", out, "--shard-tokens", "30000", "--workers", "1", cwd=world)
    with pytest.raises(ValueError, match=r"begun with manifest_hash [0-9a-f]{64}, now it is [0-9a-f]{64}"):
        train.main(settings(data="data/other"))


def test_free_settings_may_change(copied, capsys):
    expected = read_metrics(copied)
    go_back(copied, 15)
    train.main(settings(micro_batch=8, val_every=4, save_every=3, log_every=1))
    assert re.search("resuming .*step 15 of 24", capsys.readouterr().out)
    metrics = read_metrics(copied)
    assert [line["step"] for line in metrics if line["split"] == "val"] == [0, 6, 12, 16, 20, 24]
    assert sorted(p.name for p in (copied / "checkpoints").iterdir())[-3:] == [
        "step_000018",
        "step_000021",
        "step_000024",
    ]
    ours, theirs = ([line["loss"] for line in lines if line["split"] == "train"] for lines in (metrics, expected))
    assert ours == pytest.approx(theirs, rel=5e-6)


def test_what_a_kill_cut_short_in_the_metrics_is_dropped(copied):
    expected = read_metrics(copied)
    go_back(copied, 20)
    path = copied / METRICS
    path.write_bytes(path.read_bytes()[:-40])
    train.main(settings())
    assert [(line["step"], line["split"]) for line in read_metrics(copied)] == [
        (line["step"], line["split"]) for line in expected
    ]


def test_the_training_state_is_all_that_a_resume_needs(copied):
    """The random state of the process that goes on has no effect."""
    path = copied / "checkpoints/step_000024/model.safetensors"
    expected = path.read_bytes()
    go_back(copied, 10)
    torch.manual_seed(99)
    train.main(settings())
    assert path.read_bytes() == expected


def test_resume_never_refuses_a_run_that_exists(copied):
    with pytest.raises(ValueError, match=r"logs/whole holds a run already.*--run"):
        train.main(settings(resume="never"))


def test_resume_never_refuses_a_run_without_a_checkpoint(copied):
    """Killed before its first one, it still has metrics to lose."""
    shutil.rmtree(copied / "checkpoints")
    before = (copied / METRICS).read_bytes()
    with pytest.raises(ValueError, match=r"logs/whole holds a run already"):
        train.main(settings(resume="never"))
    assert (copied / METRICS).read_bytes() == before
