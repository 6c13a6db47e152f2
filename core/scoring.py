"""Log-likelihoods of continuations: the engine of every evaluation."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from model import GPT

NEAR_TIE = 1e-5  # log-probabilities closer than this may change places with another batch size or device


@dataclass(frozen=True)
class Question:
    """Token ids of a context and of the continuations to score given it."""

    context: list[int]
    continuations: list[list[int]]


@dataclass(frozen=True)
class Score:
    """What the model makes of one continuation, token by token."""

    logprobs: list[float]  # of each token, given all before it
    is_greedy: list[bool]  # whether each token is the likeliest there
    near_tie: bool = False  # whether somewhere the two likeliest ids are within NEAR_TIE

    @property
    def total(self) -> float:
        return sum(self.logprobs)


@dataclass(order=True)
class _Row:
    """One sequence to run through the model."""

    length: int
    inputs: list[int] = field(compare=False)
    targets: list[int] = field(compare=False)
    place: tuple[int, int] = field(compare=False)  # question, continuation


@torch.no_grad()
def score(
    model: GPT, questions: list[Question], batch_size: int, banned_first: Tensor | None = None, label: str = "scoring"
) -> list[list[Score]]:
    """Score every continuation of every question, in fp32 for a model in fp32.

    A context too long for the model loses its beginning, alike for all continuations of a question. `banned_first`
    (vocab_size,) bool marks ids that can't be the likeliest as a continuation's first token.
    Raises ValueError for an empty context or continuation, an id outside the vocabulary, or a continuation longer
    than the model's context.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows = sorted(row for i, question in enumerate(questions) for row in _rows(model, i, question))
    scores: list[list[Score]] = [[None] * len(question.continuations) for question in questions]  # type: ignore[list-item]
    with tqdm(total=len(rows), desc=label, unit="seq", disable=None) as bar:
        for begin in range(0, len(rows), batch_size):
            batch = rows[begin : begin + batch_size]  # of like lengths, as rows are sorted
            for row, result in zip(batch, _score_batch(model, batch, banned_first), strict=True):
                scores[row.place[0]][row.place[1]] = result
            bar.update(len(batch))
    return scores


def _rows(model: GPT, index: int, question: Question) -> list[_Row]:
    n_positions, vocab_size = model.config.n_positions, model.config.vocab_size
    longest = max((len(continuation) for continuation in question.continuations), default=0)
    if not question.context or not all(question.continuations):
        raise ValueError(f"question {index + 1}: a context and each continuation need at least one token")
    if longest > n_positions:
        raise ValueError(
            f"question {index + 1}: a continuation of {longest} tokens passes the context of {n_positions}"
        )
    largest = max(max(ids) for ids in (question.context, *question.continuations))
    if largest >= vocab_size:
        raise ValueError(
            f"question {index + 1}: token id {largest} is outside the model's vocabulary of {vocab_size}: its "
            f"tokenizer is another one"
        )
    context = question.context[-(n_positions + 1 - longest) :]
    rows = []
    for i, continuation in enumerate(question.continuations):
        ids = context + continuation
        rows.append(_Row(len(ids) - 1, ids[:-1], continuation, (index, i)))
    return rows


def _score_batch(model: GPT, batch: list[_Row], banned_first: Tensor | None) -> list[Score]:
    width = max(row.length for row in batch)
    # Padding stands on the right, where causal attention keeps it from every real token.
    inputs = torch.tensor([row.inputs + [0] * (width - row.length) for row in batch])  # (B, T)
    # Only where a target is are logits needed: n positions out of B x T.
    where = [(b, row.length - len(row.targets) + i) for b, row in enumerate(batch) for i in range(len(row.targets))]
    b, t = torch.tensor(where).T.to(model.device)  # (n,), (n,)
    targets = torch.tensor([target for row in batch for target in row.targets], device=model.device)  # (n,)
    logits = model.logits(model.hidden(inputs.to(model.device))[b, t]).float()  # (n, V)
    logprobs = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]  # (n,)
    if banned_first is not None:
        first = torch.tensor([i == 0 for row in batch for i in range(len(row.targets))], device=model.device)  # (n,)
        logits = logits.masked_fill(first[:, None] & banned_first.to(model.device), -torch.inf)
    best = logits.topk(2, dim=-1)  # (n, 2)
    greedy = best.indices[:, 0] == targets  # (n,)
    near = best.values[:, 0] - best.values[:, 1] < NEAR_TIE  # (n,)
    sizes = [len(row.targets) for row in batch]
    columns = (values.cpu().split(sizes) for values in (logprobs, greedy, near))
    return [Score(p.tolist(), g.tolist(), bool(n.any())) for p, g, n in zip(*columns, strict=True)]
