"""--help explains every option, a mistyped option is answered with the nearest one, and --quiet keeps the results."""

import re
import sys

import pytest
from conftest import option_names, run

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


def help_of(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
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
    assert "None" not in text


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
    expected.run.data, expected.run.name, expected.run.no_verify = "d", "r", True
    expected.recipe.name, expected.recipe.lr = "speedrun", 3.0
    expected.system.micro_batch, expected.evaluation.val_every, expected.checkpoints.keep = 2, 7, 9
    expected.terminal.quiet = True
    assert config == expected


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


def test_progress_bars_are_shown_only_on_a_terminal(monkeypatch):
    for terminal, environment, shown in ((True, "", True), (True, "1", False), (False, "", False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setenv("CI", environment)
        assert bool(cli.progress_bar(total=1, file=sys.stderr).disable) is not shown
        monkeypatch.setattr(cli.terminal, "quiet", True)
        assert cli.progress_bar(total=1, file=sys.stderr).disable
        monkeypatch.undo()
