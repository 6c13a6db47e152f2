"""The LAMBADA curve of a run: what eval_lambada.py finds at those steps, from all ranks, in metrics and the picture."""

import contextlib
import json
import time

import pytest
import torch
from conftest import TRAIN, on_ranks, run

import eval_lambada
import report
import train
from core.distributed import Ranks
from core.eval import scoring
from core.files import read_metrics
from core.train.validation import LambadaCurve

STEPS, EVERY = 12, 5
RUNS = ("scored", "unscored")
RECIPE = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--save-every", EVERY, "--lr", "3e-3", "--warmup-steps", 2)
SCORED = ("--eval-lambada", "data/stories/lambada.txt", "--eval-every", EVERY)


@pytest.fixture(scope="module")
def scored(world):
    said = run("train.py", *RECIPE, *SCORED, "--run", "scored", cwd=world).stdout
    return world / "logs/scored", said


def curve(folder):
    return [line for line in read_metrics(folder) if line["split"] == "lambada"]


def test_the_curve_is_what_the_script_finds_at_those_steps(world, scored, monkeypatch):
    monkeypatch.chdir(world)
    folder, said = scored
    lines = curve(folder)
    assert [line["step"] for line in lines] == [0, 5, 10, STEPS]
    for line in lines[1:]:
        checkpoint = f"logs/scored/checkpoints/step_{line['step']:06d}"
        passages = {"data": "data/stories/lambada.txt", "text": "other"}
        eval_lambada.main(eval_lambada.Config(ckpt=(checkpoint,), **passages, device="cpu", out="out.json"))
        (row,) = json.loads((world / "out.json").read_text())
        assert {name: row[name] for name in ("protocol", "correct", "total", "accuracy")}.items() <= line.items()
        assert line["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)
        assert f"LAMBADA openai {line['accuracy']:.2%}, {line['correct']} of {line['total']}, perplexity" in said
    assert len({line["perplexity"] for line in lines}) == len(lines)


def test_scoring_changes_nothing_of_the_run_and_none_of_its_time(world, scored, monkeypatch):
    monkeypatch.chdir(world)
    in_this_process(run="unscored", steps=STEPS, lr=3e-3, warmup_steps=2, eval_lambada=None)
    names = ("loss", "grad_norm", "lr")
    runs = [[line for line in read_metrics(world / "logs" / name) if line["split"] == "train"] for name in RUNS]
    assert len(runs[0]) == STEPS
    assert [[line[name] for name in names] for line in runs[0]] == [[line[name] for name in names] for line in runs[1]]
    before = {line["step"]: line["seconds"] for line in runs[0]}
    assert all(line["seconds"] == before.get(line["step"], 0.0) for line in curve(scored[0]))


def in_this_process(**changes):
    tiny = {"preset": "tiny", "seq_len": 64, "batch_tokens": 2048, "micro_batch": 16, "device": "cpu"}
    scored = {"data": "data/small", "steps": 4, "eval_lambada": "data/stories/lambada.txt", "eval_every": 2}
    train.main(train.Config(**(tiny | scored | changes)))


def test_slow_scoring_is_no_part_of_the_steps_time(world, monkeypatch):
    monkeypatch.chdir(world)
    score = LambadaCurve.run

    def slow(curve, model):
        time.sleep(1)
        return score(curve, model)

    monkeypatch.setattr(LambadaCurve, "run", slow)
    in_this_process(run="slowly-scored")
    assert read_metrics(world / "logs/slowly-scored")[-1]["seconds"] < 1


def test_the_ranks_share_the_passages(world, monkeypatch):
    monkeypatch.chdir(world)
    shares = []

    def score(model, groups, *, ranks, **how):
        shares.append(ranks)
        return scoring.score(model, groups, ranks=ranks, **how)

    monkeypatch.setattr(evaluate, "score", score)
    opened = Ranks(0, 1, torch.device("cpu"))
    monkeypatch.setattr(train, "process_group", lambda *_: contextlib.nullcontext(opened))
    in_this_process(run="shared")
    assert [ranks is opened for ranks in shares] == [True] * 3


def test_two_ranks_draw_the_same_curve(world, scored):
    on_ranks(2, "train.py", *RECIPE, *SCORED, "--run-name", "scored-by-two", cwd=world)
    ours, theirs = curve(world / "logs/scored-by-two"), curve(scored[0])
    for name in ("step", "tokens", "correct", "total"):
        assert [line[name] for line in ours] == [line[name] for line in theirs]
    assert [line["perplexity"] for line in ours] == pytest.approx([line["perplexity"] for line in theirs], rel=1e-4)


def test_eval_only_scores_it_too(world, scored, monkeypatch, capsys):
    monkeypatch.chdir(world)
    in_this_process(run="scored", eval_only=True)
    assert f"LAMBADA openai {curve(scored[0])[-1]['accuracy']:.2%}, " in capsys.readouterr().out


def test_the_picture_has_the_curve(world, scored, monkeypatch):
    monkeypatch.chdir(world)
    run = report.load_run("scored", None)
    (panel,) = (axes for axes in report.picture([run]).axes if axes.get_ylabel() == "LAMBADA accuracy (%), openai")
    lines = curve(scored[0])
    assert list(panel.lines[0].get_xdata()) == [line["tokens"] for line in lines]
    assert list(panel.lines[0].get_ydata()) == [100 * line["accuracy"] for line in lines]
    run.lambada.clear()
    assert not any("LAMBADA" in axes.get_ylabel() for axes in report.picture([run]).axes)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "none.txt"), ("two words\nlonely\n", "none.txt, line 2: a passage has at least two words")],
)
def test_a_file_that_cannot_be_scored_is_refused_before_the_first_step(world, monkeypatch, content, message):
    monkeypatch.chdir(world)
    path = world / "none.txt"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, OSError), match=message):  # which core.cli makes a sentence and exit status 2
        in_this_process(run="refused", eval_lambada="none.txt")
    assert not (world / "logs/refused").exists()
