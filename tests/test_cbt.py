"""The Children's Book Test by both protocols' exact rules, from a file's lines to the counts in results.json."""

import hashlib
import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import ENCODING, POSITIONS, run, save_model

from core.scoring import Score
from core.stats import wilson
from core.tasks import cbt
from core.tasks.cbt import Cloze, detokenize


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("Ana took it .", "Ana took it."),
        ("Yes , no ; so : why ? Ah !", "Yes, no; so: why? Ah!"),
        ("Well ... what ?! No !!", "Well... what?! No!!"),
        ("`` Come , '' said he . `` Now ! ''", '"Come," said he. "Now!"'),
        ("`` ` Tis ' he said ''", "\"'Tis' he said\""),
        ("-LRB- one -RRB- two", "(one) two"),
        ("-LSB- one -RSB- two", "[one] two"),
        ("-LCB- one -RCB- two", "{one} two"),
        ("( one ) [ two ] { three }", "(one) [two] {three}"),
        ("I do n't . DO N'T !", "I don't. DON'T!"),
        ("Ana 's lamp and ANA 'S", "Ana's lamp and ANA'S"),
        ("I 'm , he 'd , you 're , we 've , they 'll", "I'm, he'd, you're, we've, they'll"),
        ("the boys ' lamp", "the boys' lamp"),
        ("50 % of $ 5 is # 2", "50% of $5 is #2"),
        ("yes -- no - so", "yes -- no - so"),
        ("o'clock 'em 'T was", "o'clock 'em 'T was"),
        ("'s first", "'s first"),
        ("", ""),
    ],
)
def test_tokens_are_joined_as_in_ordinary_text(tokens, text):
    assert detokenize(tokens.split()) == text


def test_the_text_of_a_lists_beginning_is_the_beginning_of_its_text():
    rng = random.Random(1)
    tokens = ["Ana", "lamp", "the", *cbt.PTB, *cbt.OPENING, *".,!?;:%)]}", "'", "''", "n't", "'s", "'ll", "--", "..."]
    tokens.sort()  # sets have no order of their own
    for _ in range(300):
        drawn = rng.choices(tokens, k=rng.randint(1, 15))
        whole = detokenize(drawn)
        assert all(whole.startswith(detokenize(drawn[:k])) for k in range(len(drawn) + 1))


TEN = "bell|boat|book|drum|flute|kite|lamp|ring|rope|sack"


def write_lines(count=20, question="Ana took the XXXXX .", answer="lamp", options=TEN):
    lines = [f"{i} Sentence number {i} ." for i in range(1, count + 1)]
    return [*lines, f"{count + 1} {question}\t{answer}\t\t{options}"]


def read(tmp_path, *blocks, ending="\n"):
    path = tmp_path / "questions.txt"
    path.write_text("\n\n".join("\n".join(block) for block in blocks) + ending)
    return cbt.read(path)


@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "\n\n\n"])
def test_questions_are_read_from_blocks_of_21_lines(tmp_path, ending):
    first, second = read(tmp_path, write_lines(), write_lines(answer="ring"), ending=ending)
    sentences = [f"Sentence number {i} ." for i in range(1, 21)]
    assert first == Cloze(sentences, "Ana took the XXXXX .", "lamp", TEN.split("|"))
    assert second == Cloze(sentences, "Ana took the XXXXX .", "ring", TEN.split("|"))


def test_empty_and_repeated_candidates_are_left_out(tmp_path):
    (cloze,) = read(tmp_path, write_lines(options="|boat|lamp|boat||lamp| |ring|lamp|"))
    assert cloze.options == ["boat", "lamp", "ring"]


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (write_lines()[:9], "9 lines and 1 fields: the file was cut short"),
        (write_lines()[:20], "20 lines and 1 fields: the file was cut short"),
        ([*write_lines()[:20], "21 Ana took the XXXXX .\tla"], "21 lines and 2 fields: the file was cut short"),
        (write_lines(19), "20 lines and 4 fields"),
        (write_lines(21), "line 22 of the question should begin with its number, up to 21"),
        (write_lines()[1:], "line 1 of the question should begin with its number, up to 21: '2 Sentence"),
        (["Ana took the lamp ."], "line 1 of the question should begin with its number"),
        (write_lines(answer="hat"), "the answer 'hat' is not among the candidates 'bell|boat|"),
        (write_lines(answer=""), "the answer '' is not among the candidates"),
        (write_lines(question="Ana took the lamp ."), "the question holds XXXXX 0 times, not once"),
        (write_lines(question="XXXXX took XXXXX ."), "the question holds XXXXX 2 times, not once"),
    ],
)
def test_what_is_no_question_is_refused_by_file_and_line(tmp_path, block, problem):
    with pytest.raises(ValueError, match=f"{tmp_path}/questions.txt, line 23: ") as caught:
        read(tmp_path, write_lines(), block)
    assert problem in str(caught.value)


def test_a_file_cut_within_the_last_candidates_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/questions.txt, line 23: .*cut short"):
        read(tmp_path, write_lines(), write_lines(options=TEN[: TEN.index("|rope")]), ending="")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00"])
def test_a_file_without_questions_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/a.txt (holds no question|is not UTF-8 text)"):
        cbt.read(tmp_path / "a.txt")


def asked(protocol, cloze):
    """Context and continuations of each question, as text."""
    questions = cbt.question(protocol, cloze, ENCODING.encode_ordinary)
    return [(ENCODING.decode(q.context), [ENCODING.decode(ids) for ids in q.continuations]) for q in questions]


def test_paper_puts_the_sentences_before_and_scores_candidate_and_rest():
    cloze = Cloze(["`` Ana !", "It 's he . ''"], "She did n't take the XXXXX , Ben .", "lamp", ["lamp", "hat", "'s"])
    context = "\"Ana! It's he.\" She didn't take the"
    assert asked("paper", cloze) == [(context, [" lamp, Ben.", " hat, Ben.", "'s, Ben."])]
    (question,) = cbt.question("paper", cloze, ENCODING.encode_ordinary)
    assert question.context == ENCODING.encode_ordinary(context)
    assert question.continuations[0] == ENCODING.encode_ordinary(" lamp, Ben.")


@pytest.mark.parametrize(
    ("blank", "context", "continuation"),
    [
        ("XXXXX went home .", "Ana.", " Ben went home."),
        ("He said `` XXXXX '' .", 'Ana. He said "', 'Ben".'),
        ("-LRB- XXXXX -RRB- left", "Ana. (", "Ben) left"),
        ("the old-XXXXX lamp", "Ana. the", " old-Ben lamp"),  # a word that holds the blank is part of what is scored
        ("Then came XXXXX", "Ana. Then came", " Ben"),
        ("He met XXXXX 's cook", "Ana. He met", " Ben's cook"),
    ],
)
def test_paper_splits_before_the_word_of_the_blank(blank, context, continuation):
    assert asked("paper", Cloze(["Ana ."], blank, "Ben", ["Ben"])) == [(context, [continuation])]


def test_sentence_scores_the_question_alone_as_it_is_written():
    cloze = Cloze(["Ana ."], "He did n't take the XXXXX .", "lamp", ["lamp", "hat"])
    found = asked("sentence", cloze)
    assert [context + rest for context, (rest,) in found] == ["He did n't take the lamp .", "He did n't take the hat ."]
    questions = cbt.question("sentence", cloze, ENCODING.encode_ordinary)
    assert [len(question.context) for question in questions] == [1, 1]


def scored(*logprobs):
    return [Score(list(tokens), [False] * len(tokens)) for tokens in logprobs]


def test_paper_takes_the_highest_sum_and_sentence_the_highest_mean():
    cloze = Cloze([], "XXXXX", "long", ["long", "short", "bad"])
    group = scored([-1.0, -1.0, -1.0], [-1.5], [-9.0])
    assert cbt.judge("paper", cloze, [group]) == cbt.Verdict(False, "short", False)
    assert cbt.judge("sentence", cloze, [[score] for score in group]) == cbt.Verdict(True, "long", False)


@pytest.mark.parametrize(("gap", "near"), [(0.0, True), (9e-6, True), (2e-5, False)])
def test_two_best_candidates_that_lie_close_are_counted(gap, near):
    cloze = Cloze([], "XXXXX", "one", ["one", "two", "three"])
    group = scored([-1.0], [-1.0 - gap], [-1.00001 - gap])
    assert cbt.judge("paper", cloze, [group]).near_tie == near
    assert cbt.judge("sentence", cloze, [[score] for score in group]).near_tie == near
    assert not cbt.judge("paper", Cloze([], "XXXXX", "one", ["one"]), [group[:1]]).near_tie


@torch.no_grad()
def plain(model, protocol, cloze):
    """The candidate that a protocol chooses, one sequence at a time."""
    values = []
    longest = max(len(ids) for q in cbt.question(protocol, cloze, ENCODING.encode_ordinary) for ids in q.continuations)
    for option in cloze.options:
        told = " ".join(cloze.sentences) + " " if protocol == "paper" else ""
        before, after = cloze.question.split("XXXXX")
        if protocol == "paper":  # the stories' only mark is the full stop
            context = ENCODING.encode_ordinary((told + before).strip().replace(" .", "."))
            ids = ENCODING.encode_ordinary(" " + option + after.replace(" .", "."))
        else:
            first, *ids = ENCODING.encode_ordinary(before + option + after)
            context = [first]
        inputs = context[-(POSITIONS + 1 - longest) :] + ids
        logprobs = model(torch.tensor([inputs[:-1]]))[0, -len(ids) :].log_softmax(-1)
        total = sum(logprobs[i, token].item() for i, token in enumerate(ids))
        values.append(total if protocol == "paper" else total / len(ids))
    return cloze.options[values.index(max(values))]


def test_the_command_line_writes_what_a_plain_computation_finds(world):
    models = {f"models/{name}": save_model(world / "models" / name, seed) for name, seed in (("one", 1), ("two", 2))}
    files = [world / f"data/stories/stories_{kind}_valid.txt" for kind in ("NE", "CN")]
    places = ("--out", "cbt/results.json", "--items", "cbt/items.jsonl")
    result = run(
        *("eval_cbt.py", "--ckpt", *models, "--data", *files, "--protocol", "all", "--batch-size", 13, *places),
        cwd=world,
    )
    rows = json.loads((world / "cbt/results.json").read_text())
    items = [json.loads(line) for line in (world / "cbt/items.jsonl").read_text().splitlines()]
    expected = [(m, f.name, p) for m in models for f in files for p in ("paper", "sentence")]
    assert [(row["model"], row["data"], row["protocol"]) for row in rows] == expected
    for row in rows:
        path = world / "data/stories" / row["data"]
        clozes = cbt.read(path)
        key = {"model": row["model"], "protocol": row["protocol"], "data": path.stem}
        chosen = [item for item in items if key.items() <= item.items()]
        assert [item["index"] for item in chosen] == list(range(len(clozes)))
        assert [item["answer"] for item in chosen] == [cloze.answer for cloze in clozes]
        assert [item["correct"] for item in chosen] == [item["chosen"] == item["answer"] for item in chosen]
        model = models[row["model"]]
        assert [item["chosen"] for item in chosen] == [plain(model, row["protocol"], cloze) for cloze in clozes]
        correct, total = sum(item["correct"] for item in chosen), len(clozes)
        assert (row["task"], row["correct"], row["total"], row["accuracy"]) == ("cbt", correct, total, correct / total)
        assert row["interval"] == pytest.approx(wilson(correct, total))
        assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (row["perplexity"], row["near_ties"], row["has_published"]) == (None, 0, False)
    assert len(items) == sum(row["total"] for row in rows)
    assert 0 < sum(row["correct"] for row in rows) < len(items)
    assert sum(line.startswith("| models/") for line in result.stdout.splitlines()) == len(rows)


def test_results_go_to_the_folder_where_the_report_looks(world):
    save_model(world / "models/one", 1)
    run("eval_cbt.py", "--ckpt", "models/one", "--data", "data/stories/stories_NE_valid.txt", cwd=world)
    path = world / "logs/results/cbt-paper-models-one-stories_NE_valid.txt.json"
    (row,) = json.loads(path.read_text())
    assert (row["protocol"], row["total"]) == ("paper", 40)


# A quotation may begin with s, as in: the word 'string'.
TREEBANK = re.compile(r"-[LR][RSC]B-|`|''| n't| '(?:s|m|d|re|ve|ll)(?!\w)")


def test_no_treebank_token_is_left_in_the_data_sets_own_files():
    folder = os.environ.get("GPT2_TEST_EVAL")
    if not folder or not Path(folder).is_dir():
        pytest.skip("GPT2_TEST_EVAL names no folder of Children's Book Test files")
    files = [path for kind in ("cbt_format", "cbt_like") for path in sorted(Path(folder).glob(f"{kind}/*.txt"))]
    assert files
    for path in files:
        for cloze in cbt.read(path):
            assert 1 < len(cloze.options) <= 10
            whole = " ".join([*cloze.sentences, cloze.question.replace("XXXXX", cloze.answer)])
            text = detokenize(whole.split())
            left = TREEBANK.findall(text)
            assert not left, (path.name, cloze.question, left)
