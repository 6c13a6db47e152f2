"""The optimizer, and the learning rate as a function of the step."""

import math

import torch
from torch import nn


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float, final_fraction: float) -> float:
    """The rate of optimizer step `step` (counted from 0): linear warm-up to `peak`, then half a cosine down.

    GPT-3 (Brown et al. 2020, appendix B), which gives the settings that GPT-2's paper left out.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def check_batch(batch_tokens: int, micro_batch: int, seq_len: int, world_size: int) -> None:
    """Raise ValueError, naming what would fit, where the batch doesn't divide into micro-batches on all ranks."""
    unit = micro_batch * world_size * seq_len
    if batch_tokens % unit == 0:
        return
    nearest = max(round(batch_tokens / unit), 1) * unit
    fitting = [m for m in range(1, micro_batch) if batch_tokens % (m * world_size * seq_len) == 0]
    remedy = f", or --micro-batch {fitting[-1]}" if fitting else ""
    raise ValueError(
        f"--batch-tokens {batch_tokens} is no multiple of --micro-batch {micro_batch} x --seq-len {seq_len} x "
        f"{world_size} rank{'s' if world_size > 1 else ''} = {unit}: take --batch-tokens {nearest}{remedy}"
    )


def adamw(model: nn.Module, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW that decays matrices alone: biases and LayerNorm gains are left free. The rate is set at each step."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
