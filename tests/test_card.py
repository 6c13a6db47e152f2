"""Each checkpoint has a model card with the facts of the run, in the format of the Hugging Face hub."""

import json
import re
import shutil

import pytest
import torch
from conftest import train_here
from huggingface_hub import ModelCard

from core.checkpoint import find_damage
from core.train.model_card import model_card

RUN = ("--data", "data/small", "--run", "carded", "--preset", "tiny", "--seq-len", 64, "--batch-tokens", 2048)
RUN += ("--device", "cpu", "--micro-batch", 16, "--steps", 4, "--save-every", 2, "--val-every", 2)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("carded")
    shutil.copytree(world / "data", folder / "data")
    lambada = ("--eval-lambada", "data/stories/lambada.txt", "--eval-every", 2)
    train_here(*RUN, *lambada, cwd=folder)
    return folder


def rows(card):
    """The table of a card as a dictionary by the first cell."""
    lines = [line for line in card.splitlines() if line.startswith("| ") and line != "| | |"]
    return dict(line.strip("| ").split(" | ", 1) for line in lines)


def test_the_card_has_the_measurements_of_its_step(trained):
    run = trained / "logs/carded"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    manifest = json.loads((trained / "data/small/manifest.json").read_text(encoding="utf-8"))
    train_tokens = sum(shard["tokens"] for shard in manifest["shards"] if shard["split"] == "train")
    for step in (2, 4):
        card = (run / f"checkpoints/step_{step:06d}/README.md").read_text(encoding="utf-8")
        at_step = {line["split"]: line for line in metrics if line["step"] == step}
        found = rows(card)
        assert f"# carded, step {step}\n" in card
        assert f"trained from scratch, after step {step} of 4." in card
        assert found["validation loss"].startswith(f"{at_step['val']['loss']:.4f} nats per token")
        assert f"({at_step['lambada']['correct']} of 40 in lambada.txt, step {step})" in found["LAMBADA, `openai`"]
        assert found["tokens seen"] == f"{2048 * step:,}, {2048 * step / train_tokens:.2f} epochs"
        assert found["data"] == f"stories.jsonl: {train_tokens:,} training tokens"
        assert "lr 0.0006" in found["recipe"]
        assert torch.__version__ in found["computed with"]


def test_a_card_generated_later_is_the_same(trained):
    manifest = json.loads((trained / "data/small/manifest.json").read_text(encoding="utf-8"))
    run = trained / "logs/carded"
    for step in (2, 4):
        assert model_card(run, manifest, step) == (run / f"checkpoints/step_{step:06d}/README.md").read_text(
            encoding="utf-8"
        )


def test_a_run_resumed_without_lambada_has_a_card(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "logs/carded/checkpoints/step_000004")
    train_here(*RUN, cwd=tmp_path)
    card = (tmp_path / "logs/carded/checkpoints/step_000004/README.md").read_text(encoding="utf-8")
    assert re.search(r"of 40, step 2\)", rows(card)["LAMBADA, `openai`"])


def test_the_card_has_hellaswag_too(trained, tmp_path):
    run = shutil.copytree(trained / "logs/carded", tmp_path / "carded")
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(facts | {"eval_hellaswag": "data/endings.jsonl"}), encoding="utf-8")
    line = {"step": 2, "tokens": 4096, "split": "hellaswag", "protocol": "completion-norm", "accuracy": 0.25}
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        metrics.write(json.dumps(line | {"correct": 5, "total": 20}) + "\n")
    manifest = json.loads((trained / "data/small/manifest.json").read_text(encoding="utf-8"))
    found = rows(model_card(run, manifest, 4))
    assert found["HellaSwag, `completion-norm`"] == "25.00 % (5 of 20 in endings.jsonl, step 2)"
    assert "LAMBADA, `openai`" in found


def test_the_hub_reads_the_card(trained):
    card = ModelCard.load(trained / "logs/carded/checkpoints/step_000004/README.md")
    card.validate = None  # it sends the card to the hub
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")


def test_a_failing_card_does_not_prevent_the_checkpoint(world, tmp_path, monkeypatch, capsys):
    shutil.copytree(world / "data/small", tmp_path / "data/small")
    monkeypatch.setattr("core.train.model_card.SETTINGS", ("unknown",))
    train_here(*RUN, cwd=tmp_path)
    folder = tmp_path / "logs/carded/checkpoints/step_000004"
    assert find_damage(folder) is None
    assert not (folder / "README.md").exists()
    assert "the checkpoint of step 4 has no model card (KeyError: 'unknown')" in capsys.readouterr().out
