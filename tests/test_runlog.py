"""Logging that can't hurt: metrics.jsonl is the truth, wandb mirrors it, and no failure of either stops a run."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAIN, command_of, environment, run, train_here
from test_resume import assert_like

from core.distributed import Ranks
from core.files import METRICS, read_metrics
from core.train.logging import StepReports, announcement, format_duration, logged_in, truncate_metrics

STEPS = 10
COMMAND = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--val-every", 4, "--save-every", 4, "--log-every", 5)
WANDB = ("--wandb-project", "gpt2")
NOBODY = {"WANDB_API_KEY": "", "NETRC": "/nonexistent"}


@pytest.fixture(scope="module")
def plain(world):
    """The run without a mirror."""
    train_here(*COMMAND, "--run", "plain-log", cwd=world)
    return world / "logs/plain-log"


def mirrored(folder):
    """What an offline run of wandb holds, by step: its file is a log of LevelDB's format with protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, place, begun, history = path.read_bytes(), 7, b"", {}
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no record begins in a block's last bytes
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        begun += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, begun = Record.FromString(begun), b""
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                history.setdefault(items["_step"], {}).update(items)
    return history


def test_wandb_mirrors_the_metrics_offline_without_a_login(world, plain):
    result = run("train.py", *COMMAND, *WANDB, "--run", "mirrored", cwd=world, **NOBODY)
    folder = world / "logs/mirrored"
    assert "wandb sync" in result.stderr
    assert_like(folder, plain, STEPS)
    history = mirrored(folder)
    assert sorted(history) == list(range(STEPS + 1))
    for line in read_metrics(folder):
        split = line["split"]
        for name in ("loss", "grad_norm", "bits_per_byte", "seconds"):
            assert history[line["step"]].get(f"{split}/{name}") == line.get(name), (line["step"], name)
        assert history[line["step"]]["tokens"] == line["tokens"]


@pytest.mark.parametrize(
    ("env", "content", "found"),
    [
        ({"WANDB_API_KEY": "k"}, None, True),
        ({}, None, False),
        ({}, "machine api.wandb.ai login user password secret", True),
        ({}, "machine example.org login user password secret", False),
        ({"WANDB_BASE_URL": "https://example.org:8080"}, "machine example.org login user password secret", True),
        ({}, "machine machine machine", False),
    ],
)
def test_a_login_is_found_where_wandb_keeps_it(tmp_path, monkeypatch, env, content, found):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"NETRC": str(tmp_path / "netrc")} | env).items():
        monkeypatch.setenv(name, value)
    if content is not None:
        (tmp_path / "netrc").write_text(content)
    assert logged_in() == found


BROKEN = {
    "import": "raise ImportError('no such library')",
    "init": "def init(**settings): raise OSError('disk quota exceeded')",
    "log": """
class Run:
    def log(self, *metrics, **more): raise ConnectionError('the service is gone')
    def finish(self): raise AssertionError('a mirror left out is not finished')
def init(**settings): return Run()
""",
    "finish": """
class Run:
    def log(self, *metrics, **more): pass
    def finish(self): raise TimeoutError('upload never ended')
def init(**settings): return Run()
""",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_mirror_that_fails_is_left_out_and_the_run_goes_on(world, plain, tmp_path, monkeypatch, capsys, broken):
    (tmp_path / "wandb.py").write_text(BROKEN[broken])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    train_here(*COMMAND, *WANDB, "--run", f"broken-{broken}", cwd=world)
    said = capsys.readouterr()
    assert (said.out + said.err).count("wandb") == 1
    assert_like(world / f"logs/broken-{broken}", plain, STEPS)


def test_time_left_and_mfu_follow_steps_that_grow(monkeypatch):
    """Two tokens a step, then six: what is left is tokens, not steps of this size."""
    said, written = [], []
    log = SimpleNamespace(say=said.append, write=lambda **line: written.append(line), advance=lambda: None)
    monkeypatch.setattr("core.train.logging.peak_flops", lambda device: 1e6)
    monkeypatch.setattr(
        "core.train.logging.DeviceClock", lambda device: SimpleNamespace(mark=int, seconds=lambda a, b: 0.5)
    )
    reports = StepReports(log, Ranks(0, 2, torch.device("cpu")), 4, 1011, 1, 0.0, 0, 0)
    steps = (1, 2, 2, 1000.0), (2, 8, 6, 2000.0), (3, 10, 2, 0.0), (4, 1011, 1001, 0.0)
    for step, tokens, step_tokens, flops in steps:
        reports.launched(step, tokens, step_tokens, flops, 1e-3, torch.tensor([2.0, 1.0, 0.0]))
    reports.flush()
    assert [line["mfu"] for line in written] == [4 * 1000 / 2e6, 12 * 2000 / 2e6, 0, 0]
    pace = 0.9 * 0.5 / 6 + 0.1 * 0.5 / 2  # seconds a token: the first step is forgotten, one slow one no promise
    left = [f"{1009 * 0.5 / 2 / 60:.1f} min left", f"{1003 * 0.5 / 6:.0f} s left", f"{1001 * pace:.0f} s left"]
    assert [line.split("  ")[-1] for line in said[:3]] == left
    assert "left" not in said[3]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (119, "119 s"), (120, "2.0 min"), (7199, "120.0 min"), (9000, "2.5 h"), (2e5, "2.3 days")],
)
def test_durations_are_told_in_the_unit_that_fits(seconds, said):
    assert format_duration(seconds) == said


def test_a_run_says_what_it_is_about_to_do():
    facts = {"preset": "gpt2", "parameters": 124_439_808, "world_size": 8, "versions": {"device": "NVIDIA H200"}}
    facts |= {"steps": 19_073, "tokens": 9_999_745_024, "epochs": 1.00093, "data": "data/fineweb-edu"}
    said = announcement(Path("logs/gpt2"), facts)
    assert said == (
        "logs/gpt2: gpt2, 124,439,808 parameters, on 8 x NVIDIA H200; 19,073 steps, 10.00B tokens, "
        "1 epochs of data/fineweb-edu"
    )
    assert "passes over the same data gain little" in announcement(Path("logs/gpt2"), facts | {"epochs": 5})


@pytest.mark.parametrize("end", ["", '{"step": 3, "spl', '{"step": 3}\n{"st', "\x00\x00\x00"])
def test_what_a_kill_leaves_at_the_end_is_cut_off(tmp_path, end):
    lines = [{"step": step, "split": "train", "loss": 0.1 + step / 3} for step in range(5)]
    path = tmp_path / METRICS
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    kept = truncate_metrics(path, 3)
    assert kept[:4] == lines[:4] == read_metrics(tmp_path)[:4]
    assert kept == read_metrics(tmp_path)
    assert all(line["step"] <= 3 for line in kept)


def test_a_reader_that_goes_away_stops_nothing(world, plain):
    """As in `train.py | head -1`, or a terminal that was closed."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = command_of("train.py", (*COMMAND, "--run", "unheard"))
    process = subprocess.Popen(command, cwd=world, env=environment({}), **streams)
    assert process.stdout.readline()
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert b"Traceback" not in stderr
    assert process.returncode == 0, stderr
    assert_like(world / "logs/unheard", plain, STEPS)


def test_a_bar_on_a_terminal_and_plain_lines_in_a_file(world):
    command = command_of("train.py", (*COMMAND, "--run", "watched"))
    here, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # or its width would be 0
    process = subprocess.Popen(command, cwd=world, env=environment({}), stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(here, 65536):
            shown += part
    except OSError:  # so Linux tells that the other end was closed
        pass
    os.close(here)
    assert process.wait(timeout=60) == 0
    assert re.search(rb"\r *\d+%\|.*\| \d+/10 \[", shown)
    result = run("train.py", *COMMAND, "--run", "unwatched", cwd=world)
    assert "%|" not in result.stdout + result.stderr
    assert "\r" not in result.stdout + result.stderr
    assert [line.split()[1] for line in result.stdout.splitlines() if "norm" in line] == ["1/10", "5/10", "10/10"]
