"""benchmarks/time_to_loss.py says how much sooner a loss was reached, and says so where it wasn't."""

import json
import math
from dataclasses import replace

import pytest
from conftest import run

from benchmarks.time_to_loss import Config, Outcome, earlier, main, named, times_sooner


def ended(seconds, loss):
    return Outcome("run", "ours", "a run", seconds, seconds, loss, "", [], {})


@pytest.mark.parametrize(
    "ours, expected",
    [
        ([(10, 5.0), (20, 4.0)], (5.0, False)),  # the baseline's 4.0 at 20 s
        ([(20, 3.5), (10, 4.5)], (100 / math.sqrt(200), False)),  # half way between, in log(seconds)
        ([(10, 5.0), (20, 4.5), (40, 3.5), (80, 3.0)], (100 / math.sqrt(800), False)),
        ([(10, 3.9), (20, 3.5)], (10.0, True)),  # all are below: sooner than that
        ([(50, 5.0), (90, 4.01)], (None, False)),
    ],
)
def test_the_seconds_at_the_loss_lie_between_two_runs(ours, expected):
    sooner, bound = times_sooner(ended(100, 4.0), [ended(*run) for run in ours])
    assert (sooner, bound) == (expected[0] and pytest.approx(expected[0]), expected[1])


def test_both_recipes_from_scratch(world, monkeypatch, capsys):
    command = ("--data", "data/small", "--preset", "tiny", "--seq-len", 64, "--device", "cpu", "--val-tokens", 2560)
    command += ("--tokens", 40_000, "--ours-tokens", 20_000, "--baseline=--batch-tokens 2048")
    command += ("--ours=--recipe speedrun --first-batch-tokens 512",)
    said = run("benchmarks/time_to_loss.py", *command, cwd=world).stdout
    found = json.loads((world / "logs/time-to-loss.json").read_text())
    baseline, ours = found["runs"]
    assert [baseline["tokens"], ours["tokens"]] == [19 * 2048, 39 * 512]
    assert ours["loss"] < baseline["loss"] - 0.5
    assert found["ratios"][0]["at_least"]
    assert found["ratios"][0]["times_sooner"] == baseline["seconds"] / ours["seconds"]
    assert f"reached at least {found['ratios'][0]['times_sooner']:.2f} times sooner" in said
    assert (world / "logs/time-to-loss.png").stat().st_size > 10_000
    monkeypatch.chdir(world)
    main(Config(**found["config"]))
    assert capsys.readouterr().out == said[said.index("seed 1337") :]  # nothing is trained: both runs are finished
    joined = earlier(world / "logs/time-to-loss.json")
    assert [(each.name, each.kind) for each in joined] == [(baseline["name"], "original"), (ours["name"], "ours")]
    with pytest.raises(ValueError, match=r"time-to-loss\.md is not what this script writes"):
        earlier(world / "logs/time-to-loss.md")


def test_another_option_is_another_run():
    config = Config(data="d")
    changes = [{"gpus": 2}, {"data": "e"}, {"preset": "tiny"}, {"seq_len": 64}, {"val_tokens": 5}, {"device": "cpu"}]
    names = [named(replace(config, **change), "ours", "--lr 1", 9, 1)[0] for change in ({}, *changes)]
    names += [named(config, *given)[0] for given in (("a", "--lr 1", 9, 1), ("ours", "--lr 2", 9, 1))]
    names += [named(config, *given)[0] for given in (("ours", "--lr 1", 8, 1), ("ours", "--lr 1", 9, 2))]
    assert len(set(names)) == len(names)
    assert named(replace(config, name="other", lambada="file"), "ours", "--lr 1", 9, 1)[0] == names[0]
