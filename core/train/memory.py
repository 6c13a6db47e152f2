"""How many sequences fit on the device at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from core.distributed import Ranks

MARGIN = 0.1  # of the memory that is free: for fragments, the compiler's buffers, and measures taken on the way
MOST_TOKENS = 65_536  # what the speed was measured with; more was not tried
ON_HOST = 8  # sequences, where memory isn't counted: small products stay in a CPU's caches


def largest_micro_batch(
    loss: Callable[[Tensor, Tensor], Tensor], sequences: int, seq_len: int, bytes_to_come: int, ranks: Ranks
) -> int:
    """The largest divisor of `sequences`, a rank's share of a step, that fits on every rank. All ranks must call it.

    `loss` of one, two and three sequences, with its gradients, tells what each more takes; where these don't fit the
    answer is one. `bytes_to_come` are yet to be allocated.
    """
    most = ON_HOST
    if ranks.device.type == "cuda":
        device = ranks.device
        try:
            _, two, three = (peak_bytes(loss, n, seq_len, device) for n in (1, 2, 3))  # the first sets up libraries
        except torch.OutOfMemoryError:
            most = 1
        else:
            free, _ = torch.cuda.mem_get_info(device)
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            most = min(fitting(free - bytes_to_come, two, three), MOST_TOKENS // seq_len)
    return min(ranks.all_gather(largest_divisor(sequences, most)))  # no rank may leave before this


def fitting(free: int, two: int, three: int) -> int:
    """How many sequences fit into `free` bytes but for a margin, if two and three take that much."""
    each = max(three - two, 1)
    return int((free * (1 - MARGIN) - (two - 2 * each)) / each)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that isn't above `most`; 1 where that is less."""
    return max(n for n in range(1, max(min(most, number), 1) + 1) if number % n == 0)


def peak_bytes(loss: Callable[[Tensor, Tensor], Tensor], sequences: int, seq_len: int, device: torch.device) -> int:
    """The most memory that a loss and its gradients take beyond what is allocated now."""
    tokens = torch.zeros(sequences, seq_len, dtype=torch.long, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    loss(tokens, tokens).backward()
    return torch.cuda.max_memory_allocated(device) - before
