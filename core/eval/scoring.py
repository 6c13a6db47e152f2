"""Log-probabilities of continuations: the computation behind every evaluation.

Requests with the same first tokens share their computation. A row of a batch contains each distinct prefix once; its
sequences branch like a tree, and a token attends to the tokens of its own branch only. Ten candidates after a context
of 500 tokens cost 500 tokens and ten endings.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core import cli
from core.distributed import Ranks, autocast
from model import GPT

NEAR_TIE = 1e-5  # the order of log-probabilities closer than this may depend on batch size and device
# Bytes of logits per matrix product. A CPU's allocator keeps blocks of up to 32 MiB for the next product; larger ones
# are returned to the system, and the page faults of new ones took 40 % of the time of HellaSwag with a small model.
LOGIT_BYTES = {"cpu": 32 << 20, "gpu": 400 << 20}
SUM_ROWS = {"cpu": 16, "gpu": 1 << 20}  # rows of logits per sum
WIDTH_MULTIPLE = 8  # attention kernels need aligned rows of the mask


def default_batch_tokens(device: torch.device) -> int:
    """Enough to keep a GPU busy; on a CPU what fits its caches (8,192 took 1.4 times as long for GPT-2 124M)."""
    return 1024 if device.type == "cpu" else 32_768


def logit_rows(model: GPT) -> int:
    """Rows of logits per matrix product: 160 on a CPU and 2,086 on a GPU for GPT-2's vocabulary."""
    return max(LOGIT_BYTES[_kind(model.device)] // (4 * model.config.padded_vocab_size), 1)


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "gpu"


@dataclass(frozen=True)
class Request:
    """Token ids of a context, and of the continuation to score given it."""

    context: list[int]
    continuation: list[int]

    def check(self, n_positions: int, vocab_size: int) -> None:
        """Raise ValueError if a model with this context length and vocabulary can't score it."""
        if not self.context or not self.continuation:
            raise ValueError("context and continuation need at least one token each")
        if len(self.continuation) > n_positions:
            raise ValueError(
                f"a continuation of {len(self.continuation)} tokens exceeds the model's context of {n_positions}"
            )
        largest = max(self.context + self.continuation)
        if largest >= vocab_size:
            raise ValueError(
                f"token id {largest} is outside the model's vocabulary of {vocab_size}. Use the model's own tokenizer"
            )


@dataclass(frozen=True)
class Score:
    """The model's scores of one continuation, one value per token."""

    logprobs: list[float]  # of the token, given all tokens before it
    margins: list[float]  # the token's log-probability minus the highest one of any other id
    allowed_margins: list[float]  # the same without masked ids as alternatives; -inf for a masked token

    @property
    def total(self) -> float:
        return sum(self.logprobs)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during scoring."""

    def __init__(self, scores: list[list[Score] | None]) -> None:
        """`scores` of this rank, by group; None: not complete."""
        super().__init__()
        self.scores = scores
        self.verdicts: list[Any] = []  # a verdict per question, None where it is not complete


def highest(values: list[float]) -> tuple[int, bool]:
    """The index of the highest of at least two values, the first of equals, and whether the second is a near tie."""
    second, first = sorted(values)[-2:]
    return values.index(first), first - second < NEAR_TIE


def tokens_to_truncate(group: list[Request], n_positions: int) -> int:
    """The number of tokens to remove from the start of every context of a group, so that its longest request fits.

    The last token of a sequence is predicted but not an input: sequences of n_positions + 1 tokens fit.
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
    share_prefixes: bool = True,
    masked_ids: Tensor | None = None,
    label: str = "scoring",
) -> list[list[Score]]:
    """Score every request. All ranks must call it with the same arguments; all get the same scores.

    batch_tokens: tokens per forward pass, padding included; None: default_batch_tokens.
    dtype: of the matrix products in the blocks, float32 (without TF32) or bfloat16; logits are always float32.
    share_prefixes: False computes every request in its own row.
    masked_ids: (vocab_size,) bool, ids to exclude from `allowed_margins`.
    Batch size, number of ranks and sharing change the scores by rounding only.
    Raises ValueError with the group's number for a request that the model can't score, and Interrupted on Ctrl-C.
    """
    torch.set_float32_matmul_precision("highest")
    ranks = ranks or Ranks(0, 1, model.device)
    masked_ids = masked_ids.to(model.device) if masked_ids is not None else None
    sequences = _truncate(model, groups)
    rows = [_build_row(merged) for merged in _merge(sequences, share_prefixes)]
    # Batches are formed before ranks share them: each batch is the same for any number of ranks.
    batches = _build_batches(rows, batch_tokens or default_batch_tokens(model.device))
    share = [(np.empty(0, np.int64), torch.empty(0, 3, device=model.device))]  # slots and values of this rank
    total = sum(len(row.branches) for row in rows)
    with cli.progress_bar(total=total, desc=label, unit="requests", hidden=not ranks.is_main, leave=False) as bar:
        try:
            for first in range(0, len(batches), ranks.world_size):
                round_ = batches[first : first + ranks.world_size]  # one batch for each rank
                for batch in round_[ranks.rank : ranks.rank + 1]:
                    # The values stay on the device, so that the host can build the next batch.
                    share += _score_batch(model, batch, ranks, dtype, masked_ids)
                bar.update(sum(len(row.branches) for batch in round_ for row in batch))
        except KeyboardInterrupt:
            raise Interrupted(_collect(sequences, [_to_host(share)])) from None
    scores = _collect(sequences, ranks.all_gather(_to_host(share)))
    assert all(group is not None for group in scores)
    return [group or [] for group in scores]


def _to_host(share: list[tuple[np.ndarray, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    slots, values = zip(*share, strict=True)
    return np.concatenate(slots), torch.cat(values).cpu().numpy()


def _collect(
    sequences: list[list["_Sequence"]], shares: list[tuple[np.ndarray, np.ndarray]]
) -> list[list[Score] | None]:
    """The scores of each group, from slots and values of the ranks; None for a group that lacks a value."""
    count = sum(len(sequence.targets) for group in sequences for sequence in group)
    table, is_scored = np.empty((count, 3), np.float32), np.zeros(count, bool)
    for slots, values in shares:
        table[slots], is_scored[slots] = values, True
    return [
        [_to_score(table, sequence) for sequence in group]
        if all(is_scored[sequence.slot : sequence.slot + len(sequence.targets)].all() for sequence in group)
        else None
        for group in sequences
    ]


@dataclass
class _Sequence:
    """One request, truncated to the model's context."""

    ids: list[int]
    start: int  # of the continuation in ids
    slot: int  # of its first target in the table of results

    @property
    def targets(self) -> list[int]:
        return self.ids[self.start :]


@dataclass
class _Row:
    """One row of a batch: the tokens of sequences that branch, each shared token once."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[tuple[np.ndarray, int, int]] = field(default_factory=list)  # prefix indices; own start and end
    logit_indices: list[int] = field(default_factory=list)  # for each target, the index that predicts it
    targets: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    @property
    def is_chain(self) -> bool:
        """Whether no sequence branches, so that plain causal attention is sufficient."""
        return self.positions[-1] == len(self.tokens) - 1

    def mark_visible(self, mask: np.ndarray) -> None:
        """Set in `mask` (T, T), all False, which indices each index attends to."""
        for prefix, start, end in self.branches:
            if len(prefix) and prefix[-1] == len(prefix) - 1:  # a slice: 0.4 s instead of 2.0 for 2,000 CBT questions
                mask[start:end, : len(prefix)] = True
            else:
                mask[start:end, prefix] = True
            mask[start:end, start:end] = np.tri(end - start, dtype=bool)
        padding = np.arange(len(self.tokens), len(mask))
        mask[padding, padding] = True  # itself: a softmax over nothing is NaN


def _truncate(model: GPT, groups: list[list[Request]]) -> list[list[_Sequence]]:
    sequences: list[list[_Sequence]] = []
    slot = 0
    for number, group in enumerate(groups, 1):
        cut = tokens_to_truncate(group, model.config.n_positions)
        sequences.append([])
        try:
            for request in group:
                request.check(model.config.n_positions, model.config.vocab_size)
            if min(len(request.context) for request in group) <= cut:
                raise ValueError(f"a context has no more than the {cut} tokens that its group must lose")
        except ValueError as error:
            raise ValueError(f"request {number}: {error}") from None
        for request in group:
            ids = request.context[cut:] + request.continuation
            sequences[-1].append(_Sequence(ids, len(request.context) - cut, slot))
            slot += len(request.continuation)
    return sequences


def _merge(sequences: list[list[_Sequence]], share_prefixes: bool) -> list[list[_Sequence]]:
    """The sequences of each row: a group, and other groups that score parts of the same texts, by another protocol."""
    if not share_prefixes:
        return [[sequence] for group in sequences for sequence in group]
    merged: dict[tuple[tuple[int, ...], ...], list[_Sequence]] = {}
    for group in sequences:
        merged.setdefault(tuple(tuple(sequence.ids) for sequence in group), []).extend(group)
    return list(merged.values())


def _build_row(sequences: list[_Sequence]) -> _Row:
    row, path = _Row(), np.empty(0, np.int64)  # path: the indices in the row of the current sequence's tokens
    previous: list[int] = []
    for sequence in sorted(sequences, key=lambda sequence: sequence.ids):  # the longest common prefixes are adjacent
        ids = sequence.ids[:-1]
        prefix, start = _common_prefix(previous, ids), len(row.tokens)
        row.tokens += ids[prefix:]
        row.positions += range(prefix, len(ids))
        row.branches.append((path[:prefix], start, len(row.tokens)))
        path = np.concatenate([path[:prefix], np.arange(start, len(row.tokens))])
        row.logit_indices += path[sequence.start - 1 :].tolist()
        row.targets += sequence.targets
        row.slots += range(sequence.slot, sequence.slot + len(sequence.targets))
        previous = ids
    return row


def _common_prefix(a: list[int], b: list[int]) -> int:
    """The length of the longest common prefix of two sequences."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


def _build_batches(rows: list[_Row], batch_tokens: int) -> list[list[_Row]]:
    """Batches of rows of similar length, the longest first, so that a lack of memory appears at once."""
    batches: list[list[_Row]] = []
    for row in sorted(rows, key=lambda row: len(row.tokens), reverse=True):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0].tokens) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def _score_batch(
    model: GPT, rows: list[_Row], ranks: Ranks, dtype: str, masked_ids: Tensor | None
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Slots of the table (n,) and their values (n, 3): log-probability, margin, margin without masked ids."""
    hidden, width = _hidden(model, rows, ranks, dtype)  # (B * T, C)
    indices = np.concatenate([b * width + np.array(row.logit_indices) for b, row in enumerate(rows)])  # (n,)
    order = np.argsort(indices, kind="stable")  # targets after the same prefix use the same logits
    unique, inverse = np.unique(indices[order], return_inverse=True)  # (u,), (n,)
    targets = np.concatenate([row.targets for row in rows])[order]  # (n,)
    slots = np.concatenate([row.slots for row in rows])[order]  # (n,)
    chunks = -(-len(unique) // logit_rows(model))
    size = -(-len(unique) // chunks)  # equal chunks: a product of few rows takes almost as long as one of many
    for first in range(0, len(unique), size):
        chunk = slice(*np.searchsorted(inverse, [first, first + size]))
        chunk_indices, which, chunk_targets = (
            torch.from_numpy(values).to(model.device)
            for values in (unique[first : first + size], inverse[chunk] - first, targets[chunk])
        )
        yield slots[chunk], _logprobs_and_margins(model.logits(hidden[chunk_indices]), which, chunk_targets, masked_ids)


def _hidden(model: GPT, rows: list[_Row], ranks: Ranks, dtype: str) -> tuple[Tensor, int]:
    """The final hidden states of a batch, (B * T, C), and T."""
    width = max(len(row.tokens) for row in rows)
    is_tree = not all(row.is_chain for row in rows)
    if is_tree:
        width = -(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    # Padding is on the right, where no real token attends to it.
    tokens, positions = np.zeros((2, len(rows), width), np.int64)  # (B, T) each
    for b, row in enumerate(rows):
        tokens[b, : len(row.tokens)] = row.tokens
        positions[b, : len(row.tokens)] = row.positions
    inputs, tree_positions, visible = torch.from_numpy(tokens).to(model.device), None, None
    if is_tree:
        mask = np.zeros((len(rows), 1, width, width), bool)  # (B, 1, T, T)
        for b, row in enumerate(rows):
            row.mark_visible(mask[b, 0])
        tree_positions, visible = (torch.from_numpy(values).to(model.device) for values in (positions, mask))
    with autocast(ranks, dtype):
        hidden = model.hidden(inputs, positions=tree_positions, visible=visible)  # (B, T, C)
    return hidden.flatten(0, 1).float(), width


def _logprobs_and_margins(logits: Tensor, which: Tensor, targets: Tensor, masked_ids: Tensor | None) -> Tensor:
    """logits (u, V), which it overwrites; targets (n,), target j belongs to row which[j].

    Returns (n, 3), the columns of `_score_batch`.
    """
    own = logits[which, targets]  # (n,)
    # Blocks, as logsumexp copies its input: a second block of the size of the logits would be returned to the system.
    sums = torch.cat([block.logsumexp(dim=-1) for block in logits.split(SUM_ROWS[_kind(logits.device)])])  # (u,)
    columns = [own - sums[which], own - _highest_other(logits, which, own)]
    if masked_ids is None:
        columns.append(columns[1])
    else:
        others = _highest_other(logits.masked_fill_(masked_ids, -torch.inf), which, own)
        columns.append(torch.where(masked_ids[targets], -torch.inf, own - others))
    return torch.stack(columns, dim=1)


def _highest_other(logits: Tensor, which: Tensor, own: Tensor) -> Tensor:
    """The highest logit except the target's own (n,), where target j belongs to row which[j]; (n,)."""
    best = logits.amax(dim=-1)  # (u,)
    is_best = own >= best[which]  # (n,)
    if _kind(logits.device) == "cpu":  # only where it is needed: topk takes seven times as long as amax
        rows = which[is_best].unique()
        second = best.index_copy(0, rows, logits[rows].topk(2, dim=-1).values[:, 1])  # (u,)
    else:  # a GPU would wait for the choice of rows
        second = logits.topk(2, dim=-1).values[:, 1]
    return torch.where(is_best, second[which], best[which])


def _to_score(table: np.ndarray, sequence: _Sequence) -> Score:
    logprobs, margins, allowed_margins = table[sequence.slot : sequence.slot + len(sequence.targets)].T.tolist()
    return Score(logprobs, margins, allowed_margins)
