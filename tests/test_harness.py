"""LAMBADA: answers and log-probabilities equal lm-evaluation-harness's on the same model folder."""

import json
import math
import os
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import ENCODING, execute, run, save_model

from benchmarks import commands
from core.data import tokenizer
from model import GPT

pytest.importorskip("lm_eval")

# A separate process: lm_eval seeds random generators and must be imported offline.
HARNESS = r"""
import json, sys
from benchmarks.harness import harness
for folder in sys.argv[1:]:
    passages = [line.rstrip("\n") for line in open(f"{folder}/passages.txt", encoding="utf-8")]
    found, *_ = harness(f"{folder}/model", passages, 8, "cpu")
    json.dump(found, open(f"{folder}/answers.json", "w"))
"""
OFFICIAL = "lambada_development_plain_text.txt"


@torch.no_grad()
def with_predicted_endings(model, encoding, passages):
    """Passages whose last word is the model's prediction, in all of its tokens or in the last one only."""
    found = []
    for passage in passages:
        context, _, own = passage.rpartition(" ")
        before = encoding.encode_ordinary(context)
        for prefix, count in (([], 1), ([], 2), (encoding.encode_ordinary(" " + own), 1)):
            ids = list(prefix)
            for _ in range(count):
                tokens = torch.tensor([(before + ids)[-model.config.n_positions :]])
                ids.append(model(tokens)[0, -1].argmax().item())
            word = encoding.decode(ids)
            is_word = word[0] == " " and word[1:] and word[1:].isprintable() and " " not in word[1:]
            if is_word and encoding.encode_ordinary(word) == ids:
                found.append(context + word)
    return found


def write_passages(folder, model, encoding, passages):
    """Write the passages, and those with endings that the model predicts, next to the model."""
    passages = passages + with_predicted_endings(model, encoding, passages)
    passages += [space.join(passages[0].rsplit(" ", 1)) for space in ("  ", "\t ")]
    (folder / "passages.txt").write_text("".join(passage + "\n" for passage in passages), encoding="utf-8")


def project_model(folder, world):
    folder.mkdir()
    model = save_model(folder / "model", seed=1)
    write_passages(folder, model, ENCODING, (world / "data/stories/lambada.txt").read_text().splitlines())
    return folder


def transformers_model(folder):
    """A model of transformers and LAMBADA's own passages; None if they or GPT-2's vocabulary are not available."""
    from transformers import GPT2Config, GPT2LMHeadModel

    data = Path(os.environ.get("GPT2_TEST_EVAL", ""), OFFICIAL)
    try:
        encoding = tokenizer.load("gpt2")
    except ValueError:
        return None
    if not data.is_file():
        return None
    torch.manual_seed(1)
    reference = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2))
    with torch.no_grad():
        for p in reference.parameters():
            if p.dim() == 2:
                p.mul_(4)
    reference.save_pretrained(folder / "model")
    tokenizer.save(encoding, folder / "model")
    with open(data, encoding="utf-8") as file:
        passages = [line.rstrip("\n") for line in islice(file, 24)]
    write_passages(folder, GPT.from_pretrained(folder / "model"), encoding, passages)
    return folder


@pytest.fixture(scope="module")
def answered(world, tmp_path_factory):
    """Folders with a model, its passages, and the harness's answers; the second is None if it is not available."""
    folder = tmp_path_factory.mktemp("harness")
    found = project_model(folder / "project", world), transformers_model(folder / "transformers")
    execute([sys.executable, "-c", HARNESS, *(each for each in found if each)], folder, True, {})
    return found


def assert_equal(folder, text):
    """Score the passages and compare with the harness's answers."""
    places = ("--out", "results.json", "--items", "items.jsonl")
    common = ("--ckpt", "model", "--data", "passages.txt", "--text", text, "--device", "cpu")
    run("eval_lambada.py", *common, *places, cwd=folder)
    (row,) = json.loads((folder / "results.json").read_text())
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    logprobs, greedy = zip(*json.loads((folder / "answers.json").read_text()), strict=True)
    assert len(items) == row["total"] == len((folder / "passages.txt").read_text(encoding="utf-8").split("\n")) - 1
    assert (row["unscored"], row["near_ties"]) == ({}, 0)
    assert [item["logprob"] for item in items] == pytest.approx(logprobs, abs=1e-4)
    assert [item["correct"] for item in items] == list(greedy)
    assert row["correct"] == sum(greedy)
    assert row["perplexity"] == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), rel=1e-5)
    assert 10 < row["correct"] < row["total"] - 10
    return row


def test_a_checkpoint_of_this_project_has_equal_scores(answered):
    row = assert_equal(answered[0], "openai")
    assert row["protocol"] == "openai"
    assert sum(row["remarks"].values()) > 10  # both truncate contexts to the model's context length


def test_a_model_of_transformers_has_equal_scores_on_lambadas_own_passages(answered):
    if answered[1] is None:
        pytest.skip(f"GPT2_TEST_EVAL has no {OFFICIAL}, or GPT-2's vocabulary is not available")
    row = assert_equal(answered[1], "standard")
    assert (row["protocol"], row["remarks"]) == ("standard", {})


def test_whole_commands_are_timed_and_their_scores_equal(world, tmp_path):
    save_model(tmp_path / "model", seed=5)
    passages = [line.split()[-12:] for line in (world / "data/stories/lambada.txt").read_text().splitlines()[:20]]
    passages[7][-1] += '\n"'  # as in seven of LAMBADA's passages
    rows = [json.dumps({"text": " ".join(words)}) + "\n" for words in passages]
    (tmp_path / "passages.jsonl").write_text("".join(rows))
    options = ("--device", "cpu", "--dtypes", "float32", "--batch-sizes", 4, "--out", "speed.json")
    run("benchmarks.commands", "--ckpt", "model", "--lambada", "passages.jsonl", *options, cwd=tmp_path)
    own, harness = json.loads((tmp_path / "speed.json").read_text())["measurements"]
    assert (own["batch_size"], harness["batch_size"]) == (0, 4)
    assert own["score"] == pytest.approx(harness["score"])
    assert own["questions"] == harness["questions"] == 20
    assert f"{harness['seconds'] / own['seconds']:.2f}" in (tmp_path / "speed.md").read_text()


def test_a_file_with_fewer_questions_is_repeated_with_other_labels():
    question = {"activity_label": "Tale", "ctx": "He sat. Then he", "endings": ["a", "b"], "label": 0}
    found = [*commands.repeated([question, question | {"ctx": "So"}], 5)]
    assert [q["activity_label"] for q in found] == ["Tale", "Tale", "1 Tale", "1 Tale", "2 Tale"]
    assert [(q["ctx_a"], q["ctx_b"]) for q in found[:2]] == [("He sat.", "Then he"), ("", "So")]
