"""LAMBADA during training: equal to eval_lambada.py at those steps, for any number of ranks, in metrics and plot."""

import contextlib
import json
import time

import pytest
import torch
from conftest import TRAIN, on_ranks, run, train_here

import eval_hellaswag
import eval_lambada
import report
import train
from core.distributed import Ranks
from core.eval import evaluate, hellaswag, scoring
from core.eval.lambada import LambadaConfig
from core.files import read_metrics
from core.train.validation import LambadaDuringTraining

STEPS, EVERY = 12, 5
RUNS = ("scored", "unscored")
RECIPE = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--save-every", EVERY, "--lr", "3e-3", "--warmup-steps", 2)
SCORED = ("--eval-lambada", "data/stories/lambada.txt", "--eval-every", EVERY)


@pytest.fixture(scope="module")
def scored(world):
    output = run("train.py", *RECIPE, *SCORED, "--run", "scored", cwd=world).stdout
    return world / "logs/scored", output


def lambada_lines(folder):
    return [line for line in read_metrics(folder) if line["split"] == "lambada"]


def test_the_scores_equal_those_of_the_script_at_the_same_steps(world, scored, monkeypatch):
    monkeypatch.chdir(world)
    folder, output = scored
    lines = lambada_lines(folder)
    assert [line["step"] for line in lines] == [0, 5, 10, STEPS]
    for line in lines[1:]:
        checkpoint = f"logs/scored/checkpoints/step_{line['step']:06d}"
        questions = LambadaConfig(data="data/stories/lambada.txt", text="other")
        scoring_config = evaluate.ScoringConfig(ckpt=(checkpoint,), device="cpu", out="out.json")
        eval_lambada.main(eval_lambada.Config(questions, scoring_config))
        (row,) = json.loads((world / "out.json").read_text())
        assert {name: row[name] for name in ("protocol", "correct", "total", "accuracy")}.items() <= line.items()
        assert line["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)
        assert f"LAMBADA openai {line['accuracy']:.2%} ({line['correct']} of {line['total']}) | perplexity" in output
    assert len({line["perplexity"] for line in lines}) == len(lines)


def test_hellaswag_is_scored_by_completion_norm_as_by_the_script(world, monkeypatch):
    monkeypatch.chdir(world)
    passages = (world / "data/stories/lambada.txt").read_text().splitlines()
    questions = [
        {"ctx": text, "endings": [f"{word} {word}." for word in text.split()[:4]], "label": i % 4}
        for i, text in enumerate(passages)
    ]
    (world / "hellaswag.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    options = ("--eval-hellaswag", "hellaswag.jsonl", "--eval-every", 4, "--run", "endings")
    output = run("train.py", *RECIPE, *options, "--steps", 8, "--save-every", 4, cwd=world).stdout
    lines = [line for line in read_metrics(world / "logs/endings") if line["split"] == "hellaswag"]
    assert [line["step"] for line in lines] == [0, 4, 8]
    config = hellaswag.HellaSwagConfig(data="hellaswag.jsonl", protocol=("completion-norm",))
    scoring_config = evaluate.ScoringConfig(ckpt=("logs/endings",), device="cpu", out="out.json")
    eval_hellaswag.main(eval_hellaswag.Config(config, scoring_config))
    (row,) = json.loads((world / "out.json").read_text())
    assert {name: row[name] for name in ("protocol", "correct", "total", "accuracy")}.items() <= lines[-1].items()
    assert f"HellaSwag completion-norm {row['accuracy']:.2%} ({row['correct']} of {row['total']})" in output


def test_scoring_changes_neither_the_steps_nor_their_time(world, scored, monkeypatch):
    monkeypatch.chdir(world)
    train_here(*RECIPE, "--run", "unscored", cwd=world)
    names = ("loss", "grad_norm", "lr")
    runs = [[line for line in read_metrics(world / "logs" / name) if line["split"] == "train"] for name in RUNS]
    assert len(runs[0]) == STEPS
    assert [[line[name] for name in names] for line in runs[0]] == [[line[name] for name in names] for line in runs[1]]
    before = {line["step"]: line["seconds"] for line in runs[0]}
    assert all(line["seconds"] == before.get(line["step"], 0.0) for line in lambada_lines(scored[0]))


def train_scored(world, name, *options):
    scored = ("--eval-lambada", "data/stories/lambada.txt", "--eval-every", 2)
    train_here(*TRAIN, "--data", "data/small", "--steps", 4, *scored, "--run", name, *options, cwd=world)


def test_slow_scoring_is_not_part_of_the_training_time(world, monkeypatch):
    monkeypatch.chdir(world)
    score = LambadaDuringTraining.run

    def slow(evaluation, model, **settings):
        time.sleep(1)
        return score(evaluation, model, **settings)

    monkeypatch.setattr(LambadaDuringTraining, "run", slow)
    train_scored(world, "slowly-scored")
    assert read_metrics(world / "logs/slowly-scored")[-1]["seconds"] < 1


def test_the_ranks_share_the_passages(world, monkeypatch):
    monkeypatch.chdir(world)
    shares = []

    def score(model, groups, *, ranks, **settings):
        shares.append(ranks)
        return scoring.score(model, groups, ranks=ranks, **settings)

    monkeypatch.setattr(evaluate, "score", score)
    all_ranks = Ranks(0, 1, torch.device("cpu"))
    monkeypatch.setattr(train, "process_group", lambda *_: contextlib.nullcontext(all_ranks))
    train_scored(world, "shared")
    assert [ranks is all_ranks for ranks in shares] == [True] * 3


def test_two_ranks_give_the_same_scores(world, scored):
    on_ranks(2, "train.py", *RECIPE, *SCORED, "--run-name", "scored-by-two", cwd=world)
    two, one = lambada_lines(world / "logs/scored-by-two"), lambada_lines(scored[0])
    for name in ("step", "tokens", "correct", "total"):
        assert [line[name] for line in two] == [line[name] for line in one]
    assert [line["perplexity"] for line in two] == pytest.approx([line["perplexity"] for line in one], rel=1e-4)


def test_eval_only_scores_lambada_too(world, scored, monkeypatch, capsys):
    monkeypatch.chdir(world)
    train_here(*RECIPE, *SCORED, "--run", "scored", "--eval-only", cwd=world)
    assert f"LAMBADA openai {lambada_lines(scored[0])[-1]['accuracy']:.2%} " in capsys.readouterr().out


def test_the_plot_has_the_scores(world, scored, monkeypatch):
    monkeypatch.chdir(world)
    run, title = report.load_run("scored"), "LAMBADA accuracy (%), openai"
    (panel,) = (axes for axes in report.build_figure([run], []).axes if axes.get_ylabel() == title)
    lines = lambada_lines(scored[0])
    assert list(panel.lines[0].get_xdata()) == [line["tokens"] for line in lines]
    assert list(panel.lines[0].get_ydata()) == [100 * line["accuracy"] for line in lines]
    run.lines["lambada"].clear()
    assert not any("LAMBADA" in axes.get_ylabel() for axes in report.build_figure([run], []).axes)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "none.txt"), ("two words\nlonely\n", "none.txt, line 2 has fewer than two words")],
)
def test_a_damaged_file_is_refused_before_the_first_step(world, monkeypatch, content, message):
    monkeypatch.chdir(world)
    path = world / "none.txt"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, OSError), match=message):  # core.cli prints one line and exits with status 2
        train_scored(world, "refused", "--eval-lambada", "none.txt")
    assert not (world / "logs/refused").exists()
