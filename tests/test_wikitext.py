"""WikiText: `harness` equals lm-evaluation-harness, `strided` equals a plain loop with transformers."""

import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENCODING, POSITIONS, execute, on_ranks, refused, run, save_model

from core.data import tokenizer
from core.eval import evaluate, results, wikitext
from core.eval.evaluate import ScoringConfig
from core.eval.task import Page, UnscorableError
from core.eval.wikitext import Stream, detokenize, disjoint_windows, joined_lines, read, split_pages, strided_windows

REAL = Path(os.environ.get("GPT2_TEST_EVAL", ""), "wiki.test.raw")
needs_text = pytest.mark.skipif(not REAL.is_file(), reason="GPT2_TEST_EVAL has no wiki.test.raw")
PAGES = [
    " = The bell = \n \n = = Tower = = \n \n Ana 's bell @-@ tower ( built in 1 @,@ 402 ; see [ 3 ] ) rang "
    "\" at noon \" , ' not later ' . The Millers ' dog , N metres up at 5 \u00b0 C , slept : why ? No ! "
    "{ x } 1 @.@ 5 /' 7/ \n ",
    " = Caf\u00e9 \u2013 a lamp = \n \n = = = Ben = = = \n \n The lamp was red . "
    + "It went home with the boat . " * 12
    + "\n ",
    " = Short = \n \n A kite . \n",
]
TEXT = " \n" + "\n".join(PAGES)


def test_pages_start_at_titles_with_single_equals_signs():
    assert split_pages(TEXT) == PAGES
    assert split_pages("a = b\n = = c = = \n q = \n") == ["a = b\n = = c = = \n q = \n"]  # no title: one page


def test_a_file_is_read_with_any_line_ends_and_published_figures_need_the_original(tmp_path):
    path = tmp_path / "wiki.test.raw"
    path.write_bytes(TEXT.replace("\n", "\r\n").encode())
    assert read(path) == TEXT
    (found,) = wikitext.load(wikitext.WikiTextConfig(data=str(path)))
    assert (found.questions, found.has_published) == (PAGES, False)
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"wiki\.test\.raw contains no text"):
        read(path)


def test_the_hubs_rows_become_the_lines_of_the_file(monkeypatch):
    rows = [{"text": ""}, {"text": " = A = \n"}, {"text": ""}, {"text": " b \n"}]
    monkeypatch.setattr(wikitext.task, "hub_rows", lambda *where, split: rows)
    assert wikitext.from_hub() == " \n = A = \n \n b \n"
    assert joined_lines(wikitext.from_hub()) == "\n\n".join(row["text"] for row in rows)
    whole, stream = wikitext.load(wikitext.WikiTextConfig(protocol=("all",), stride=(7,)))
    assert (whole.questions, whole.has_published) == ([" = A = \n \n b \n"], True)
    assert (stream.questions[0].stride, stream.subset) == (7, "stride 7")
    assert stream.data == "Salesforce/wikitext wikitext-2-raw-v1 test, stride 7"


def test_a_line_with_more_equals_signs_on_one_side_starts_no_page():
    assert len(split_pages(" = A = \n text \n = B = = = \n text \n = C = = \n")) == 1


def test_the_stream_is_the_hubs_rows_joined_by_two_newlines():
    assert joined_lines(" = A = \n \n text \n") == " = A = \n\n\n\n\n text \n"
    assert joined_lines(" text \n more") == " text \n\n\n more\n"


@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 25, 30])
@pytest.mark.parametrize("n_positions", [1, 2, 10])
def test_disjoint_windows_predict_each_id_once(length, n_positions):
    ids = list(range(length + 1))  # the first is end-of-text
    requests = disjoint_windows(ids, n_positions)
    assert [i for request in requests for i in request.continuation] == ids[1:]
    for request in requests:
        both = request.context + request.continuation
        assert both == ids[both[0] : both[-1] + 1]
    sizes = [len(request.context) + len(request.continuation) for request in requests]
    assert sizes[:-1] == [n_positions + 1] * (len(sizes) - 1)
    assert sizes[-1] == min(n_positions, length) + 1


@pytest.mark.parametrize("stride", [1, 3, 9, 10])
@pytest.mark.parametrize("length", [2, 9, 10, 11, 21, 30])
def test_strided_windows_predict_each_id_once_except_first_ids(length, stride):
    ids = list(range(length))
    requests = strided_windows(ids, stride, 10)
    found = [i for request in requests for i in request.continuation]
    firsts = {0} if stride < 10 else set(range(0, length, 10))
    assert found == [i for i in ids if i not in firsts]
    assert all(len(request.context) + len(request.continuation) <= 10 for request in requests)
    with pytest.raises(UnscorableError, match="one token"):
        strided_windows([1], 3, 10)


def test_the_interval_is_a_bootstrap_over_pages():
    rng = np.random.default_rng(1)
    pages = [Page(-float(words) * (3.5 + 0.2 * rng.standard_normal()), int(words)) for words in [100] * 200]
    low, high = results.bootstrap(pages)
    error = 1.96 * 0.2 / math.sqrt(200)  # of the mean of 200 pages of equal length
    assert math.log(low) == pytest.approx(3.5 - error, abs=0.02)
    assert math.log(high) == pytest.approx(3.5 + error, abs=0.02)
    assert results.bootstrap(pages) == [low, high]
    assert results.bootstrap(pages[:1]) is None


# A separate process: lm_eval must be imported offline. Its own task reads the pages from a file.
HARNESS = r"""
import json, math, os, pathlib, sys
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
from lm_eval import tasks
from lm_eval.models.huggingface import HFLM
data, answers, *models = sys.argv[1:]
os.makedirs("tasks", exist_ok=True)
include = pathlib.Path(tasks.__file__).parent / "wikitext" / "wikitext.yaml"
files = {"data_files": {"test": os.path.abspath(data)}, "cache_dir": os.path.abspath("cache")}
config = {"include": str(include), "task": "local", "training_split": None, "validation_split": None}
config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
pathlib.Path("tasks/local.yaml").write_text(json.dumps(config))
task = tasks.TaskManager(include_path="tasks", include_defaults=False).load("local")["tasks"]["local"]
task.build_all_requests()
docs = list(task.test_docs())
all_found = {}
for folder in models:
    found = HFLM(pretrained=folder, device="cpu", batch_size=1).loglikelihood_rolling(task.instances)
    scored = [task.process_results(docs[i.doc_id], [each]) for i, each in zip(task.instances, found, strict=True)]
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    metrics = {name: task.aggregation()[name]([each[name] for each in scored]) for name in names}
    all_found[folder] = {"logprobs": found, "metrics": metrics}
json.dump(all_found, open(answers, "w"))
"""


def train_a_little(folder, text):
    """Save a model that predicts the text better than chance: 60 AdamW steps on it."""
    model = save_model(folder, seed=3)
    ids = torch.tensor(ENCODING.encode_ordinary(text)[: 40 * (POSITIONS + 1)]).view(-1, POSITIONS + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder, ENCODING.eot_token)
    tokenizer.save(ENCODING, folder)
    return model


def sample_text():
    """The pages above, and the start of three real ones where the text is available."""
    real = split_pages(read(REAL))[:3] if REAL.is_file() else []
    return "\n".join([*PAGES, *(page[:4000] for page in real)])


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder with text, the models `random` and `trained`, and their results and pages."""
    folder = tmp_path_factory.mktemp("wikitext")
    (folder / "wiki.txt").write_text(sample_text(), encoding="utf-8")
    save_model(folder / "random", seed=2)
    train_a_little(folder / "trained", sample_text() * 10)
    run("eval_wikitext.py", "--ckpt", "random", "trained", "--data", "wiki.txt", "--device", "cpu", "--protocol", "all",
        *("--stride", 48, 20, "--out", "out.json", "--items", "items.jsonl"), cwd=folder)  # fmt: skip
    return folder


def row_of(folder, model, protocol, subset=""):
    rows = json.loads((folder / "out.json").read_text())
    (row,) = [r for r in rows if (r["model"], r["protocol"], r["subset"]) == (model, protocol, subset)]
    return row


@pytest.fixture(scope="module")
def answered(scored):
    """The answers of lm-evaluation-harness for both models."""
    pytest.importorskip("lm_eval")
    pages = split_pages(read(scored / "wiki.txt"))
    (scored / "pages.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    command = [sys.executable, "-c", HARNESS, "pages.jsonl", "answers.json", "random", "trained"]
    execute(command, scored, True, {})
    return json.loads((scored / "answers.json").read_text())


@pytest.mark.parametrize("model", ["random", "trained"])
def test_harness_equals_the_harness(scored, answered, model):
    expected = answered[model]
    row = row_of(scored, model, "harness")
    items = [json.loads(line) for line in (scored / "items.jsonl").read_text().splitlines()]
    found = [i["pages"][0][0] for i in items if (i["model"], i["protocol"]) == (model, "harness")]
    assert found == pytest.approx(expected["logprobs"], rel=1e-5)
    metrics = {"word_perplexity": row["perplexity"]} | {n: row[n] for n in ("byte_perplexity", "bits_per_byte")}
    assert metrics == pytest.approx(expected["metrics"], rel=1e-4)
    assert (row["total"], row["correct"], row["accuracy"], row["unscored"]) == (len(found), None, None, {})
    low, high = row["perplexity_interval"]
    assert low < row["perplexity"] < high


def test_the_text_is_detokenized_like_the_harness():
    module = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    pages = PAGES + (split_pages(read(REAL)) if REAL.is_file() else [])
    for page in pages:
        assert detokenize(page) == module.wikitext_detokenizer({"page": page})
    assert detokenize(PAGES[0]) != PAGES[0]


@pytest.mark.parametrize("model", ["random", "trained"])
@pytest.mark.parametrize("stride", [48, 20])
def test_strided_equals_a_plain_loop_with_transformers(scored, model, stride):
    from transformers import GPT2LMHeadModel

    reference = GPT2LMHeadModel.from_pretrained(scored / model).eval()
    ids = torch.tensor([ENCODING.encode_ordinary(joined_lines(read(scored / "wiki.txt")))])
    nats, count, done = 0.0, 0, 0
    for begin in range(0, ids.size(1), stride):
        end = min(begin + POSITIONS, ids.size(1))
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : -(end - done)] = -100
        predicted = int((labels[:, 1:] != -100).sum())
        if predicted:
            with torch.no_grad():
                nats += reference(window, labels=labels).loss.item() * predicted
            count += predicted
        done = end
        if end == ids.size(1):
            break
    row = row_of(scored, model, "strided", f"stride {stride}")
    assert row["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    items = [json.loads(line) for line in (scored / "items.jsonl").read_text().splitlines()]
    (pages,) = [i["pages"] for i in items if (i["model"], i["subset"]) == (model, f"stride {stride}")]
    assert sum(page[1] for page in pages) == count
    assert len(pages) == len(split_pages(read(scored / "wiki.txt")))


def test_a_trained_model_is_better_and_ranks_share_the_windows(scored):
    assert row_of(scored, "trained", "harness")["perplexity"] < row_of(scored, "random", "harness")["perplexity"] / 10
    options = ("--ckpt", "trained", "--data", "wiki.txt", "--device", "cpu", "--out", "two.json")
    result = on_ranks(2, "eval_wikitext.py", *options, "--batch-tokens", 300, cwd=scored)
    (row,) = json.loads((scored / "two.json").read_text())
    assert row["perplexity"] == pytest.approx(row_of(scored, "trained", "harness")["perplexity"], rel=1e-5)
    assert "| 95 % of perplexity" in result.stdout and "| bits per byte |" in result.stdout
    assert "accuracy %" not in result.stdout.split("Published")[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": (512,)}, "--stride 512 has no effect on --protocol harness"),
        ({"protocol": ("strided",), "stride": (0,)}, "--stride 0 must be above 0"),
    ],
)
def test_a_stride_without_effect_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        wikitext.load(wikitext.WikiTextConfig(**options))


def test_a_stride_beyond_the_context_is_refused(scored):
    options = ("--ckpt", "random", "--data", "wiki.txt", "--device", "cpu", "--protocol", "strided", "--stride", 48, 49)
    result = run("eval_wikitext.py", *options, "--out", "long.json", cwd=scored, check=False)
    assert refused(result) == "--stride 49 exceeds the model's context of 48 tokens. Use --stride 48"
    assert not (scored / "long.json").exists()


def test_the_default_stride_of_a_shorter_context_is_its_length_and_named_so(scored):
    options = ("--ckpt", "random", "--data", "wiki.txt", "--device", "cpu", "--protocol", "strided")
    run("eval_wikitext.py", *options, "--out", "default.json", cwd=scored)
    (row,), expected = (
        json.loads((scored / "default.json").read_text()),
        row_of(scored, "random", "strided", "stride 48"),
    )
    names = ("subset", "data", "perplexity", "has_published")
    assert [row[name] for name in names] == [expected[name] for name in names]
    assert row["data"] == "wiki.txt, stride 48"


def test_answers_of_a_task_without_questions_are_not_compared():
    with pytest.raises(ValueError, match="which WikiText has none of"):
        evaluate.run(wikitext.TASK, wikitext.WikiTextConfig(), ScoringConfig(compare=("a", "b"), ckpt=(".",)))


@needs_text
def test_the_published_counts_of_the_real_text():
    """241,335 words: with word perplexity 37.37 they give the published 0.9769 bits per byte."""
    pages = split_pages(read(REAL))
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    assert (len(pages), words) == (62, 241_335)
    assert math.log2(37.37) * words / 1_290_590 == pytest.approx(0.9769, abs=1e-4)  # bytes of wiki.test.raw


def test_the_text_of_a_stream_includes_its_stride():
    assert wikitext.text(Stream(TEXT, 5)) != wikitext.text(Stream(TEXT, 6))
    assert wikitext.text(PAGES[0]) == PAGES[0]
