"""The Children's Book Test: both protocols' exact rules, from the lines of a file to the counts in results.json."""

import hashlib
import json
import os
import re
import tracemalloc
from pathlib import Path

import pytest
import torch
from conftest import ENCODING, POSITIONS, run, save_model
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_cbt
from core.eval import cbt, evaluate
from core.eval.cbt import BLANK, CBTConfig, Cloze, detokenize
from core.eval.results import wilson
from core.eval.scoring import Score, score
from core.eval.task import UnscorableError, Verdict

DRAWN = settings(derandomize=True, deadline=None, max_examples=150)
CUT = f"context cut to the model's {POSITIONS} tokens"
TOO_LONG = f"longer than the model's context of {POSITIONS} tokens"


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("Ana took it .", "Ana took it."),
        ("Yes , no ; so : why ? Ah !", "Yes, no; so: why? Ah!"),
        ("Well ... what ?! No !!", "Well... what?! No!!"),
        ("`` Come , '' said he . `` Now ! ''", '"Come," said he. "Now!"'),
        ("`` ` Tis ' he said ''", "\"'Tis' he said\""),
        ("` Tis the boys ' ' he said", "'Tis the boys' ' he said"),
        ("`` the boys ' '' he said", '"the boys\'" he said'),
        ("-LRB- one -RRB- two", "(one) two"),
        ("-LSB- one -RSB- two", "[one] two"),
        ("-LCB- one -RCB- two", "{one} two"),
        ("( one ) [ two ] { three }", "(one) [two] {three}"),
        ("-LRB- `` No ! '' -RRB- .", '("No!").'),
        ("I do n't . DO N'T !", "I don't. DON'T!"),
        ("Ana 's lamp and ANA 'S", "Ana's lamp and ANA'S"),
        ("I 'm , he 'd , you 're , we 've , they 'll", "I'm, he'd, you're, we've, they'll"),
        ("I 'M , HE 'D , YOU 'RE , WE 'VE , THEY 'LL", "I'M, HE'D, YOU'RE, WE'VE, THEY'LL"),
        ("the boys ' lamp", "the boys' lamp"),
        ("50 % of $ 5 is # 2", "50% of $5 is #2"),
        ("yes -- no - so", "yes -- no - so"),
        ("o'clock 'em 'T was", "o'clock 'em 'T was"),
        ("'s first", "'s first"),
        ("` ' Tis", "' ' Tis"),
        ("said ' 's", "said' 's"),
        (". first", ". first"),
        ("", ""),
    ],
)
def test_tokens_are_joined_as_in_ordinary_text(tokens, text):
    assert detokenize(tokens.split()) == text


MARKS = [*cbt.PTB, *cbt.NO_SPACE_AFTER, *".,!?;:%)]}", "'", "...", "?!"]
ENDINGS = ["n't", "N'T", *(f"'{end}" for end in ("s", "m", "d", "re", "ve", "ll", "S", "M", "D", "RE", "VE", "LL"))]
WORDS = st.text("Aalz'-.\u2019\u00e9", min_size=1, max_size=4).filter(
    lambda word: not cbt.NO_SPACE_BEFORE.fullmatch(word)
)
TOKENS = st.one_of(WORDS, st.sampled_from(sorted({*MARKS, *ENDINGS, "--"})))


@DRAWN
@given(st.lists(TOKENS, max_size=15))
def test_the_text_of_the_first_tokens_is_a_prefix_of_the_text(tokens):
    text = detokenize(tokens)
    assert all(text.startswith(detokenize(tokens[:k])) for k in range(len(tokens) + 1))


@DRAWN
@given(st.lists(TOKENS, max_size=15))
def test_only_spaces_and_treebank_marks_change(tokens):
    expected = "".join(cbt.PTB.get(token, token) for token in tokens)
    assert detokenize(tokens).replace(" ", "") == expected


@DRAWN
@given(st.lists(WORDS))
def test_words_are_joined_by_single_spaces(words):
    assert detokenize(words) == " ".join(words)


# A quotation can start with s, as in: the word 'string'.
TREEBANK = re.compile(r"-[LR][RSC]B-|`|''| n't| N'T| '(?:s|m|d|re|ve|ll)(?!\w)| [.,;:?!%)\]}]|[(\[{$#] ", re.IGNORECASE)
PLAIN_WORDS = st.text("Aalz\u00e9", min_size=1, max_size=4)


@DRAWN
@given(st.lists(st.tuples(PLAIN_WORDS, st.sampled_from(sorted({*MARKS, *ENDINGS})))))
def test_no_treebank_token_is_left_among_words(pairs):
    text = detokenize([token for pair in pairs for token in pair] + ["end"])
    assert not TREEBANK.search(text)


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


# \r ends a line where \n follows; \t and | separate fields; a zero byte is refused.
FIELDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\n\r\t|\0"), max_size=20)
CLOZES = st.builds(
    Cloze,
    sentences=st.lists(FIELDS, min_size=20, max_size=20),
    question=st.tuples(FIELDS, FIELDS).map(BLANK.join).filter(lambda text: text.count(BLANK) == 1),
    answer=FIELDS,
    candidates=st.lists(FIELDS, min_size=10, max_size=10).filter(lambda drawn: drawn[-1]),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drawn")


@settings(DRAWN, max_examples=60)
@given(clozes=st.lists(CLOZES, min_size=1, max_size=2), ending=st.sampled_from(["\n", "\r\n"]))
def test_questions_are_read_unchanged(folder, clozes, ending):
    blocks = []
    for cloze in clozes:
        last = f"{cloze.question}\t{cloze.answer}\t\t{'|'.join(cloze.candidates)}"
        blocks.append("".join(f"{i} {text}{ending}" for i, text in enumerate([*cloze.sentences, last], 1)))
    (folder / "a.txt").write_text(ending.join(blocks), encoding="utf-8", newline="")
    assert cbt.read(folder / "a.txt") == clozes


@pytest.mark.parametrize(
    ("candidates", "options", "warnings"),
    [
        (TEN, TEN, ()),
        (TEN[:-5], TEN[:-5], ("not 10 candidates",)),
        (TEN + "|hat", TEN + "|hat", ("not 10 candidates",)),
        (TEN.replace("rope", "lamp"), TEN.replace("rope|", ""), ("a repeated candidate",)),
        (TEN.replace("boat", " "), TEN.replace("boat|", ""), ("an empty candidate",)),
        (
            "|boat|lamp|boat||lamp| |ring|lamp|",
            "boat|lamp|ring",
            ("an empty candidate", "a repeated candidate"),
        ),
    ],
)
def test_irregular_candidates_give_warnings_and_empty_and_repeated_ones_no_requests(
    tmp_path, candidates, options, warnings
):
    cloze, _ = read(tmp_path, write_lines(options=candidates), write_lines())
    assert cloze.candidates == candidates.split("|")
    assert cloze.options == options.split("|")
    assert cloze.warnings == warnings
    assert len(cbt.requests("paper", cloze, ENCODING.encode_ordinary)) == len(cloze.options)
    assert len(cbt.requests("sentence", cloze, ENCODING.encode_ordinary)) == len(cloze.options)


@pytest.mark.parametrize("protocol", cbt.PROTOCOLS)
@pytest.mark.parametrize(
    ("answer", "candidates", "reason"),
    [
        ("hat", ["lamp", "ring"], "the answer is not among the candidates"),
        ("", ["lamp", "", "ring"], "the answer is not among the candidates"),
        ("lamp", ["lamp", " ", "lamp", ""], "fewer than two candidates"),
        ("lamp", [""], "the answer is not among the candidates"),
    ],
)
def test_an_unscorable_question_has_a_reason(protocol, answer, candidates, reason):
    cloze = Cloze(["Ana ."], "Ana took the XXXXX .", answer, candidates)
    with pytest.raises(UnscorableError, match=reason):
        cbt.requests(protocol, cloze, ENCODING.encode_ordinary)


@pytest.mark.parametrize(
    ("protocol", "sentences", "reason"),
    [("paper", ["", " "], "no context before the blank"), ("sentence", ["Ana ."], "a question of one token")],
)
def test_a_blank_without_context_is_unscorable(protocol, sentences, reason):
    with pytest.raises(UnscorableError, match=reason):
        cbt.requests(protocol, Cloze(sentences, BLANK, "a", ["a", "b"]), ENCODING.encode_ordinary)


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (write_lines()[:9], "9 lines and 1 fields. Download the file again"),
        (write_lines()[:20], "20 lines and 1 fields. Download the file again"),
        ([*write_lines()[:20], "21 Ana took the XXXXX .\tla"], "21 lines and 2 fields. Download the file again"),
        (write_lines(19), "20 lines and 4 fields"),
        (write_lines(21), "line 22 of the question does not start with its number (1 to 21)"),
        (write_lines()[1:], "line 1 of the question does not start with its number (1 to 21): '2 Sentence"),
        (["Ana took the lamp ."], "line 1 of the question does not start with its number"),
        (write_lines(question="Ana took the lamp ."), "the question has 0 blanks (XXXXX), expected 1"),
        (write_lines(question="XXXXX took XXXXX ."), "the question has 2 blanks (XXXXX), expected 1"),
    ],
)
@pytest.mark.parametrize("after", [[], [write_lines()]])
def test_a_malformed_question_is_refused_by_file_and_line(tmp_path, block, problem, after):
    with pytest.raises(ValueError, match=f"{tmp_path}/questions.txt, line 23: ") as caught:
        read(tmp_path, write_lines(), block, *after)
    assert problem in str(caught.value)


@pytest.mark.parametrize("kept", range(1, 10))
def test_a_file_cut_within_the_last_candidates_is_refused(tmp_path, kept):
    cut = "|".join(TEN.split("|")[:kept])
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/questions.txt, line 43: the file ends after {kept} of 10 candidates"
    ):
        read(tmp_path, write_lines(), write_lines(options=cut), ending="")


def test_a_file_cut_before_the_last_candidate_is_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}/questions.txt, line 43: the file ends after 9 of 10 candidates"):
        read(tmp_path, write_lines(), write_lines(options=TEN.removesuffix("sack")), ending="")


def test_a_file_without_blank_lines_is_not_read_into_memory(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i} {'Ana took it . ' * 10}\n" for i in range(1, 40_000)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{tmp_path}/a.txt, line 1: "):
            cbt.read(tmp_path / "a.txt")
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \n\t\n"])
def test_a_file_without_questions_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/a.txt contains no questions"):
        cbt.read(tmp_path / "a.txt")


def decoded(protocol, cloze):
    """Context and continuation of each candidate, as text."""
    found = cbt.requests(protocol, cloze, ENCODING.encode_ordinary)
    return [(ENCODING.decode(request.context), ENCODING.decode(request.continuation)) for request in found]


def test_paper_scores_candidate_and_rest_after_the_sentences():
    cloze = Cloze(["`` Ana !", "It 's he . ''"], "She did n't take the XXXXX , Ben .", "lamp", ["lamp", "hat", "'s"])
    context = "\"Ana! It's he.\" She didn't take the"
    assert decoded("paper", cloze) == [(context, end) for end in (" lamp, Ben.", " hat, Ben.", "'s, Ben.")]
    first, *_ = cbt.requests("paper", cloze, ENCODING.encode_ordinary)
    assert first.context == ENCODING.encode_ordinary(context)
    assert first.continuation == ENCODING.encode_ordinary(" lamp, Ben.")


@pytest.mark.parametrize(
    ("blank", "context", "continuation"),
    [
        ("XXXXX went home .", "Ana.", " Ben went home."),
        ("He said `` XXXXX '' .", 'Ana. He said "', 'Ben".'),
        ("-LRB- XXXXX -RRB- left", "Ana. (", "Ben) left"),
        ("the old-XXXXX lamp", "Ana. the", " old-Ben lamp"),  # a word that contains the blank is scored
        ("Then came XXXXX", "Ana. Then came", " Ben"),
        ("He met XXXXX 's cook", "Ana. He met", " Ben's cook"),
    ],
)
def test_paper_splits_before_the_word_of_the_blank(blank, context, continuation):
    assert decoded("paper", Cloze(["Ana ."], blank, "Ben", ["Ben", "Ana"]))[0] == (context, continuation)


LINES = st.lists(TOKENS, max_size=8).map(" ".join)


@DRAWN
@given(
    sentences=st.lists(LINES, max_size=3),
    ends=st.tuples(LINES, LINES),
    glue=st.sampled_from([" ", "", "-"]),
    options=st.lists(st.lists(TOKENS, min_size=1, max_size=2).map(" ".join), min_size=2, max_size=4, unique=True),
)
def test_paper_splits_every_text_at_the_same_place(sentences, ends, glue, options):
    question = glue.join([ends[0], BLANK, ends[1]])
    cloze = Cloze(["Then", *sentences], question, options[0], options)
    found = cbt.requests("paper", cloze, ENCODING.encode_ordinary)
    assert len({tuple(request.context) for request in found}) == 1
    for request, option in zip(found, options, strict=True):
        words = " ".join([*cloze.sentences, question.replace(BLANK, option)])
        assert ENCODING.decode(request.context + request.continuation) == detokenize(words.split())


def test_sentence_scores_the_unchanged_question_alone():
    cloze = Cloze(["Ana ."], "He did n't take the XXXXX .", "lamp", ["lamp", "hat"])
    found = decoded("sentence", cloze)
    assert [context + rest for context, rest in found] == ["He did n't take the lamp .", "He did n't take the hat ."]
    assert [len(request.context) for request in cbt.requests("sentence", cloze, ENCODING.encode_ordinary)] == [1, 1]


def scored(*logprobs):
    return [Score(list(tokens), [0.0] * len(tokens), [0.0] * len(tokens)) for tokens in logprobs]


def test_paper_chooses_the_highest_sum_and_sentence_the_highest_mean():
    cloze = Cloze([], "XXXXX", "long", ["long", "short", "bad"])
    scores = scored([-1.0, -1.0, -1.0], [-1.5], [-9.0])
    irregular = {"warnings": ("not 10 candidates",)}
    assert cbt.judge("paper", cloze, scores) == Verdict(False, chosen="short", **irregular)
    assert cbt.judge("sentence", cloze, scores) == Verdict(True, chosen="long", **irregular)


def test_scores_belong_to_the_distinct_candidates():
    cloze = Cloze([], "XXXXX", "two", ["", "one", "one", "two", "three"])
    assert cbt.judge("paper", cloze, scored([-2.0], [-1.0], [-3.0])).chosen == "two"


@pytest.mark.parametrize("protocol", cbt.PROTOCOLS)
@pytest.mark.parametrize(("gap", "near_tie"), [(0.0, True), (9e-6, True), (2e-5, False)])
def test_two_close_best_candidates_are_a_near_tie(protocol, gap, near_tie):
    cloze = Cloze([], "XXXXX", "one", ["one", "two", "three"])
    assert cbt.judge(protocol, cloze, scored([-1.0], [-1.0 - gap], [-1.00001 - gap])).near_tie == near_tie
    assert cbt.judge(protocol, cloze, scored([-2.0], [-1.0 - gap], [-1.0])).near_tie == near_tie
    assert not cbt.judge(protocol, cloze, scored([-1.0], [-3.0], [-3.0 - gap])).near_tie


@torch.no_grad()
def values_by_hand(model, protocol, cloze):
    """Each candidate's sum or mean of log-probabilities, one sequence at a time. The stories' only punctuation is the
    full stop."""
    before, after = cloze.question.split(BLANK)
    if protocol == "paper":
        words = " ".join([*cloze.sentences, before]).split()
        context = ENCODING.encode_ordinary(" ".join(words).replace(" .", "."))
        ends = [ENCODING.encode_ordinary(" " + option + after.replace(" .", ".")) for option in cloze.options]
        context = context[-(POSITIONS + 1 - max(map(len, ends))) :]  # the same for all; the last token is not an input
        halves = [(context, end) for end in ends]
    else:
        sequences = [ENCODING.encode_ordinary(before + option + after) for option in cloze.options]
        halves = [(ids[:1], ids[1:]) for ids in sequences]
    values = []
    for context, end in halves:
        logprobs = model(torch.tensor([[*context, *end[:-1]]]))[0, -len(end) :].log_softmax(-1)
        total = sum(logprobs[i, token].item() for i, token in enumerate(end))
        values.append(total if protocol == "paper" else total / len(end))
    return values


def plain(model, protocol, cloze):
    values = values_by_hand(model, protocol, cloze)
    return cloze.options[values.index(max(values))]


@pytest.fixture(scope="module")
def models(world):
    return {f"models/{name}": save_model(world / "models" / name, seed) for name, seed in (("one", 1), ("two", 2))}


@pytest.mark.parametrize("batch_tokens", [1, 10**4])
def test_a_long_context_is_truncated_from_the_left_equally_for_all_candidates(models, batch_tokens):
    model, names = models["models/one"], ["Ana", "Anastasia", "Bartholomew", "Ben"]
    clozes = [Cloze(["Ana met Ben ."] * n, "Then XXXXX met Ana .", "Ana", names) for n in range(6, 30)]
    groups = [cbt.requests("paper", cloze, ENCODING.encode_ordinary) for cloze in clozes]
    lengths = [{len(request.context) + len(request.continuation) for request in group} for group in groups]
    assert all(len(found) > 2 for found in lengths)
    assert any(max(found) <= POSITIONS for found in lengths)
    assert any(min(found) <= POSITIONS + 1 < max(found) for found in lengths)  # the short ones are cut for the longest
    assert any(min(found) > POSITIONS + 1 for found in lengths)
    for cloze, found in zip(clozes, score(model, groups, batch_tokens=batch_tokens), strict=True):
        assert [each.total for each in found] == pytest.approx(values_by_hand(model, "paper", cloze), abs=1e-4)


def test_the_results_equal_a_plain_computation(world, models):
    files = [world / f"data/stories/stories_{kind}_valid.txt" for kind in ("NE", "CN")]
    places = ("--out", "cbt/results.json", "--items", "cbt/items.jsonl")
    result = run(
        *("eval_cbt.py", "--ckpt", *models, "--data", *files, "--protocol", "all", "--batch-tokens", 700, *places),
        cwd=world,
    )
    rows = json.loads((world / "cbt/results.json").read_text())
    items = [json.loads(line) for line in (world / "cbt/items.jsonl").read_text().splitlines()]
    expected = [(m, f.name, p) for m in models for f in files for p in ("paper", "sentence")]
    assert [(row["model"], row["data"], row["protocol"]) for row in rows] == expected
    for row in rows:
        path = world / "data/stories" / row["data"]
        clozes = cbt.read(path)
        key = {"task": "cbt", "model": row["model"], "protocol": row["protocol"], "subset": path.stem}
        chosen = [item for item in items if key.items() <= item.items()]
        assert [item["index"] for item in chosen] == list(range(len(clozes)))
        answers = [cloze.answer for cloze in clozes]
        assert [item["correct"] for item in chosen] == [
            item["chosen"] == answer for item, answer in zip(chosen, answers, strict=True)
        ]
        model = models[row["model"]]
        assert [item["chosen"] for item in chosen] == [plain(model, row["protocol"], cloze) for cloze in clozes]
        correct, total = sum(item["correct"] for item in chosen), len(clozes)
        assert (row["task"], row["correct"], row["total"], row["accuracy"]) == ("cbt", correct, total, correct / total)
        assert row["interval"] == pytest.approx(wilson(correct, total))
        assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (row["perplexity"], row["near_ties"], row["has_published"]) == (None, 0, False)
        truncated = sum(CUT in item.get("remarks", []) for item in chosen)
        assert row["remarks"].get(CUT, 0) == truncated
        assert (truncated > 0) == (row["protocol"] == "paper")
    assert len(items) == sum(row["total"] for row in rows)
    assert 0 < sum(row["correct"] for row in rows) < len(items)
    assert sum(line.startswith("| models/") for line in result.stdout.splitlines()) == len(rows)


def test_results_go_to_the_folder_that_the_report_reads(world, models, monkeypatch):
    monkeypatch.chdir(world)
    questions = CBTConfig(data=("data/stories/stories_NE_valid.txt",))
    eval_cbt.main(eval_cbt.Config(questions, evaluate.ScoringConfig(ckpt=("models/one",))))
    (path,) = world.glob("logs/results/cbt-paper-models-one-stories_NE_valid.txt-*.json")
    (row,) = json.loads(path.read_text())
    assert (row["protocol"], row["total"]) == ("paper", 40)


def write(path, clozes):
    blocks = []
    for cloze in clozes:
        last = f"{cloze.question}\t{cloze.answer}\t\t{'|'.join(cloze.candidates)}"
        blocks.append("\n".join(f"{i} {text}" for i, text in enumerate([*cloze.sentences, last], 1)))
    path.write_text("\n\n".join(blocks) + "\n")


NAMES = ["Ana", "Ben", "Anna", "Bell", "Carl", "Dora", "Emil", "Fay", "Gus", "Hanna"]
SHORT = ["Ana .", *[""] * 19]
LONG = ["Ana met Ben and Ben met Ana ."] * 20
LONG_QUESTION = f"{'Ana met Ben and ' * 20}XXXXX ."  # too long to score, but not as a context
LONG_REST = f"XXXXX met Ben {'and Ben met Ana ' * 20}."
UNSCORED = {"answer": "the answer is not among the candidates", "few": "fewer than two candidates"}
IRREGULAR = [  # sentences, question, answer, candidates; by protocol, the reason for no score; warnings
    (SHORT, "Ben met XXXXX .", "Ana", NAMES, {}, ()),
    (SHORT, "Ben met XXXXX .", "Ana", NAMES[:9], {}, ("not 10 candidates",)),
    (SHORT, "Ben met XXXXX .", "Ana", [*NAMES[:8], "Ben", ""], {}, ("an empty candidate", "a repeated candidate")),
    (SHORT, "Ben met XXXXX .", "Zoe", NAMES, dict.fromkeys(cbt.PROTOCOLS, UNSCORED["answer"]), ()),
    (SHORT, "Ben met XXXXX .", "Ana", ["Ana"], dict.fromkeys(cbt.PROTOCOLS, UNSCORED["few"]), ()),
    (LONG, "Ben met XXXXX .", "Ana", NAMES, {}, ()),
    (SHORT, LONG_QUESTION, "Ana", NAMES, {"sentence": TOO_LONG}, ()),
    (SHORT, LONG_REST, "Ana", NAMES, dict.fromkeys(cbt.PROTOCOLS, TOO_LONG), ()),
    (SHORT, "Ben met XXXXX .", "Ana", NAMES, {}, ()),  # so that the file ends with a regular question
]
TRUNCATED = {"paper": [5, 6], "sentence": []}


def test_every_question_counts_and_irregular_ones_are_reported(world, models, monkeypatch, capsys):
    monkeypatch.chdir(world)
    clozes = [Cloze(*parts) for *parts, _, _ in IRREGULAR]
    write(world / "irregular.txt", clozes)
    assert cbt.read(world / "irregular.txt") == clozes
    scoring = evaluate.ScoringConfig(ckpt=("models/one",), items="irregular.jsonl", out="irregular.json")
    eval_cbt.main(eval_cbt.Config(CBTConfig(data=("irregular.txt",), protocol=("all",)), scoring))
    printed = capsys.readouterr().out
    items = [json.loads(line) for line in (world / "irregular.jsonl").read_text().splitlines()]
    rows = json.loads((world / "irregular.json").read_text())
    assert [row["protocol"] for row in rows] == ["paper", "sentence"]
    for row in rows:
        protocol, unscored, counts = row["protocol"], {}, {}
        chosen = [item for item in items if item["protocol"] == protocol]
        for i, (item, (*_, reasons, warnings)) in enumerate(zip(chosen, IRREGULAR, strict=True)):
            expected = [*warnings, *[CUT] * (i in TRUNCATED[protocol])]
            assert item.get("unscored") == reasons.get(protocol)
            assert item.get("remarks", []) == expected
            if reason := reasons.get(protocol):
                assert not item["correct"]
                assert "chosen" not in item
                unscored[reason] = unscored.get(reason, 0) + 1
            else:
                assert item["chosen"] == plain(models["models/one"], protocol, clozes[i])
                assert item["correct"] == (item["chosen"] == clozes[i].answer)
            counts |= {warning: counts.get(warning, 0) + 1 for warning in expected}
        assert (row["unscored"], row["remarks"]) == (unscored, counts)
        assert row["total"] == len(IRREGULAR) == sum(unscored.values()) + sum("chosen" in item for item in chosen)
        assert row["correct"] == sum(item["correct"] for item in chosen)
        assert f" {row['correct']} of {len(IRREGULAR)} " in printed
        for reason, n in unscored.items():
            assert f"models/one, irregular.txt, {protocol}: {n} not scored, counted as wrong: {reason}\n" in printed
        for warning, n in counts.items():
            assert f"models/one, irregular.txt, {protocol}: {n} scored with a warning: {warning}\n" in printed


@pytest.mark.parametrize(
    ("name", "count", "subset", "has_published"),
    [
        ("cbtest_NE_valid_2000ex.txt", 2000, "NE validation", True),
        ("cbtest_CN_test_2500ex.txt", 2500, "CN test", True),
        ("my_cbtest_NE_valid_2000ex.txt", 2000, "my_cbtest_NE_valid_2000ex", False),
    ],
)
def test_published_figures_apply_to_the_data_sets_own_files(tmp_path, name, count, subset, has_published):
    write(tmp_path / name, [Cloze(SHORT, "Ben met XXXXX .", "Ana", NAMES)] * count)
    (questions,) = cbt.load(CBTConfig(data=(str(tmp_path / name),)))
    found = (len(questions.questions), questions.data, questions.subset, questions.has_published)
    assert found == (count, name, subset, has_published)


@pytest.mark.parametrize(
    ("name", "count", "complete"),
    [("cbtest_NE_valid_2000ex.txt", 1999, "2,000"), ("cbtest_V_test_2500ex.txt", 2000, "2,500")],
)
def test_an_incomplete_file_of_the_data_set_is_refused(tmp_path, name, count, complete):
    write(tmp_path / name, [Cloze(SHORT, "Ben met XXXXX .", "Ana", NAMES)] * count)
    with pytest.raises(ValueError, match=rf"{name} has {count:,} questions, expected {complete}"):
        cbt.load_file(tmp_path / name, ["paper"])


def test_a_last_question_of_nine_candidates_in_a_complete_file_is_accepted(tmp_path):
    (cloze,) = read(tmp_path, write_lines(options=TEN.removesuffix("|sack")), ending="\n")
    assert cloze.warnings == ("not 10 candidates",)


def test_the_hubs_questions_are_loaded_by_type_and_split(monkeypatch):
    row = {"sentences": LONG, "question": "Ben met XXXXX .", "answer": "Ana", "options": NAMES}
    monkeypatch.setattr(cbt.task, "hub_rows", lambda *where: [row | {"answer": "/".join(where)}])
    sets = cbt.load(CBTConfig(types=("V", "NE", "V"), split="test"))
    assert [(each.data, each.subset, each.has_published) for each in sets] == [
        ("cam-cst/cbt V test", "V test", True),
        ("cam-cst/cbt NE test", "NE test", True),
    ]
    assert sets[1].questions == [Cloze(LONG, "Ben met XXXXX .", "cam-cst/cbt/NE/test", NAMES)]
    monkeypatch.setattr(cbt.task, "hub_rows", lambda *where: [row, row | {"question": "Ben met Ana ."}])
    with pytest.raises(ValueError, match="cam-cst/cbt NE validation, row 1: the question has 0 blanks"):
        cbt.load(CBTConfig())


def test_no_treebank_token_is_left_in_the_data_sets_own_files():
    folder = os.environ.get("GPT2_TEST_EVAL")
    if not folder or not Path(folder).is_dir():
        pytest.skip("GPT2_TEST_EVAL is not a folder of Children's Book Test files")
    files = [path for kind in ("cbt_format", "cbt_like") for path in sorted(Path(folder).glob(f"{kind}/*.txt"))]
    assert files
    for path in files:
        clozes = cbt.read(path)
        assert all(1 < len(cloze.options) <= 10 for cloze in clozes)
        texts = {cloze.question.replace(BLANK, cloze.answer) for cloze in clozes}
        texts |= {" ".join(cloze.sentences) for cloze in clozes[::10]}
        for original in texts:
            text = detokenize(original.split())
            left = TREEBANK.findall(text)
            assert not left, (path.name, text, left)


@pytest.mark.parametrize("chosen", [{"types": ("V",)}, {"split": "test"}])
def test_options_of_the_hubs_questions_are_refused_with_a_file(chosen):
    with pytest.raises(
        ValueError, match="--types and --split select questions of the hub and have no effect on --data"
    ):
        cbt.load(CBTConfig(data=("questions.txt",), **chosen))
