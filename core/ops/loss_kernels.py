"""The Triton kernel of the head's loss: as core/ops/kernels.py, in which the others are."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOGITS_BLOCK = 8192  # with 32 warps, two rows per multiprocessor: they stay in the L2 cache until the second pass


@triton.jit
def load_logits(logits, offsets, column):
    """The logits of a row in these columns, float32. `offsets`: to be added to them, or None."""
    logit = tl.load(logits + column).to(tl.float32)
    if offsets is not None:
        logit += tl.load(offsets + column)
    return logit


@triton.jit
def update_softmax(logit, maxima, sums, BLOCK: tl.constexpr):
    """Update running maxima and sums of exp2 by BLOCK logits; each of the BLOCK // 8 accumulators takes 8 of them."""
    logit = tl.reshape(logit * 1.4426950408889634, (BLOCK // 8, 8))
    larger = tl.maximum(maxima, tl.max(logit, 1))
    return larger, sums * tl.exp2(maxima - larger) + tl.sum(tl.exp2(logit - larger[:, None]), 1)


@triton.jit
def cross_entropy_kernel(
    logits,  # (rows, PADDED), with VOCAB columns in use
    offsets,  # (VOCAB,) float32, or None
    targets,  # (rows,)
    losses,  # (rows,) float32
    scale,
    VOCAB: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LOG2_E: tl.constexpr = 1.4426950408889634
    WHOLE: tl.constexpr = VOCAB // BLOCK * BLOCK  # columns that need no mask
    row = tl.program_id(0).to(tl.int64)
    logits += row * PADDED
    column = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    target_logit = load_logits(logits, offsets, target) * LOG2_E
    maxima = tl.full((BLOCK // 8,), -1e30, tl.float32)
    sums = tl.zeros((BLOCK // 8,), tl.float32)
    for first in range(0, WHOLE, BLOCK):
        maxima, sums = update_softmax(load_logits(logits, offsets, first + column), maxima, sums, BLOCK)
    tail = tl.load(logits + WHOLE + column, mask=WHOLE + column < VOCAB, other=-float("inf")).to(tl.float32)
    if offsets is not None:
        tail += tl.load(offsets + WHOLE + column, mask=WHOLE + column < VOCAB, other=0.0)
    maxima, sums = update_softmax(tail, maxima, sums, BLOCK)
    maximum = tl.max(maxima, 0)
    log2_sum = maximum + tl.log2(tl.sum(sums * tl.exp2(maxima - maximum), 0))
    tl.store(losses + row, (log2_sum - target_logit) / LOG2_E)
    shift = tl.log2(scale) - log2_sum
    tl.debug_barrier()  # all threads have read the logit of the target before one overwrites it
    gradient = tl.exp2(tail * LOG2_E + shift)  # zero in the padding
    tl.store(logits + WHOLE + column, gradient.to(logits.dtype.element_ty), mask=WHOLE + column < PADDED)
    for first in range(0, WHOLE, BLOCK):
        gradient = tl.exp2(load_logits(logits, offsets, first + column) * LOG2_E + shift)
        tl.store(logits + first + column, gradient.to(logits.dtype.element_ty))
    tl.debug_barrier()  # the element of the target is written a second time
    tl.store(logits + target, (tl.exp2(target_logit + shift) - scale).to(logits.dtype.element_ty))


@torch.library.custom_op("gpt2::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, offsets: Tensor | None, vocab_size: int, chunk_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy of hidden (N, C) @ weight.T (C, padded vocabulary) + offsets on targets (N,), in nats.

    Also returns its gradients: of hidden in the dtype of hidden, of the weight in float32. At most `chunk_rows` rows
    of logits are in memory; the kernel replaces them by their gradient in place.
    """
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    chunks = zip(*(whole.split(chunk_rows) for whole in (hidden, targets, losses, d_hidden)), strict=True)
    for rows, row_targets, row_losses, d_rows in chunks:
        logits = rows @ weight.T
        cross_entropy_kernel[(len(rows),)](
            logits,
            offsets,
            row_targets,
            row_losses,
            1 / len(hidden),
            vocab_size,
            len(weight),
            LOGITS_BLOCK,
            num_warps=32,
        )
        torch.mm(logits, weight, out=d_rows)
        d_weight += logits.T @ rows
        del logits
    return losses.mean(), d_hidden, d_weight


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, offsets: Tensor | None, vocab_size: int, chunk_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)
