"""How fast a training step is: this project's, beside transformers' GPT-2 and torch.compile alone, in the same run.

    python benchmarks/train_step.py                                          # GPT-2 124M on one GPU
    python benchmarks/train_step.py --roofline --data data/corpus            # and what limits it, and the real loader
    python benchmarks/train_step.py --preset tiny --seq-len 64 --micro-batch 4 --batch-tokens 512 --steps 3  # here

Whole optimizer steps (clipping and AdamW included) on random tokens, bfloat16 autocast on GPUs. Each variant has a
process of its own and empty compile caches. The time to the first step runs from the process's start to its end.
"""

import sys

sys.path[0] = sys.path[0].rpartition("/")[0]  # the repo

import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from benchmarks.steps import WARM_UP, Timed, milliseconds, random_batches, settings_of, synchronize, timed
from core import cli
from core.data.shards import TokenOrder, Windows, open_dataset
from core.distributed import Ranks, peak_flops, pick_device, process_group
from core.train.interrupts import Interrupts
from core.train.logging import versions
from core.train.optim import Optimizers, optimizers
from core.train.recipe import Schedule
from core.train.setup import loss_model, open_loader, resolve_computation, train_step
from model import GPT, PRESETS, GPTConfig

VARIANTS = ("transformers", "transformers compiled", "compiled", "ours")
# Kernels by a part of their name; the first that fits. What fits none is `other`.
PARTS = {
    "matrix products, GELU": ("nvjet", "gemm", "cutlass", "splitK", "linear_gelu", "matmul_times", "gelu"),
    "attention": ("sdpa", "flash", "dot_do_o", "convert_dq", "pack_kernel"),
    "loss": ("cross_entropy", "softmax", "nll_loss"),
    "LayerNorm, residual stream": ("norm",),
    "optimizer, clipping": ("multi_tensor", "Adam", "foreach"),
}


@dataclass
class Config(Timed):
    variants: tuple[str, ...] = VARIANTS
    """Which to run, of: transformers, transformers compiled, compiled (this model and torch.compile alone), ours."""
    data: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """Folder of shards: ours with the real loader too."""
    roofline: bool = False
    """Measure each matrix shape and attention alone, and print what each part of our step takes beside its limit."""
    only: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """One variant, within this process: what the benchmark calls itself with."""
    started: float = 0.0
    """When that process was started, in seconds since 1970."""


def main(config: Config) -> None:
    settings_of(config, fused=False)
    if config.roofline and pick_device(config.device).type != "cuda":
        raise ValueError("--roofline measures a GPU, and this machine has none that torch can use: leave it out")
    unknown = set(config.variants) - set(VARIANTS)
    if unknown:
        raise ValueError(f"--variants {' '.join(unknown)}: there are {', '.join(VARIANTS)}")
    if config.only:
        with process_group(config.device) as ranks:
            found = measure_roofline(config, ranks) if config.only == "roofline" else measure(config, ranks)
        return ranks.log(json.dumps(found))
    rows = {}
    with tempfile.TemporaryDirectory() as caches:
        for variant in config.variants:
            rows[variant] = child(config, variant, caches)
        if "ours" in config.variants:
            warm = child(replace(config, steps=1, data=None, roofline=False), "ours", caches)
            rows["ours"]["first_step_warm_s"] = warm["first_step_s"]
        limits = child(config, "roofline", caches) if config.roofline else {}
    report(config, rows, limits)
    if config.out:
        facts = {"config": asdict(config), "versions": rows[config.variants[0]]["versions"], "variants": rows}
        Path(config.out).write_text(json.dumps(facts | {"limits": limits}, indent=1) + "\n")


def child(config: Config, variant: str, caches: str) -> dict[str, Any]:
    """What a process of its own found out about a variant."""
    names = ("preset", "micro_batch", "batch_tokens", "seq_len", "steps", "device", "data", "optimizer")
    options = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in names if getattr(config, name)]
    flags = [
        f"--{name.replace('_', '-')}" for name in ("roofline", "activation_checkpointing") if getattr(config, name)
    ]
    folder = f"{caches}/{variant.replace(' ', '-')}"  # Inductor's compiler takes a space for the end of a name
    own = [f"--only={variant}", f"--started={time.time()}"]
    cache = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
    command = [sys.executable, __file__, *options, *flags, *own]
    print(f"{variant} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, env=os.environ | cache, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{variant} ended with status {done.returncode}, see above")
    return json.loads(done.stdout.splitlines()[-1])


class TransformersLoss(nn.Module):
    """transformers' GPT-2 of the same shape, with its own loss and without dropout."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        self.gpt = GPT2LMHeadModel(GPT2Config(**asdict(config), **none, attn_implementation="sdpa"))

    def forward(self, inputs: Tensor, _targets: Tensor) -> Tensor:
        return self.gpt(input_ids=inputs, labels=inputs, use_cache=False).loss


def measure(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Rates, memory and times of the variant `only`."""
    assert config.only is not None
    shape = PRESETS[config.preset]
    settings = resolve_computation(settings_of(config, config.only == "ours"), ranks)
    raw: Any = TransformersLoss(shape) if "transformers" in config.only else GPT(shape)
    raw = raw.to(ranks.device)
    if config.only in ("ours", "compiled"):
        model = loss_model(raw, settings, settings.compile == "on")
    else:
        model = torch.compile(raw, dynamic=False) if "compiled" in config.only else raw
    optimizer = optimizer_of(raw, settings, ranks)
    optimizer.set_rate(1.0)
    sequences = config.batch_tokens // config.seq_len
    interrupts = Interrupts(3600, False)

    def step(batches: Iterator[list[Tensor]]) -> None:
        train_step(model, optimizer, batches, sequences, settings, ranks, interrupts)

    resident = itertools.cycle(random_batches(config, ranks))
    step(resident)
    synchronize(ranks)
    found: dict[str, Any] = {"first_step_s": time.time() - config.started, "versions": versions(ranks.device)}
    for _ in range(WARM_UP - 1):
        step(resident)
    found |= timed(lambda: step(resident), config, ranks)
    flops = shape.flops_per_token(config.seq_len) * found["tokens_per_second"]
    found["mfu"] = flops / peak if (peak := peak_flops(ranks.device)) else None
    if config.data and config.only == "ours":
        dataset = open_dataset(config.data)
        windows = Windows(dataset, "train", config.seq_len)
        order = TokenOrder(dataset.manifest_hash, settings.seed, config.seq_len, len(windows))
        schedule = Schedule(replace(settings, steps=config.steps + 1))
        loader = open_loader(settings, schedule, ranks, windows, order, range(config.steps + 1))
        step(loader)
        found["with_loader"] = timed(lambda: step(loader), config, ranks)["tokens_per_second"]
    if config.roofline and config.only == "ours" and ranks.device.type == "cuda":
        found["parts_ms"] = profile_parts(lambda: step(resident))
    interrupts.pause()
    return found


def optimizer_of(model: Any, settings: train.Config, ranks: Ranks) -> Optimizers:
    if isinstance(model, GPT):
        return optimizers(model, settings, ranks)
    groups = [{"params": list(model.parameters()), "peak": settings.lr}]
    return Optimizers(torch.optim.AdamW(groups, lr=0.0, weight_decay=settings.weight_decay, fused=True))


def profile_parts(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of a step's kernels, by part."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    parts = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in recorded.key_averages():
        fits = (part for part, names in PARTS.items() if any(name in event.key for name in names))
        parts[next(fits, "other")] += event.self_device_time_total / 1000
    return parts


def measure_roofline(config: Config, ranks: Ranks) -> dict[str, Any]:
    """The least milliseconds that each part of a step can take on this card: products and attention at the rate that
    they reach alone, what only moves memory at the rate of a copy, each tensor read once and written once."""
    shape, rows = PRESETS[config.preset], config.micro_batch * config.seq_len
    C, L, V = shape.n_embd, shape.n_layer, shape.padded_vocab_size
    micro_steps = config.batch_tokens // rows
    shapes = {"c_attn": (C, 3 * C), "attn.c_proj": (C, C), "c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C), "head": (C, V)}
    tflops, products = {}, 0.0
    for name, (inputs, outputs) in shapes.items():
        times = product_times(rows, inputs, outputs, ranks)
        tflops[name] = [2 * rows * inputs * outputs / ms / 1e9 for ms in times]
        products += sum(times) * (1 if name == "head" else L)
    size = (config.micro_batch, config.seq_len, shape.n_head, C // shape.n_head)
    q, k, v, dy = (random(ranks, *size).transpose(1, 2).requires_grad_() for _ in range(4))

    def attention() -> None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(y, (q, k, v), dy)

    attention_ms = milliseconds(attention, ranks)
    big = random(ranks, 2**30)
    per_ms = 2 * big.nbytes / milliseconds(big.clone, ranks)  # bytes read and written
    parameters = 12 * L * C * C + shape.vocab_size * C
    limits = {
        "matrix products, GELU": products * micro_steps,
        "attention": (attention_ms * L + 2 * 2 * 3 * rows * C * L / per_ms) * micro_steps,  # and q, k, v side by side
        "loss": 2 * 2 * rows * V / per_ms * micro_steps,
        "LayerNorm, residual stream": 2 * 2 * (4 + 4) * rows * C * L / per_ms * micro_steps,
        "optimizer, clipping": (28 + 12) * parameters / per_ms,
    }
    return {"limit_ms": limits, "tflops": tflops, "attention_ms": attention_ms, "copy_tb_per_s": per_ms / 1e9}


def product_times(rows: int, inputs: int, outputs: int, ranks: Ranks) -> list[float]:
    """Milliseconds of a linear layer's product, and of those that make its input's and its weight's gradient."""
    x, w, dy = (random(ranks, *size) for size in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    return [milliseconds(product, ranks) for product in (lambda: x @ w.T, lambda: dy @ w, lambda: dy.T @ x)]


def random(ranks: Ranks, *size: int) -> Tensor:
    return torch.randn(*size, device=ranks.device, dtype=torch.bfloat16)


def report(config: Config, rows: dict[str, dict[str, Any]], limits: dict[str, Any]) -> None:
    facts = rows[config.variants[0]]["versions"]
    print(f"{config.preset}, {config.batch_tokens:,} tokens a step, micro-batch {config.micro_batch}, {facts}")
    print(f"{'':24}  ktok/s  times     MFU   peak GiB   step ms (median, least, most)   first step after")
    ours = rows.get("ours", rows[config.variants[0]])
    for variant, row in rows.items():
        rate, steps = row["tokens_per_second"], [1000 * s for s in row["step_s"]]
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        peak = f"{row['peak_gib']:.1f}" if row["peak_gib"] else "-"
        spread = f"{statistics.median(steps):.1f}, {min(steps):.1f}, {max(steps):.1f}"
        warm = f", warm {row['first_step_warm_s']:.0f}" if "first_step_warm_s" in row else ""
        times = ours["tokens_per_second"] / rate
        first = f"{row['first_step_s']:.0f} s{warm}"
        print(f"{variant:24}  {rate / 1e3:6.1f}  {times:5.3f}  {mfu:>6}  {peak:>9}   {spread:>29}   {first}")
    print(f"times: ours over this. Waits for the device {ours['syncs']}, recompilations {ours['recompilations']}")
    if "with_loader" in ours:
        ratio = ours["with_loader"] / ours["tokens_per_second"]
        print(f"with the real loader: {ours['with_loader'] / 1e3:.1f} ktok/s, {ratio:.4f} times the resident batches'")
    if limits:
        parts = ours.get("parts_ms", {})
        print(f"{'part of our step':28}  {'ms':>7}  {'limit':>7}")
        for part, limit in (limits["limit_ms"] | {"other": 0.0}).items():
            print(f"{part:28}  {parts.get(part, 0):7.1f}  {limit:7.1f}")
        whole = sum(limits["limit_ms"].values())
        print(f"{'all':28}  {sum(parts.values()):7.1f}  {whole:7.1f}: {config.batch_tokens / whole:.0f} ktok/s")
        print(f"a copy moves {limits['copy_tb_per_s']:.2f} TB/s; attention {limits['attention_ms']:.2f} ms a layer")
        for name, rates in limits["tflops"].items():
            print(f"{name:12} TFLOP/s forward, input gradient, weight gradient: {', '.join(f'{r:.0f}' for r in rates)}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
