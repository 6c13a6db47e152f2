"""What the benchmarks of training steps share: what is timed, on which tokens, and how."""

import itertools
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

import train
from core import cli
from core.distributed import DeviceClock, Ranks
from core.train import recipe
from model import PRESETS

WARM_UP = 3  # steps that don't count


@dataclass
class Timed:
    """What is timed, also by benchmarks/scaling.py."""

    preset: Literal[tuple(PRESETS)] = "gpt2"  # type: ignore[valid-type]
    """Size of the model."""
    micro_batch: int = 64
    """Sequences at once."""
    batch_tokens: int = 524_288
    """Tokens an optimizer step."""
    seq_len: int = 1024
    """Tokens a sequence."""
    steps: int = 10
    """Steps that count."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """As train.py's."""
    activation_checkpointing: bool = False
    """As train.py's."""
    device: str = "auto"
    """auto, cuda or cpu."""
    out: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File for all figures as JSON."""


def settings_of(config: Timed, fused: bool, world_size: int = 1) -> train.Config:
    """train.py's settings for what is timed, on so many ranks. Raises ValueError where they don't go together."""
    names = ("preset", "micro_batch", "batch_tokens", "seq_len", "device", "activation_checkpointing", "optimizer")
    given = {name: getattr(config, name) for name in names}
    cli.check_positive(micro_batch=config.micro_batch, steps=config.steps)
    settings = train.Config(**given, steps=config.steps, fused="auto" if fused else "off")
    return recipe.resolve(settings, PRESETS[config.preset], config.micro_batch, world_size)


def random_batches(config: Timed, ranks: Ranks) -> list[list[Tensor]]:
    """A step's micro-batches on the device, other ones on each rank."""
    generator = torch.Generator(ranks.device).manual_seed(ranks.rank)
    count = config.batch_tokens // (config.micro_batch * config.seq_len * ranks.world_size)
    size = (config.micro_batch, config.seq_len + 1)
    vocab = PRESETS[config.preset].vocab_size
    rows = [torch.randint(vocab, size, generator=generator, device=ranks.device) for _ in range(count)]
    return [[tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()] for tokens in rows]


def timed(step: Callable[[], Any], config: Timed, ranks: Ranks) -> dict[str, Any]:
    """Tokens a second by the median step, the spread, peak memory, recompilations and waits for the device."""
    on_cuda, clock = ranks.device.type == "cuda", DeviceClock(ranks.device)
    synchronize(ranks)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        with warnings.catch_warnings(action="ignore"):  # that it doesn't see all of them
            torch.cuda.set_sync_debug_mode("warn")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        marks = [clock.mark()]
        for _ in range(config.steps):
            step()
            marks.append(clock.mark())
    if on_cuda:
        torch.cuda.set_sync_debug_mode("default")
    seconds = [clock.seconds(begin, end) for begin, end in itertools.pairwise(marks)]
    syncs = sum("synchroniz" in str(warning.message) for warning in warned)
    found = {"step_s": seconds, "tokens_per_second": config.batch_tokens / statistics.median(seconds), "syncs": syncs}
    found["recompilations"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None
    return found


def synchronize(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], ranks: Ranks, repeats: int = 30) -> float:
    """The median of three rounds, each a mean."""
    clock, rounds = DeviceClock(ranks.device), []
    work()
    for _ in range(3):
        begin = clock.mark()
        for _ in range(repeats):
            work()
        rounds.append(clock.seconds(begin, clock.mark()) * 1000 / repeats)
    return statistics.median(rounds)
