"""Speed of a training step on 1, 2, 4, ... GPUs of one machine, and the time for ten billion tokens.

    python -m benchmarks.scaling                                        # every power of two up to the number of GPUs
    python -m benchmarks.scaling --gpus 1 2 --per-gpu --batch-tokens 65536  # each GPU's share of a step on eight
    python -m benchmarks.scaling --device cpu --gpus 1 2 --preset tiny --seq-len 64 --micro-batch 2 --batch-tokens 256

Complete optimizer steps on random tokens. Each number of GPUs runs under its own torchrun and is timed twice: with_sync
is the step of train.py; in no_sync every rank computes its share of the step without communication. If no_sync takes
longer than this share of the step of one GPU, the GPUs are the cause: every rank does the complete optimizer update,
and power and clock rates differ. The excess of with_sync over no_sync of the slowest rank is the cost of communication.
With Muon it is not, because the ranks divide the optimizer's work in with_sync only. All rows take about as much time,
because GPUs lower their clock rate when they are warm.
"""

import itertools
import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist

from benchmarks import common
from benchmarks.common import TimingConfig
from core import cli
from core.distributed import Ranks, peak_flops, pick_device, process_group
from core.files import markdown_table
from core.train.logging import format_duration, versions
from core.train.optim import build_optimizer
from core.train.setup import build_loss, wrap_ddp
from model import GPT, PRESETS


@dataclass
class Config:
    timing: TimingConfig = field(default_factory=TimingConfig)
    gpus: Annotated[tuple[int, ...], cli.DEFAULT_IN_HELP] = ()
    """Numbers of GPUs; efficiency is relative to the first one. Default: 1, 2, 4, ... up to all GPUs."""
    per_gpu: bool = False
    """Use --batch-tokens for each GPU instead of for the complete step."""
    out: str = "logs/benchmarks/scaling.json"
    """File for all figures (JSON)."""
    terminal: cli.Terminal = field(default_factory=cli.Terminal)

    def scaled(self, count: int) -> TimingConfig:
        """The step on `count` GPUs. When they share its tokens, it is shorter, and more steps are timed."""
        if self.per_gpu:
            return replace(self.timing, batch_tokens=self.timing.batch_tokens * count)
        return replace(self.timing, steps=self.timing.steps * count)


def main(config: Config) -> None:
    device = pick_device(config.timing.device)
    if "WORLD_SIZE" in os.environ:  # a rank that `run_on` started
        with process_group(config.timing.device) as ranks:
            return ranks.log(json.dumps(ranks.all_gather(measure(config, ranks))))
    counts = gpu_counts(config, device)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    facts, measured, rows = versions(device), {}, []
    timing = config.timing
    print(f"{timing.preset}, micro-batch {timing.micro_batch}, {timing.optimizer}, {facts}", flush=True)
    for count in counts:
        measured[count] = run_on(count)
        rows.append(summarize(config, count, measured))
        figures = {"config": asdict(config), "versions": facts, "rows": rows, "ranks": measured}
        Path(config.out).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print_table(rows)
    print(f"wrote {config.out}")


def gpu_counts(config: Config, device: torch.device) -> tuple[int, ...]:
    """The numbers of GPUs, or of processes on a CPU. Raises ValueError for those that can't run the step."""
    available = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
    counts = config.gpus or tuple(2**i for i in range(available.bit_length()))
    for count in counts:
        if not 1 <= count <= available:
            unit = "GPUs" if device.type == "cuda" else "cores"
            raise ValueError(f"--gpus {count} must be between 1 and {available}, the {unit} of this machine")
        config.scaled(count).recipe(count)
    return counts


def run_on(count: int) -> list[dict[str, Any]]:
    """The figures of each of `count` ranks: torchrun starts this command on all of them."""
    print(f"{count} rank{'s' if count > 1 else ''} ...", file=sys.stderr, flush=True)
    command = [*common.torchrun_command(count), "-m", "benchmarks.scaling", *sys.argv[1:]]
    threads = os.environ.get("OMP_NUM_THREADS", "1")  # torchrun sets 1, but not for a single rank
    output = common.run_command(command, capture=True, OMP_NUM_THREADS=threads)
    return json.loads(next(line for line in output.splitlines() if line.startswith("[{")))  # not NCCL_DEBUG's output


def measure(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Seconds of this rank's steps in `with_sync` and `no_sync`, and milliseconds of an all-reduce of the gradient."""
    timing = config.scaled(ranks.world_size)
    recipe, system = timing.recipe(ranks.world_size), timing.system(ranks)
    model = GPT(PRESETS[timing.preset]).to(ranks.device)
    loss_fn = build_loss(model, system)
    random_batches = common.random_batches(timing, ranks)

    def time_variant(loss_fn: Any, group: Ranks) -> dict[str, Any]:
        step = common.build_step(
            loss_fn,
            build_optimizer(model, recipe, group),
            timing,
            accumulation=len(random_batches),
            dtype=system.dtype,
            ranks=group,
        )
        batches = itertools.cycle(random_batches)
        for _ in range(common.WARM_UP_STEPS * (1 if config.per_gpu else ranks.world_size)):
            step(batches)
        common.synchronize(ranks)
        ranks.all_gather(None)  # a rank that compiles faster must not run its first steps while the others are idle
        return common.time_steps(partial(step, batches), timing, ranks)

    found: dict[str, Any] = {"with_sync": time_variant(wrap_ddp(loss_fn, ranks), ranks), "all_reduce_ms": 0.0}
    if ranks.world_size > 1:
        found["no_sync"] = time_variant(loss_fn, Ranks(0, 1, ranks.device))
        gradient = torch.zeros(model.num_parameters(), device=ranks.device)
        found["all_reduce_ms"] = common.milliseconds(partial(dist.all_reduce, gradient), ranks, repeats=5)
    return found


def summarize(config: Config, count: int, measured: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """A row of the table. `measured`: the figures of each rank, by number of GPUs."""
    timing, ranks, first = config.timing, measured[count], next(iter(measured))
    steps, tokens = slowest_rank(ranks), config.scaled(count).batch_tokens
    speed = tokens / statistics.median(steps)
    first_speed = config.scaled(first).batch_tokens / statistics.median(slowest_rank(measured[first])) / first
    peak, flops = peak_flops(pick_device(timing.device)), PRESETS[timing.preset].flops_per_token(timing.seq_len)
    return {
        "gpus": count,
        "batch_tokens": tokens,
        "tokens_per_second": speed,
        "efficiency": speed / count / first_speed,
        "mfu": speed / count * flops / peak if peak else None,
        "step_ms": [1000 * of(steps) for of in (statistics.median, min, max)],
        "with_sync_ms": medians_ms(ranks, "with_sync"),
        "no_sync_ms": medians_ms(ranks, "no_sync" if count > 1 else "with_sync"),
        "all_reduce_ms": max(rank["all_reduce_ms"] for rank in ranks),
        "peak_gib": max(rank["with_sync"]["peak_gib"] or 0 for rank in ranks) or None,
        "ten_billion_tokens_s": 1e10 / speed,
    }


def medians_ms(ranks: list[dict[str, Any]], variant: str) -> list[float]:
    """Milliseconds of the median step of each rank."""
    return [1000 * statistics.median(rank[variant]["step_s"]) for rank in ranks]


def slowest_rank(ranks: list[dict[str, Any]]) -> list[float]:
    """Seconds of each step: the maximum over the ranks."""
    return [max(step) for step in zip(*(rank["with_sync"]["step_s"] for rank in ranks), strict=True)]


def print_table(rows: list[dict[str, Any]]) -> None:
    header = ["GPUs", "tokens per step", "ktok/s", "efficiency", "MFU", "step, ms (min to max)", "ranks' medians, ms"]
    header += ["no_sync, ms", "all-reduce alone, ms", "peak GiB", "ten billion tokens"]
    cells = []
    for row in rows:
        median, least, most = row["step_ms"]
        cells.append([f"{row['gpus']}", f"{row['batch_tokens']:,}", f"{row['tokens_per_second'] / 1e3:,.1f}"])
        cells[-1] += [f"{row['efficiency']:.1%}", f"{row['mfu']:.1%}" if row["mfu"] else ""]
        cells[-1] += [f"{median:.1f} ({least:.1f} to {most:.1f})"]
        cells[-1] += [f"{min(row[key]):.1f} to {max(row[key]):.1f}" for key in ("with_sync_ms", "no_sync_ms")]
        cells[-1] += [f"{row['all_reduce_ms']:.2f}", f"{row['peak_gib']:.1f}" if row["peak_gib"] else ""]
        cells[-1] += [format_duration(row["ten_billion_tokens_s"])]
    print(markdown_table(header, cells))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
