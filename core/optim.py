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


def adamw(model: nn.Module, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW that decays matrices alone: biases and LayerNorm gains are left free. The rate is set at each step."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
