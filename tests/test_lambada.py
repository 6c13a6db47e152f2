"""LAMBADA by each protocol's exact rule, from a file's lines to the counts in results.json."""

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
from core.eval import lambada
from core.eval.results import wilson
from core.eval.scoring import NEAR_TIE, Request, Score
from core.eval.task import UnscorableError, Verdict

DRAWN = settings(derandomize=True, deadline=None, max_examples=100)
CUT = f"context cut to the model's {POSITIONS} tokens"


def request(protocol, passage):
    (found,) = lambada.requests(protocol, passage, ENCODING.encode_ordinary)
    return found


def asked(protocol, passage):
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
        ("a  b", "a ", " b"),
    ],
)
def test_the_last_word_is_what_follows_the_last_space(protocol, passage, context, target):
    assert asked(protocol, passage) == (context, target)
    assert " ".join(passage.split(" ")[:-1]) == context


@DRAWN
@given(
    st.text(st.sampled_from("aeo.\u2019 \n'`"), min_size=1)
    .map("So {}".format)
    .filter(lambda passage: passage.rpartition(" ")[2].strip())
)
def test_context_and_target_put_together_are_the_passage(passage):
    for protocol in lambada.PROTOCOLS:
        straight = "\n" + re.sub("``|''", '"', passage.replace("\u2019", "'"))
        whole = straight if protocol in ("last-token-norm", "stop-filter") else passage
        found = request(protocol, passage)
        assert ENCODING.decode(found.context + found.continuation) == whole


def test_context_and_target_are_encoded_apart():
    found = request("openai", "So the lamp went home with Anastasia")
    assert found.context == ENCODING.encode_ordinary("So the lamp went home with")
    assert found.continuation == ENCODING.encode_ordinary(" Anastasia")
    assert len(found.continuation) > 1


def test_last_token_asks_for_the_last_token_alone():
    passage = "\u201cAh,\u201d said Anastasia"
    ids = ENCODING.encode_ordinary(passage)
    assert request("last-token", passage) == Request(ids[:-1], ids[-1:])


def test_last_token_norm_begins_with_a_newline_and_has_plain_quotes():
    ids = ENCODING.encode_ordinary('\n"Ah," said \'Ben\' to "Anastasia')
    passage = "\u201cAh,\u201d said \u2018Ben\u2019 to ``Anastasia"
    assert request("last-token-norm", passage) == Request(ids[:-1], ids[-1:])


def test_stop_filter_asks_for_the_whole_word_in_the_same_text():
    assert asked("stop-filter", "\u201cAh,\u201d said\nthe ''cook") == ('\n"Ah," said\nthe', ' "cook')


def test_straighten_leaves_other_text_alone():
    assert (
        lambada.straighten("It's `one' \u2014 \"two\"\u2026 caf\u00e9\n")
        == "It's `one' \u2014 \"two\"\u2026 caf\u00e9\n"
    )


@pytest.mark.parametrize(
    ("protocol", "passage"), [("openai", "two\nwords"), ("standard", "two\twords"), ("openai", " word")]
)
def test_a_passage_without_context_is_unscorable(protocol, passage):
    with pytest.raises(UnscorableError, match="no context before the last word"):
        request(protocol, passage)


def test_the_mask_holds_stop_words_and_nothing_else():
    mask = lambada.stop_word_mask(ENCODING, ENCODING.n_vocab)
    assert mask.shape == (ENCODING.n_vocab,)
    assert all(mask[ENCODING.encode_single_token(word)] for word in (" the", " a", " with", " It"))
    assert not any(mask[ENCODING.encode_single_token(word)] for word in (" lamp", " Ana", " cook", ".", " lam"))
    assert not mask[ENCODING.eot_token]


def test_the_mask_covers_a_model_whose_vocabulary_is_padded():
    mask = lambada.stop_word_mask(ENCODING, ENCODING.n_vocab + 40)
    assert mask.shape == (ENCODING.n_vocab + 40,)
    assert torch.equal(mask[: ENCODING.n_vocab], lambada.stop_word_mask(ENCODING, ENCODING.n_vocab))


def test_the_mask_is_made_for_stop_filter_alone():
    assert lambada.banned(["openai", "standard", "last-token", "last-token-norm"], ENCODING, ENCODING.n_vocab) is None
    mask = lambada.banned(["openai", "stop-filter"], ENCODING, ENCODING.n_vocab)
    assert torch.equal(mask, lambada.stop_word_mask(ENCODING, ENCODING.n_vocab))


def test_each_text_allows_the_protocols_that_are_defined_on_it():
    assert lambada.allowed("openai") == ["openai", "last-token", "last-token-norm", "stop-filter"]
    assert lambada.allowed("standard") == ["standard"]
    assert lambada.allowed("other") == ["openai"]


WITHOUT_MASK = ["openai", "standard", "last-token", "last-token-norm"]


@pytest.mark.parametrize("protocol", WITHOUT_MASK)
@pytest.mark.parametrize(
    ("margins", "correct"), [([0.5], True), ([-0.5], False), ([0.5, 2.0], True), ([2.0, -0.5, 2.0], False)]
)
def test_a_passage_is_right_only_with_all_its_tokens(protocol, margins, correct):
    score = Score([-1.0] * len(margins), margins, [-9.0] * len(margins))
    assert lambada.judge(protocol, "", [score]) == Verdict(correct, logprob=-1.0 * len(margins))


@pytest.mark.parametrize(
    ("margins", "allowed", "correct"),
    [
        ([-1.0], [0.5], True),  # what was likelier was a stop word
        ([1.0], [-math.inf], False),  # the target is one itself
        ([-1.0, 0.5], [0.5, -math.inf], True),  # after the first token there is no mask
        ([-1.0, -0.5], [0.5, 0.5], False),
        ([-1.0, 0.5], [-0.5, 0.5], False),
    ],
)
def test_stop_filter_masks_where_the_first_token_is_chosen_and_nowhere_else(margins, allowed, correct):
    score = Score([-2.0] * len(margins), margins, allowed)
    assert lambada.judge("stop-filter", "", [score]) == Verdict(correct, logprob=-2.0 * len(margins))


@pytest.mark.parametrize(
    ("protocol", "margins", "near"),
    [
        ("openai", [NEAR_TIE / 2], True),
        ("openai", [-NEAR_TIE / 2], True),
        ("openai", [1.0, NEAR_TIE / 2], True),
        ("openai", [-1.0, NEAR_TIE / 2], False),  # wrong whatever comes of the tie
        ("openai", [2 * NEAR_TIE], False),
        ("stop-filter", [NEAR_TIE / 2], False),  # nothing comes near among those allowed
    ],
)
def test_a_passage_whose_answer_rounding_may_turn_is_counted(protocol, margins, near):
    assert lambada.judge(protocol, "", [Score([-1.0] * len(margins), margins, [3.0, *margins[1:]])]).near_tie == near


def test_perplexity_is_per_word():
    verdicts = [Verdict(True, logprob=-1.0), Verdict(True, logprob=-3.0), Verdict(False, logprob=-5.0)]
    for protocol in ("openai", "standard", "stop-filter"):
        assert lambada.perplexity(protocol, verdicts) == pytest.approx(math.exp(3.0))
    for protocol in ("last-token", "last-token-norm"):
        assert lambada.perplexity(protocol, verdicts) is None  # per token, and so no perplexity of words


def test_perplexity_is_of_the_passages_that_were_scored():
    unscored = Verdict(False, unscored="no context before the last word")
    assert lambada.perplexity("openai", [Verdict(True, logprob=-2.0), unscored]) == pytest.approx(math.exp(2.0))
    assert lambada.perplexity("openai", [unscored]) is None


def test_a_diverged_model_has_no_perplexity():
    for logprob in (-1e4, math.nan, -math.inf):
        assert lambada.perplexity("openai", [Verdict(False, logprob=logprob)] * 2) is None


@pytest.mark.parametrize("ending", ["", "\n"])
def test_passages_are_read_one_a_line(tmp_path, ending):
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
def test_passages_written_a_line_each_are_read_as_they_are(folder, passages):
    (folder / "a.txt").write_bytes("".join(passage + "\n" for passage in passages).encode())
    assert lambada.read(folder / "a.txt") == passages


@DRAWN
@given(passages=lines_of(st.characters(exclude_categories=("Cs",))), ascii_only=st.booleans())
def test_passages_written_as_json_are_read_as_they_are(folder, passages, ascii_only):
    lines = [json.dumps({"n": 1, "text": passage}, ensure_ascii=ascii_only) for passage in passages]
    (folder / "a.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert lambada.read(folder / "a.jsonl") == passages


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"two words\nlonely\n", "a.txt, line 2: a passage has at least two words, this is 'lonely'"),
        ("a.txt", b"two words\n\ntwo words\n", "a.txt, line 2: a passage has at least two words"),
        ("a.txt", b"two words\n\xff\xfe\x00\x01\n", "a.txt, line 2 is not UTF-8 text"),
        ("a.txt", b"two words\ntwo\0words\n", "a.txt, line 2 holds a zero byte"),
        ("a.txt", b"", "a.txt holds no passage"),
        ("a.jsonl", b'{"text": "two words"}\n{"text": "two wo', "a.jsonl, line 2: no JSON object with a `text` field"),
        ("a.jsonl", b'{"text": "two words"}\n["two words"]\n', "a.jsonl, line 2: no JSON object with a `text` field"),
        ("a.jsonl", b'{"words": "two words"}\n', "a.jsonl, line 1: no JSON object with a `text` field"),
        ("a.jsonl", b"[" * 10**5 + b"\n", "a.jsonl, line 1: no JSON object with a `text` field"),
        ("a.jsonl", b"9" * 10**5 + b"\n", "a.jsonl, line 1: no JSON object with a `text` field"),
        ("a.jsonl", b'{"text": 2}\n', "a.jsonl, line 1: `text` is int, not a string"),
        ("a.jsonl", b'{"text": "lonely"}\n', "a.jsonl, line 1: a passage has at least two words"),
        ("lambada_test.jsonl", b'{"text": "two words"}\n' * 5152, "lambada_test.jsonl holds 5152 passages of 5153: it"),
        ("lambada_test_plain_text.txt", b"two words\n" * 5152, "holds 5152 passages of 5153: it was cut"),
        ("lambada_test_plain_text.txt", b"", "holds no passage"),
        ("lambada_development_plain_text.txt", b"two words\n" * 4870, "holds 4870 passages of 4869"),
    ],
)
def test_a_file_that_holds_no_passages_is_refused_by_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/.*") as caught:
        lambada.read(tmp_path / name)
    assert message in str(caught.value)


def test_half_a_surrogate_pair_is_refused_by_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "two words"}\n{"text": "two \\ud800 words"}\n')
    with pytest.raises(ValueError, match=f"{tmp_path}/a.jsonl, line 2"):
        lambada.read(tmp_path / "a.jsonl")


def test_whole_files_of_known_names_are_read(tmp_path):
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
    """Whether each token of the target is the likeliest, the log-probability of all, and whether the context was cut;
    one token at a time."""
    context, target = by_hand(protocol, passage)
    room = POSITIONS + 1 - len(target)  # the last token predicted is no input
    ids, right, total = context[-room:], True, 0.0
    for i, token in enumerate(target):
        logprobs = next_logprobs(model, ids)
        total += logprobs[token].item()
        if protocol == "stop-filter" and i == 0:
            logprobs = logprobs.masked_fill(mask, -math.inf)
        right &= logprobs.argmax().item() == token
        ids = [*ids, token]
    return right, total, len(context) > room


@pytest.fixture(scope="module")
def mask():
    return lambada.stop_word_mask(ENCODING, ENCODING.n_vocab)


@pytest.fixture(scope="module")
def model(world):
    return save_model(world / "models/a", seed=1)


@pytest.fixture(scope="module")
def passages(world, model, mask):
    """The world's passages, short and long; each also with the words that the model likes best for its last one, with
    and without stop words."""
    told = (world / "data/stories/lambada.txt").read_text().splitlines()
    told += [f"\u201cYes,\u201d {text}" for text in told[:5]] + [" ".join(text.split()[-9:]) for text in told[5:15]]
    liked = {}
    for passage in told:
        context = passage.rpartition(" ")[0]
        for text in (context, "\n" + lambada.straighten(context)):
            logprobs = next_logprobs(model, ENCODING.encode_ordinary(text)[-POSITIONS:])
            for values in (logprobs, logprobs.masked_fill(mask, -math.inf)):
                word = ENCODING.decode([values.argmax().item()])
                if word[0] == " " and word[1:].isalpha():
                    liked[context + word] = True
    (world / "data/passages.txt").write_text("".join(passage + "\n" for passage in [*told, *liked]))
    return [*told, *liked]


@pytest.fixture(scope="module")
def all_protocols(world, model, passages):
    """results.json, the items by protocol and the words on the terminal, of a call for all protocols."""
    places = ("--out", "found/results.json", "--items", "found/items.jsonl")
    common = ("--ckpt", "models/a", "--data", "data/passages.txt", "--text", "openai", "--protocol", "all")
    result = run("eval_lambada.py", *common, *places, "--batch-tokens", 200, "--device", "cpu", cwd=world)
    rows = json.loads((world / "found/results.json").read_text())
    by_protocol = {}
    for line in (world / "found/items.jsonl").read_text().splitlines():
        item = json.loads(line)
        by_protocol.setdefault(item["protocol"], []).append(item)
    return rows, by_protocol, result.stdout


def test_the_command_line_writes_what_a_plain_computation_finds(world, model, mask, passages, all_protocols):
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
        was_cut = 0
        for item, passage in zip(chosen, passages, strict=True):
            right, logprob, cut = plain(model, protocol, passage, mask)
            assert item["correct"] == right
            assert item["logprob"] == pytest.approx(logprob, abs=1e-4)
            assert item.get("remarks", []) == [CUT] * cut
            was_cut += cut
        assert row["remarks"] == {CUT: was_cut}
        assert 0 < was_cut < total
        assert f"models/a, passages.txt, {protocol}: {was_cut} scored all the same: {CUT}\n" in printed
        assert 5 < correct < total - 5
    outcomes = {
        (plainly["correct"], masked["correct"])
        for plainly, masked in zip(items["openai"], items["stop-filter"], strict=True)
    }
    assert outcomes == {(True, True), (True, False), (False, True), (False, False)}


@pytest.mark.parametrize("protocol", lambada.allowed("openai"))
def test_a_protocol_alone_finds_what_it_finds_among_all(world, all_protocols, monkeypatch, protocol):
    monkeypatch.chdir(world)
    config = {"ckpt": ("models/a",), "data": "data/passages.txt", "text": "openai", "protocol": (protocol,)}
    eval_lambada.main(eval_lambada.Config(**config, device="cpu", out="alone.json", items="alone.jsonl"))
    (row,) = json.loads((world / "alone.json").read_text())
    items = [json.loads(line) for line in (world / "alone.jsonl").read_text().splitlines()]
    expected_rows, expected_items, _ = all_protocols
    (expected,) = (each for each in expected_rows if each["protocol"] == protocol)
    approximate = {"seconds": pytest.approx(row["seconds"], abs=1e6)}
    if expected["perplexity"]:
        approximate["perplexity"] = pytest.approx(row["perplexity"], rel=1e-4)
    assert row == expected | approximate
    for item, other in zip(items, expected_items[protocol], strict=True):
        assert item == other | {"logprob": pytest.approx(item["logprob"], abs=1e-4)}


def test_results_go_to_the_folder_where_the_report_looks(world, model, passages, monkeypatch, capsys):
    monkeypatch.chdir(world)
    config = {"ckpt": ("models/a",), "data": "data/passages.txt", "text": "other", "batch_tokens": 1}
    eval_lambada.main(eval_lambada.Config(**config))
    printed = capsys.readouterr().out
    (path,) = world.glob("logs/results/lambada-openai-models-a-passages.txt-*.json")
    (row,) = json.loads(path.read_text())
    (line,) = (line for line in printed.splitlines() if line.startswith("| models/a "))
    low, high = row["interval"]
    assert f"| {row['correct']} of {row['total']} " in line
    assert f"| {100 * row['accuracy']:.2f} " in line
    assert f"| {100 * low:.2f} to {100 * high:.2f} " in line
    assert not row["has_published"]  # published figures speak of other passages
    assert "OpenAI's weights" not in printed


def test_passages_that_cannot_be_scored_are_counted_as_wrong_and_named(world, model, monkeypatch, capsys):
    monkeypatch.chdir(world)
    told = (world / "data/stories/lambada.txt").read_text().splitlines()[:3]
    long_word = "Ana" * POSITIONS  # longer than the model's context by itself
    (world / "odd.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ["two\nwords", *told, f"Ana met {long_word}", "a\nb"])
    )
    config = {"ckpt": ("models/a",), "data": "odd.jsonl", "text": "other", "items": "odd-items.jsonl"}
    eval_lambada.main(eval_lambada.Config(**config, out="odd.json"))
    printed = capsys.readouterr().out
    (row,) = json.loads((world / "odd.json").read_text())
    items = [json.loads(line) for line in (world / "odd-items.jsonl").read_text().splitlines()]
    none, long = "no context before the last word", f"longer than the model's context of {POSITIONS} tokens"
    assert [item.get("unscored") for item in items] == [none, None, None, None, long, none]
    assert not any(items[i]["correct"] for i in (0, 4, 5))
    assert (row["total"], row["unscored"]) == (6, {none: 2, long: 1})
    nats = -sum(item["logprob"] for item in items[1:4]) / 3
    assert row["perplexity"] == pytest.approx(math.exp(nats))
    assert f"models/a, odd.jsonl, openai: 2 not scored, counted as wrong: {none}\n" in printed
    assert f"models/a, odd.jsonl, openai: 1 not scored, counted as wrong: {long}\n" in printed


def test_a_wrong_call_ends_in_one_sentence(world, model, passages):
    message = refused(
        run("eval_lambada.py", "--ckpt", "models/a", "--data", "data/passages.txt", cwd=world, check=False)
    )
    assert "data/passages.txt" in message
    assert "--text openai" in message


@pytest.mark.parametrize(
    ("ckpt", "settings", "message"),
    [
        ("models/a", {"text": "openai", "protocol": ("standard",)}, "--protocol standard needs .*last-token-norm"),
        ("models/a", {"text": "standard", "protocol": ("openai",)}, "--protocol openai needs .*allows standard"),
        ("models/a", {"text": "other", "protocol": ("stop-filter",)}, "--protocol stop-filter needs .*allows openai"),
        ("models/a", {"text": None}, "--data data/passages.txt: .* --text openai"),
        ("models/a", {"batch_tokens": 0}, "--batch-tokens 0 must be above 0"),
        ("models/a", {"device": "abacus"}, "--device abacus"),
        ("models/a", {"data": "data/none.txt"}, "data/none.txt"),
        ("models/a", {"data": None, "text": "openai"}, "--text openai says what --data holds"),
        ("models/small", {}, "outside the model's vocabulary of 300"),
        ("models/bare", {}, "models/bare has a vocabulary of 664 and no tokenizer.json"),
        ("data/stories", {}, "--ckpt data/stories holds neither checkpoints nor a config.json"),
        ("logs/none", {}, "--ckpt logs/none is no folder"),
    ],
)
def test_what_the_user_got_wrong_is_named(world, model, passages, monkeypatch, ckpt, settings, message):
    monkeypatch.chdir(world)
    save_model(world / "models/small", seed=1, vocab_size=300)
    save_model(world / "models/bare", seed=1)
    (world / "models/bare/tokenizer.json").unlink()
    settings = {"data": "data/passages.txt", "text": "other", "out": "none.json"} | settings
    with pytest.raises((ValueError, OSError), match=message):  # which core.cli makes a sentence and exit status 2
        eval_lambada.main(eval_lambada.Config(ckpt=(ckpt,), **settings))
    assert not (world / "none.json").exists()


@pytest.mark.parametrize(
    ("name", "count", "protocols"),
    [
        ("lambada_test.jsonl", 5153, ["openai", "last-token", "last-token-norm", "stop-filter"]),
        ("lambada_test_plain_text.txt", 5153, ["standard"]),
    ],
)
def test_lambadas_own_test_files_need_no_text_and_are_what_published_figures_speak_of(tmp_path, name, count, protocols):
    line = json.dumps({"text": "two words"}) if name.endswith("l") else "two words"
    (tmp_path / name).write_text(f"{line}\n" * count)
    config = eval_lambada.Config(data=str(tmp_path / name), protocol=("all",))
    text = eval_lambada.which_text(config)
    assert eval_lambada.which_protocols(config, text) == protocols
    (questions,) = eval_lambada.load_questions(config, protocols, text)
    assert (len(questions.questions), questions.data, questions.has_published) == (count, name, True)


def test_the_development_set_is_not_what_published_figures_speak_of(tmp_path):
    path = tmp_path / "lambada_development_plain_text.txt"
    path.write_text("two words\n" * 4869)
    (questions,) = eval_lambada.load_questions(eval_lambada.Config(data=str(path)), ["standard"], "standard")
    assert not questions.has_published


def test_the_hubs_texts_are_scored_each_by_its_own_protocols(monkeypatch):
    monkeypatch.setattr(lambada, "from_hub", lambda text: [f"{text} passage"])
    config = eval_lambada.Config(protocol=("all",))
    protocols = eval_lambada.which_protocols(config, eval_lambada.which_text(config))
    assert protocols == list(lambada.PROTOCOLS)
    sets = eval_lambada.load_questions(config, protocols, None)
    assert [(each.questions, each.protocols, each.data) for each in sets] == [
        (["openai passage"], lambada.allowed("openai"), "EleutherAI/lambada_openai"),
        (["standard passage"], ["standard"], "cimec/lambada"),
    ]
    assert eval_lambada.which_protocols(eval_lambada.Config(), None) == ["openai"]


@pytest.mark.parametrize("protocol", ["openai", "standard", "stop-filter"])
@pytest.mark.parametrize("end", [" ", "  ", " \u00a0"])
def test_a_passage_whose_last_word_would_be_a_blank_is_not_scored(protocol, end):
    with pytest.raises(UnscorableError, match="ends with a space"):
        lambada.requests(protocol, f"the dog ran home{end}", ENCODING.encode_ordinary)


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.json"])
def test_json_lines_are_read_as_such_whatever_their_suffix(tmp_path, name):
    (tmp_path / name).write_text('{"text": "the dog ran home"}\n')
    assert lambada.read(tmp_path / name) == ["the dog ran home"]
