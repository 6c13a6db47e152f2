"""The micro-batch that fits into device memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from core.distributed import Ranks

MARGIN = 0.1  # fraction of free memory kept for fragmentation, compiler buffers and evaluation during training
MAX_TOKENS = 65_536  # the largest micro-batch that was measured
CPU_SEQUENCES = 8  # where memory isn't measured: small products stay in the caches of a CPU


def largest_micro_batch(
    loss_fn: Callable[[Tensor, Tensor], Tensor], sequences: int, seq_len: int, reserved_bytes: int, ranks: Ranks
) -> int:
    """The largest divisor of `sequences`, a rank's share of a step, that fits on every rank. All ranks must call it.

    Runs `loss_fn` and its backward on one, two and three sequences and extrapolates; 1 where these don't fit.
    `reserved_bytes` are yet to be allocated.
    """
    limit = CPU_SEQUENCES
    if ranks.device.type == "cuda":
        device = ranks.device
        try:
            _, two, three = (peak_bytes(loss_fn, n, seq_len, device) for n in (1, 2, 3))  # the first loads libraries
        except torch.OutOfMemoryError:
            limit = 1
        else:
            free, _ = torch.cuda.mem_get_info(device)
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            limit = min(fitting_sequences(free - reserved_bytes, two, three), MAX_TOKENS // seq_len)
    return min(ranks.all_gather(largest_divisor(sequences, limit)))  # also a barrier


def fitting_sequences(free: int, two: int, three: int) -> int:
    """How many sequences fit into `free` bytes minus a margin, if two and three take that many bytes."""
    each = max(three - two, 1)
    return int((free * (1 - MARGIN) - (two - 2 * each)) / each)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`; 1 where `limit` is below 1."""
    return max(n for n in range(1, max(min(limit, number), 1) + 1) if number % n == 0)


def peak_bytes(loss_fn: Callable[[Tensor, Tensor], Tensor], sequences: int, seq_len: int, device: torch.device) -> int:
    """Peak memory of a loss and its backward, above what is allocated now."""
    tokens = torch.zeros(sequences, seq_len, dtype=torch.long, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss_fn(tokens, tokens).backward()
    return torch.cuda.max_memory_allocated(device) - before
