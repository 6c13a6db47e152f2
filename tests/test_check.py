"""--check: verdicts and exit codes; known values; and `make check-published` on stand-ins for the hub."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ENCODING, ROOT, run, save_model
from test_evaluation import make_result

from core.data import tokenizer
from core.eval import check, known_values, results
from core.eval.check import FAIL, MISSING, PASS, REFERENCE
from model import GPT, PRESETS


def verdicts(**changes):
    return [(row.measure, row.verdict) for row in check.compare([make_result(**changes)])]


@pytest.mark.parametrize(
    ("correct", "perplexity", "expected"),
    [
        (1678, 40.06, [PASS, PASS]),  # the count behind 32.56 %
        (1693, 40.06, [PASS, PASS]),  # 32.855, within 0.3 points
        (1694, 40.06, [FAIL, PASS]),
        (1663, 40.06, [PASS, PASS]),
        (1662, 40.06, [FAIL, PASS]),
        (1678, 40.45, [PASS, PASS]),
        (1678, 40.47, [PASS, FAIL]),
        (1678, 39.65, [PASS, FAIL]),
        (1678, None, [PASS, FAIL]),  # a diverged model
    ],
)
def test_a_score_passes_within_its_tolerance(correct, perplexity, expected):
    assert verdicts(correct=correct, perplexity=perplexity) == list(
        zip(("accuracy %", "perplexity"), expected, strict=True)
    )


def test_a_measure_that_was_not_published_is_not_compared():
    assert verdicts(size="gpt2-medium", correct=2216) == [("accuracy %", PASS)]
    assert verdicts(size=None) == [("accuracy %", MISSING)]
    assert verdicts(has_published=False) == [("accuracy %", MISSING)]
    perplexity = {"task": "wikitext", "correct": None, "protocol": "harness"}
    assert verdicts(**perplexity, perplexity=37.5) == [("perplexity", PASS)]
    assert verdicts(**perplexity, perplexity=38.0) == [("perplexity", FAIL)]
    assert verdicts(**perplexity, size="gpt2-xl") == [("perplexity", MISSING)]
    assert verdicts(**perplexity | {"protocol": "strided"}, subset="stride 512", size="gpt2-large") == [
        ("perplexity", FAIL)
    ]


def test_figures_of_unpublished_rules_are_references():
    assert [verdict for _, verdict in verdicts(protocol="stop-filter")] == [REFERENCE, REFERENCE]
    paper = {"task": "cbt", "protocol": "paper", "subset": "NE validation", "total": 2000}
    assert [verdict for _, verdict in verdicts(**paper)] == [REFERENCE]
    rows = check.compare([make_result(**paper)])
    assert "cbt paper is a reference: the paper's de-tokenizer is unpublished." in check.table(rows)


def test_both_denominators_of_the_originals_cbt_are_shown():
    """1,479 of 2,493 is 59.33 %; no count of 2,500 is."""
    result = make_result(task="cbt", protocol="sentence", subset="NE test", correct=1479, total=2500)
    (row,) = check.compare([result])
    assert (row.found, row.published, row.verdict) == ("59.16 (59.33 of 2,493)", "59.33", PASS)
    assert [check.compare([replace(result, correct=n)])[0].verdict for n in (1471, 1490, 1491)] == [FAIL, PASS, FAIL]
    assert not any(f"{100 * n / 2500:.2f}" == "59.33" for n in range(2501))


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ([PASS], 0),
        ([PASS, REFERENCE], 0),
        ([PASS, FAIL, MISSING], 1),
        ([PASS, MISSING], 2),
        ([REFERENCE], 2),
        ([], 2),
    ],
)
def test_the_exit_status_follows_from_the_verdicts(found, status):
    (row,) = check.compare([make_result(size="gpt2-medium")])
    assert check.status([replace(row, verdict=verdict) for verdict in found]) == status


COUNTS = [  # percentages of questions as published, and the counts behind them
    ("lambada", "openai", 1678, 5153),
    ("lambada", "standard", 1343, 5153),
    ("lambada", "last-token", 2405, 5153),
    ("lambada", "last-token-norm", 2456, 5153),
    ("lambada", "stop-filter", 2370, 5153),
    ("hellaswag", "harness", 2904, 10_042),
    ("hellaswag", "harness-norm", 3127, 10_042),
    ("hellaswag", "completion", 2871, 10_042),
    ("hellaswag", "completion-norm", 2967, 10_042),
    ("cbt", "sentence", 1479, 2493),
    ("cbt", "paper", 1753, 2000),
]


@pytest.mark.parametrize(("task", "protocol", "count", "total"), COUNTS)
def test_published_percentages_are_counts(task, protocol, count, total):
    figure = next(figure for figure in results.published(task) if figure["protocol"] == protocol)
    assert f"{100 * count / total:.2f}" == f"{figure['gpt2'][0]:.2f}"


def test_known_texts_have_the_known_tokens():
    """The facts about GPT-2's known values that need no weights."""
    try:
        encoding = tokenizer.load("gpt2")
    except ValueError:
        pytest.skip("GPT-2's vocabulary is not available")
    known = known_values.load()
    assert encoding.decode(known["greedy"]["prompt"]) == "The dog"
    assert encoding.decode(known["greedy"]["output"]).endswith("West Streets.\n\nThe dog")
    text = known["token_log_likelihoods"]["text"]
    for values in known["token_log_likelihoods"]["by_context"].values():
        assert len(values) == len(encoding.encode_ordinary(text)) == 17
    assert encoding.encode_ordinary(known["mean_loss"]["text"]) == [15496, 995, 0]
    assert len(known["training"]["losses"]) == known["training"]["steps"] == 10


SHARED = {"openai": "EleutherAI/lambada_openai", "standard": "cimec/lambada"}
README = "---\nconfigs:\n{configs}---\n"


def stand_in(folder, name, configs):
    """A data set of the hub as a folder. `configs`: rows by configuration and split."""
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    lines = ""
    for config in dict.fromkeys(config for config, _ in configs):
        lines += f"- config_name: {config}\n  data_files:\n"
        for split in (split for name, split in configs if name == config):
            text = "".join(json.dumps(row) + "\n" for row in configs[config, split])
            (target / f"{config}-{split}.jsonl").write_text(text, encoding="utf-8")
            lines += f"  - split: {split}\n    path: {config}-{split}.jsonl\n"
    (target / "README.md").write_text(README.format(configs=lines), encoding="utf-8")


def stand_ins(folder, world):
    """Folders with the names of the hub's data sets; `datasets` reads them in place of the hub."""
    passages = (world / "data/stories/lambada.txt").read_text().splitlines()[:25]
    rows = [{"text": passage} for passage in passages]
    stand_in(folder, "EleutherAI/lambada_openai", {("default", "test"): rows})
    stand_in(folder, "cimec/lambada", {("plain_text", "test"): rows})
    words = ["bell", "boat", "book", "drum", "flute", "kite", "lamp", "ring", "rope", "sack"]
    cloze = [
        {"sentences": [passage] * 20, "question": "Ana saw the XXXXX .", "answer": words[i % 10], "options": words}
        for i, passage in enumerate(passages)
    ]
    places = (("NE", "validation"), ("CN", "validation"), ("NE", "test"))
    stand_in(folder, "cam-cst/cbt", dict.fromkeys(places, cloze))
    stories = [
        {"activity_label": "Tale", "ctx_a": text, "ctx_b": "ana", "ctx": f"{text} ana", "label": str(i % 4),
         "endings": [f"took the {word}." for word in words[i % 6 : i % 6 + 4]], "ind": i}
        for i, text in enumerate(passages)
    ]  # fmt: skip
    stand_in(folder, "Rowan/hellaswag", {("default", "validation"): stories})
    lines = [line for passage in passages for line in ("", f" = {passage[:9]} = \n", "", f" {passage} \n")]
    stand_in(folder, "Salesforce/wikitext", {("wikitext-2-raw-v1", "test"): [{"text": line} for line in lines]})


@torch.no_grad()
def logits_after(model, ids):
    return model(torch.tensor([ids])).log_softmax(-1)[0]  # (T, V)


def plain_log_likelihoods(model, context, continuation):
    logprobs = logits_after(model, context + continuation)[len(context) - 1 : -1]
    return [logprobs[i, token].item() for i, token in enumerate(continuation)]


def plain_known_values(model, known):
    """The same values for another model, by plain forward passes; the texts stay."""
    known = json.loads(json.dumps(known)) | {"size": "tiny"}
    encode, eot = ENCODING.encode_ordinary, ENCODING.eot_token
    for each in known["log_likelihoods"]:
        before, both = encode(each["context"]), encode(each["context"] + each["continuation"])
        each["value"] = sum(plain_log_likelihoods(model, before, both[len(before) :]))
    for each in known["greedy_continuations"]:
        each["greedy"] = False
    ids = [eot, *encode(known["token_log_likelihoods"]["text"])]
    whole = plain_log_likelihoods(model, ids[:1], ids[1:])
    short = []
    for start in range(1, len(ids), 5):
        end = min(start + 5, len(ids))
        short += plain_log_likelihoods(model, ids[max(end - 6, 0) : start], ids[start:end])
    known["token_log_likelihoods"]["by_context"] = {"1024": whole, "5": short}
    values = plain_log_likelihoods(model, [eot], encode(known["mean_loss"]["text"]))
    known["mean_loss"]["value"] = -sum(values) / len(values)
    output = [20, 21]
    for _ in range(6):
        output.append(logits_after(model, output)[-1].argmax().item())
    known["greedy"] |= {"prompt": output[:2], "output": output}
    return known


def plain_losses(model, ids, known):
    """torch.optim.AdamW with the same decay on all weights, as in llm.c."""
    betas = (known["beta1"], known["beta2"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=known["lr"], betas=betas, weight_decay=known["weight_decay"])
    inputs, targets = (each.view(known["batch"]) for each in (ids[:-1], ids[1:]))
    losses = []
    for _ in range(known["steps"]):
        loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def random_model(folder, seed=1):
    """A model of the shape of the preset `tiny` with the vocabulary of the stories."""
    model = GPT(replace(PRESETS["tiny"], vocab_size=ENCODING.n_vocab, n_positions=1024), seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(3)
    model.save_pretrained(folder, ENCODING.eot_token)
    tokenizer.save(ENCODING, folder)
    return model


def make(folder, *arguments):
    """`make check-published` as a visitor runs it; the environment counts as installed."""
    (folder / ".venv").mkdir(exist_ok=True)
    (folder / ".venv/installed").touch()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    env = {name: value for name, value in env.items() if name not in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "check-published", "SIZES=tiny", *arguments]
    return subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True, timeout=300)


def figures_of(folder):
    """published.json with the scores in logs/results/ as the figures of the size `tiny`."""
    rows = [json.loads(path.read_text())[0] for path in (folder / "logs/results").glob("*.json")]
    figures = json.loads(results.PUBLISHED.read_text()) | {"sizes": {"tiny": "0M"}}
    for task in ("lambada", "cbt", "hellaswag", "wikitext"):
        for figure in figures[task]:
            place = (figure["protocol"], results.subset_of(figure))
            for row in rows:
                if (row["task"], row["protocol"], row["subset"]) == (task, *place) and "model" not in figure:
                    percent = None if row["accuracy"] is None else 100 * row["accuracy"]
                    figure["tiny"] = [percent, row["perplexity"]]
                    figure.pop("scored", None)
    return figures


ROWS = {"known values": 11, "lambada": 8, "cbt": 3, "hellaswag": 4, "wikitext": 2}  # comparisons of one size


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_check_published_on_stand_ins_for_the_hub(world, tmp_path):
    """All rows pass for the right weights; a small change of the weights and a missing data set are found."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "core", folder / "core", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("model.py", "Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    stand_ins(folder, world)
    model = random_model(folder / "tiny")
    published, known_file = folder / "core/eval/published.json", folder / "core/eval/known_values.json"
    figures = json.loads(published.read_text()) | {"sizes": {"tiny": "0M"}}
    published.write_text(json.dumps(figures))

    first = make(folder)  # no figure of this size
    assert first.returncode == 2, first.stdout + first.stderr
    assert "Error 2" in first.stderr and "Traceback" not in first.stderr
    published.write_text(json.dumps(figures_of(folder)))
    known = plain_known_values(model, known_values.load())
    ids = torch.randint(ENCODING.n_vocab, (257,), generator=torch.Generator().manual_seed(0))
    known["training"]["losses"] = plain_losses(model, ids, known["training"])
    known_file.write_text(json.dumps(known))
    batch = folder / "karpathy/llmc-starter-pack/tiny_shakespeare_val.bin"
    batch.parent.mkdir(parents=True)
    header = torch.zeros(256, dtype=torch.int32)
    header[:3] = torch.tensor([20240520, 1, 257])
    batch.write_bytes(header.numpy().tobytes() + ids.numpy().astype("uint16").tobytes())

    second = make(folder)
    assert second.returncode == 0, second.stdout + second.stderr
    page = (folder / "logs/published.md").read_text()
    assert "check: 24 pass, 4 reference" in second.stdout and "check: 24 pass, 4 reference" in page
    rows = {task: page.split("## Results")[0].count(f"| {task} ") for task in ROWS}
    assert rows == ROWS
    assert "FAIL" not in page

    with torch.no_grad():
        model = GPT.from_pretrained(folder / "tiny")
        model.transformer.h[0].mlp.c_proj.weight.mul_(1.2)  # a small defect of the weights
    model.save_pretrained(folder / "tiny", ENCODING.eot_token)
    shutil.rmtree(folder / "Rowan")
    third = make(folder)
    assert "Error 1" in third.stderr and "Traceback" not in third.stderr
    assert "FAIL" in third.stdout
    assert "hellaswag: data set Rowan/hellaswag can't be loaded from the Hugging Face hub" in third.stdout
    assert "| wikitext" in third.stdout  # the data sets after the missing one are scored


def test_check_of_one_evaluation_ends_with_its_status(world, tmp_path):
    save_model(tmp_path / "model", seed=1)
    lines = (world / "data/stories/lambada.txt").read_text().splitlines()[:5]
    (tmp_path / "some.txt").write_text("\n".join(lines))
    options = ("--ckpt", "model", "--data", "some.txt", "--text", "other", "--device", "cpu", "--check")
    result = run("eval_lambada.py", *options, cwd=tmp_path, check=False)
    assert (result.returncode, result.stderr) == (2, "")
    assert "| no figure |" in result.stdout and "check: 1 no figure" in result.stdout
    assert (tmp_path / "logs/results").is_dir()
