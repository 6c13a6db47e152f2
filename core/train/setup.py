"""One optimizer step: the micro-batches it reads, the loss it follows, and the update, on any number of ranks."""

import contextlib
import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from core.data.shards import TokenOrder, Windows, prefetched
from core.distributed import Ranks, autocast, runs_triton
from core.files import LOCK, FileLocks
from core.train.interrupts import Interrupts
from core.train.memory import largest_divisor, largest_micro_batch
from core.train.optim import Optimizers
from core.train.recipe import Recipe, Schedule
from model import GPT

Settings = TypeVar("Settings", bound="StepConfig")
READ_AHEAD = 4  # micro-batches in host memory before they are needed


@dataclass
class Computation:
    """How a step is computed: speed and memory; results change by rounding."""

    micro_batch: int | Literal["auto"] = "auto"
    """Sequences a rank computes at once; changes the result by rounding. auto: what fits, to 65,536 tokens (CPU: 8)."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the matrix products; weights and optimizer stay float32. auto: bfloat16 on CUDA, float32 elsewhere."""
    activation_checkpointing: bool = False
    """Compute each block again for its gradient: gpt2-xl (--fused off) takes half the memory and 1.2 times the time."""
    deterministic: bool = False
    """Bit for bit the same result from as many ranks on GPUs too, also after a resume; 12 % slower on an H200."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the training step. auto: on CUDA."""
    fused: Literal["auto", "on", "off"] = "auto"
    """The step by core/ops.py's kernels, for bfloat16 on NVIDIA's Hopper GPUs and B200. auto: where they run."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    profile: bool = False
    """Record three early steps: the ten costliest kernels on the terminal, and logs/RUN/trace.json.gz."""


@dataclass
class StepConfig(Recipe, Computation):
    """All that a step follows, as `resolve` left it: nothing "auto" and nothing None any more."""


def resolve_computation(config: Settings, ranks: Ranks) -> Settings:
    """Fill in what "auto" is on this device. Raises ValueError for kernels that it can't run."""
    on_cuda = ranks.device.type == "cuda"
    dtype = ("bfloat16" if on_cuda else "float32") if config.dtype == "auto" else config.dtype
    compiled = ("on" if on_cuda else "off") if config.compile == "auto" else config.compile
    can_fuse = dtype == "bfloat16" and runs_triton(ranks.device)
    if config.fused == "on" and not can_fuse:
        raise ValueError("--fused on takes --dtype bfloat16, and an NVIDIA Hopper or B200 GPU with Triton: take auto")
    fused: Literal["on", "off"] = "on" if can_fuse and config.fused != "off" else "off"
    return replace(config, dtype=dtype, compile=compiled, fused=fused)


def at_once(config: StepConfig, ranks: Ranks, sequences: int) -> int:
    """How many of a step's sequences a rank computes at once: the micro-batch, or less where the step has less."""
    assert config.micro_batch != "auto"
    return largest_divisor(sequences // ranks.world_size, config.micro_batch)


def micro_batches(
    config: StepConfig, schedule: Schedule, ranks: Ranks, windows: Windows, order: TokenOrder, step: int
) -> Iterator[list[Tensor]]:
    """This rank's share of a step's sequences, cut to the step's pieces: inputs and targets (B, T) on the host."""
    sequences, piece = schedule.sequences(step), schedule.piece(step)
    size = at_once(config, ranks, len(sequences))
    for first in range(sequences.start + ranks.rank * size, sequences.stop, size * ranks.world_size):
        batch = windows.batch(order[range(first, first + size)])
        yield ranks.pinned(*(tokens.view(-1, piece) for tokens in batch))


def open_loader(
    config: StepConfig, schedule: Schedule, ranks: Ranks, windows: Windows, order: TokenOrder, steps: range
) -> Generator[list[Tensor], None, None]:
    """This rank's micro-batches of those steps, read ahead by a thread."""
    batches = (batch for step in steps for batch in micro_batches(config, schedule, ranks, windows, order, step))
    return prefetched(batches, READ_AHEAD, ranks.set_thread_device)


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
    # A step's last micro-batch moves the gradients into the buckets; while they accumulate they lie beside them.
    return DistributedDataParallel(loss, gradient_as_bucket_view=True)


def fitting_micro_batch(model: GPT, optimizer: Optimizers, config: StepConfig, ranks: Ranks) -> int:
    """As many sequences at once as the memory of every rank has room for, beside what else a step will hold."""
    loss = loss_model(model, config, compiled=False)
    moments = 0 if optimizer.begun else 8 * model.num_parameters()
    buckets = 4 * model.num_parameters() if ranks.world_size > 1 else 0
    sequences = config.batch_tokens // config.seq_len // ranks.world_size
    with autocast(ranks, config.dtype):
        fitting = largest_micro_batch(loss, sequences, config.seq_len, moments + buckets, ranks)
    optimizer.zero_grad()
    return fitting


def train_step(
    model: Any,
    optimizer: Optimizers,
    batches: Iterator[list[Tensor]],
    sequences: int,
    config: StepConfig,
    ranks: Ranks,
    interrupts: Interrupts,
) -> Tensor:
    """One optimizer step on so many sequences, this rank's among the `batches`.

    Still on the device, (3,): mean loss over all ranks, gradient norm, ranks asked to stop.
    """
    accumulation = sequences // ranks.world_size // at_once(config, ranks, sequences)
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
    optimizer.step(skip=1 - (loss.isfinite() & norm.isfinite()).float())
    optimizer.zero_grad()
    return torch.stack([loss, norm, stop])


def warm_up(model: Any, config: StepConfig, schedule: Schedule, ranks: Ranks, step: int) -> None:
    """Compile for every shape of the steps to come, so that no step's time holds the compiler's."""
    begin = time.perf_counter()
    shapes = dict.fromkeys((at_once(config, ranks, sequences), piece) for sequences, piece in schedule.shapes(step))
    # With more graphs than its limit, 8, torch.compile leaves a function uncompiled; validation needs one as well.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(shapes) + 8)
    for size, piece in shapes:
        tokens = torch.zeros(size * config.seq_len // piece, piece, dtype=torch.long, device=ranks.device)
        with autocast(ranks, config.dtype):
            loss = model(tokens, tokens.clone())  # one tensor as both would compile a graph for that alone
        loss.backward()
        loss.item()  # waits for the device
    for p in model.parameters():
        p.grad = None
    ranks.log(f"compiled in {time.perf_counter() - begin:.0f} s")


@contextlib.contextmanager
def lock_run(folder: Path, ranks: "Ranks") -> Iterator[None]:
    """Keep other processes off a run's folder. Raises ValueError, on every rank, where one is training the run."""
    lock, problem = None, None
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLocks(folder, "--run")
        try:
            lock.take(0)
        except ValueError as error:
            problem = str(error)
    if problem := ranks.broadcast(problem):
        raise ValueError(problem)
    try:
        yield
    finally:
        if lock is not None and [path.name for path in folder.iterdir()] == [LOCK]:  # it came to no run
            shutil.rmtree(folder)
