"""HellaSwag: each protocol's text and rule, lm-evaluation-harness's own answers, and damaged files."""

import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ENCODING, execute, run, save_model

from core.data import tokenizer
from core.eval import hellaswag, scoring
from core.eval.hellaswag import PROTOCOLS, clean, judge, parse, read, requests
from core.eval.scoring import Score
from core.eval.task import UnscorableError
from model import GPT, PRESETS

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
    return parse(STORY | changes, "here")


def score(*logprobs):
    return Score(list(logprobs), [0.0] * len(logprobs), [0.0] * len(logprobs))


def decoded(requests):
    return [(ENCODING.decode(r.context), ENCODING.decode(r.continuation)) for r in requests]


def test_the_harness_text_is_cleaned_and_starts_with_the_activity():
    context = "Ringing a bell: How to ring a bell. Find it. The bell hangs in the tower. Ana"
    assert clean("[header] How to ring a bell [title] Find it. [step] Go. ") == " How to ring a bell. Find it. Go."
    for protocol in ("harness", "harness-norm"):
        found = decoded(requests(protocol, story(), ENCODING.encode_ordinary))
        assert [c for c, _ in found] == [context] * 4
        assert [e for _, e in found] == [
            " pulls the rope twice.",
            " eats it.",
            " paints the lamp.",
            " sings to the boat.",
        ]


def test_completions_are_scored_unchanged():
    for protocol in ("completion", "completion-norm"):
        found = decoded(requests(protocol, story(), ENCODING.encode_ordinary))
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
def test_each_protocol_chooses_by_its_own_rule(protocol, chosen):
    endings = ["pulls the rope twice.", "eats it.", "paints the lamp " + "very " * 8 + "red.", "sings to the boat."]
    scores = [score(-2, -2), score(-3), score(-2, -2, -2), score(-1, -2, -2, -2)]
    for label in range(4):
        verdict = judge(protocol, story(endings=endings, label=label), scores)
        assert verdict.correct == (label == chosen)
        assert (verdict.chosen, verdict.warnings, verdict.near_tie) == (endings[chosen], (), False)


def test_irregular_endings_give_warnings_and_ties_are_marked():
    irregular = story(endings=["a.", "a.", "[x]"], label=1)
    verdict = judge("harness", irregular, [score(-1), score(-1), score(-2)])
    assert verdict.warnings == ("not 4 endings", "an empty ending", "a repeated ending")
    assert (verdict.correct, verdict.near_tie) == (False, True)  # the first of equals, like the harness
    with pytest.raises(UnscorableError, match="fewer than two endings"):
        requests("harness", story(endings=["a."]), ENCODING.encode_ordinary)
    with pytest.raises(UnscorableError, match="adds no token"):
        requests("harness", irregular, str.split)
    with pytest.raises(UnscorableError, match="no context"):
        requests("completion", story(ctx=""), ENCODING.encode_ordinary)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r"q\.jsonl, line 2 is not a JSON object"),
        ("[1]", r"q\.jsonl, line 2 is not a JSON object"),
        (
            json.dumps(STORY | {"endings": None}),
            "line 2 is not a question: it needs a list `endings`, and ctx or activity_label, ctx_a and ctx_b",
        ),
        (json.dumps(STORY | {"ctx_b": 3}), "line 2 is not a question"),
        (json.dumps(STORY | {"label": ""}), "line 2 has no label: the test split's labels are unpublished"),
        (json.dumps(STORY | {"label": 4}), "line 2 has label 4, but 4 endings"),
        (json.dumps(STORY | {"label": -1}), "line 2 has label -1, but"),
        (json.dumps(STORY | {"ctx": "\ud800"}), "line 2 contains half of a surrogate pair"),
        ("a\0b", "line 2 contains a zero byte"),
    ],
)
def test_a_malformed_line_is_refused_by_file_and_line(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(json.dumps(STORY) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "q.jsonl")


def test_an_empty_file_and_an_incomplete_file_of_the_authors_are_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text("")
    with pytest.raises(ValueError, match="contains no questions"):
        read(tmp_path / "q.jsonl")
    (tmp_path / hellaswag.FILE).write_text(json.dumps(STORY) + "\n")
    with pytest.raises(ValueError, match="has 1 questions, expected 10,042"):
        read(tmp_path / hellaswag.FILE)


def test_files_with_fewer_fields_are_accepted_where_the_protocol_allows(tmp_path):
    forms = {
        "authors": (STORY | {"split": "val", "dataset": "activitynet"}, PROTOCOLS),
        "hub": (STORY | {"label": "0", "source_id": "x", "split_type": "indomain"}, PROTOCOLS),
        "ctx": ({name: STORY[name] for name in ("ctx", "label", "endings")}, ("completion", "completion-norm")),
        "parts": ({name: value for name, value in STORY.items() if name != "ctx"}, ("harness", "harness-norm")),
    }
    for name, (fields, allowed) in forms.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(fields) + "\n")
        for protocol in PROTOCOLS:
            if protocol in allowed:
                (question,) = hellaswag.load_file(path, [protocol]).questions
                assert decoded(requests(protocol, question, ENCODING.encode_ordinary)) == decoded(
                    requests(protocol, story(), ENCODING.encode_ordinary)
                )
            else:
                needed = f"has no .*ctx.*, which --protocol {protocol} needs"
                message = rf"{name}\.jsonl, line 1 {needed}. Use --protocol {' '.join(allowed)}"
                with pytest.raises(ValueError, match=message):
                    hellaswag.load_file(path, [protocol])


def test_all_protocols_are_those_that_the_fields_allow_and_the_others_are_named(tmp_path, capsys):
    without_ctx = {name: value for name, value in STORY.items() if name != "ctx"}
    for rows, protocols, note in (
        ([STORY, STORY], PROTOCOLS, ""),
        ([STORY, without_ctx], ("harness", "harness-norm"), "completion, completion-norm: q.jsonl has no ctx"),
    ):
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (questions,) = hellaswag.load(hellaswag.HellaSwagConfig(data=str(tmp_path / "q.jsonl"), protocol=("all",)))
        assert questions.protocols == list(protocols)
        assert capsys.readouterr().out == (f"note: --protocol all omits {note}\n" if note else "")
    only_ctx = {name: STORY[name] for name in ("ctx", "label", "endings")}
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(only_ctx)}\n{json.dumps(without_ctx)}\n")
    with pytest.raises(ValueError, match="has no activity_label, ctx_a, ctx_b, which --protocol harness needs"):
        hellaswag.load_file(tmp_path / "q.jsonl", ["all"])


def test_a_label_can_be_a_digit_as_on_the_hub():
    assert story(label="2").label == 2


def test_the_hubs_validation_split_is_loaded_and_a_bad_row_refused_by_number(monkeypatch):
    monkeypatch.setattr(hellaswag.task, "hub_rows", lambda *where: [STORY | {"ctx": "/".join(where)}])
    assert hellaswag.from_hub() == [story(ctx="Rowan/hellaswag/default/validation")]
    monkeypatch.setattr(hellaswag.task, "hub_rows", lambda *where: [STORY, STORY | {"label": ""}])
    with pytest.raises(ValueError, match="Rowan/hellaswag, row 1 has no label"):
        hellaswag.from_hub()


@pytest.mark.parametrize("change", [*STORY])
def test_each_field_of_a_question_is_part_of_its_text(change):
    parts = {"label": 1, "endings": STORY["endings"][::-1]}
    other = story(**{change: parts.get(change, "other")})
    assert (hellaswag.text(other) == hellaswag.text(story())) == (change == "ind")


def test_harness_norm_divides_by_the_characters_of_the_cleaned_ending():
    endings = ["[x][y]\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9", "abcdef", "abc", "[x]"]
    cases = (
        ((-6.1, -6, -6, -6), 1),  # per byte, or per character of the original, the first
        ((-12, -11, -6, -9), 1),  # with the space before it, the third: -11 / 7 is less than -6 / 4
        ((-40, -41, -42, -1), 0),  # the last is empty after cleaning: the harness divides by 0
    )
    for totals, best in cases:
        verdict = judge("harness-norm", story(endings=endings), [score(total) for total in totals])
        assert verdict.chosen == clean(endings[best])


def test_the_harness_moves_spaces_to_the_ending_and_completions_keep_them():
    moved = decoded(requests("harness", story(ctx_a="Find it. [title] ", ctx_b=" [step]"), ENCODING.encode_ordinary))
    assert {c for c, _ in moved} == {"Ringing a bell: Find it.."}
    assert moved[1][1] == "   eats it."
    assert clean("a  b   c") == "a b  c"  # replaces pairs of spaces, once
    kept = decoded(requests("completion", story(ctx=" a  b ", endings=[" c ", "d"]), ENCODING.encode_ordinary))
    assert kept == [(" a  b ", "  c "), (" a  b ", " d")]


def generated(world, count):
    """Questions from the demo's stories, with contexts and endings of different passages, so that models differ."""
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


def edge_cases():
    """Questions whose outcome needs the exact rules: spaces, marks, accents, and endings empty after cleaning."""
    contexts = (
        {},
        {"ctx_a": "Ana\u00efs took the \u00e9toile. [title]", "ctx_b": ""},
        {"ctx_a": "  Ben saw  a   kite [a [b] c]", "ctx_b": "tHE boat [step]"},
        {"ctx_a": "Cleo sat. [step] [step] ", "ctx_b": " [step] [x] "},
    )
    endings = (
        ["[x]", "\u00e9", "\u00df", "\u2019"],
        ["\u00e9\u00e8\u00ea", "?", "zq", "\u2019\u2019"],
        ["[substeps] a lamp", "a [b] lamp   and", "it  is.", "it  was."],
        ["so", "so it is that the boat and the lamp were red.", "[x] [x] he", "rq\u00e9"],
    )
    for before, after in itertools.product(contexts, endings):
        for label in range(4):
            yield STORY | before | {"endings": after, "label": label}


# A separate process: lm_eval seeds random generators and must be imported offline. Its task reads our file only.
HARNESS = r"""
import json, os, pathlib, sys
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
from lm_eval import tasks
from lm_eval.models.huggingface import HFLM
for folder in map(pathlib.Path, sys.argv[1:]):
    (folder / "tasks").mkdir()
    include = pathlib.Path(tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
    files = {"data_files": {"validation": str(folder / "q.jsonl")}, "cache_dir": str(folder / "cache")}
    config = {"include": str(include), "task": "local", "training_split": None, "dataset_path": "json"}
    (folder / "tasks/local.yaml").write_text(json.dumps(config | {"dataset_kwargs": files}))
    manager = tasks.TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    task = manager.load("local")["tasks"]["local"]
    task.build_all_requests()
    found = HFLM(pretrained=str(folder / "model"), device="cpu", batch_size=4).loglikelihood(task.instances)
    docs = list(task.validation_docs())
    results = [[] for _ in docs]
    for instance, answer in zip(task.instances, found, strict=True):
        results[instance.doc_id].append(answer)
    scored = [task.process_results(doc, each) for doc, each in zip(docs, results, strict=True)]
    (folder / "answers.json").write_text(json.dumps([[each["acc"], each["acc_norm"]] for each in scored]))
"""


REAL_QUESTIONS = int(os.environ.get("HELLASWAG_QUESTIONS", "60"))  # of the file's 2,000, which take minutes


def real(world, folder):
    """Real questions, and a model with GPT-2's tokenizer and a context that they fit.

    The file has `ctx` alone: the text after its last full stop becomes ctx_b, as in the original. No questions where
    the file or GPT-2's vocabulary is not available.
    """
    file = Path(os.environ.get("GPT2_TEST_EVAL", ""), "hellaswag_val_2000.jsonl")
    try:
        encoding = tokenizer.load("gpt2")
    except ValueError:
        return
    if not file.is_file():
        return
    model = GPT(replace(PRESETS["tiny"], n_positions=256), seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4) if p.dim() == 2 else None
    model.save_pretrained(folder, encoding.eot_token)
    tokenizer.save(encoding, folder)
    with open(file, encoding="utf-8") as lines:
        for line in itertools.islice(lines, REAL_QUESTIONS):
            fields = json.loads(line)
            before, mark, after = fields["ctx"].rpartition(". ")
            yield fields | {"ctx_a": before + mark.strip(), "ctx_b": after}


def invented(world, folder):
    save_model(folder, seed=1)
    return [*generated(world, 40), *edge_cases()]


@pytest.fixture(scope="module")
def answered(world, tmp_path_factory):
    """Folders with a model, its questions and the harness's answers, by the function that makes the questions."""
    pytest.importorskip("lm_eval")
    folders = {}
    for make_questions in (invented, real):
        folder = tmp_path_factory.mktemp("harness")
        if questions := [*make_questions(world, folder / "model")]:
            (folder / "q.jsonl").write_text("".join(json.dumps(fields) + "\n" for fields in questions))
            folders[make_questions] = folder
    execute([sys.executable, "-c", HARNESS, *map(str, folders.values())], world, True, {})
    return folders


@pytest.mark.parametrize("make_questions", [invented, real])
def test_the_answers_equal_the_harness(answered, make_questions):
    if make_questions not in answered:
        pytest.skip("GPT2_TEST_EVAL has no hellaswag_val_2000.jsonl, or GPT-2's vocabulary is not available")
    folder = answered[make_questions]
    run("eval_hellaswag.py", *("--ckpt", "model", "--data", "q.jsonl", "--device", "cpu", "--protocol", "all"),
        *("--out", "out.json", "--items", "items.jsonl"), cwd=folder)  # fmt: skip
    stories = (folder / "q.jsonl").read_text().splitlines()
    expected = json.loads((folder / "answers.json").read_text())
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    for column, protocol in enumerate(("harness", "harness-norm")):
        found = [item["correct"] for item in items if item["protocol"] == protocol]
        assert found == [bool(answers[column]) for answers in expected]
        assert 0 < sum(found[:40]) < 40
        assert len(found) == len(stories)
    rows = {row["protocol"]: row for row in json.loads((folder / "out.json").read_text())}
    assert list(rows) == list(PROTOCOLS)
    correct = {p: sum(item["correct"] for item in items if item["protocol"] == p) for p in PROTOCOLS}
    assert {p: (row["correct"], row["total"], row["unscored"]) for p, row in rows.items()} == {
        p: (correct[p], len(stories), {}) for p in PROTOCOLS
    }
    assert not any(row["near_ties"] for row in rows.values())  # rounding can't change an outcome
    assert len({tuple(item["chosen"] for item in items if item["protocol"] == p) for p in PROTOCOLS}) > 2


def test_completions_equal_a_plain_computation(world, tmp_path):
    """The sums and means of one plain forward pass per ending."""
    model = save_model(tmp_path / "model", seed=2)
    (fields,) = generated(world, 1)
    question = parse(fields, "here")
    means, sums = [], []
    for ending in question.endings:
        before, after = ENCODING.encode_ordinary(question.ctx), ENCODING.encode_ordinary(" " + ending)
        with torch.no_grad():
            logprobs = model(torch.tensor([before + after])).log_softmax(-1)[0, len(before) - 1 : -1]
        each = [logprobs[i, token].item() for i, token in enumerate(after)]
        sums.append(sum(each))
        means.append(sum(each) / len(each))
    for protocol, values in (("completion", sums), ("completion-norm", means)):
        (scores,) = scoring.score(model, [requests(protocol, question, ENCODING.encode_ordinary)])
        assert [s.total for s in scores] == pytest.approx(sums, abs=1e-4)
        best = question.endings[max(range(4), key=values.__getitem__)]
        assert judge(protocol, question, scores).chosen == best
