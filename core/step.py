"""One optimizer step: the micro-batches it reads, the loss it follows, and the update, on any number of ranks."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from core.distributed import Ranks, autocast
from core.interrupts import Interrupts
from core.memory import largest_micro_batch
from core.shards import TokenOrder, Windows, prefetched
from model import GPT

READ_AHEAD = 4  # micro-batches in host memory before they are needed


class StepConfig(Protocol):
    """What a step needs of train.py's settings."""

    batch_tokens: int
    micro_batch: Any  # an int; "auto" until `fitting_micro_batch` has said which
    seq_len: int
    dtype: str
    grad_clip: float
    fused: str
    activation_checkpointing: bool


def micro_batches(
    config: StepConfig, ranks: Ranks, windows: Windows, order: TokenOrder, step: int
) -> Iterator[list[Tensor]]:
    """This rank's share of a step's sequences, as inputs and targets (B, T) in the host's memory."""
    sequences = config.batch_tokens // config.seq_len
    stride = config.micro_batch * ranks.world_size
    for first in range(step * sequences + ranks.rank * config.micro_batch, (step + 1) * sequences, stride):
        yield ranks.pinned(*windows.batch(order[range(first, first + config.micro_batch)]))


def open_loader(
    config: StepConfig, ranks: Ranks, windows: Windows, order: TokenOrder, steps: range
) -> Iterator[list[Tensor]]:
    """This rank's micro-batches of those steps, read ahead by a thread."""
    batches = (batch for step in steps for batch in micro_batches(config, ranks, windows, order, step))
    return prefetched(batches, READ_AHEAD, ranks.begin_thread)


def loss_model(model: GPT, config: StepConfig, compiled: bool) -> Any:
    """The function of inputs and targets (B, T) whose gradient a step takes; its weights are the raw model's own."""
    if config.fused == "on":
        from core.ops import FusedLoss  # needs Triton, which torch brings along for CUDA alone

        return FusedLoss(model, compiled, config.activation_checkpointing)
    model.activation_checkpointing = config.activation_checkpointing
    return torch.compile(model, dynamic=False) if compiled else model


def parallel(loss: Any, ranks: Ranks) -> Any:
    """The same function on every rank, with gradients that are averaged."""
    if ranks.world_size == 1:
        return loss
    # Gradients live in the buckets that are reduced, not beside them.
    return DistributedDataParallel(loss, gradient_as_bucket_view=True, broadcast_buffers=False)


def fitting_micro_batch(model: GPT, optimizer: torch.optim.Optimizer, config: StepConfig, ranks: Ranks) -> int:
    """As many sequences at once as the memory of every rank has room for, beside the optimizer's two moments."""
    loss = loss_model(model, config, compiled=False)
    moments = 0 if optimizer.state else 8 * model.num_parameters()
    sequences = config.batch_tokens // config.seq_len // ranks.world_size
    with autocast(ranks, config.dtype):
        fitting = largest_micro_batch(loss, sequences, config.seq_len, moments, ranks)
    optimizer.zero_grad(set_to_none=True)
    return fitting


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[list[Tensor]],
    config: StepConfig,
    ranks: Ranks,
    interrupts: Interrupts,
) -> Tensor:
    """One optimizer step. Still on the device, (3,): mean loss over all ranks, gradient norm, ranks asked to stop."""
    accumulation = config.batch_tokens // (config.micro_batch * config.seq_len * ranks.world_size)
    loss_sum = torch.zeros((), device=ranks.device)
    for i in range(accumulation):
        interrupts.alive()
        inputs, targets = ranks.to_device(*next(batches))
        last = i == accumulation - 1
        with nullcontext() if last or ranks.world_size == 1 else model.no_sync():  # reduce gradients once a step
            with autocast(ranks, config.dtype):
                loss = model(inputs, targets) / accumulation
            loss.backward()
        loss_sum += loss.detach()
    sums = torch.stack([loss_sum, torch.full_like(loss_sum, interrupts.stop)])
    if ranks.world_size > 1:
        dist.all_reduce(sums)
    loss, stop = sums[0] / ranks.world_size, sums[1]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    # Where this is 1 the fused optimizer leaves weights and moments as they were, and nobody waits to know.
    optimizer.found_inf = 1 - (loss.isfinite() & norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss, norm, stop])


def warm_up(model: Any, inputs: Tensor, targets: Tensor, config: StepConfig, ranks: Ranks) -> None:
    """Compile on one micro-batch whose gradients are thrown away, so that no step's time holds the compiler's."""
    begin = time.perf_counter()
    with autocast(ranks, config.dtype):
        loss = model(*ranks.to_device(inputs, targets))
    loss.backward()
    loss.item()  # waits for the device
    for p in model.parameters():
        p.grad = None
    ranks.say(f"compiled in {time.perf_counter() - begin:.0f} s")
