"""--help teaches every option, a mistyped one names the nearest, and --quiet leaves results alone."""

import re
import sys
from dataclasses import fields

import pytest
from conftest import run

import eval_cbt
import eval_hellaswag
import eval_lambada
import fineweb
import report
import sample
import train
from core import cli

SCRIPTS = (fineweb, train, eval_lambada, eval_cbt, eval_hellaswag, sample, report)
TRAIN = ("--data", "data/small", "--preset", "tiny", "--seq-len", 64, "--batch-tokens", 2048, "--device", "cpu")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_option_is_explained(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.parse(script.Config, script.__doc__, ["--help"])
    said = capsys.readouterr().out
    options = {part.split()[0]: part for part in re.split(r"\n  ?(?=--)", said)[1:]}
    for name in (field.name for field in fields(script.Config)):
        text = next(text for option, text in options.items() if name.replace("_", "-") in option)
        assert len(re.findall(r"[a-z]{2,}", text.split("\n\n")[0])) >= 3, f"{name} is not explained: {text}"
    assert "--quiet" in said
    assert "None" not in said


def test_the_settings_of_training_are_groups(capsys):
    with pytest.raises(SystemExit):
        cli.parse(train.Config, "", ["--help"])
    titles = re.findall(r"^ (\w+) options ", capsys.readouterr().out, re.MULTILINE)
    assert titles == ["origin", "recipe", "computation", "measurement", "survival", "terminal"]


def test_groups_are_one_config():
    given = ["--data", "d", "--lr", "3", "--micro-batch", "2", "--val-every", "7", "--keep", "9", "--no-verify"]
    config = cli.parse(train.Config, "", given)
    assert config == train.Config(data="d", lr=3.0, micro_batch=2, val_every=7, keep=9, verify=False)


def test_a_mistyped_option_names_the_nearest(tmp_path):
    done = run("train.py", "--batch-token", 2048, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "--batch-tokens INT" in done.stdout + done.stderr


def test_quiet_training_says_what_it_found_and_no_more(world):
    said = run("train.py", *TRAIN, "--run", "quiet", "--steps", 3, "--quiet", cwd=world)
    assert re.findall(r"step +\d", said.stdout) == ["step      0", "step      3"]  # the validations
    assert "ktok/s" not in said.stdout
    assert said.stderr == ""


def test_bars_are_for_those_who_watch(monkeypatch):
    for terminal, environment, shown in ((True, "", True), (True, "1", False), (False, "", False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setenv("CI", environment)
        assert bool(cli.progress_bar(total=1, file=sys.stderr).disable) is not shown
        monkeypatch.setattr(cli.terminal, "quiet", True)
        assert cli.progress_bar(total=1, file=sys.stderr).disable
        monkeypatch.undo()
