"""--help explains every option, a mistyped option is answered with the nearest one, and --quiet keeps the results."""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from itertools import pairwise

import pytest
from conftest import ROOT, environment, on_ranks, option_names, refused, run, save_model
from tqdm import tqdm

import convert
import eval_cbt
import eval_hellaswag
import eval_lambada
import eval_wikitext
import fineweb
import report
import sample
import train
from core import cli
from core.train.recipe import SMALL_BATCH_TOKENS, SMALL_WIDTH
from model import PRESETS

SCRIPTS = (fineweb, train, eval_lambada, eval_cbt, eval_hellaswag, eval_wikitext, sample, convert, report)
TRAIN = ("--data", "data/small", "--preset", "tiny", "--seq-len", 64, "--batch-tokens", 2048, "--device", "cpu")


def help_of(script, capsys, monkeypatch, width=100):
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        cli.parse(script.Config, script.__doc__, ["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_option_is_explained(script, capsys, monkeypatch):
    text = help_of(script, capsys, monkeypatch)
    parts = [re.split(r"\n *\n|\(default", part)[0] for part in re.split(r"\n  (?=--?[a-z])", text)[1:]]
    descriptions = {name: part for part in parts for name in re.findall(r"--[a-z][\w-]*", part.split("\n")[0])}
    names = list(option_names(script.Config))
    assert len(names) == len(set(names)) and "--quiet" in names
    for name in names:
        words = re.findall(r"\b[A-Za-z][a-z]+\b", re.sub(r"{[^}]*}|--[\w-]+", "", descriptions[name]))
        assert len(words) >= 3, f"{name} is not explained: {descriptions[name]}"
    assert "None" not in text and "(default: )" not in text


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_lines_of_the_help_are_as_long_as_the_terminal_allows(script, width, capsys, monkeypatch):
    lines = help_of(script, capsys, monkeypatch, width).splitlines()
    boxes = [line.strip("│").rstrip() for line in lines if line.startswith("│")]
    for line, following in pairwise(boxes):
        indents = [len(text) - len(text.lstrip()) for text in (line, following)]
        if line and following and min(indents) == max(indents) > 4:  # two lines of one description
            assert len(line) + 1 + len(following.split()[0].split(",")[0]) > width - 3, (line, following)
    assert all(len(line) <= width for line in lines if not line.startswith(("usage", "    ")))  # not examples
    assert ("", "") not in pairwise(lines)


def test_help_names_defaults_and_protocols(capsys, monkeypatch):
    assert "(default: one per core)" in " ".join(help_of(fineweb, capsys, monkeypatch, 200).split())
    assert "during training by protocol openai" in " ".join(help_of(train, capsys, monkeypatch, 200).split())


def test_options_of_training_are_grouped(capsys, monkeypatch):
    titles = re.findall(r"^ (\w+) options ", help_of(train, capsys, monkeypatch), re.MULTILINE)
    assert titles == ["run", "recipe", "system", "evaluation", "checkpoints", "terminal"]


def test_help_states_the_batch_of_small_presets(capsys, monkeypatch):
    small = [name for name, shape in PRESETS.items() if shape.n_embd < SMALL_WIDTH]
    text = " ".join(help_of(train, capsys, monkeypatch).split())
    assert f"{' and '.join(small)}: {SMALL_BATCH_TOKENS}." in text


def test_flat_options_fill_the_groups():
    given = ["--data", "d", "--run", "r", "--recipe", "speedrun", "--lr", "3", "--micro-batch", "2", "--val-every", "7"]
    config = cli.parse(train.Config, "", [*given, "--keep", "9", "--no-verify", "--quiet"])
    expected = train.Config()
    expected.run.data, expected.run.name, expected.checkpoints.no_verify = "d", "r", True
    expected.run.recipe, expected.run.lr = "speedrun", 3.0
    expected.run.micro_batch, expected.evaluation.val_every, expected.checkpoints.keep = 2, 7, 9
    expected.terminal.quiet = True
    assert config == expected


def with_a_closed_pipe(script, *arguments, cwd):
    """The result of `script | head`, where head has ended before the script writes."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=environment({}), stdout=writer, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writer)


@pytest.mark.parametrize("script", ["train.py", "report.py"])
def test_help_to_a_closed_pipe_ends_without_a_message(script, tmp_path):
    result = with_a_closed_pipe(script, "--help", cwd=tmp_path)
    assert (result.stderr, result.returncode) == (b"", 128 + signal.SIGPIPE)


def test_output_to_a_closed_pipe_ends_without_a_message_and_results_are_saved(world, tmp_path):
    save_model(tmp_path / "model", seed=1)
    questions = ("--data", world / "data/stories/lambada.txt", "--text", "other", "--device", "cpu")
    result = with_a_closed_pipe("eval_lambada.py", "--ckpt", "model", *questions, "--out", "r.json", cwd=tmp_path)
    assert result.stderr == b""
    assert json.loads((tmp_path / "r.json").read_text())[0]["total"] == 40
    sampled = with_a_closed_pipe("sample.py", "--ckpt", "model", "--tokens", 3, "--device", "cpu", cwd=tmp_path)
    assert sampled.stderr == b""
    failed = with_a_closed_pipe("sample.py", "--ckpt", "logs/none", cwd=tmp_path)
    assert failed.stderr.startswith(b"error: ") and failed.returncode == 2


def test_a_full_disk_below_the_output_is_an_error(world, tmp_path):
    save_model(tmp_path / "model", seed=1)
    with open("/dev/full", "wb") as full:
        command = [sys.executable, ROOT / "sample.py", "--ckpt", "model", "--tokens", "3", "--device", "cpu"]
        result = subprocess.run(
            command, cwd=tmp_path, env=environment({}), stdout=full, stderr=subprocess.PIPE, check=False
        )
    error = refused(subprocess.CompletedProcess(command, result.returncode, "", result.stderr.decode()))
    assert error.endswith("No space left on device. Free disk space and rerun the same command")


@pytest.mark.parametrize(
    "script, arguments, expected",
    [
        ("train.py", ["--optimizer", "sgd"], "Expected one of ('adamw', 'muon')."),
        ("eval_lambada.py", ["--text", "x"], "Expected one of ('openai', 'standard', 'other')."),
        ("eval_lambada.py", ["--compare", "a"], "Missing value for argument '--compare'. Expected 2 values."),
        (
            "fineweb.py",
            ["--source", "a.txt", "b.txt"],
            "2 names in place of one glob. Put it in quotes, as --source 'my/",
        ),
        ("fineweb.py", ["--source"], "--source: a value is missing. Use a glob in quotes, as --source 'my/*.txt'"),
        ("train.py", ["--micro-batch", "x"], "--micro-batch: 'x' is neither an integer nor auto"),
        ("train.py", ["--tokens", "20M"], "--tokens: '20M' must be an integer, such as 150_000_000 or 1.5e8"),
        ("train.py", ["--seq-len", "1.5"], "--seq-len: '1.5' must be an integer, such as 150_000_000 or 1.5e8"),
        ("train.py", ["--lr", "x"], "--lr: 'x' must be a number, such as 0.001 or 1e-3"),
        ("train.py", ["--tokens", "1e300"], "--tokens: '1e300' must be an integer, such as"),
        ("train.py", ["--tokens", "nan"], "--tokens: 'nan' must be an integer, such as"),
        ("train.py", ["--steps", "inf"], "--steps: 'inf' must be an integer, such as 150_000_000 or 1.5e8"),
    ],
)
def test_errors_of_the_parser_name_no_type_of_python(script, arguments, expected, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.parse(sys.modules[script.removesuffix(".py")].Config, "", arguments)
    error = capsys.readouterr().err
    assert expected in error
    assert not re.search(r"None|\[bold\]|typing|<class", error)


def test_integers_may_have_underscores_or_an_exponent():
    options = ["--tokens", "1.5e8", "--steps", "1e3", "--micro-batch", "4e0", "--batch-tokens", "65_536"]
    config = cli.parse(train.Config, "", [*options, "--seed", "9007199254740993.0"])
    values = (config.run.tokens, config.recipe.steps, config.run.micro_batch, config.run.batch_tokens)
    assert values == (150_000_000, 1000, 4, 65_536)
    assert config.recipe.seed == 9007199254740993  # no float
    assert all(type(value) is int for value in values)


def test_mistyped_option_is_answered_with_the_nearest(tmp_path):
    result = run("train.py", "--batch-token", 2048, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert "--batch-tokens INT" in result.stdout + result.stderr


def test_quiet_training_prints_only_results(world):
    result = run("train.py", *TRAIN, "--run", "quiet", "--steps", 3, "--quiet", cwd=world)
    assert re.findall(r"step \d.*", result.stdout) == re.findall(r"step [03]/3 \| val_loss .*", result.stdout)
    assert result.stdout.count("val_loss") == 2
    assert "tok/s" not in result.stdout
    assert result.stderr == ""


def test_progress_bars_are_shown_only_on_a_terminal(monkeypatch, capsys):
    for is_terminal, ci, shown in ((True, "", True), (True, "1", False), (False, "", False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        monkeypatch.setenv("CI", ci)
        assert isinstance(cli.progress_bar(total=1), tqdm) is shown
        monkeypatch.setattr(cli, "LINE_SECONDS", 0)
        for hidden in ({"hidden": True}, {"lines": False}):
            if not (shown and "lines" in hidden):
                assert [*cli.progress_bar("ab", **hidden)] == ["a", "b"]
        monkeypatch.setattr(cli.terminal, "quiet", True)
        assert [*cli.progress_bar("ab")] == ["a", "b"]
        monkeypatch.undo()
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert not [line for line in lines if "2/2" in line]


def test_without_a_terminal_progress_is_a_line_every_30_seconds(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(cli.time, "monotonic", lambda: now)
    bar = cli.progress_bar(total=10_042, desc="HellaSwag", unit="requests")
    for seconds in (10, 29, 31, 60, 62, 63):
        now = 100.0 + seconds
        bar.update(800)
    assert capsys.readouterr().err.splitlines() == [
        "HellaSwag: 2,400/10,042 requests | 77.4 requests/s | 01:38 left",
        "HellaSwag: 4,000/10,042 requests | 64.5 requests/s | 01:33 left",
    ]
    for _ in cli.progress_bar(range(2), unit="files"):
        now += 40
    with cli.progress_bar(desc="tokens", unit="tok", unit_scale=True) as bar:
        now += 40
        bar.update(2_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "1/2 files | 0.025 files/s | 00:40 left",
        "2/2 files | 0.025 files/s | 00:00 left",
        "tokens: 2.00M tok | 50.0k tok/s",
    ]


def test_all_long_work_shows_its_progress_without_a_terminal(world, tmp_path):
    """With a line at every update in place of one every 30 seconds."""
    (tmp_path / "always.py").write_text(
        "import runpy, sys\nfrom core import cli\n"
        "cli.LINE_SECONDS = 0\ndel sys.argv[0]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )

    def lines(script, *arguments, ranks=1):
        start = partial(on_ranks, ranks) if ranks > 1 else run
        return start(tmp_path / "always.py", ROOT / script, *arguments, cwd=world).stderr

    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": f"Story {i}."}) + "\n" for i in range(50)))
    few = ("--source", tmp_path / "few.jsonl", "--encoding", "data/stories", "--out", tmp_path / "few")
    preparation = lines("fineweb.py", *few, "--val-tokens", 64)
    assert re.search(r"^tokens: \S+/\S+ tok \| \S+ tok/s \| \d\d:\d\d left$", preparation, re.M)
    assert "checking shards: 2/2 shards" in lines("fineweb.py", "--verify", tmp_path / "few")
    training = lines("train.py", *TRAIN, "--run", "lines", "--steps", 3)
    assert re.search(r"^validation: \d+/\d+ batches", training, re.M)
    assert " steps" not in training  # they have their own lines
    save_model(tmp_path / "model", seed=1)
    questions = ("--data", "data/stories/lambada.txt", "--text", "other", "--device", "cpu", "--batch-tokens", 300)
    for ranks in (1, 2):
        scoring = lines("eval_lambada.py", "--ckpt", tmp_path / "model", *questions, ranks=ranks)
        found = [(int(a), int(b)) for a, b in re.findall(r"^LAMBADA.*: (\d+)/(\d+) requests", scoring, re.M)]
        assert len(found) > 1
        assert {total for _, total in found} == {found[-1][0]}
        assert [done for done, _ in found] == sorted({done for done, _ in found})  # of one rank alone
