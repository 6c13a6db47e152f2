"""benchmarks/time_to_loss.py: how many times faster a loss is reached, and a message if no run reaches it."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
from conftest import children, ended, run, started, wait_until

from benchmarks.time_to_loss import RISE_STEPS, Config, Outcome, largest_rise, load, main, run_name, times_faster
from core import cli
from core.files import METRICS, read_metrics
from core.train.recipe import RECIPES


def outcome(seconds, loss):
    return Outcome("run", "ours", "a run", seconds, seconds, loss, "", [], {})


@pytest.mark.parametrize(
    "runs, expected",
    [
        ([(10, 5.0), (20, 4.0)], (5.0, False)),  # the baseline's 4.0 at 20 s
        ([(20, 3.5), (10, 4.5)], (100 / math.sqrt(200), False)),  # half way between, in log(seconds)
        ([(10, 5.0), (20, 4.5), (40, 3.5), (80, 3.0)], (100 / math.sqrt(800), False)),
        ([(10, 3.9), (20, 3.5)], (10.0, True)),  # all end below: a lower bound
        ([(50, 5.0), (90, 4.01)], (None, False)),
    ],
)
def test_seconds_at_the_loss_are_interpolated_between_two_runs(runs, expected):
    ratio, is_bound = times_faster(outcome(100, 4.0), [outcome(*run) for run in runs])
    assert (ratio, is_bound) == (expected[0] and pytest.approx(expected[0]), expected[1])


@pytest.mark.parametrize(
    "losses, rise",
    [
        ([9 - i / 100 for i in range(200)], 0.0),  # falls everywhere
        ([4.0] * 100 + [5.0] * RISE_STEPS + [3.0] * 50, 1.0),
        ([4.0] * 100 + [5.0] * (RISE_STEPS // 4) + [3.0] * 50, 0.25),  # a quarter of the steps
        ([5.0] * 50 + [4.0] * 50 + [4.5] * 50 + [3.0] * 50 + [3.25] * 50, 0.5),  # the larger one of two
        ([1.0, 2.0], 0.0),
    ],
)
def test_largest_rise_is_that_of_the_mean_loss(losses, rise):
    assert largest_rise(losses) == pytest.approx(rise)
    assert RISE_STEPS % RECIPES["speedrun"].long_every == 0  # each mean has equally many steps with long sequences


def test_both_recipes_from_scratch(world, monkeypatch, capsys):
    command = ("--data", "data/small", "--preset", "tiny", "--seq-len", 64, "--device", "cpu", "--val-tokens", 2560)
    command += ("--tokens", 40_000, "--ours-tokens", 20_000, "--baseline=--batch-tokens 2048")
    command += ("--ours=--recipe speedrun --first-batch-tokens 512",)
    output = run("benchmarks.time_to_loss", *command, cwd=world).stdout
    found = json.loads((world / "logs/time-to-loss.json").read_text(encoding="utf-8"))
    baseline, own = found["runs"]
    assert [baseline["tokens"], own["tokens"]] == [19 * 2048, 39 * 512]
    assert own["loss"] < baseline["loss"] - 0.5
    assert found["ratios"][0]["at_least"]
    assert found["ratios"][0]["times_faster"] == baseline["seconds"] / own["seconds"]
    page = (world / "logs/time-to-loss.md").read_text(encoding="utf-8")
    assert f": at least {found['ratios'][0]['times_faster']:.2f} times faster to the same loss." in page
    assert output.endswith(f"\n{page}\n")
    assert (world / "logs/time-to-loss.png").stat().st_size > 10_000
    monkeypatch.chdir(world)
    main(Config(**found["config"] | {"terminal": cli.Terminal()}))
    assert capsys.readouterr().out == f"{page}\n"  # both runs are finished: nothing is trained
    joined = load(world / "logs/time-to-loss.json")
    assert [(each.name, each.kind) for each in joined] == [(baseline["name"], "original"), (own["name"], "ours")]
    with pytest.raises(ValueError, match=r"time-to-loss\.md was not written by this script"):
        load(world / "logs/time-to-loss.md")


def test_a_run_that_a_signal_stopped_is_not_finished(world, tmp_path):
    command = ("--data", world / "data/small", "--preset", "tiny", "--seq-len", 64, "--device", "cpu")
    command += ("--val-tokens", 640, "--tokens", 20_000, "--ours-tokens", 10_000_000, "--ours=--batch-tokens 512")
    with started("benchmarks.time_to_loss", *command, cwd=tmp_path) as process:

        def logged():
            return [len(read_metrics(path.parent)) for path in tmp_path.glob(f"logs/*/{METRICS}")]

        assert wait_until(lambda: logged() > [1], process)
        os.kill(children(process.pid)[0], signal.SIGTERM)
        result = ended(process)
    assert result.returncode == 2
    assert "Rerun the same command to resume it" in result.stderr
    assert not [*tmp_path.glob("logs/*/finished")]


def test_another_option_or_recipe_is_another_run(monkeypatch):
    config = Config(data="d")
    changes = [{"gpus": 2}, {"data": "e"}, {"preset": "tiny"}, {"seq_len": 64}, {"val_tokens": 5}, {"device": "cpu"}]
    names = [run_name(replace(config, **change), "ours", "--lr 1", 9, 1)[0] for change in ({}, *changes)]
    names += [run_name(config, *given)[0] for given in (("a", "--lr 1", 9, 1), ("ours", "--lr 2", 9, 1))]
    names += [run_name(config, *given)[0] for given in (("ours", "--lr 1", 8, 1), ("ours", "--lr 1", 9, 2))]
    assert len(set(names)) == len(names)
    assert run_name(replace(config, name="other", lambada="file"), "ours", "--lr 1", 9, 1)[0] == names[0]
    monkeypatch.setitem(RECIPES, "speedrun", replace(RECIPES["speedrun"], weight_decay=0.02))
    assert run_name(config, "ours", "--lr 1", 9, 1)[0] not in names
