"""LAMBADA: each protocol's exact rule, from the lines of a file to the counts in results.json."""

import hashlib
import json
import math
import re

import pytest
import torch
from conftest import ENCODING, POSITIONS, refused, run, save_model
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_lambada
from core.eval import evaluate, lambada
from core.eval.lambada import LambadaConfig
from core.eval.results import wilson
from core.eval.scoring import NEAR_TIE, Request, Score
from core.eval.task import UnscorableError, Verdict

DRAWN = settings(derandomize=True, deadline=None, max_examples=100)
CUT = f"context cut to the model's {POSITIONS} tokens"


def score(data=None, text=None, protocol=(), **scoring):
    """Run eval_lambada.py in this process."""
    questions = LambadaConfig(data=data, text=text, protocol=protocol)
    eval_lambada.main(eval_lambada.Config(questions=questions, scoring=evaluate.ScoringConfig(**scoring)))


def request(protocol, passage):
    (found,) = lambada.requests(protocol, passage, ENCODING.encode_ordinary)
    return found


def decoded(protocol, passage):
    """Context and target as text."""
    found = request(protocol, passage)
    return ENCODING.decode(found.context), ENCODING.decode(found.continuation)


@pytest.mark.parametrize("protocol", ["openai", "standard"])
@pytest.mark.parametrize(
    ("passage", "context", "target"),
    [
        ("So the lamp went home with Ana", "So the lamp went home with", " Ana"),
        ("`` no , '' said anastasia", "`` no , '' said", " anastasia"),
        (
            "\u201cNo,\u201d said Ana. \u201cIt\u2019s me\u201d",
            "\u201cNo,\u201d said Ana. \u201cIt\u2019s",
            " me\u201d",
        ),
        # The last word is what follows the last space, newlines in it included: split(" "), not split().
        ("he met\nthe new\nclerk", "he met\nthe", " new\nclerk"),
        # lm-evaluation-harness moves whitespace at the end of a context to the target.
        ("a  b", "a", "  b"),
        ("a\n b", "a", "\n b"),
    ],
)
def test_the_last_word_is_what_follows_the_last_space(protocol, passage, context, target):
    assert decoded(protocol, passage) == (context, target)
    assert " ".join(passage.split(" ")[:-1]).rstrip() == context


@DRAWN
@given(
    st.text(st.sampled_from("aeo.\u2019 \n'`"), min_size=1)
    .map("So {}".format)
    .filter(lambda passage: passage.rpartition(" ")[2].strip())
)
def test_context_plus_target_is_the_passage(passage):
    for protocol in lambada.PROTOCOLS:
        normalized = "\n" + re.sub("``|''", '"', passage.replace("\u2019", "'"))
        expected = normalized if protocol in ("last-token-norm", "stop-filter") else passage
        found = request(protocol, passage)
        assert ENCODING.decode(found.context + found.continuation) == expected


def test_context_and_target_are_encoded_separately():
    found = request("openai", "So the lamp went home with Anastasia")
    assert found.context == ENCODING.encode_ordinary("So the lamp went home with")
    assert found.continuation == ENCODING.encode_ordinary(" Anastasia")
    assert len(found.continuation) > 1


def test_last_token_scores_only_the_last_token():
    passage = "\u201cAh,\u201d said Anastasia"
    ids = ENCODING.encode_ordinary(passage)
    assert request("last-token", passage) == Request(ids[:-1], ids[-1:])


def test_last_token_norm_starts_with_a_newline_and_has_straight_quotes():
    ids = ENCODING.encode_ordinary('\n"Ah," said \'Ben\' to "Anastasia')
    passage = "\u201cAh,\u201d said \u2018Ben\u2019 to ``Anastasia"
    assert request("last-token-norm", passage) == Request(ids[:-1], ids[-1:])


def test_stop_filter_scores_the_whole_word_in_the_same_text():
    assert decoded("stop-filter", "\u201cAh,\u201d said\nthe ''cook") == ('\n"Ah," said\nthe', ' "cook')


def test_normalize_quotes_leaves_other_text_unchanged():
    assert (
        lambada.normalize_quotes("It's `one' \u2014 \"two\"\u2026 caf\u00e9\n")
        == "It's `one' \u2014 \"two\"\u2026 caf\u00e9\n"
    )


@pytest.mark.parametrize(
    ("protocol", "passage"), [("openai", "two\nwords"), ("standard", "two\twords"), ("openai", " word")]
)
def test_a_passage_without_context_is_unscorable(protocol, passage):
    with pytest.raises(UnscorableError, match="no context before the last word"):
        request(protocol, passage)


def test_the_mask_contains_stop_words_and_nothing_else():
    mask = lambada.stop_word_mask(ENCODING, ENCODING.n_vocab)
    assert mask.shape == (ENCODING.n_vocab,)
    assert all(mask[ENCODING.encode_single_token(word)] for word in (" the", " a", " with", " It"))
    assert not any(mask[ENCODING.encode_single_token(word)] for word in (" lamp", " Ana", " cook", ".", " lam"))
    assert not mask[ENCODING.eot_token]


def test_the_mask_covers_a_model_whose_vocabulary_is_padded():
    mask = lambada.stop_word_mask(ENCODING, ENCODING.n_vocab + 40)
    assert mask.shape == (ENCODING.n_vocab + 40,)
    assert torch.equal(mask[: ENCODING.n_vocab], lambada.stop_word_mask(ENCODING, ENCODING.n_vocab))


def test_only_stop_filter_has_a_mask():
    assert (
        lambada.masked_ids(["openai", "standard", "last-token", "last-token-norm"], ENCODING, ENCODING.n_vocab) is None
    )
    mask = lambada.masked_ids(["openai", "stop-filter"], ENCODING, ENCODING.n_vocab)
    assert torch.equal(mask, lambada.stop_word_mask(ENCODING, ENCODING.n_vocab))


def test_each_text_allows_the_protocols_that_are_defined_on_it():
    assert lambada.allowed_protocols("openai") == ["openai", "last-token", "last-token-norm", "stop-filter"]
    assert lambada.allowed_protocols("standard") == ["standard"]
    assert lambada.allowed_protocols("other") == ["openai"]


WITHOUT_MASK = ["openai", "standard", "last-token", "last-token-norm"]


@pytest.mark.parametrize("protocol", WITHOUT_MASK)
@pytest.mark.parametrize(
    ("margins", "correct"), [([0.5], True), ([-0.5], False), ([0.5, 2.0], True), ([2.0, -0.5, 2.0], False)]
)
def test_a_passage_is_correct_only_if_all_its_tokens_are(protocol, margins, correct):
    score = Score([-1.0] * len(margins), margins, [-9.0] * len(margins))
    assert lambada.judge(protocol, "", [score]) == Verdict(correct, logprob=-1.0 * len(margins))


@pytest.mark.parametrize(
    ("margins", "allowed", "correct"),
    [
        ([-1.0], [0.5], True),  # the more likely tokens are stop words
        ([1.0], [-math.inf], False),  # the target itself is a stop word
        ([-1.0, 0.5], [0.5, -math.inf], True),  # no mask after the first token
        ([-1.0, -0.5], [0.5, 0.5], False),
        ([-1.0, 0.5], [-0.5, 0.5], False),
    ],
)
def test_stop_filter_masks_only_the_choice_of_the_first_token(margins, allowed, correct):
    score = Score([-2.0] * len(margins), margins, allowed)
    assert lambada.judge("stop-filter", "", [score]) == Verdict(correct, logprob=-2.0 * len(margins))


@pytest.mark.parametrize(
    ("protocol", "margins", "near_tie"),
    [
        ("openai", [NEAR_TIE / 2], True),
        ("openai", [-NEAR_TIE / 2], True),
        ("openai", [1.0, NEAR_TIE / 2], True),
        ("openai", [-1.0, NEAR_TIE / 2], False),  # incorrect for any outcome of the tie
        ("openai", [2 * NEAR_TIE], False),
        ("stop-filter", [NEAR_TIE / 2], False),  # no allowed id is close
    ],
)
def test_a_passage_whose_outcome_rounding_can_change_is_a_near_tie(protocol, margins, near_tie):
    assert (
        lambada.judge(protocol, "", [Score([-1.0] * len(margins), margins, [3.0, *margins[1:]])]).near_tie == near_tie
    )


def test_perplexity_is_per_word():
    verdicts = [Verdict(True, logprob=-1.0), Verdict(True, logprob=-3.0), Verdict(False, logprob=-5.0)]
    for protocol in ("openai", "standard", "stop-filter"):
        assert lambada.perplexity(protocol, verdicts) == pytest.approx(math.exp(3.0))
    for protocol in ("last-token", "last-token-norm"):
        assert lambada.perplexity(protocol, verdicts) is None  # per token, not per word


def test_perplexity_covers_only_scored_passages():
    unscored = Verdict(False, unscored="no context before the last word")
    assert lambada.perplexity("openai", [Verdict(True, logprob=-2.0), unscored]) == pytest.approx(math.exp(2.0))
    assert lambada.perplexity("openai", [unscored]) is None


def test_a_diverged_model_has_no_perplexity():
    for logprob in (-1e4, math.nan, -math.inf):
        assert lambada.perplexity("openai", [Verdict(False, logprob=logprob)] * 2) is None


@pytest.mark.parametrize("ending", ["", "\n"])
def test_passages_are_read_one_per_line(tmp_path, ending):
    passages = ["so it went home with Ana", "\u201cyes\u201d said caf\u00e9", " two  words "]
    (tmp_path / "a.txt").write_text("\n".join(passages) + ending, encoding="utf-8")
    assert lambada.read(tmp_path / "a.txt") == passages
    passages.append("with a\nnewline")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in passages) + ending)
    assert lambada.read(tmp_path / "a.jsonl") == passages


def lines_of(characters):
    """Lists of passages of these characters."""
    return st.lists(st.text(characters).map("so {} on".format), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drawn")


@DRAWN
@given(passages=lines_of(st.characters(exclude_categories=("Cs",), exclude_characters="\n\0")))
def test_lines_are_read_unchanged(folder, passages):
    (folder / "a.txt").write_bytes("".join(passage + "\n" for passage in passages).encode())
    assert lambada.read(folder / "a.txt") == passages


@DRAWN
@given(passages=lines_of(st.characters(exclude_categories=("Cs",))), ascii_only=st.booleans())
def test_json_lines_are_read_unchanged(folder, passages, ascii_only):
    lines = [json.dumps({"n": 1, "text": passage}, ensure_ascii=ascii_only) for passage in passages]
    (folder / "a.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert lambada.read(folder / "a.jsonl") == passages


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"two words\nlonely\n", "a.txt, line 2 has fewer than two words: 'lonely'"),
        ("a.txt", b"two words\n\ntwo words\n", "a.txt, line 2 has fewer than two words"),
        ("a.txt", b"two words\n\xff\xfe\x00\x01\n", "a.txt, line 2 is not UTF-8 text"),
        ("a.txt", b"two words\ntwo\0words\n", "a.txt, line 2 contains a zero byte"),
        ("a.txt", b"", "a.txt contains no passages"),
        ("a.jsonl", b'{"text": "two words"}\n{"text": "two wo', "a.jsonl, line 2 is not a JSON object"),
        ("a.jsonl", b'{"text": "two words"}\n["two words"]\n', "a.jsonl, line 2 is not a JSON object"),
        ("a.jsonl", b'{"words": "two words"}\n', "a.jsonl, line 1 has no string `text`"),
        ("a.jsonl", b"[" * 10**5 + b"\n", "a.jsonl, line 1 is not a JSON object"),
        ("a.jsonl", b"9" * 10**5 + b"\n", "a.jsonl, line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": 2}\n', "a.jsonl, line 1 has no string `text`"),
        ("a.jsonl", b'{"text": "lonely"}\n', "a.jsonl, line 1 has fewer than two words"),
        (
            "lambada_test.jsonl",
            b'{"text": "two words"}\n' * 5152,
            "lambada_test.jsonl has 5,152 passages, expected 5,153",
        ),
        ("lambada_test_plain_text.txt", b"two words\n" * 5152, "has 5,152 passages, expected 5,153. Download"),
        ("lambada_test_plain_text.txt", b"", "contains no passages"),
        ("lambada_development_plain_text.txt", b"two words\n" * 4870, "has 4,870 passages, expected 4,869"),
    ],
)
def test_a_file_without_passages_is_refused_by_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/.*") as caught:
        lambada.read(tmp_path / name)
    assert message in str(caught.value)


def test_half_of_a_surrogate_pair_is_refused_by_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "two words"}\n{"text": "two \\ud800 words"}\n')
    with pytest.raises(ValueError, match=f"{tmp_path}/a.jsonl, line 2 contains half of a surrogate pair"):
        lambada.read(tmp_path / "a.jsonl")


def test_complete_files_of_known_names_are_read(tmp_path):
    (tmp_path / "lambada_test_plain_text.txt").write_text("two words\n" * 5153)
    assert len(lambada.read(tmp_path / "lambada_test_plain_text.txt")) == 5153


def by_hand(protocol, passage):
    """Ids of context and target, and whether stop words are masked."""
    if protocol in ("last-token-norm", "stop-filter"):
        passage = "\n" + re.sub("``|''", '"', passage.translate(str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")))
    if protocol.startswith("last-token"):
        *context, last = ENCODING.encode_ordinary(passage)
        return context, [last]
    *before, word = passage.split(" ")
    return ENCODING.encode_ordinary(" ".join(before)), ENCODING.encode_ordinary(f" {word}")


@torch.no_grad()
def next_logprobs(model, context):
    return model(torch.tensor([context]))[0, -1].log_softmax(-1)


def plain(model, protocol, passage, mask):
    """Whether each token of the target is the most likely one, the log-probability of the target, and whether the
    context was truncated; computed one token at a time."""
    context, target = by_hand(protocol, passage)
    room = POSITIONS + 1 - len(target)  # the last predicted token is not an input
    ids, correct, total = context[-room:], True, 0.0
    for i, token in enumerate(target):
        logprobs = next_logprobs(model, ids)
        total += logprobs[token].item()
        if protocol == "stop-filter" and i == 0:
            logprobs = logprobs.masked_fill(mask, -math.inf)
        correct &= logprobs.argmax().item() == token
        ids = [*ids, token]
    return correct, total, len(context) > room


@pytest.fixture(scope="module")
def mask():
    return lambada.stop_word_mask(ENCODING, ENCODING.n_vocab)


@pytest.fixture(scope="module")
def model(world):
    return save_model(world / "models/a", seed=1)


@pytest.fixture(scope="module")
def passages(world, model, mask):
    """The world's passages, short and long; each also with the model's most likely last word, with and without stop
    words."""
    texts = (world / "data/stories/lambada.txt").read_text().splitlines()
    texts += [f"\u201cYes,\u201d {text}" for text in texts[:5]] + [" ".join(text.split()[-9:]) for text in texts[5:15]]
    predicted = {}
    for passage in texts:
        context = passage.rpartition(" ")[0]
        for text in (context, "\n" + lambada.normalize_quotes(context)):
            logprobs = next_logprobs(model, ENCODING.encode_ordinary(text)[-POSITIONS:])
            for values in (logprobs, logprobs.masked_fill(mask, -math.inf)):
                word = ENCODING.decode([values.argmax().item()])
                if word[0] == " " and word[1:].isalpha():
                    predicted[context + word] = True
    (world / "data/passages.txt").write_text("".join(passage + "\n" for passage in [*texts, *predicted]))
    return [*texts, *predicted]


@pytest.fixture(scope="module")
def all_protocols(world, model, passages):
    """results.json, the items by protocol, and the output, of one call with all protocols."""
    places = ("--out", "found/results.json", "--items", "found/items.jsonl")
    common = ("--ckpt", "models/a", "--data", "data/passages.txt", "--text", "openai", "--protocol", "all")
    result = run("eval_lambada.py", *common, *places, "--batch-tokens", 200, "--device", "cpu", cwd=world)
    rows = json.loads((world / "found/results.json").read_text())
    by_protocol = {}
    for line in (world / "found/items.jsonl").read_text().splitlines():
        item = json.loads(line)
        by_protocol.setdefault(item["protocol"], []).append(item)
    return rows, by_protocol, result.stdout


def test_the_results_equal_a_plain_computation(world, model, mask, passages, all_protocols):
    rows, items, printed = all_protocols
    assert [row["protocol"] for row in rows] == ["openai", "last-token", "last-token-norm", "stop-filter"]
    for row in rows:
        protocol, chosen = row["protocol"], items[row["protocol"]]
        assert [(item["model"], item["index"]) for item in chosen] == [("models/a", i) for i in range(len(passages))]
        correct, total = sum(item["correct"] for item in chosen), len(passages)
        assert (row["task"], row["model"], row["data"]) == ("lambada", "models/a", "passages.txt")
        assert row["sha256"] == hashlib.sha256((world / "data/passages.txt").read_bytes()).hexdigest()
        assert (row["correct"], row["total"], row["accuracy"]) == (correct, total, correct / total)
        assert row["interval"] == pytest.approx(wilson(correct, total))
        nats = -sum(item["logprob"] for item in chosen) / total
        per_word = protocol in lambada.PER_WORD
        assert row["perplexity"] == (pytest.approx(math.exp(nats)) if per_word else None)
        assert row["seconds"] > 0
        assert (row["dtype"], row["unscored"]) == ("float32", {})
        truncated = 0
        for item, passage in zip(chosen, passages, strict=True):
            correct_by_hand, logprob, is_truncated = plain(model, protocol, passage, mask)
            assert item["correct"] == correct_by_hand
            assert item["logprob"] == pytest.approx(logprob, abs=1e-4)
            assert item.get("remarks", []) == [CUT] * is_truncated
            truncated += is_truncated
        assert row["remarks"] == {CUT: truncated}
        assert 0 < truncated < total
        assert f"models/a, passages.txt, {protocol}: {truncated} scored with a warning: {CUT}\n" in printed
        assert 5 < correct < total - 5
    outcomes = {
        (unmasked["correct"], masked["correct"])
        for unmasked, masked in zip(items["openai"], items["stop-filter"], strict=True)
    }
    assert outcomes == {(True, True), (True, False), (False, True), (False, False)}


@pytest.mark.parametrize("protocol", lambada.allowed_protocols("openai"))
def test_one_protocol_gives_the_same_results_as_all_together(world, all_protocols, monkeypatch, protocol):
    monkeypatch.chdir(world)
    questions = {"data": "data/passages.txt", "text": "openai", "protocol": (protocol,)}
    score(**questions, ckpt=("models/a",), device="cpu", out="one.json", items="one.jsonl")
    (row,) = json.loads((world / "one.json").read_text())
    items = [json.loads(line) for line in (world / "one.jsonl").read_text().splitlines()]
    expected_rows, expected_items, _ = all_protocols
    (expected,) = (each for each in expected_rows if each["protocol"] == protocol)
    approximate = {"seconds": pytest.approx(row["seconds"], abs=1e6)}
    if expected["perplexity"]:
        approximate["perplexity"] = pytest.approx(row["perplexity"], rel=1e-4)
    assert row == expected | approximate
    for item, other in zip(items, expected_items[protocol], strict=True):
        assert item == other | {"logprob": pytest.approx(item["logprob"], abs=1e-4)}


def test_results_go_to_the_folder_that_the_report_reads(world, model, passages, monkeypatch, capsys):
    monkeypatch.chdir(world)
    score(data="data/passages.txt", text="other", ckpt=("models/a",), batch_tokens=1)
    printed = capsys.readouterr().out
    (path,) = world.glob("logs/results/lambada-openai-models-a-passages.txt-*.json")
    (row,) = json.loads(path.read_text())
    (line,) = (line for line in printed.splitlines() if line.startswith("| models/a "))
    low, high = row["interval"]
    assert f"| {row['correct']} of {row['total']} " in line
    assert f"| {100 * row['accuracy']:.2f} " in line
    assert f"| {100 * low:.2f} to {100 * high:.2f} " in line
    assert not row["has_published"]  # published figures are for other passages
    assert "Published" not in printed


def test_passages_without_a_score_count_as_wrong_and_are_reported(world, model, monkeypatch, capsys):
    monkeypatch.chdir(world)
    texts = (world / "data/stories/lambada.txt").read_text().splitlines()[:3]
    long_word = "Ana" * POSITIONS  # longer than the model's context without any other word
    (world / "irregular.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ["two\nwords", *texts, f"Ana met {long_word}", "a\nb"])
    )
    score(data="irregular.jsonl", text="other", ckpt=("models/a",), items="irregular-items.jsonl", out="irregular.json")
    printed = capsys.readouterr().out
    (row,) = json.loads((world / "irregular.json").read_text())
    items = [json.loads(line) for line in (world / "irregular-items.jsonl").read_text().splitlines()]
    none, long = "no context before the last word", f"longer than the model's context of {POSITIONS} tokens"
    assert [item.get("unscored") for item in items] == [none, None, None, None, long, none]
    assert not any(items[i]["correct"] for i in (0, 4, 5))
    assert (row["total"], row["unscored"]) == (6, {none: 2, long: 1})
    nats = -sum(item["logprob"] for item in items[1:4]) / 3
    assert row["perplexity"] == pytest.approx(math.exp(nats))
    assert f"models/a, irregular.jsonl, openai: 2 not scored, counted as wrong: {none}\n" in printed
    assert f"models/a, irregular.jsonl, openai: 1 not scored, counted as wrong: {long}\n" in printed


def test_a_missing_text_is_a_one_line_error(world, model, passages):
    message = refused(
        run("eval_lambada.py", "--ckpt", "models/a", "--data", "data/passages.txt", cwd=world, check=False)
    )
    assert "data/passages.txt" in message
    assert "--text openai" in message


@pytest.mark.parametrize(
    ("ckpt", "settings", "message"),
    [
        (
            "models/a",
            {"text": "openai", "protocol": ("standard",)},
            "--protocol standard is not defined on text openai.*last-token-norm",
        ),
        (
            "models/a",
            {"text": "standard", "protocol": ("openai",)},
            "--protocol openai is not defined on text standard. Use --protocol standard",
        ),
        (
            "models/a",
            {"text": "other", "protocol": ("stop-filter",)},
            "--protocol stop-filter is not defined on text other. Use --protocol openai",
        ),
        ("models/a", {"text": None}, "--data data/passages.txt .* Add --text openai"),
        ("models/a", {"batch_tokens": 0}, "--batch-tokens 0 must be above 0"),
        ("models/a", {"device": "abacus"}, "--device abacus"),
        ("models/a", {"data": "data/none.txt"}, "data/none.txt"),
        ("models/a", {"data": None, "text": "openai"}, "--text openai has no effect without --data"),
        ("models/small", {}, "outside the model's vocabulary of 300"),
        ("models/bare", {}, "models/bare has 664 token ids and no tokenizer.json"),
        ("data/stories", {}, "--ckpt data/stories contains neither checkpoints nor a config.json"),
        ("logs/none", {}, "--ckpt logs/none does not exist"),
    ],
)
def test_a_user_error_names_the_option(world, model, passages, monkeypatch, ckpt, settings, message):
    monkeypatch.chdir(world)
    save_model(world / "models/small", seed=1, vocab_size=300)
    save_model(world / "models/bare", seed=1)
    (world / "models/bare/tokenizer.json").unlink()
    settings = {"data": "data/passages.txt", "text": "other", "out": "none.json"} | settings
    with pytest.raises((ValueError, OSError), match=message):  # core.cli prints one line and exits with status 2
        score(ckpt=(ckpt,), **settings)
    assert not (world / "none.json").exists()


@pytest.mark.parametrize(
    ("name", "count", "protocols"),
    [
        ("lambada_test.jsonl", 5153, ["openai", "last-token", "last-token-norm", "stop-filter"]),
        ("lambada_test_plain_text.txt", 5153, ["standard"]),
    ],
)
def test_lambadas_own_test_files_need_no_text_and_have_published_figures(tmp_path, capsys, name, count, protocols):
    line = json.dumps({"text": "two words"}) if name.endswith("l") else "two words"
    (tmp_path / name).write_text(f"{line}\n" * count)
    (questions,) = lambada.load(LambadaConfig(data=str(tmp_path / name), protocol=("all",)))
    assert questions.protocols == protocols
    omitted = [protocol for protocol in lambada.PROTOCOLS if protocol not in protocols]
    assert capsys.readouterr().out.startswith(f"note: --protocol all omits {', '.join(omitted)}: not defined on text ")
    assert (len(questions.questions), questions.data, questions.has_published) == (count, name, True)


def test_the_development_set_has_no_published_figures(tmp_path):
    path = tmp_path / "lambada_development_plain_text.txt"
    path.write_text("two words\n" * 4869)
    (questions,) = lambada.load(LambadaConfig(data=str(path)))
    assert (questions.protocols, questions.has_published) == (["standard"], False)


@pytest.mark.parametrize(
    ("name", "protocol"), [("lambada_test_plain_text.txt", "standard"), ("lambada_test.txt", "openai")]
)
def test_a_file_of_unknown_text_is_loaded_with_the_protocol_of_other_passages(tmp_path, capsys, name, protocol):
    """Training scores a file without asking for its text."""
    (tmp_path / name).write_text("two words\n" * 5153)
    questions = lambada.load_file(tmp_path / name)
    assert (questions.protocols, questions.has_published) == ([protocol], protocol == "standard")
    note = f"note: {tmp_path / name} has none of LAMBADA's own file names: its passages are scored by protocol openai\n"
    assert capsys.readouterr().out == ("" if protocol == "standard" else note)


def test_each_text_of_the_hub_is_scored_by_its_own_protocols(monkeypatch):
    monkeypatch.setattr(lambada, "from_hub", lambda text: [f"{text} passage"])
    sets = lambada.load(LambadaConfig(protocol=("all",)))
    assert sorted(protocol for each in sets for protocol in each.protocols) == sorted(lambada.PROTOCOLS)
    assert [(each.questions, each.protocols, each.data) for each in sets] == [
        (["openai passage"], lambada.allowed_protocols("openai"), "EleutherAI/lambada_openai"),
        (["standard passage"], ["standard"], "cimec/lambada"),
    ]
    (default,) = lambada.load(LambadaConfig())
    assert default.protocols == ["openai"]


@pytest.mark.parametrize("protocol", ["openai", "standard", "stop-filter"])
@pytest.mark.parametrize("end", [" ", "  ", " \u00a0"])
def test_a_passage_with_an_empty_last_word_is_not_scored(protocol, end):
    with pytest.raises(UnscorableError, match="ends with a space"):
        lambada.requests(protocol, f"the dog ran home{end}", ENCODING.encode_ordinary)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json"])
def test_json_lines_are_read_with_any_json_suffix(tmp_path, name):
    (tmp_path / name).write_text('{"text": "the dog ran home"}\n')
    assert lambada.read(tmp_path / name) == ["the dog ran home"]


@pytest.mark.parametrize(("path", "error"), [("none.txt", FileNotFoundError), (".", IsADirectoryError)])
def test_a_file_that_cannot_be_read_is_reported_before_its_unknown_text(path, error, tmp_path):
    with pytest.raises(error):
        lambada.load(lambada.LambadaConfig(data=str(tmp_path / path)))
