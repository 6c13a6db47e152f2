"""Promise 6: log-probabilities equal a plain computation's, for any batch size; and a count has the right interval."""

import pytest
import torch

from core.scoring import Question, score
from core.stats import wilson
from model import GPT, GPTConfig

VOCAB, POSITIONS = 97, 32  # padded to 128: padded ids must never win


@pytest.fixture(scope="module")
def model():
    """Random weights, large enough that some tokens are much likelier than others."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=POSITIONS, vocab_size=VOCAB), seed=3)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)
    return model


@torch.no_grad()
def plain(model, context, continuation):
    """Log-probabilities of the continuation's tokens and the likeliest id at each, one token at a time."""
    logprobs, likeliest = [], []
    for i, token in enumerate(continuation):
        tokens = torch.tensor([context + continuation[:i]])
        logits = model(tokens).log_softmax(-1)[0, -1]
        logprobs.append(logits[token].item())
        likeliest.append(logits.argmax().item())
    return logprobs, likeliest


@torch.no_grad()
def greedy(model, context, count):
    ids = list(context)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(context) :]


def draw(generator, count):
    return torch.randint(VOCAB, (count,), generator=generator).tolist()


@pytest.fixture(scope="module")
def questions(model):
    generator = torch.Generator().manual_seed(1)
    found = []
    for lengths in ((1, (1,)), (5, (3,)), (20, (1, 1, 4)), (28, (4, 2)), (9, (2,) * 10), (1, (32,)), (3, (6, 1, 9, 2))):
        context = draw(generator, lengths[0])
        found.append(Question(context, [draw(generator, n) for n in lengths[1]]))
    for length in (2, 7, 15):  # some that are right, in part or wholly
        context = draw(generator, length)
        best = greedy(model, context, 4)
        found.append(Question(context, [best, best[:1], [*best[:2], *draw(generator, 2)], draw(generator, 2)]))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_equal_a_plain_computation_for_any_batch_size(model, questions, batch_size):
    scores = score(model, questions, batch_size)
    assert [len(group) for group in scores] == [len(question.continuations) for question in questions]
    hits = 0
    for question, group in zip(questions, scores, strict=True):
        for continuation, found in zip(question.continuations, group, strict=True):
            logprobs, likeliest = plain(model, question.context, continuation)
            assert found.logprobs == pytest.approx(logprobs, abs=1e-5)
            assert found.total == pytest.approx(sum(logprobs), abs=1e-4)
            assert found.is_greedy == [a == b for a, b in zip(likeliest, continuation, strict=True)]
            hits += sum(found.is_greedy)
    assert 3 * 7 <= hits < sum(len(c) for question in questions for c in question.continuations)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_long_context_loses_its_beginning_alike_for_all_continuations(model, batch_size):
    generator = torch.Generator().manual_seed(2)
    for context_length, lengths in ((31, (1, 3)), (60, (1, 5)), (60, (32, 1)), (33, (1,)), (32, (1, 1))):
        context = draw(generator, context_length)
        continuations = [draw(generator, n) for n in lengths]
        (group,) = score(model, [Question(context, continuations)], batch_size)
        kept = context[-(POSITIONS + 1 - max(lengths)) :]  # the last token predicted is no input
        for continuation, found in zip(continuations, group, strict=True):
            assert found.logprobs == pytest.approx(plain(model, kept, continuation)[0], abs=1e-5)


def test_banned_ids_cannot_be_the_likeliest_first_token_and_change_no_logprob(model):
    context = [5, 17, 40]
    first, *rest = greedy(model, context, 3)
    with torch.no_grad():
        second = model(torch.tensor([context]))[0, -1].topk(2).indices[1].item()
    banned = torch.zeros(VOCAB, dtype=torch.bool)
    banned[[first, *rest]] = True
    question = Question(context, [[first, *rest], [second], [second, *greedy(model, [*context, second], 1)]])
    free, masked = (score(model, [question], 4, mask)[0] for mask in (None, banned))
    assert [found.is_greedy for found in free] == [[True, True, True], [False], [False, True]]
    assert [found.is_greedy for found in masked] == [[False, True, True], [True], [True, True]]
    assert [found.logprobs for found in free] == [found.logprobs for found in masked]


@pytest.mark.parametrize(
    ("context", "continuations", "message"),
    [
        ([1, 2], [[3], [VOCAB]], r"question 2: token id 97 is outside the model's vocabulary of 97"),
        ([1, VOCAB + 5], [[3]], r"question 2: token id 102 is outside the model's vocabulary of 97"),
        ([1, 2], [[3], []], r"question 2: a context and each continuation need at least one token"),
        ([], [[3]], r"question 2: a context and each continuation need at least one token"),
        ([1], [[3], [4] * (POSITIONS + 1)], r"question 2: a continuation of 33 tokens passes the context of 32"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_question(model, context, continuations, message):
    with pytest.raises(ValueError, match=message):
        score(model, [Question([1], [[2]]), Question(context, continuations)], 4)


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
