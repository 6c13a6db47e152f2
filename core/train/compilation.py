"""Before the first step: compile for each shape of a micro-batch, or measure how long a step will take."""

import time
from typing import Any

import torch

from core.distributed import Ranks, autocast
from core.train.recipe import Recipe
from core.train.sampling import blank_batch
from core.train.schedule import Schedule, Shape
from core.train.setup import Run, System

MAX_TIMED_SECONDS = 30  # of a micro-batch; the time of a longer one is estimated from one sequence


def compile_shapes(
    loss_fn: Any, recipe: Recipe, system: System, micro_batch: int, ranks: Ranks, step: int, shallow: bool = False
) -> None:
    """Compile for every shape of the steps from `step` on, so that no step's time includes compilation.

    `shallow`: of the steps that compute every second block, or else of those that compute all (`Depth.set`).
    """
    shapes = dict.fromkeys(shape for shape, _ in Schedule(recipe).splits(step, micro_batch, ranks.world_size, shallow))
    # Beyond its limit of 8 graphs, torch.compile leaves a function uncompiled; validation needs graphs too.
    torch._dynamo.config.recompile_limit += len(shapes)
    seconds = sum(time_micro_batch(loss_fn, shape, system, ranks) for shape in shapes)
    ranks.log(f"compiled in {seconds:.0f} s" + (" for half of the blocks" if shallow else ""))


def log_expected_time(loss_fn: Any, shape: Shape, count: int, run: Run) -> None:
    """Log how long a step of `count` micro-batches of this shape will take, unless that is less than a second."""
    one_sequence = shape._replace(rows=run.recipe.seq_len // shape.seq_len)
    size = shape.rows // one_sequence.rows
    first = time_micro_batch(loss_fn, one_sequence, run.system, run.ranks)  # it also loads libraries
    if size * first < MAX_TIMED_SECONDS:
        seconds = time_micro_batch(loss_fn, shape, run.system, run.ranks)
    else:  # ranks may differ here: each computes one backward pass, whose gradients DDP averages
        seconds = size * time_micro_batch(loss_fn, one_sequence, run.system, run.ranks)
    if count * seconds > 1:
        batches = f"{count} micro-batch{'es' if count > 1 else ''} of {size} sequence{'s' if size > 1 else ''}"
        run.ranks.log(f"expected time per step: {count * seconds:.0f} s ({batches})")


def time_micro_batch(loss_fn: Any, shape: Shape, system: System, ranks: Ranks) -> float:
    """Seconds of forward and backward on a micro-batch."""
    start = time.perf_counter()
    with autocast(ranks, system.dtype):
        loss = loss_fn(*blank_batch(shape, ranks.device), **shape.forward_kwargs)
    loss.backward()
    loss.item()  # waits for the device
    for p in loss_fn.parameters():
        p.grad = None
    return time.perf_counter() - start
