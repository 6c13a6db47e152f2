"""The operators that model.py is written in. Each has a plain PyTorch body of a few lines, and a kernel body.

A kernel body (Triton, with its own backward) computes the same up to rounding, and reads and writes memory less often.
`select_kernels` decides once per run whether kernel bodies are used. An operator falls back to its plain body where a
kernel doesn't apply: for another activation, normalization or linear layer than GPT-2's, or in float32. The portable
kernels don't use the tensor memory accelerator (TMA) of Hopper GPUs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

KERNEL_DTYPE: torch.dtype | None = None  # kernel bodies take tensors of this dtype; None: they aren't used
USE_TMA = True
CHUNK_ROWS = 32_768  # rows of logits in memory: 3.3 GB for any micro-batch


def select_kernels(dtype: torch.dtype | None, portable: bool = False) -> None:
    """Use the kernel bodies for tensors of `dtype`; None: nowhere. `portable`: only those that don't use TMA."""
    global KERNEL_DTYPE, USE_TMA
    KERNEL_DTYPE, USE_TMA = dtype, not portable


def gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as in GPT-2."""
    return F.gelu(x, approximate="tanh")


def gelu_exact(x: Tensor) -> Tensor:
    """GELU by the error function, as in nanoGPT. It has no kernel body."""
    return F.gelu(x)


ACTIVATIONS = {"gelu_new": gelu, "gelu": gelu_exact}  # by Hugging Face's names


def project_heads(x: Tensor, linear: nn.Linear, n_head: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, each (B, H, T, D): linear(x) of x (B, T, C), split among the heads."""
    B, T, C = x.shape
    if (dtype := kernel_dtype(x)) is not None and is_plain(linear):
        return ProjectHeads.apply(x.to(dtype), linear.weight.to(dtype), linear.bias.to(dtype), n_head)
    return linear(x).view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4).unbind(0)


def kernel_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of a kernel body with input x, which may be float32 with autocast; None: the plain body."""
    is_selected = x.dtype == KERNEL_DTYPE or torch.is_autocast_enabled(x.device.type)
    return KERNEL_DTYPE if is_selected else None


def is_plain(*modules: nn.Module) -> bool:
    """Whether each is a Linear or LayerNorm of PyTorch with weight and bias: what a kernel body computes."""
    return all(
        type(module) in (nn.Linear, nn.LayerNorm)
        and module.weight is not None
        and module.bias is not None
        and not module._forward_hooks
        and not module._forward_pre_hooks
        for module in modules
    )


def add_linear_norm(x: Tensor, y: Tensor, linear: nn.Linear, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + linear(y), and norm of it: the residual stream (B, T, C) and the input of the next layer, (B, T, C)."""
    if x.dtype == KERNEL_DTYPE and is_plain(linear, norm):
        return add_norm(x, y.to(x.dtype).flatten(0, 1) @ linear.weight.to(x.dtype).T, linear.bias, norm)
    x = x + linear(y)
    return x, norm(x).to(x.dtype)


def add_mlp_norm(
    x: Tensor, h: Tensor, fc: nn.Linear, activation: Callable[[Tensor], Tensor], proj: nn.Linear, norm: nn.Module
) -> tuple[Tensor, Tensor]:
    """x + proj(activation(fc(h))), and norm of it; both (B, T, C)."""
    if x.dtype == KERNEL_DTYPE and USE_TMA and activation is gelu and is_plain(fc, proj, norm):
        weights = (weight.to(x.dtype) for weight in (fc.weight, fc.bias, proj.weight))
        return add_norm(x, GeluMLP.apply(h.to(x.dtype).flatten(0, 1), *weights), proj.bias, norm)
    return add_linear_norm(x, activation(fc(h)), proj, norm)


def add_norm(x: Tensor, branch: Tensor, bias: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """x (B, T, C) + branch (B T, C) + bias (C,), and its LayerNorm; both (B, T, C)."""
    total, normal = AddNorm.apply(x.flatten(0, 1), branch, bias, norm.weight, norm.bias, norm.eps)
    return total.view_as(x), normal.view_as(x)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    candidates: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of the logits x @ weight.T on targets (B, T), in nats per token; x (B, T, C), weight (V, C).

    Rows of the weight from `vocab_size` on are padding: they are excluded, get no gradient and stay zero.
    Sampled softmax: the logits are those of the ids `candidates` (K,) plus `offsets` (K,), and targets are indices of
    candidates.
    """
    if torch.is_grad_enabled() and (dtype := kernel_dtype(x)) is not None:
        flat = x.to(dtype).flatten(0, 1), weight.to(dtype), targets.flatten()
        return LinearCrossEntropy.apply(*flat, vocab_size, candidates, offsets)
    if candidates is not None and offsets is not None:
        logits = F.linear(x, weight[candidates]) + offsets
    else:  # on CUDA, slicing takes 1.05 times as long as masking; on a CPU, masking takes 1.2 times as long (LOG.md)
        logits = masked_logits(x, weight, vocab_size) if x.is_cuda else F.linear(x, weight[:vocab_size])
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def masked_logits(x: Tensor, weight: Tensor, vocab_size: int) -> Tensor:
    """x (B, T, C) @ weight.T (C, V), with -inf for the padding: (B, T, V)."""
    logits = F.linear(x, weight)
    padding = torch.arange(logits.size(-1), device=logits.device) >= vocab_size
    return logits.masked_fill(padding, -torch.inf)


class ProjectHeads(Function):
    """The kernel body of `project_heads`. Backward packs and sums the gradients of q, k and v in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, n_head: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        B, T, C = x.shape
        return F.linear(x, weight, bias).view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        from core.ops import kernels

        x, weight = ctx.saved_tensors
        packed, sums = kernels.pack(dq, dk, dv)  # (B T, 3 C), (3 C,)
        return (packed @ weight).view_as(x), packed.T @ x.flatten(0, 1), sums.to(x.dtype), None


class GeluMLP(Function):
    """tanh-GELU of x @ fc.T + fc_bias, times proj.T; x (N, C). Forward saves the derivative of GELU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fc: Tensor, fc_bias: Tensor, proj: Tensor) -> Tensor:
        from core.ops import kernels

        activation, slope = kernels.linear_gelu(x, fc, fc_bias)  # (N, 4 C) each
        ctx.save_for_backward(x, activation, slope, fc, proj)
        return activation @ proj.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        from core.ops import kernels

        x, activation, slope, fc, proj = ctx.saved_tensors
        d, sums = kernels.matmul_times(dy, proj, slope)
        return d @ fc, d.T @ x, sums.to(x.dtype), dy.T @ activation


class AddNorm(Function):
    """x + branch + bias, and its LayerNorm: two (N, C). Backward computes all five gradients in one pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = (x.float() + branch.float() + bias).to(x.dtype)
        normal, mean, rstd = torch.native_layer_norm(total.float(), (x.size(1),), gain, shift, eps)
        ctx.save_for_backward(total, mean, rstd, gain)
        return total, normal.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, d_normal: Tensor) -> tuple[Tensor | None, ...]:
        from core.ops import kernels

        total, mean, rstd, gain = ctx.saved_tensors
        dx, sums = kernels.norm_backward(total, mean, rstd, gain, d_normal, d_total)
        d_gain, d_shift, d_bias = sums.unbind(0)
        return dx, dx, d_bias, d_gain, d_shift, None


class LinearCrossEntropy(Function):
    """The kernel body of `linear_cross_entropy`, x (N, C). Forward computes the gradients too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        candidates: Tensor | None,
        offsets: Tensor | None,
    ) -> Tensor:
        from core.ops import loss_kernels

        rows, size = (weight, vocab_size) if candidates is None else (weight[candidates], len(candidates))
        loss, d_x, d_rows = loss_kernels.linear_cross_entropy(x, rows, targets, offsets, size, CHUNK_ROWS)
        ctx.save_for_backward(d_x, d_rows, candidates)
        ctx.weight_shape = weight.shape
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_rows, candidates = ctx.saved_tensors
        d_weight = (d_rows * d_loss).to(d_x.dtype)
        if candidates is not None:
            d_weight = d_weight.new_zeros(ctx.weight_shape).index_copy(0, candidates, d_weight)
        return (d_x * d_loss).to(d_x.dtype), d_weight, None, None, None, None
