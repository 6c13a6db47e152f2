"""What the benchmarks share: the timed training step, random micro-batches, timers, and subprocesses."""

import itertools
import os
import shlex
import signal
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from core import cli
from core.distributed import DeviceClock, Ranks
from core.train.config import SystemConfig
from core.train.interrupts import Interrupts
from core.train.optim import OPTIMIZERS, OptimizerGroup, loss_scaler
from core.train.recipe import Recipe, resolve_recipe
from core.train.setup import System, resolve_system
from model import PRESETS
from train import train_step

ROOT = Path(__file__).parent.parent
WARM_UP_STEPS = 3  # not timed

Fused = Literal["auto", "portable", "off"]


@dataclass
class TimingConfig:
    """The timed training step."""

    preset: Literal[tuple(PRESETS)] = "gpt2"  # type: ignore[valid-type]
    """Model size."""
    micro_batch: int = 64
    """Sequences per forward pass."""
    batch_tokens: int = 524_288
    """Tokens per optimizer step."""
    seq_len: int = 1024
    """Tokens per sequence."""
    steps: int = 10
    """Number of timed steps."""
    optimizer: Literal[tuple(OPTIMIZERS)] = "adamw"  # type: ignore[valid-type]
    """Optimizer of the block matrices, as in train.py."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass, as in train.py."""
    device: str = "auto"
    """Device: auto, cuda or cpu."""

    def recipe(self, world_size: int = 1) -> Recipe:
        """The recipe of the step. Raises ValueError for options that contradict each other."""
        positive = ("micro_batch", "batch_tokens", "seq_len", "steps")
        cli.check_positive(**{name: getattr(self, name) for name in positive})
        return resolve_recipe(
            "original",
            PRESETS[self.preset],
            tokens=self.steps * self.batch_tokens,
            seq_len=self.seq_len,
            overrides={"batch_tokens": self.batch_tokens, "optimizer": self.optimizer},
            micro_batch=self.micro_batch,
            world_size=world_size,
        )

    def system(self, ranks: Ranks, fused: Fused = "auto") -> System:
        """The resolved system options; `fused` as the option of train.py."""
        system = SystemConfig(
            activation_checkpointing=self.activation_checkpointing,
            fused=fused,
            device=self.device,
        )
        return resolve_system(system, ranks, self.micro_batch)

    def micro_batches(self, world_size: int) -> int:
        """Forward passes per step on each rank."""
        return self.batch_tokens // (self.micro_batch * self.seq_len * world_size)


def build_step(
    loss_fn: Any, optimizer: OptimizerGroup, timing: TimingConfig, *, accumulation: int, dtype: str, ranks: Ranks
) -> Callable[[Iterator[list[Tensor]]], Any]:
    """train.py's optimizer step at the peak learning rate, as a function of an iterator of micro-batches."""
    optimizer.set_lr(1.0)
    return partial(
        train_step,
        loss_fn,
        optimizer,
        loss_scaler(dtype, ranks),
        accumulation=accumulation,
        grad_clip=timing.recipe().grad_clip,
        dtype=dtype,
        ranks=ranks,
        interrupts=Interrupts(3600, is_main=False),
        graphs={},
    )


def random_batches(timing: TimingConfig, ranks: Ranks) -> list[list[Tensor]]:
    """The micro-batches of a step: inputs and targets (B, T) on the device, different ones on each rank."""
    generator = torch.Generator(ranks.device).manual_seed(ranks.rank)
    size = (timing.micro_batch, timing.seq_len + 1)
    vocab_size = PRESETS[timing.preset].vocab_size
    rows = [
        torch.randint(vocab_size, size, generator=generator, device=ranks.device)
        for _ in range(timing.micro_batches(ranks.world_size))
    ]
    return [[tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()] for tokens in rows]


def time_steps(step: Callable[[], Any], timing: TimingConfig, ranks: Ranks) -> dict[str, Any]:
    """Seconds of each step, tokens per second of the median step, peak memory, recompilations and host syncs."""
    on_cuda, clock = ranks.device.type == "cuda", DeviceClock(ranks.device)
    synchronize(ranks)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        with warnings.catch_warnings(action="ignore"):  # torch warns that it doesn't detect every synchronization
            torch.cuda.set_sync_debug_mode("warn")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        marks = [clock.mark()]
        for _ in range(timing.steps):
            step()
            marks.append(clock.mark())
    if on_cuda:
        torch.cuda.set_sync_debug_mode("default")
    seconds = [clock.seconds(begin, end) for begin, end in itertools.pairwise(marks)]
    return {
        "step_s": seconds,
        "tokens_per_second": timing.batch_tokens / statistics.median(seconds),
        "syncs": sum("synchroniz" in str(warning.message) for warning in warned),
        "recompilations": torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None,
    }


def synchronize(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], ranks: Ranks, repeats: int = 30) -> float:
    """Milliseconds of `work`: the median of three rounds, each the mean of `repeats` calls."""
    clock, rounds = DeviceClock(ranks.device), []
    work()
    for _ in range(3):
        begin = clock.mark()
        for _ in range(repeats):
            work()
        rounds.append(clock.seconds(begin, clock.mark()) * 1000 / repeats)
    return statistics.median(rounds)


def torchrun_command(ranks: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]


def run_command(command: list[str], capture: bool = False, **variables: str) -> str:
    """Run a command that can import this project, with additional environment variables; returns its captured output.

    Its processes end before this function does, also when this process is terminated. Raises ValueError if it fails.
    """
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths} | variables
    stdout = subprocess.PIPE if capture else None
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # runs `finally`
    with subprocess.Popen(command, env=environment, text=True, stdout=stdout) as process:
        try:
            output, _ = process.communicate()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            signal.signal(signal.SIGTERM, previous)
    if process.returncode:
        raise ValueError(f"{shlex.join(command)} ended with status {process.returncode}; its output is above")
    return output or ""
