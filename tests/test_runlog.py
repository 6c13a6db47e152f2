"""metrics.jsonl is authoritative, wandb or trackio mirrors it, and no failure of a log stops a run."""

import fcntl
import json
import os
import pty
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import termios
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAIN, command_of, environment, on_ranks, run, train_here
from test_resume import assert_like

import train
from core import cli
from core.distributed import Ranks
from core.files import METRICS, read_metrics
from core.train.logging import StepLogger, format_count, format_duration, summary, truncate_metrics
from core.train.trackers import logged_in, run_id

STEPS = 10
COMMAND = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--val-every", 4, "--save-every", 4, "--log-every", 5)
WANDB = ("--wandb-project", "gpt2")
LOGGED_OUT = {"WANDB_API_KEY": "", "NETRC": "/nonexistent"}


@pytest.fixture(scope="module")
def plain(world):
    """A run without wandb."""
    train_here(*COMMAND, "--run", "plain-log", cwd=world)
    return world / "logs/plain-log"


def mirrored(folder):
    """The metrics of an offline run of wandb by step. Its file is a LevelDB log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, place, partial, history = path.read_bytes(), 7, b"", {}
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no record starts in the last bytes of a block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        partial += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a complete record, or its last part
            record, partial = Record.FromString(partial), b""
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                history.setdefault(items["_step"], {}).update(items)
    return history


def test_wandb_mirrors_the_metrics_offline_without_a_login(world, plain):
    """wandb refuses the characters :;,#?/' in an id, of which a name can have all but the slash."""
    name = "c:d;e,f#g?h'i"
    result = run("train.py", *COMMAND, *WANDB, "--run", name, cwd=world, **LOGGED_OUT)
    folder = world / "logs" / name
    assert "wandb sync" in result.stderr
    assert "disabled" not in result.stdout + result.stderr
    assert json.loads((folder / "run.json").read_text())["tracker"] == "wandb"
    assert_like(folder, plain, STEPS)
    history = mirrored(folder)
    assert sorted(history) == list(range(STEPS + 1))
    for line in read_metrics(folder):
        split = line["split"]
        for name in ("loss", "grad_norm", "bits_per_byte", "seconds"):
            assert history[line["step"]].get(f"{split}/{name}") == line.get(name), (line["step"], name)
        assert history[line["step"]]["tokens"] == line["tokens"]


def test_the_id_of_a_mirror_differs_where_the_name_or_the_data_do():
    names = ["gpt2", "c:d", "c-d", "c;d", "x" * 255, "x" * 254]
    ids = {run_id(Path("logs") / name, {"manifest_hash": data * 64}) for name in names for data in "ab"}
    assert len(ids) == 2 * len(names)
    assert "gpt2-aaaaaaaa" in ids  # as the version before
    assert not [i for i in ids if len(i) > 128 or set(i) & set(":;,#?/'")]


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_mirrors_the_metrics_on_this_machine_and_resumes(world, plain, tmp_path):
    command = (*COMMAND, "--tracker", "trackio", "--run", "c:trackio", "--wandb-project", "stories")
    for steps_left in (6, 0):
        run("train.py", *command, cwd=world, TRACKIO_DIR=str(tmp_path))
        if steps_left:  # the run ended at step 4
            shutil.rmtree(world / "logs/c:trackio/checkpoints/step_000010")
            shutil.rmtree(world / "logs/c:trackio/checkpoints/step_000008")
    assert_like(world / "logs/c:trackio", plain, STEPS)
    (database,) = tmp_path.glob("stories*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    lines = [(step, json.loads(text)) for _, step, text in rows]
    assert {step for step, line in lines if "val/loss" in line} == {0, 4, 8, 10}
    losses = {step: line["train/loss"] for step, line in lines if "train/loss" in line}
    expected = {line["step"]: line["loss"] for line in read_metrics(plain) if line["split"] == "train"}
    assert losses == expected


def test_a_missing_tracker_is_an_error_with_the_command_to_install_it(world, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--tracker trackio needs a package .* Run pip install trackio"):
        train_here(*COMMAND, "--tracker", "trackio", "--run", "untracked", cwd=world)
    with pytest.raises(ValueError, match=r"--tracker wandb needs a package .* Run pip install wandb"):
        train_here(*COMMAND, "--wandb-project", "gpt2", "--run", "untracked", cwd=world)
    assert not (world / "logs/untracked").exists()


@pytest.mark.parametrize("options, tracker", [((), "none"), (WANDB, "wandb"), ((*WANDB, "--tracker", "none"), "none")])
def test_a_project_alone_means_wandb(options, tracker):
    assert cli.parse(train.Config, args=list(options)).tracker == tracker


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
def test_a_login_is_found_where_wandb_stores_it(tmp_path, monkeypatch, env, content, found):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"NETRC": str(tmp_path / "netrc")} | env).items():
        monkeypatch.setenv(name, value)
    if content is not None:
        (tmp_path / "netrc").write_text(content, encoding="utf-8")
    assert logged_in() == found


BROKEN = {
    "import": "raise ImportError('no such library')",
    "init": "def init(**settings): raise OSError('disk quota exceeded')",
    "log": """
class Run:
    def log(self, *metrics, **more): raise ConnectionError('the service is gone')
    def finish(self): raise AssertionError('a disabled mirror must not be finished')
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
def test_a_failing_mirror_is_disabled_and_the_run_continues(world, plain, tmp_path, monkeypatch, capsys, broken):
    (tmp_path / "wandb.py").write_text(BROKEN[broken], encoding="utf-8")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    train_here(*COMMAND, *WANDB, "--run", f"broken-{broken}", cwd=world)
    output = capsys.readouterr()
    assert (output.out + output.err).count("wandb") == 1
    assert_like(world / f"logs/broken-{broken}", plain, STEPS)


def test_eta_and_mfu_follow_steps_that_grow(monkeypatch):
    """Two tokens per step, then six: the ETA counts the remaining tokens, not steps of the current size."""
    lines, written = [], []
    log = SimpleNamespace(log=lines.append, write=lambda **line: written.append(line), advance=lambda: None)
    monkeypatch.setattr("core.train.logging.peak_flops", lambda device: 1e6)
    monkeypatch.setattr(
        "core.train.logging.DeviceClock", lambda device: SimpleNamespace(mark=int, seconds=lambda a, b: 0.5)
    )
    ranks, metrics = Ranks(0, 2, torch.device("cpu")), {"loss": 2.0, "grad_norm": 1.0, "stop_requested": 0.0}
    logger = StepLogger(log, ranks, steps=4, tokens=1011, log_every=1, seconds=0.0, bad_steps=0, max_bad_steps=0)
    for step, tokens, step_tokens, flops in (1, 2, 2, 1000.0), (2, 8, 6, 2000.0), (3, 10, 2, 0.0), (4, 1011, 1001, 0.0):
        logger.record(
            step=step,
            tokens=tokens,
            step_tokens=step_tokens,
            flops_per_token=flops,
            lr=1e-3,
            metrics={name: torch.tensor(value) for name, value in metrics.items()},
        )
    logger.flush()
    assert [line["mfu"] for line in written] == [4 * 1000 / 2e6, 12 * 2000 / 2e6, 0, 0]
    smoothed = 0.9 * 0.5 / 6 + 0.1 * 0.5 / 2  # seconds per token: the second step replaces the slow first one
    etas = [f"eta {1009 * 0.5 / 2 / 60:.0f}m", f"eta {1003 * 0.5 / 6:.0f}s", f"eta {1001 * smoothed:.0f}s"]
    assert [line.split(" | ")[-1] for line in lines[:3]] == etas
    assert "eta" not in lines[3]


def test_a_new_metric_of_a_step_is_written_by_its_name():
    written = []
    log = SimpleNamespace(log=lambda text: None, write=lambda **line: written.append(line), advance=lambda: None)
    ranks = Ranks(0, 1, torch.device("cpu"))
    logger = StepLogger(log, ranks, steps=9, tokens=99, log_every=1, seconds=0.0, bad_steps=0, max_bad_steps=0)
    metrics = {"loss": 2.0, "grad_norm": 1.0, "stop_requested": 1.0, "z_loss": 0.25}
    tensors = {name: torch.tensor(value) for name, value in metrics.items()}
    logger.record(step=1, tokens=2, step_tokens=2, flops_per_token=1.0, lr=1e-3, metrics=tensors)
    logger.flush()
    assert written[0]["z_loss"] == 0.25
    assert "stop_requested" not in written[0]
    assert logger.stop


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (119, "119s"), (120, "2m"), (7199, "120m"), (9000, "2.5h"), (2e5, "2.3d")],
)
def test_durations_have_the_unit_that_fits(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(950, "950"), (12_345, "12.3k"), (1_058_000, "1.06M"), (9_999_745_024, "10.00B")]
)
def test_counts_have_the_suffix_that_fits(number, text):
    assert format_count(number) == text


def test_the_first_line_summarizes_the_run():
    facts = {"preset": "gpt2", "parameters": 124_439_808, "world_size": 8, "versions": {"device": "NVIDIA H200"}}
    facts |= {"steps": 19_073, "tokens": 9_999_745_024, "epochs": 1.00093, "data": "data/fineweb-edu"}
    assert summary(Path("logs/gpt2"), facts) == (
        "logs/gpt2 | gpt2, 124,439,808 parameters | 8 x NVIDIA H200 | 19073 steps | 10.00B tokens | "
        "1 epochs of data/fineweb-edu"
    )
    assert summary(Path("logs/gpt2"), facts | {"tokens": 1_000_000, "epochs": 5}).endswith(
        "| 5 epochs of data/fineweb-edu (more than 4 gain little: --tokens 800000)"
    )


@pytest.mark.parametrize("end", ["", '{"step": 3, "spl', "\x00\x00\x00"])
def test_an_incomplete_end_of_the_metrics_is_removed(tmp_path, end):
    lines = [{"step": step, "split": "train", "loss": 0.1 + step / 3} for step in range(5)]
    path = tmp_path / METRICS
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end, encoding="utf-8")
    assert truncate_metrics(path, 3) == (lines[:4], 0)
    assert read_metrics(tmp_path) == lines[:4]


DAMAGED = [b"\xff\xfe\x00", b"\x00", b'{"step": 2, "sp', b"[1]", b"7", b'{"step": 3}', b'{"step": "x", "split": "val"}']


@pytest.mark.parametrize("line", [*DAMAGED, b'{"step": 3, "split": []}', b"[" * 100_000])
def test_damaged_lines_of_the_metrics_are_removed_and_counted(tmp_path, line):
    lines = [{"step": step, "split": "train", "loss": 0.5} for step in range(5)]
    first, *rest = [json.dumps(each).encode() + b"\n" for each in lines]
    (tmp_path / METRICS).write_bytes(b"".join([first, line + b"\n", *rest, line + b"\n"]))
    assert truncate_metrics(tmp_path / METRICS, 3) == (lines[:4], 2)
    assert read_metrics(tmp_path) == lines[:4]


def test_a_run_with_damaged_logs_resumes_with_a_warning(world, plain, capsys):
    folder = world / "logs/damaged-log"
    shutil.copytree(plain, folder)
    shutil.rmtree(folder / "checkpoints/step_000010")
    (folder / "run.json").write_bytes(bytes(range(256)))
    with open(folder / METRICS, "ab") as file:
        file.write(bytes(range(256)) + b"\n")
    train_here(*COMMAND, "--run", "damaged-log", cwd=world)
    assert f"warning: 2 damaged lines of logs/damaged-log/{METRICS} removed" in capsys.readouterr().out
    assert_like(folder, plain, STEPS)


def test_a_log_that_cannot_be_written_ends_all_ranks_with_the_same_line(world):
    folder = world / "logs/no-log"
    (folder / METRICS).mkdir(parents=True)
    result = on_ranks(2, "train.py", *COMMAND, "--run-name", "no-log", cwd=world, check=False)
    assert result.stderr.count(f"error: logs/no-log/{METRICS}: Is a directory.") == 2
    assert "Traceback" not in result.stderr and result.returncode == 2


def test_a_closed_standard_output_does_not_stop_the_run(world, plain):
    """As with `train.py | head -1`, or a closed terminal."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = command_of("train.py", (*COMMAND, "--run", "closed-output"))
    process = subprocess.Popen(command, cwd=world, env=environment({}), **streams)
    assert process.stdout.readline()
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert b"Traceback" not in stderr
    assert process.returncode == 0, stderr
    assert_like(world / "logs/closed-output", plain, STEPS)


def test_a_bar_on_a_terminal_and_plain_lines_in_a_file(world):
    command = command_of("train.py", (*COMMAND, "--run", "on-terminal"))
    here, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # its width would be 0
    process = subprocess.Popen(command, cwd=world, env=environment({}), stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(here, 65536):
            shown += part
    except OSError:  # on Linux: the other end was closed
        pass
    os.close(here)
    assert process.wait(timeout=60) == 0
    assert re.search(rb"\r *\d+%\|.*\| \d+/10 \[", shown)
    result = run("train.py", *COMMAND, "--run", "in-file", cwd=world)
    assert "%|" not in result.stdout + result.stderr
    assert "\r" not in result.stdout + result.stderr
    assert [line.split()[1] for line in result.stdout.splitlines() if "grad_norm" in line] == ["1/10", "5/10", "10/10"]
