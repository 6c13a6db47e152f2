"""HellaSwag by each protocol: its text, its rule, lm-evaluation-harness's own answers; and files that hold none."""

import json
import sys

import pytest
import torch
from conftest import ENCODING, execute, run, save_model

from core import scoring
from core.scoring import Score
from core.tasks import UnscorableError, hellaswag
from core.tasks.hellaswag import PROTOCOLS, checked, cleaned, judge, read, requests

STORY = {
    "ind": 1,
    "activity_label": "Ringing a bell",
    "ctx_a": "[header] How to ring a bell [title] Find it. [step] The bell hangs in the tower.",
    "ctx_b": "ana",
    "ctx": "[header] How to ring a bell [title] Find it. [step] The bell hangs in the tower. ana",
    "endings": ["pulls the rope [substeps] twice.", "eats  it.", "paints the lamp.", "sings to the boat."],
    "label": 0,
}


def story(**changes):
    return checked(STORY | changes, "here")


def score(*logprobs):
    return Score(list(logprobs), [0.0] * len(logprobs), [0.0] * len(logprobs))


def spelled(requests):
    return [(ENCODING.decode(r.context), ENCODING.decode(r.continuation)) for r in requests]


def test_the_harness_text_is_cleaned_and_begins_with_the_activity():
    context = "Ringing a bell: How to ring a bell. Find it. The bell hangs in the tower. Ana"
    assert cleaned("[header] How to ring a bell [title] Find it. [step] Go. ") == " How to ring a bell. Find it. Go."
    for protocol in ("harness", "harness-norm"):
        found = spelled(requests(protocol, story(), ENCODING.encode_ordinary))
        assert [c for c, _ in found] == [context] * 4
        assert [e for _, e in found] == [
            " pulls the rope twice.",
            " eats it.",
            " paints the lamp.",
            " sings to the boat.",
        ]


def test_completions_are_scored_as_they_stand():
    for protocol in ("completion", "completion-norm"):
        found = spelled(requests(protocol, story(), ENCODING.encode_ordinary))
        assert found == [(STORY["ctx"], f" {ending}") for ending in STORY["endings"]]


@pytest.mark.parametrize(
    "protocol, chosen",
    [
        ("harness", 1),  # -4, -3, -6, -7
        ("harness-norm", 2),  # a character: -4 / 21, -3 / 8, -6 / 60, -7 / 18
        ("completion", 1),
        ("completion-norm", 3),  # a token: -2, -3, -2, -1.75
    ],
)
def test_the_ending_that_each_rule_prefers(protocol, chosen):
    endings = ["pulls the rope twice.", "eats it.", "paints the lamp " + "very " * 8 + "red.", "sings to the boat."]
    scores = [score(-2, -2), score(-3), score(-2, -2, -2), score(-1, -2, -2, -2)]
    for label in range(4):
        verdict = judge(protocol, story(endings=endings, label=label), scores)
        assert verdict.correct == (label == chosen)
        assert (verdict.chosen, verdict.remarks, verdict.near_tie) == (endings[chosen], (), False)


def test_odd_endings_are_remarked_and_ties_told():
    odd = story(endings=["a.", "a.", "[x]"], label=1)
    verdict = judge("harness", odd, [score(-1), score(-1), score(-2)])
    assert verdict.remarks == ("not 4 endings", "an empty ending", "a repeated ending")
    assert (verdict.correct, verdict.near_tie) == (False, True)  # the first of equals, as the harness
    with pytest.raises(UnscorableError, match="fewer than two endings"):
        requests("harness", story(endings=["a."]), ENCODING.encode_ordinary)
    with pytest.raises(UnscorableError, match="no context"):
        requests("completion", story(ctx=""), ENCODING.encode_ordinary)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r"q\.jsonl, line 2: no JSON object"),
        ("[1]", r"q\.jsonl, line 2: no JSON object"),
        (json.dumps(STORY | {"endings": None}), "line 2: a question has activity_label, .* a list of endings"),
        (json.dumps(STORY | {"ctx_b": 3}), "line 2: a question has"),
        (json.dumps(STORY | {"label": ""}), "line 2: no label: the test split's answers are unpublished"),
        (json.dumps(STORY | {"label": 4}), "line 2: label 4 is none of the 4 endings"),
        (json.dumps(STORY | {"label": -1}), "line 2: label -1 is none"),
        (json.dumps(STORY | {"ctx": "\ud800"}), "line 2 holds half a surrogate pair"),
        ("a\0b", "line 2 holds a zero byte"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(json.dumps(STORY) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "q.jsonl")


def test_an_empty_file_and_the_authors_own_cut_short_are_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds 0 questions of none"):
        read(tmp_path / "q.jsonl")
    (tmp_path / hellaswag.FILE).write_text(json.dumps(STORY) + "\n")
    with pytest.raises(ValueError, match="holds 1 questions of 10,042: it was cut short"):
        read(tmp_path / hellaswag.FILE)


def test_the_hub_writes_the_label_as_a_digit():
    assert story(label="2").label == 2


def invented(world, count):
    """Questions of the demo's stories: contexts and endings from different places, so that models differ on them."""
    lines = (world / "data/stories/lambada.txt").read_text().splitlines()
    for i in range(count):
        words = lines[i % len(lines)].split()
        ends = [" ".join(lines[(7 * i + k) % len(lines)].split()[k : k + 4 + k]) + "." for k in range(4)]
        fields = {
            "ctx_a": " ".join(words[:12]) + "[step]",
            "ctx_b": " ".join(words[12:15]),
            "ctx": " ".join(words[:15]),
        }
        yield STORY | fields | {"endings": ends, "label": i % 4, "activity_label": f"Tale {i}"}


# A process of its own: lm_eval seeds random generators and has to be imported offline.
HARNESS = r"""
import json, sys
import datasets
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.hellaswag.utils import process_docs
folder, data, answers = sys.argv[1:]
docs = process_docs(datasets.Dataset.from_list([json.loads(line) for line in open(data, encoding="utf-8")]))
model = HFLM(pretrained=folder, device="cpu", batch_size=4)
asked = [(doc["query"], " " + choice) for doc in docs for choice in doc["choices"]]
found = iter(model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked]))
chosen = []
for doc in docs:
    sums = [next(found)[0] for _ in doc["choices"]]
    norms = [total / len(choice) for total, choice in zip(sums, doc["choices"])]
    chosen.append([doc["choices"][values.index(max(values))] for values in (sums, norms)])
json.dump(chosen, open(answers, "w"))
"""


def test_the_answers_are_the_harness_own(world, tmp_path):
    pytest.importorskip("lm_eval")
    save_model(tmp_path / "model", seed=1)
    stories = list(invented(world, 40))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(fields) + "\n" for fields in stories))
    run("eval_hellaswag.py", *("--ckpt", "model", "--data", "q.jsonl", "--device", "cpu", "--protocol", "all"),
        *("--out", "out.json", "--items", "items.jsonl"), cwd=tmp_path)  # fmt: skip
    execute([sys.executable, "-c", HARNESS, "model", "q.jsonl", "answers.json"], tmp_path, True, {})
    theirs = json.loads((tmp_path / "answers.json").read_text())
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    for column, protocol in enumerate(("harness", "harness-norm")):
        ours = [item["chosen"] for item in items if item["protocol"] == protocol]
        assert ours == [answers[column] for answers in theirs]
        assert len(set(map(ours.count, ours))) > 1  # the model prefers some endings
    rows = {row["protocol"]: row for row in json.loads((tmp_path / "out.json").read_text())}
    assert list(rows) == list(PROTOCOLS)
    right = {p: sum(item["correct"] for item in items if item["protocol"] == p) for p in PROTOCOLS}
    assert {p: (row["correct"], row["total"], row["unscored"]) for p, row in rows.items()} == {
        p: (right[p], 40, {}) for p in PROTOCOLS
    }
    assert len({tuple(item["chosen"] for item in items if item["protocol"] == p) for p in PROTOCOLS}) > 2


def test_completions_by_hand(world, tmp_path):
    """The sums and means of a plain forward an ending."""
    model = save_model(tmp_path / "model", seed=2)
    (fields,) = invented(world, 1)
    question = checked(fields, "here")
    means, sums = [], []
    for ending in question.endings:
        before, after = ENCODING.encode_ordinary(question.ctx), ENCODING.encode_ordinary(" " + ending)
        with torch.no_grad():
            logprobs = model(torch.tensor([before + after])).log_softmax(-1)[0, len(before) - 1 : -1]
        each = [logprobs[i, token].item() for i, token in enumerate(after)]
        sums.append(sum(each))
        means.append(sum(each) / len(each))
    for protocol, values in (("completion", sums), ("completion-norm", means)):
        (scores,) = scoring.score(model, [requests(protocol, question, ENCODING.encode_ordinary)], quiet=True)
        assert [s.total for s in scores] == pytest.approx(sums, abs=1e-4)
        best = question.endings[max(range(4), key=values.__getitem__)]
        assert judge(protocol, question, scores).chosen == best
