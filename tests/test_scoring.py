"""Promise 6: log-probabilities equal a plain computation's for any batch size, prefix sharing and number of ranks."""

import contextlib
import json
import math
import resource
import sys
from functools import cache
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from conftest import on_ranks, run, save_model
from hypothesis import given, settings
from hypothesis import strategies as st

from core.distributed import Ranks
from core.eval import evaluate, scoring
from core.eval.results import mcnemar, wilson
from core.eval.scoring import Request, Score, score
from core.eval.task import QuestionSet, Task, UnscorableError, Verdict
from model import GPT, GPTConfig

VOCAB, POSITIONS = 97, 32  # padded to 128: padded ids must never win


def make_model(**shape):
    """Random weights, large enough that some tokens are much more likely than others."""
    model = GPT(GPTConfig(n_head=2, n_embd=32, n_positions=POSITIONS, **shape), seed=3)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model(n_layer=2, vocab_size=VOCAB)


@torch.no_grad()
def next_token(model, tokens):
    """Log-probabilities of the next token, (vocab_size,)."""
    return model(torch.tensor([tokens]))[0, -1, : model.config.vocab_size].log_softmax(-1)


def plain(request, next_logprobs, masked=()):
    """The score of a request, one token at a time."""
    found = []
    for i, token in enumerate(request.continuation):
        logprobs = next_logprobs([*request.context, *request.continuation[:i]])
        others = logprobs.clone()
        others[token] = -math.inf
        margin = logprobs[token] - others.max()
        others[list(masked)] = -math.inf
        allowed_margin = -math.inf if token in masked else (logprobs[token] - others.max()).item()
        found.append((logprobs[token].item(), margin.item(), allowed_margin))
    return Score(*map(list, zip(*found, strict=True)))


def assert_same(found, expected):
    for group, expected_group in zip(found, expected, strict=True):
        for actual, correct in zip(group, expected_group, strict=True):
            for field in Score.__dataclass_fields__:
                assert getattr(actual, field) == pytest.approx(getattr(correct, field), abs=1e-5), field


def draw(generator, count):
    return torch.randint(VOCAB, (count,), generator=generator).tolist()


def greedy(model, context, count):
    ids = list(context)
    for _ in range(count):
        ids.append(next_token(model, ids).argmax().item())
    return ids[len(context) :]


@pytest.fixture(scope="module")
def groups(model):
    generator = torch.Generator().manual_seed(1)
    found = []
    for length, endings in ((1, (1,)), (5, (3,)), (20, (1, 1, 4)), (28, (4, 2)), (9, (2,) * 10), (1, (32,))):
        context = draw(generator, length)
        found.append([Request(context, draw(generator, n)) for n in endings])
    for length in (2, 7, 15):  # partly or completely correct ones
        context = draw(generator, length)
        best = greedy(model, context, 4)
        endings = [best, best[:1], [*best[:2], *draw(generator, 2)], draw(generator, 2), best]
        found.append([Request(context, ending) for ending in endings])
    text = draw(generator, 33)
    found += [[Request(text[:cut], text[cut:])] for cut in (32, 5, 17)]  # parts of one text in separate groups
    found.append([Request(text[:9], text[9:]), Request(text[:4], text[4:12]), Request(text[1:9], text[9:])])
    return found


@pytest.fixture(scope="module")
def expected(model, groups):
    return [[plain(request, lambda tokens: next_token(model, tokens)) for request in group] for group in groups]


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 37, 10_000, None])
def test_scores_equal_a_plain_computation(model, groups, expected, batch_tokens, share_prefixes, monkeypatch):
    if batch_tokens == 37:
        monkeypatch.setitem(scoring.LOGIT_BYTES, "cpu", 5 * 128 * 4)  # logits of one batch in several chunks
        monkeypatch.setitem(scoring.SUM_ROWS, "cpu", 2)
    found = score(model, groups, batch_tokens=batch_tokens, share_prefixes=share_prefixes)
    assert_same(found, expected)
    for group, requests in zip(found, groups, strict=True):
        for actual, request in zip(group, requests, strict=True):
            assert actual.total == pytest.approx(sum(actual.logprobs))
            for i, (token, margin) in enumerate(zip(request.continuation, actual.margins, strict=True)):
                best = next_token(model, request.context + request.continuation[:i]).argmax().item()
                assert (margin > 0) == (token == best)
    margins = [margin for group in found for actual in group for margin in actual.margins]
    assert 3 * 11 <= sum(margin > 0 for margin in margins) < len(margins) / 2


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of Linux")
def test_the_memory_of_logits_is_used_again_on_a_cpu():
    model = make_model(n_layer=1, vocab_size=50_257)
    generator = torch.Generator().manual_seed(5)
    groups = [[Request(draw(generator, 4), draw(generator, 20))] for _ in range(60)]
    masked = torch.zeros(50_257, dtype=torch.bool)
    for _ in range(2):  # the first call grows the heap
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        score(model, groups, masked_ids=masked)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    pages = 60 * 20 * 50_304 * 4 / resource.getpagesize()  # of the logits of all targets
    assert faults < pages / 4


TINY = make_model(n_layer=1, vocab_size=7)
tiny_next_token = cache(lambda tokens: next_token(TINY, list(tokens)))


@st.composite
def tiny_groups(draw):
    """Short sequences with common prefixes and repetitions, each split at a random place."""
    few, all_ids = st.integers(0, 1), st.integers(0, 6)
    texts = draw(st.lists(st.lists(few | all_ids, min_size=2, max_size=9), min_size=1, max_size=4))

    def request():
        text = draw(st.sampled_from(texts))
        text = [*text[: draw(st.integers(1, len(text)))], *draw(st.lists(few, min_size=1, max_size=3))]
        cut = draw(st.integers(1, len(text) - 1))
        return Request(text[:cut], text[cut:])

    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    return [[request() for _ in range(size)] for size in sizes]


@settings(derandomize=True, deadline=None, max_examples=120)
@given(tiny_groups(), st.sampled_from([1, 20, 1000]), st.sets(st.integers(0, 6), max_size=3))
def test_what_requests_have_in_common_changes_no_score(groups, batch_tokens, masked):
    mask = torch.tensor([i in masked for i in range(7)])
    expected = [[plain(request, lambda ids: tiny_next_token(tuple(ids)), masked) for request in g] for g in groups]
    for share_prefixes in (True, False):
        found = score(TINY, groups, batch_tokens=batch_tokens, share_prefixes=share_prefixes, masked_ids=mask)
        assert_same(found, expected)


@pytest.fixture
def seen(model, monkeypatch):
    """The batches that the model computes: tokens (B, T) and the attention mask, None for causal attention."""
    batches, hidden = [], model.hidden

    def recorded(tokens, **tree):
        batches.append((tokens, tree.get("visible")))
        return hidden(tokens, **tree)

    monkeypatch.setattr(model, "hidden", recorded)
    return batches


def shapes(seen):
    return [tuple(tokens.shape) for tokens, _ in seen]


def test_the_context_of_ten_endings_is_computed_once(model, seen):
    generator = torch.Generator().manual_seed(4)
    context = draw(generator, 24)
    group = [Request(context, [ending, *draw(generator, 4)]) for ending in range(10)]
    score(model, [group])
    assert shapes(seen) == [(1, 24 + 10 * 4)]  # the last token of an ending is not an input
    seen.clear()
    score(model, [group], share_prefixes=False, batch_tokens=1)
    assert shapes(seen) == [(1, 24 + 4)] * 10


def test_the_common_prefix_of_endings_is_computed_once(model, seen):
    context, common = list(range(17)), [50, 51, 52]
    endings = [[*common, 60, 1], [*common, 61, 1], [*common, 60, 2], [*common, 60], [*common, 60, 1], [70, 71, 1]]
    score(model, [[Request(context, ending) for ending in endings]])
    assert shapes(seen) == [(1, 24)]  # 17 + 3 + (60, 61) + (70, 71); with one token more it would be 32


def test_several_parts_of_one_text_are_computed_once(model, seen):
    text = draw(torch.Generator().manual_seed(5), 29)
    other = [*text[:-1], (text[-1] + 1) % VOCAB]
    score(model, [[Request(text[:cut], text[cut:])] for cut in (28, 3, 14, 28)], batch_tokens=1)
    assert shapes(seen) == [(1, 28)]
    seen.clear()
    score(model, [[Request(ids[:9], ids[9:])] for ids in (text, other, text)], batch_tokens=1)
    assert shapes(seen) == [(1, 28)] * 2


def test_the_same_requests_of_two_protocols_are_computed_once(model, seen):
    generator = torch.Generator().manual_seed(6)
    context, other = draw(generator, 12), draw(generator, 12)
    group = [Request(context, [ending, 1, 2]) for ending in range(4)]
    elsewhere = [Request(other, [ending, 1, 2]) for ending in range(4)]
    found = score(model, [group, elsewhere, group], batch_tokens=1)
    assert shapes(seen) == [(1, 24)] * 2  # 12 + 4 * 2, to a multiple of 8
    assert_same(found, score(model, [group, elsewhere, group], share_prefixes=False))


def test_every_index_attends_to_an_index_and_to_no_later_one(model, groups, seen):
    """Padding too: a softmax over nothing is NaN on some devices."""
    score(model, groups, batch_tokens=10_000)
    ((_, visible),) = seen
    assert visible.any(dim=-1).all()
    assert not visible.triu(1).any()


class SequentialRanks(Ranks):
    """Ranks that are computed one after the other: the last one gets all shares."""

    shares: ClassVar[list] = []

    def all_gather(self, value):
        self.shares.append(value)
        return self.shares


@pytest.mark.parametrize(("world_size", "batch_tokens"), [(2, 37), (3, 37), (3, 10_000), (70, 1)])
def test_ranks_share_the_batches_of_one_process(model, groups, seen, world_size, batch_tokens, monkeypatch):
    monkeypatch.setattr(SequentialRanks, "shares", [])
    expected = score(model, groups, batch_tokens=batch_tokens)
    one_process = [tokens.tolist() for tokens, _ in seen]
    seen.clear()
    counts = []
    for rank in range(world_size):
        ranks = SequentialRanks(rank, world_size, model.device)
        # The ranks run one after another: the scores of the later ones are missing until the last.
        with contextlib.nullcontext() if rank == world_size - 1 else contextlib.suppress(AssertionError):
            found = score(model, groups, batch_tokens=batch_tokens, ranks=ranks)
        counts.append(len(seen) - sum(counts))
    assert found == expected
    assert sorted(tokens.tolist() for tokens, _ in seen) == sorted(one_process)
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_a_long_context_is_truncated_from_the_left_equally_for_all_continuations(model, batch_tokens, share_prefixes):
    generator = torch.Generator().manual_seed(2)
    for length, endings in ((31, (1, 3)), (60, (1, 5)), (60, (32, 1)), (33, (1,)), (32, (1, 1)), (30, (1, 3))):
        context = draw(generator, length)
        group = [Request(context, draw(generator, n)) for n in endings]
        kept = context[-(POSITIONS + 1 - max(endings)) :]  # the last predicted token is not an input
        found = score(model, [group], batch_tokens=batch_tokens, share_prefixes=share_prefixes)
        cut = [Request(kept, request.continuation) for request in group]
        assert_same(found, [[plain(request, lambda tokens: next_token(model, tokens)) for request in cut]])


def test_masked_ids_change_only_allowed_margins(model):
    context = [5, 17, 40]
    first, *rest = greedy(model, context, 3)
    second = next_token(model, context).topk(2).indices[1].item()
    mask = torch.zeros(VOCAB, dtype=torch.bool)
    mask[[first, *rest]] = True
    endings = ([first, *rest], [second], [second, *greedy(model, [*context, second], 1)])
    group = [Request(context, ending) for ending in endings]
    (free,), (masked,) = (score(model, [group], masked_ids=ids) for ids in (None, mask))
    for actual, without in zip(masked, free, strict=True):
        assert (actual.logprobs, actual.margins) == (without.logprobs, without.margins)
        assert without.allowed_margins == without.margins
    assert [margin > 0 for margin in masked[0].margins] == [True] * 3
    assert masked[0].allowed_margins == [-math.inf] * 3
    assert masked[1].margins[0] < 0 < masked[1].allowed_margins[0]
    masked_set = {first, *rest}
    assert_same([masked], [[plain(r, lambda tokens: next_token(model, tokens), masked_set) for r in group]])


def test_no_requests_give_no_scores(model):
    assert score(model, []) == []


def test_bfloat16_is_the_blocks_in_bfloat16_and_the_head_in_float32(model, groups, expected):
    found = score(model, groups, dtype="bfloat16", share_prefixes=False, batch_tokens=1)
    for group, requests in zip(found, groups, strict=True):
        for actual, request in zip(group, requests, strict=True):
            tokens = torch.tensor([(request.context + request.continuation)[:-1]])
            with torch.no_grad():
                with torch.autocast("cpu", torch.bfloat16):
                    hidden = model.hidden(tokens)
                logprobs = model.logits(hidden.float())[0, len(request.context) - 1 :].log_softmax(-1)
            correct = [row[token].item() for row, token in zip(logprobs, request.continuation, strict=True)]
            assert actual.logprobs == pytest.approx(correct, abs=1e-5)
    for share_prefixes in (True, False):
        found = score(model, groups, dtype="bfloat16", share_prefixes=share_prefixes)
        gaps = torch.tensor([a - b for a, b in zip(logprobs_of(found), logprobs_of(expected), strict=True)])
        assert 1e-3 < gaps.abs().mean() < 0.1


def logprobs_of(scores):
    return [logprob for group in scores for one in group for logprob in one.logprobs]


@pytest.mark.parametrize(
    ("context", "continuations", "message"),
    [
        ([1, 2], [[3], [VOCAB]], r"request 2: token id 97 is outside the model's vocabulary of 97"),
        ([1, VOCAB + 5], [[3]], r"request 2: token id 102 is outside the model's vocabulary of 97"),
        ([1, 2], [[3], []], r"request 2: context and continuation need at least one token each"),
        ([], [[3]], r"request 2: context and continuation need at least one token each"),
        ([1], [[4] * (POSITIONS + 1)], r"request 2: a continuation of 33 tokens exceeds the model's context of 32"),
        (
            [1] * 5,
            [[3], [4] * (POSITIONS + 1)],
            r"request 2: a continuation of 33 tokens exceeds the model's context of 32",
        ),
    ],
)
def test_an_invalid_request_is_refused_by_number(model, context, continuations, message):
    group = [Request(context, continuation) for continuation in continuations]
    with pytest.raises(ValueError, match=message):
        score(model, [[Request([1], [2])], group])


def test_a_context_that_would_lose_all_its_tokens_is_refused(model):
    group = [Request([1], [3]), Request([1] * POSITIONS, [4, 5])]
    with pytest.raises(
        ValueError, match=r"request 1: a context has no more than the 1 tokens that its group must lose"
    ):
        score(model, [group])


def given_requests(protocol, question, encode):
    if not question:
        raise UnscorableError("no requests")
    return question


def correct_by_a(protocol, question, scores):
    return Verdict(protocol == "a", logprob=sum(one.total for one in scores), warnings=("irregular",))


TOY = Task(
    name="toy", title="Toy", protocols=("a", "b"), load=list, requests=given_requests, judge=correct_by_a, text=str
)
CUT = f"context cut to the model's {POSITIONS} tokens"
TOO_LONG = f"longer than the model's context of {POSITIONS} tokens"


@pytest.mark.parametrize(
    ("lengths", "unscored", "warnings"),
    [
        ([(1, 1)], None, ()),
        ([(28, 5), (28, 1)], None, ()),  # the last predicted token is not an input
        ([(29, 5), (29, 1)], None, (CUT,)),
        ([(100, 32)], None, (CUT,)),
        ([(1, 32)], None, ()),
        ([(1, 33)], TOO_LONG, ()),
        ([(50, 33)], TOO_LONG, ()),
        ([(30, 8), (5, 1)], TOO_LONG, ()),
        ([(30, 8), (6, 1)], None, (CUT,)),
        ([], "no requests", ()),
    ],
)
def test_a_long_question_is_truncated_or_unscored(lengths, unscored, warnings):
    question = [Request([1] * context, [2] * ending) for context, ending in lengths]
    encoding = SimpleNamespace(encode_ordinary=None)
    (instance,) = evaluate.build_requests(TOY, QuestionSet([question], ["a"], "toy", None), encoding, POSITIONS)
    assert (instance.unscored, instance.warnings) == (unscored, warnings)
    assert instance.groups == ([] if unscored else [question])


def test_every_question_counts_once_and_unscored_ones_as_wrong(model):
    short, long, too_long = [Request([1], [2])], [Request([1] * 40, [2])], [Request([1], [2] * 33)]
    pair = [Request([1, 5], [3, 4]), Request([1, 5], [6])]
    questions = QuestionSet([too_long, short, [], long, too_long, pair], ["a", "b"], "toy", None)
    encoding = SimpleNamespace(encode_ordinary=None)
    ranks = Ranks(0, 1, model.device)
    verdicts = evaluate.evaluate(TOY, model, encoding, questions, evaluate.ScoringConfig(), ranks)
    assert list(verdicts) == ["a", "b"]
    for protocol, outcome in verdicts.items():
        is_correct = protocol == "a"
        assert [verdict.correct for verdict in outcome] == [False, is_correct, False, is_correct, False, is_correct]
        for verdict, requests in ((outcome[1], short), (outcome[3], [Request([1] * 32, [2])]), (outcome[5], pair)):
            logprobs = [plain(request, lambda tokens: next_token(model, tokens)).total for request in requests]
            assert verdict.logprob == pytest.approx(sum(logprobs), abs=1e-4)
        result = evaluate.summarize(TOY, model, "models/a", protocol, questions, outcome, "float32", 1.0)
        assert (result.correct, result.total) == (3 * is_correct, 6)
        assert result.unscored == {TOO_LONG: 2, "no requests": 1}
        assert result.warnings == {"irregular": 3, CUT: 1}
        assert result.total == sum(result.unscored.values()) + sum(not verdict.unscored for verdict in outcome)


EVALUATIONS = {
    "eval_lambada.py": ("--data", "data/stories/lambada.txt", "--text", "openai", "--protocol", "all"),
    "eval_cbt.py": ("--data", "data/stories/stories_NE_valid.txt", "--protocol", "all", "--batch-tokens", 10**6),
}  # several batches; one batch, so that some ranks have none


def run_script(world, script, name, *more, launch=run):
    """Items, results and output of a script on the world's questions."""
    save_model(world / "models/ranks", seed=1)
    places = ("--out", f"found/{name}.json", "--items", f"found/{name}.jsonl")
    common = (*EVALUATIONS[script], "--ckpt", "models/ranks", "--device", "cpu")
    printed = launch(script, *common, *places, *more, cwd=world).stdout
    items = [json.loads(line) for line in (world / f"found/{name}.jsonl").read_text().splitlines()]
    return items, json.loads((world / f"found/{name}.json").read_text()), printed


@pytest.fixture(scope="module")
def one_process(world):
    return {script: run_script(world, script, f"one-{script}") for script in EVALUATIONS}


@pytest.mark.parametrize(("script", "ranks"), [("eval_lambada.py", 3), ("eval_cbt.py", 2)])
def test_any_number_of_ranks_gives_bitwise_equal_results(world, one_process, script, ranks):
    """Batches are formed before ranks share them, so that each batch is the same on any rank."""

    def launch(*args, **kwargs):
        return on_ranks(ranks, *args, **kwargs)

    items, rows, printed = run_script(world, script, f"{ranks}-{script}", launch=launch)
    expected_items, expected_rows, _ = one_process[script]
    assert items == expected_items
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in expected_rows]
    assert printed.count("| models/ranks ") == len(rows)  # only rank 0 prints


def test_bfloat16_is_named_in_the_results_and_in_the_table(world, one_process):
    items, rows, printed = run_script(world, "eval_lambada.py", "bfloat16", "--dtype", "bfloat16")
    expected_items, expected_rows, expected_printed = one_process["eval_lambada.py"]
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert {row["dtype"] for row in expected_rows} == {"float32"}
    assert [row["protocol"] for row in rows] == [row["protocol"] for row in expected_rows]
    for row in rows:
        assert f"| {row['protocol']} (bfloat16) " in printed
    assert "bfloat16" not in expected_printed
    gaps = [abs(a["logprob"] - b["logprob"]) for a, b in zip(items, expected_items, strict=True)]
    assert 1e-3 < sum(gaps) / len(gaps) < 0.3


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        # Newcombe 1998 (Statistics in Medicine 17), table I, the score method without correction.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(total - correct, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (0, 1, 1.0),  # 2 * 1 / 2
        (1, 2, 1.0),  # 2 * (1 + 3) / 8
        (7, 7, 1.0),
        (1, 5, 0.21875),  # 2 * (1 + 6) / 64
        (0, 10, 2 / 1024),
        (3, 12, 0.03515625),  # 2 * (1 + 15 + 105 + 455) / 32768
        (0, 3000, 0.0),  # below the smallest float
    ],
)
def test_mcnemar_is_the_exact_two_sided_binomial(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a) == p


@pytest.mark.parametrize(("only_a", "only_b"), [(5, 6), (30, 51), (400, 333), (5000, 4000)])
def test_mcnemar_equals_scipys(only_a, only_b):
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = scipy_stats.binomtest(only_a, only_a + only_b).pvalue
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)
