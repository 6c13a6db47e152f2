"""Speed of a training step: this project, transformers' GPT-2, and torch.compile alone, in the same run.

    python -m benchmarks.train_step                                          # GPT-2 124M on one GPU
    python -m benchmarks.train_step --data data/corpus                       # with the data loader too
    python -m benchmarks.train_step --variants ours --data data/corpus --batch-tokens 65536 --steps 500 --save-every 250
    python -m benchmarks.train_step --preset tiny --seq-len 64 --micro-batch 4 --batch-tokens 512 --steps 3 --device cpu

Complete optimizer steps, with clipping and AdamW, on random tokens; bfloat16 autocast on GPUs. Each variant runs in
its own process with empty compile caches. The time to the first step starts with the process.
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.common import Fused, TimingConfig, time_steps
from core import cli
from core.data.shards import open_dataset
from core.distributed import Ranks, peak_flops, process_group
from core.files import METRICS, markdown_table
from core.train.loader import open_loader
from core.train.logging import versions
from core.train.optim import OptimizerGroup, build_optimizer
from core.train.recipe import Recipe
from core.train.saver import Saver
from core.train.setup import build_loss
from model import GPT, PRESETS, GPTConfig

# The values of --variants, and their names in tables.
VARIANTS = {
    "transformers": "transformers",
    "transformers compiled": "transformers, compiled",
    "compiled": "this model, compiled",
    "portable": "this project, portable kernels",
    "ours": "this project",
}
FUSED: dict[str, Fused] = {"portable": "portable", "ours": "auto"}  # --fused of a variant; "off" for the others


@dataclass
class Config:
    timing: TimingConfig = field(default_factory=TimingConfig)
    variants: tuple[str, ...] = ("transformers", "transformers compiled", "compiled", "ours")
    """Variants to time: transformers, transformers compiled, compiled (this model with torch.compile only), portable
    (with the kernels that also run on Ampere GPUs; not timed by default), and ours, which is this project."""
    data: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """Folder of shards, to time this project with the data loader too. Default: random tokens only."""
    save_every: int = 0
    """Steps between checkpoints, to time this project with checkpoints too; needs --data. 0: no checkpoints."""
    out: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File for all figures (JSON). Default: not written."""
    only: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """Internal: the variant to time in this process."""
    started: float = 0.0
    """Internal: the start of this process in seconds since 1970."""
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


def main(config: Config) -> None:
    check_options(config)
    if config.only:
        with process_group(config.timing.device) as ranks:
            return ranks.log(json.dumps(measure(config, ranks)))
    rows = {}
    with tempfile.TemporaryDirectory() as caches:
        for variant in config.variants:
            rows[variant] = run_variant(config, variant, caches)
        if "ours" in config.variants:
            quick = replace(config, timing=replace(config.timing, steps=1), data=None, save_every=0)
            rows["ours"]["first_step_warm_s"] = run_variant(quick, "ours", caches)["first_step_s"]
    print_report(config, rows)
    if config.out:
        found = {"config": asdict(config), "versions": rows[config.variants[0]]["versions"], "variants": rows}
        Path(config.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def check_options(config: Config) -> None:
    """Raise ValueError for options that can't work, before anything is timed."""
    config.timing.recipe()
    if unknown := set(config.variants) - set(VARIANTS):
        raise ValueError(f"--variants {' '.join(unknown)} is unknown. Choose from {', '.join(VARIANTS)}")
    if config.save_every:
        cli.check_between(1, config.timing.steps, save_every=config.save_every)
        if not config.data:
            raise ValueError(f"--save-every {config.save_every} needs --data, whose tokenizer is in each checkpoint")


def run_variant(config: Config, variant: str, caches: str) -> dict[str, Any]:
    """The figures of a variant, from its own process."""
    options = asdict(config.timing) | {"data": config.data, "save_every": config.save_every}
    recompute = ["--activation-checkpointing"] * options.pop("activation_checkpointing")
    command = [sys.executable, "-m", "benchmarks.train_step", f"--only={variant}", *recompute]
    command += [f"{cli.option_name(name)}={value}" for name, value in options.items() if value]
    folder = f"{caches}/{variant.replace(' ', '-')}"  # Inductor's compiler doesn't quote names with spaces
    print(f"{variant} ...", file=sys.stderr, flush=True)
    output = common.run_command(
        [*command, f"--started={time.time()}"],
        capture=True,
        TORCHINDUCTOR_CACHE_DIR=folder,
        TRITON_CACHE_DIR=f"{folder}/triton",
    )
    return json.loads(output.splitlines()[-1])


class TransformersLoss(nn.Module):
    """transformers' GPT-2 of the same shape, with its own loss and without dropout."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        self.gpt = GPT2LMHeadModel(GPT2Config(**asdict(config), **dropout, attn_implementation="sdpa"))

    def forward(self, inputs: Tensor, _targets: Tensor) -> Tensor:
        return self.gpt(input_ids=inputs, labels=inputs, use_cache=False).loss


def measure(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Speed, memory and time to the first step of the variant `only`."""
    timing, variant, shape = config.timing, str(config.only), PRESETS[config.timing.preset]
    recipe, system = timing.recipe(), timing.system(ranks, FUSED.get(variant, "off"))
    model: Any = TransformersLoss(shape) if "transformers" in variant else GPT(shape)
    model = model.to(ranks.device)
    if isinstance(model, GPT):
        loss_fn, optimizer = build_loss(model, system), build_optimizer(model, recipe, ranks)
    else:
        loss_fn = torch.compile(model, dynamic=False) if "compiled" in variant else model
        optimizer = plain_adamw(model, recipe)
    step_on = common.build_step(
        loss_fn, optimizer, timing, accumulation=timing.micro_batches(1), dtype=system.dtype, ranks=ranks
    )
    step = partial(step_on, itertools.cycle(common.random_batches(timing, ranks)))
    step()
    common.synchronize(ranks)
    found: dict[str, Any] = {"first_step_s": time.time() - config.started, "versions": versions(ranks.device)}
    for _ in range(common.WARM_UP_STEPS - 1):
        step()
    found |= time_steps(step, timing, ranks)
    flops = shape.flops_per_token(timing.seq_len) * found["tokens_per_second"]
    found["mfu"] = flops / peak if (peak := peak_flops(ranks.device)) else None
    if variant == "ours" and config.data:
        found["with_loader"] = time_loader(step_on, config, recipe, ranks)
    if variant == "ours" and config.save_every:
        found["with_saves"] = time_saves(step, config, model, optimizer, ranks)
    return found


def plain_adamw(model: nn.Module, recipe: Recipe) -> OptimizerGroup:
    groups = [{"params": list(model.parameters()), "initial_lr": recipe.lr}]
    return OptimizerGroup(torch.optim.AdamW(groups, lr=0.0, weight_decay=recipe.weight_decay, fused=True))


def time_loader(step_on: Callable[[Any], Any], config: Config, recipe: Recipe, ranks: Ranks) -> float:
    """Tokens per second of the step on micro-batches of the data loader."""
    timing, dataset = config.timing, open_dataset(str(config.data))
    steps = range(timing.steps + 1)
    loader = open_loader(dataset, recipe, seed=0, micro_batch=timing.micro_batch, ranks=ranks, steps=steps)
    with closing(loader):
        step_on(loader)
        return time_steps(partial(step_on, loader), timing, ranks)["tokens_per_second"]


def time_saves(
    step: Callable[[], Any], config: Config, model: GPT, optimizer: OptimizerGroup, ranks: Ranks
) -> dict[str, Any]:
    """Seconds of all steps with a checkpoint after every `save_every`, and what each checkpoint took."""
    dataset, numbers = open_dataset(str(config.data)), itertools.count(1)
    Path("logs").mkdir(exist_ok=True)  # the disk of real checkpoints
    with tempfile.TemporaryDirectory(dir="logs") as folder:
        (Path(folder) / METRICS).touch()  # written to disk before each checkpoint appears
        saver = Saver(Path(folder), dataset, ranks, keep=3, keep_multiple=0, step=0, log=lambda text: None)
        saver.preallocate(model, {"step": 0, "optimizer": optimizer.state_dict()})

        def step_and_save() -> None:
            step()
            if (number := next(numbers)) % config.save_every == 0:
                saver.save(model, {"step": number, "optimizer": optimizer.state_dict()})

        seconds = sum(time_steps(step_and_save, config.timing, ranks)["step_s"])
        saver.finish()
    return {"seconds": seconds, "blocked_s": saver.blocked_seconds, "write_s": saver.write_seconds}


def print_report(config: Config, rows: dict[str, dict[str, Any]]) -> None:
    """Print the figures. Speedups and details are those of this project, or else of the first variant."""
    timing, own = config.timing, rows.get("ours", rows[config.variants[0]])
    print(
        f"{timing.preset}, {timing.batch_tokens:,} tokens per step, micro-batch {timing.micro_batch}, {own['versions']}"
    )
    print(f"\n{speed_table(rows, own)}\n")
    print(f"{timing.steps} steps: {own['syncs']} host syncs, {own['recompilations']} recompilations")
    if "with_loader" in own:
        ratio = own["with_loader"] / own["tokens_per_second"]
        print(f"with the data loader: {own['with_loader'] / 1e3:.1f} ktok/s, {ratio:.4f} of the speed on random tokens")
    if "with_saves" in own:
        seconds, blocked, written = (own["with_saves"][name] for name in ("seconds", "blocked_s", "write_s"))
        print(f"with {len(blocked)} checkpoints: {seconds / sum(own['step_s']):.4f} times the seconds without")
        median, most = 1000 * statistics.median(blocked), 1000 * max(blocked)
        print(
            f"each blocked training for {median:.0f} ms (median; max {most:.0f}), written in {max(written):.1f} s (max)"
        )


def speed_table(rows: dict[str, dict[str, Any]], own: dict[str, Any]) -> str:
    header = [
        "variant",
        "ktok/s",
        "speedup of this project",
        "MFU",
        "peak GiB",
        "step, ms (min to max)",
        "first step, s",
    ]
    cells = []
    for variant, row in rows.items():
        ms = [1000 * seconds for seconds in row["step_s"]]
        warm = f", with warm caches {row['first_step_warm_s']:.0f}" if "first_step_warm_s" in row else ""
        speeds = [f"{row['tokens_per_second'] / 1e3:.1f}", f"{own['tokens_per_second'] / row['tokens_per_second']:.3f}"]
        usage = [f"{row['mfu']:.1%}" if row["mfu"] else "", f"{row['peak_gib']:.1f}" if row["peak_gib"] else ""]
        times = [f"{statistics.median(ms):.1f} ({min(ms):.1f} to {max(ms):.1f})", f"{row['first_step_s']:.0f}{warm}"]
        cells.append([VARIANTS[variant], *speeds, *usage, *times])
    return markdown_table(header, cells)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
