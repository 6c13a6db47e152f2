"""What more GPUs give: one training step on 1, 2, 4, ... of a machine's, and what ten billion tokens would take.

    python benchmarks/scaling.py                                        # all powers of two that there are GPUs for
    python benchmarks/scaling.py --gpus 1 2 --per-gpu --batch-tokens 65536  # each with what one of eight has to do
    python benchmarks/scaling.py --device cpu --gpus 1 2 --preset tiny --seq-len 64 --micro-batch 2 --batch-tokens 256

Whole optimizer steps on random tokens, each number of GPUs under a torchrun of its own: first together, as train.py
does them; then apart, where each rank does its share of the step beside the others and exchanges nothing. What apart
takes longer than its part of one card's step is the cards' (the optimizer's work, which all of them do; power; the
slowest one's rate). What together takes longer than the slowest rank apart is the exchange's; not so with Muon, whose
work ranks share together and each does whole apart. All rows take about as long, as cards clock lower once warm.
"""

import sys

sys.path[0] = sys.path[0].rpartition("/")[0]  # the repo

import itertools
import json
import os
import statistics
import subprocess
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.launch import torchrun
from benchmarks.steps import WARM_UP, Timed, milliseconds, random_batches, settings_of, synchronize, timed
from core import cli
from core.distributed import Ranks, peak_flops, pick_device, process_group
from core.files import markdown_table
from core.train.interrupts import Interrupts
from core.train.logging import format_duration, versions
from core.train.optim import optimizers
from core.train.setup import loss_model, parallel, resolve_computation, train_step
from model import GPT, PRESETS


@dataclass
class Config(Timed):
    out: str = "logs/benchmarks/scaling.json"
    """File for all figures."""
    gpus: tuple[int, ...] = ()
    """Numbers of GPUs; the first is what the others are compared with. Default: 1, 2, 4, ... up to all of them."""
    per_gpu: bool = False
    """Take --batch-tokens as each GPU's, not as the whole step's."""


def main(config: Config) -> None:
    if "WORLD_SIZE" in os.environ:  # a rank that `on` has started
        with process_group(config.device) as ranks:
            return ranks.log(json.dumps(ranks.all_gather(measure(config, ranks))))
    device = pick_device(config.device)
    most = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
    counts = config.gpus or tuple(2**i for i in range(most.bit_length()))
    for count in counts:
        if not 1 <= count <= most:
            raise ValueError(f"--gpus {count}: this machine has {most} {'GPUs' if device.type == 'cuda' else 'cores'}")
        settings_of(step_of(config, count), fused=False, world_size=count)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    facts, measured, rows = versions(device), {}, []
    print(f"{config.preset}, micro-batch {config.micro_batch}, {config.optimizer}, {facts}", flush=True)
    for count in counts:
        measured[count] = on(count)
        rows.append(derived(config, count, measured))
        figures = {"config": asdict(config), "versions": facts, "rows": rows, "ranks": measured}
        Path(config.out).write_text(json.dumps(figures, indent=1) + "\n")
    report(rows)
    print(f"wrote {config.out}")


def step_of(config: Config, count: int) -> Config:
    """What is timed on so many GPUs: steps that are shared among them are shorter, and more."""
    if config.per_gpu:
        return replace(config, batch_tokens=config.batch_tokens * count)
    return replace(config, steps=config.steps * count)


def on(count: int) -> list[dict[str, Any]]:
    """What each of so many ranks has measured: this very command, given to each of them by torchrun."""
    ranks = f"{count} rank{'s' if count > 1 else ''}"
    print(f"{ranks} ...", file=sys.stderr, flush=True)
    with torchrun(count, *sys.argv, stdout=subprocess.PIPE) as process:
        said, _ = process.communicate()
    if process.returncode:
        raise ValueError(f"{ranks} ended with status {process.returncode}, see above")
    return json.loads(next(line for line in said.splitlines() if line.startswith("[{")))  # NCCL_DEBUG prints too


def measure(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Seconds of this rank's steps `together` and `apart`, and milliseconds of the gradient's `exchange` by itself."""
    config = step_of(config, ranks.world_size)
    settings = resolve_computation(settings_of(config, fused=True, world_size=ranks.world_size), ranks)
    raw = GPT(PRESETS[config.preset]).to(ranks.device)
    loss = loss_model(raw, settings, settings.compile == "on")
    batches = itertools.cycle(random_batches(config, ranks))
    interrupts = Interrupts(3600, False)

    def steps(model: Any, among: Ranks) -> dict[str, Any]:
        optimizer = optimizers(raw, settings, among)
        optimizer.set_rate(1.0)
        sequences = config.batch_tokens // config.seq_len // ranks.world_size * among.world_size
        step = partial(train_step, model, optimizer, batches, sequences, settings, among, interrupts)
        for _ in range(WARM_UP if config.per_gpu else WARM_UP * ranks.world_size):
            step()
        synchronize(ranks)
        ranks.all_gather(None)  # or a rank that compiled sooner would have its first steps to itself
        return timed(step, config, ranks)

    found: dict[str, Any] = {"together": steps(parallel(loss, ranks), ranks), "exchange_ms": 0.0}
    if ranks.world_size > 1:
        found["apart"] = steps(loss, Ranks(0, 1, ranks.device))
        gradient = torch.zeros(raw.num_parameters(), device=ranks.device)
        found["exchange_ms"] = milliseconds(partial(dist.all_reduce, gradient), ranks, repeats=5)
    interrupts.pause()
    return found


def derived(config: Config, count: int, measured: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of a row of the table."""
    ranks, first = measured[count], next(iter(measured))
    steps, tokens = slowest(ranks), step_of(config, count).batch_tokens
    rate = tokens / statistics.median(steps)
    base = step_of(config, first).batch_tokens / statistics.median(slowest(measured[first])) / first
    peak, flops = peak_flops(pick_device(config.device)), PRESETS[config.preset].flops_per_token(config.seq_len)
    return {
        "gpus": count,
        "batch_tokens": tokens,
        "tokens_per_second": rate,
        "efficiency": rate / count / base,
        "mfu": rate / count * flops / peak if peak else None,
        "step_ms": [1000 * of(steps) for of in (statistics.median, min, max)],
        "together_ms": medians(ranks, "together"),
        "apart_ms": medians(ranks, "apart" if count > 1 else "together"),
        "exchange_ms": max(rank["exchange_ms"] for rank in ranks),
        "peak_gib": max(rank["together"]["peak_gib"] or 0 for rank in ranks) or None,
        "ten_billion_tokens_s": 1e10 / rate,
    }


def medians(ranks: list[dict[str, Any]], how: str) -> list[float]:
    """Milliseconds of the median step of each rank."""
    return [1000 * statistics.median(rank[how]["step_s"]) for rank in ranks]


def slowest(ranks: list[dict[str, Any]]) -> list[float]:
    """Seconds of each step together: those of its slowest rank."""
    return [max(step) for step in zip(*(rank["together"]["step_s"] for rank in ranks), strict=True)]


def report(rows: list[dict[str, Any]]) -> None:
    header = ["GPUs", "tokens a step", "ktok/s", "efficiency", "MFU", "step, ms (least to most)", "ranks' medians, ms"]
    header += ["apart, ms", "gradient's exchange alone, ms", "peak GiB", "ten billion tokens"]
    cells = []
    for row in rows:
        median, least, most = row["step_ms"]
        cells.append([f"{row['gpus']}", f"{row['batch_tokens']:,}", f"{row['tokens_per_second'] / 1e3:,.1f}"])
        cells[-1] += [f"{row['efficiency']:.1%}", f"{row['mfu']:.1%}" if row["mfu"] else ""]
        cells[-1] += [f"{median:.1f} ({least:.1f} to {most:.1f})"]
        cells[-1] += [f"{min(row[how]):.1f} to {max(row[how]):.1f}" for how in ("together_ms", "apart_ms")]
        cells[-1] += [f"{row['exchange_ms']:.2f}", f"{row['peak_gib']:.1f}" if row["peak_gib"] else ""]
        cells[-1] += [format_duration(row["ten_billion_tokens_s"])]
    print(markdown_table(header, cells))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
