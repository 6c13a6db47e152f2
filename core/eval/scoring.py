"""Log-likelihoods of continuations: the engine of every evaluate.

Requests of one group that begin alike share the work of their beginning: a row of the batch holds each different
token once, its sequences branch as a tree does, and a token sees the tokens on its own branch alone. Ten candidates
after 500 tokens cost 500 tokens and ten endings.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from core import cli
from core.distributed import Ranks, autocast
from model import GPT

NEAR_TIE = 1e-5  # log-probabilities closer than this may change places with another batch size or device
HEAD_ROWS = 2048  # logits at once: 0.4 GB of them for GPT-2's vocabulary
WIDTH_MULTIPLE = 8  # attention kernels want the rows of a mask aligned


def default_batch_tokens(device: torch.device) -> int:
    """What keeps a GPU busy; on a CPU, what stays in its caches (8,192 took 1.4 times as long for GPT-2 124M)."""
    return 1024 if device.type == "cpu" else 32_768


@dataclass(frozen=True)
class Request:
    """Token ids of a context, and of the continuation to score given it."""

    context: list[int]
    continuation: list[int]

    def check(self, n_positions: int, vocab_size: int) -> None:
        """Raise ValueError where a model of this context and vocabulary can't score it."""
        if not self.context or not self.continuation:
            raise ValueError("a context and each continuation need at least one token")
        if len(self.continuation) > n_positions:
            raise ValueError(f"a continuation of {len(self.continuation)} tokens passes the context of {n_positions}")
        largest = max(self.context + self.continuation)
        if largest >= vocab_size:
            raise ValueError(
                f"token id {largest} is outside the model's vocabulary of {vocab_size}: its tokenizer is another one"
            )


@dataclass(frozen=True)
class Score:
    """What the model makes of one continuation, token by token."""

    logprobs: list[float]  # of each token, given all before it
    margins: list[float]  # how far each token's log-probability is above that of any other id; negative: below
    allowed_margins: list[float]  # the same where banned ids can't be chosen; -inf for a token that is banned

    @property
    def total(self) -> float:
        return sum(self.logprobs)


def excess(group: list[Request], n_positions: int) -> int:
    """How many tokens the contexts of a group lose at their beginning, alike for all, to fit the model's context.

    The last token predicted is no input, so that sequences of n_positions + 1 tokens fit.
    """
    longest = max(len(request.context) + len(request.continuation) for request in group)
    return max(longest - (n_positions + 1), 0)


@torch.no_grad()
def score(
    model: GPT,
    groups: list[list[Request]],
    *,
    ranks: Ranks | None = None,
    batch_tokens: int | None = None,
    dtype: str = "float32",
    share: bool = True,
    banned: Tensor | None = None,
    label: str = "scoring",
    quiet: bool = False,
) -> list[list[Score]]:
    """Score every request; all ranks must call it with the same arguments, and get the same scores.

    batch_tokens: tokens a forward, padding included; None: default_batch_tokens. dtype: of the blocks' matrix
    products, float32 (without TF32) or bfloat16; logits are float32 always. share: False gives every request a row of
    its own. banned (vocab_size,) bool: ids that `allowed_margins` leave out.
    Batch size, ranks and sharing change the scores by rounding alone. Raises ValueError, with the group's number, for
    a request that the model can't score.
    """
    torch.set_float32_matmul_precision("highest")
    ranks = ranks or Ranks(0, 1, model.device)
    banned = banned.to(model.device) if banned is not None else None
    spans = _spans(model, groups)
    rows = [_row(bundle) for bundle in _bundles(spans, share)]
    batches = _pack(rows, batch_tokens or default_batch_tokens(model.device))[ranks.rank :: ranks.world_size]
    slots, values = [np.empty(0, np.int64)], [torch.empty(0, 3, device=model.device)]
    hidden = quiet or not ranks.is_main
    with cli.progress_bar(total=sum(map(len, batches)), desc=label, unit="row", hidden=hidden, leave=False) as bar:
        for batch in batches:
            for where, found in _score_batch(model, batch, ranks, dtype, banned):
                slots.append(where)
                values.append(found)  # stays on the device, so that the host builds the next batch meanwhile
            bar.update(len(batch))
        mine = np.concatenate(slots), torch.cat(values).cpu().numpy()
    table = np.empty((sum(len(span.targets) for group in spans for span in group), 3), np.float32)
    for where, found in ranks.all_gather(mine):
        table[where] = found
    return [[_result(table, span) for span in group] for group in spans]


@dataclass
class _Span:
    """One request, cut to the model's context."""

    ids: list[int]
    begin: int  # of the continuation within ids
    slot: int  # of its first target in the table of results

    @property
    def targets(self) -> list[int]:
        return self.ids[self.begin :]


@dataclass
class _Row:
    """One row of a batch: the tokens of sequences that branch, each token once."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[tuple[np.ndarray, int, int]] = field(default_factory=list)  # stem's places; begin and end of its own
    reads: list[int] = field(default_factory=list)  # the place where the logits of each target stand
    targets: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    @property
    def is_chain(self) -> bool:
        """Whether nothing branches, and plain causal attention does."""
        return self.positions[-1] == len(self.tokens) - 1

    def mark_visible(self, seen: np.ndarray) -> None:
        """Mark which places each place sees in `seen` (T, T), all False."""
        for stem, begin, end in self.branches:
            if len(stem) and stem[-1] == len(stem) - 1:  # a slice: 0.4 s instead of 2.0 for 2,000 CBT questions
                seen[begin:end, : len(stem)] = True
            else:
                seen[begin:end, stem] = True
            seen[begin:end, begin:end] = np.tri(end - begin, dtype=bool)
        padding = np.arange(len(self.tokens), len(seen))
        seen[padding, padding] = True  # itself: a softmax over nothing is NaN


def _spans(model: GPT, groups: list[list[Request]]) -> list[list[_Span]]:
    spans: list[list[_Span]] = []
    slot = 0
    for number, group in enumerate(groups, 1):
        cut = excess(group, model.config.n_positions)
        spans.append([])
        try:
            for request in group:
                request.check(model.config.n_positions, model.config.vocab_size)
            if min(len(request.context) for request in group) <= cut:
                raise ValueError(f"a context is shorter than the {cut} tokens that its group has to lose")
        except ValueError as error:
            raise ValueError(f"request {number}: {error}") from None
        for request in group:
            ids = request.context[cut:] + request.continuation
            spans[-1].append(_Span(ids, len(request.context) - cut, slot))
            slot += len(request.continuation)
    return spans


def _bundles(spans: list[list[_Span]], share: bool) -> list[list[_Span]]:
    """What goes into one row: a group, and with it those that ask for parts of the same texts, by another protocol."""
    if not share:
        return [[span] for group in spans for span in group]
    bundles: dict[tuple[tuple[int, ...], ...], list[_Span]] = {}
    for group in spans:
        bundles.setdefault(tuple(tuple(span.ids) for span in group), []).extend(group)
    return list(bundles.values())


def _row(bundle: list[_Span]) -> _Row:
    row, path = _Row(), np.empty(0, np.int64)
    before: list[int] = []
    for span in sorted(bundle, key=lambda span: span.ids):  # those that share the longest beginnings are neighbours
        ids = span.ids[:-1]
        stem, begin = _common(before, ids), len(row.tokens)
        row.tokens += ids[stem:]
        row.positions += range(stem, len(ids))
        row.branches.append((path[:stem], begin, len(row.tokens)))
        path = np.concatenate([path[:stem], np.arange(begin, len(row.tokens))])  # places of this sequence's tokens
        row.reads += path[span.begin - 1 :].tolist()
        row.targets += span.targets
        row.slots += range(span.slot, span.slot + len(span.targets))
        before = ids
    return row


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


def _pack(rows: list[_Row], batch_tokens: int) -> list[list[_Row]]:
    """Batches of rows of like lengths, the longest first: memory that doesn't suffice shows at once."""
    batches: list[list[_Row]] = []
    for row in sorted(rows, key=lambda row: len(row.tokens), reverse=True):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0].tokens) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def _score_batch(
    model: GPT, rows: list[_Row], ranks: Ranks, dtype: str, banned: Tensor | None
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Slots of the table (n,) and what belongs there, (n, 3): log-probability, margin, margin among allowed ids."""
    hidden, width = _hidden(model, rows, ranks, dtype)  # (B * T, C)
    reads = np.concatenate([b * width + np.array(row.reads) for b, row in enumerate(rows)])  # (n,)
    order = np.argsort(reads, kind="stable")  # requests that branch at one place read the same logits
    places, which = np.unique(reads[order], return_inverse=True)  # (u,), (n,)
    targets = np.concatenate([row.targets for row in rows])[order]  # (n,)
    slots = np.concatenate([row.slots for row in rows])[order]  # (n,)
    for first in range(0, len(places), HEAD_ROWS):
        chunk = slice(*np.searchsorted(which, [first, first + HEAD_ROWS]))
        at, which_row, target = (
            torch.from_numpy(values).to(model.device)
            for values in (places[first : first + HEAD_ROWS], which[chunk] - first, targets[chunk])
        )
        yield slots[chunk], _compare(model.logits(hidden[at]), which_row, target, banned)


def _hidden(model: GPT, rows: list[_Row], ranks: Ranks, dtype: str) -> tuple[Tensor, int]:
    width = max(len(row.tokens) for row in rows)
    branching = not all(row.is_chain for row in rows)
    if branching:
        width = -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    # Padding stands on the right, where no real token sees it.
    tokens, positions = np.zeros((2, len(rows), width), np.int64)  # (B, T) each
    for b, row in enumerate(rows):
        tokens[b, : len(row.tokens)] = row.tokens
        positions[b, : len(row.tokens)] = row.positions
    inputs, at, visible = torch.from_numpy(tokens).to(model.device), None, None
    if branching:
        seen = np.zeros((len(rows), 1, width, width), bool)  # (B, 1, T, T)
        for b, row in enumerate(rows):
            row.mark_visible(seen[b, 0])
        at, visible = (torch.from_numpy(values).to(model.device) for values in (positions, seen))
    with autocast(ranks, dtype):
        hidden = model.hidden(inputs, positions=at, visible=visible)  # (B, T, C)
    return hidden.flatten(0, 1).float(), width


def _compare(logits: Tensor, which: Tensor, targets: Tensor, banned: Tensor | None) -> Tensor:
    """(u, V) logits; target j, of n, is an id of row which[j]. (n, 3): log-probability and both margins."""
    own = logits[which, targets]  # (n,)
    found = [own - logits.logsumexp(dim=-1)[which], own - _best_other(logits, which, targets)]
    if banned is not None:
        others = _best_other(logits.masked_fill(banned, -torch.inf), which, targets)
        found.append(torch.where(banned[targets], -torch.inf, own - others))
    else:
        found.append(found[1])
    return torch.stack(found, dim=1)


def _best_other(logits: Tensor, which: Tensor, targets: Tensor) -> Tensor:
    """The highest logit but the target's own, (n,)."""
    best = logits.topk(2, dim=-1)  # (u, 2) each
    return torch.where(best.indices[which, 0] == targets, best.values[which, 1], best.values[which, 0])


def _result(table: np.ndarray, span: _Span) -> Score:
    return Score(*table[span.slot : span.slot + len(span.targets)].T.tolist())
