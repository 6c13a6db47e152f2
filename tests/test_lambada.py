"""LAMBADA by each protocol's exact rule, from a file's lines to the counts in results.json."""

import hashlib
import json
import math

import pytest
import torch
from conftest import ENCODING, POSITIONS, refused, run, save_model

import eval_lambada
from core.scoring import Score
from core.stats import wilson
from core.tasks import lambada


def asked(protocol, passage):
    """Context and target as text."""
    question = lambada.question(protocol, passage, ENCODING.encode_ordinary)
    return ENCODING.decode(question.context), [ENCODING.decode(ids) for ids in question.continuations]


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
    assert asked(protocol, passage) == (context, [target])
    assert " ".join(passage.split(" ")[:-1]) == context


def test_context_and_target_are_encoded_apart():
    question = lambada.question("openai", "So the lamp went home with Anastasia", ENCODING.encode_ordinary)
    assert question.context == ENCODING.encode_ordinary("So the lamp went home with")
    assert question.continuations == [ENCODING.encode_ordinary(" Anastasia")]
    assert len(question.continuations[0]) > 1


def test_last_token_asks_for_the_last_token_alone():
    passage = "\u201cAh,\u201d said Anastasia"
    ids = ENCODING.encode_ordinary(passage)
    question = lambada.question("last-token", passage, ENCODING.encode_ordinary)
    assert (question.context, question.continuations) == (ids[:-1], [ids[-1:]])


def test_last_token_norm_begins_with_a_newline_and_has_plain_quotes():
    ids = ENCODING.encode_ordinary('\n"Ah," said \'Ben\' to "Anastasia')
    passage = "\u201cAh,\u201d said \u2018Ben\u2019 to ``Anastasia"
    question = lambada.question("last-token-norm", passage, ENCODING.encode_ordinary)
    assert (question.context, question.continuations) == (ids[:-1], [ids[-1:]])


def test_stop_filter_asks_for_the_whole_word_in_the_same_text():
    assert asked("stop-filter", "\u201cAh,\u201d said\nthe ''cook") == ('\n"Ah," said\nthe', [' "cook'])


def test_straighten_leaves_other_text_alone():
    assert (
        lambada.straighten("It's `one' \u2014 \"two\"\u2026 caf\u00e9\n")
        == "It's `one' \u2014 \"two\"\u2026 caf\u00e9\n"
    )


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


def test_each_text_allows_the_protocols_that_are_defined_on_it():
    assert lambada.allowed("openai") == ["openai", "last-token", "last-token-norm", "stop-filter"]
    assert lambada.allowed("standard") == ["standard"]
    assert lambada.allowed("other") == ["openai"]


def test_a_passage_is_right_only_with_all_its_tokens_and_perplexity_is_per_word():
    scores = [Score([-1.0], [True]), Score([-1.0, -2.0], [True, True]), Score([-0.5, -1.5, -3.0], [True, False, True])]
    verdicts = lambada.judge([[score] for score in scores])
    assert [verdict.correct for verdict in verdicts] == [True, True, False]
    assert [verdict.logprob for verdict in verdicts] == [-1.0, -3.0, -5.0]
    assert lambada.perplexity("openai", verdicts) == pytest.approx(math.exp(3.0))
    assert lambada.perplexity("last-token", verdicts) is None  # per token, and so no perplexity of words


@pytest.mark.parametrize("ending", ["", "\n"])
def test_passages_are_read_one_a_line(tmp_path, ending):
    passages = ["so it went home with Ana", "\u201cyes\u201d said caf\u00e9", " two  words "]
    (tmp_path / "a.txt").write_text("\n".join(passages) + ending, encoding="utf-8")
    assert lambada.read(tmp_path / "a.txt") == passages
    passages.append("with a\nnewline")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in passages) + ending)
    assert lambada.read(tmp_path / "a.jsonl") == passages


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"two words\nlonely\n", "a.txt, line 2: a passage has at least two words, this is 'lonely'"),
        ("a.txt", b"two words\n\ntwo words\n", "a.txt, line 2: a passage has at least two words"),
        ("a.txt", b"two words\n\xff\xfe\x00\x01\n", "a.txt is not UTF-8 text"),
        ("a.txt", b"", "a.txt holds 0 passages"),
        ("a.jsonl", b'{"text": "two words"}\n{"text": "two wo', "a.jsonl, line 2: no JSON object with a `text` field"),
        ("a.jsonl", b'{"text": "two words"}\n["two words"]\n', "a.jsonl, line 2: no JSON object with a `text` field"),
        ("a.jsonl", b'{"words": "two words"}\n', "a.jsonl, line 1: no JSON object with a `text` field"),
        ("a.jsonl", b'{"text": 2}\n', "a.jsonl, line 1: `text` is int, not a string"),
        ("a.jsonl", b'{"text": "lonely"}\n', "a.jsonl, line 1: a passage has at least two words"),
        ("lambada_test.jsonl", b'{"text": "two words"}\n', "lambada_test.jsonl holds 1 passages of 5153: it was cut"),
        ("lambada_test_plain_text.txt", b"two words\n" * 5152, "holds 5152 passages of 5153: it was cut"),
        ("lambada_development_plain_text.txt", b"two words\n" * 4870, "holds 4870 passages of 4869"),
    ],
)
def test_a_file_that_holds_no_passages_is_refused_by_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/.*") as caught:
        lambada.read(tmp_path / name)
    assert message in str(caught.value)


def test_whole_files_of_known_names_are_read(tmp_path):
    (tmp_path / "lambada_test_plain_text.txt").write_text("two words\n" * 5153)
    assert len(lambada.read(tmp_path / "lambada_test_plain_text.txt")) == 5153


@torch.no_grad()
def plain(model, context, target):
    """Whether each token of the target is the likeliest, and the log-probability of all, one passage at a time."""
    ids = context[-(POSITIONS + 1 - len(target)) :] + target
    logprobs = model(torch.tensor([ids[:-1]]))[0, -len(target) :].log_softmax(-1)
    right = logprobs.argmax(-1).tolist() == target
    return right, sum(logprobs[i, token].item() for i, token in enumerate(target))


@pytest.fixture(scope="module")
def model(world):
    return save_model(world / "models/a", seed=1)


@pytest.fixture(scope="module")
def passages(world, model):
    """The world's passages, each also with the word that the model likes best for its last one."""
    told = (world / "data/stories/lambada.txt").read_text().splitlines()
    liked = []
    for passage in told:
        context = passage.rpartition(" ")[0]
        tokens = torch.tensor([ENCODING.encode_ordinary(context)[-POSITIONS:]])
        with torch.no_grad():
            word = ENCODING.decode([model(tokens)[0, -1].argmax().item()])
        if word[0] == " " and word[1:].isalpha():
            liked.append(context + word)
    (world / "data/passages.txt").write_text("".join(passage + "\n" for passage in told + liked))
    return told + liked


def test_the_command_line_writes_what_a_plain_computation_finds(world, model, passages):
    places = ("--out", "found/results.json", "--items", "found/items.jsonl")
    common = ("--ckpt", "models/a", "--data", "data/passages.txt", "--text", "openai", "--protocol", "all")
    run("eval_lambada.py", *common, *places, "--batch-size", 7, "--device", "cpu", cwd=world)
    rows = json.loads((world / "found/results.json").read_text())
    items = [json.loads(line) for line in (world / "found/items.jsonl").read_text().splitlines()]
    assert [row["protocol"] for row in rows] == ["openai", "last-token", "last-token-norm", "stop-filter"]
    for row in rows:
        chosen = [item for item in items if item["protocol"] == row["protocol"]]
        assert [(item["model"], item["index"]) for item in chosen] == [("models/a", i) for i in range(len(passages))]
        correct, total = sum(item["correct"] for item in chosen), len(passages)
        assert (row["task"], row["model"], row["data"]) == ("lambada", "models/a", "passages.txt")
        assert row["sha256"] == hashlib.sha256((world / "data/passages.txt").read_bytes()).hexdigest()
        assert (row["correct"], row["total"], row["accuracy"]) == (correct, total, correct / total)
        assert row["interval"] == pytest.approx(wilson(correct, total))
        nats = -sum(item["logprob"] for item in chosen) / total
        per_word = row["protocol"] in lambada.PER_WORD
        assert row["perplexity"] == (pytest.approx(math.exp(nats)) if per_word else None)
        assert row["seconds"] > 0
        assert row["has_published"]
        if row["protocol"] != "stop-filter":
            for item, passage in zip(chosen, passages, strict=True):
                question = lambada.question(row["protocol"], passage, ENCODING.encode_ordinary)
                right, logprob = plain(model, question.context, question.continuations[0])
                assert item["correct"] == right
                assert item["logprob"] == pytest.approx(logprob, abs=1e-4)
    assert 5 < rows[0]["correct"] < len(passages)
    assert len(items) == 4 * len(passages)


def test_results_go_to_the_folder_where_the_report_looks(world, model, passages):
    common = ("--ckpt", "models/a", "--data", "data/passages.txt", "--text", "other", "--batch-size", 1)
    result = run("eval_lambada.py", *common, cwd=world)
    (row,) = json.loads((world / "logs/results/lambada-openai-models-a-passages.txt.json").read_text())
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("| models/a "))
    low, high = row["interval"]
    assert f"| {row['correct']} of {row['total']} " in line
    assert f"| {100 * row['accuracy']:.2f} " in line
    assert f"| {100 * low:.2f} to {100 * high:.2f} " in line
    assert not row["has_published"]  # published figures speak of other passages
    assert "OpenAI's weights" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--ckpt", "models/a", "--data", "data/passages.txt"), ("data/passages.txt", "--text openai")),
        (("--ckpt", "logs/none", "--data", "data/passages.txt", "--text", "other"), ("--ckpt logs/none",)),
        (("--ckpt", "--data", "data/passages.txt", "--text", "other"), ("--ckpt",)),  # names no model
    ],
)
def test_a_wrong_call_ends_in_one_sentence(world, model, passages, arguments, parts):
    message = refused(run("eval_lambada.py", *arguments, cwd=world, check=False))
    assert all(part in message for part in parts)


@pytest.mark.parametrize(
    ("ckpt", "settings", "message"),
    [
        ("models/a", {"text": "openai", "protocol": ("standard",)}, "--protocol standard needs .*last-token-norm"),
        ("models/a", {"text": "standard", "protocol": ("openai",)}, "--protocol openai needs .*allows standard"),
        ("models/a", {"text": "other", "protocol": ("stop-filter",)}, "--protocol stop-filter needs .*allows openai"),
        ("models/a", {"batch_size": 0}, "--batch-size 0 must be above 0"),
        ("models/a", {"device": "abacus"}, "--device abacus"),
        ("models/a", {"data": "data/none.txt"}, "data/none.txt"),
        ("models/a", {"data": None, "text": "openai"}, "--text openai says what --data holds"),
        ("models/small", {}, "outside the model's vocabulary of 300"),
        ("models/bare", {}, "models/bare has a vocabulary of 664 and no tokenizer.json"),
        ("data/stories", {}, "--ckpt data/stories holds neither checkpoints nor a config.json"),
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
