"""The training loss of GPT-2 with fused kernels, in bfloat16, on NVIDIA Hopper GPUs.

The result equals GPT.forward up to rounding. Matrix products and attention are the same; everything between them
(biases, GELU, residual additions, LayerNorms, softmax, and their gradients) reads and writes memory once.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from core.ops import kernels

if TYPE_CHECKING:
    from model import GPT, Block, Transformer

CHUNK_ROWS = 32_768  # rows of logits in memory: 3.3 GB for any micro-batch


class FusedLoss(nn.Module):
    """The mean cross-entropy of a GPT, forward and backward. Its weights stay in the GPT, in float32."""

    def __init__(
        self, model: "GPT", compiled: bool, activation_checkpointing: bool = False, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """`dtype`: of products and residual stream. Checkpointing keeps only the inputs of blocks."""
        super().__init__()
        self.model, self.dtype, self._checkpointed = model, dtype, activation_checkpointing
        # All blocks share one compiled function: compile time doesn't depend on the depth, and DDP reduces gradients
        # of one block while those of the next are computed.
        compiler: Callable[[Any], Any] = torch.compile(dynamic=False) if compiled else lambda function: function
        self._embed, self._block = compiler(embed), compiler(run_block)
        self._loss, self._loss_alone = compiler(mean_loss), compiler(model.cross_entropy)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, T), (B, T) -> mean cross-entropy in nats per token."""
        transformer = self.model.transformer
        blocks = list(transformer.h)
        next_norms = [block.ln_1 for block in blocks[1:]] + [transformer.ln_f]
        x, h = self._embed(transformer, blocks[0].ln_1, tokens, self.dtype)
        for block, next_norm in zip(blocks, next_norms, strict=True):
            if self._checkpointed:
                x, h = checkpoint(
                    self._block, block, next_norm, x, h, len(tokens), use_reentrant=False, preserve_rng_state=False
                )
            else:
                x, h = self._block(block, next_norm, x, h, len(tokens))
        if not torch.is_grad_enabled():
            return self._loss_alone(h.view(*tokens.shape, -1), targets)
        return self._loss(h, transformer.wte.weight, targets, self.model.config.vocab_size)


def embed(transformer: "Transformer", norm: nn.LayerNorm, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) -> the residual stream, and its LayerNorm; both (B T, C)."""
    positions = torch.arange(tokens.size(1), device=tokens.device)
    x = (transformer.wte(tokens) + transformer.wpe(positions)).flatten(0, 1).to(dtype)
    return x, F.layer_norm(x.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(dtype)


def run_block(block: "Block", next_norm: nn.LayerNorm, x: Tensor, h: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The residual stream x and h = ln_1(x), both (B T, C) -> the stream after the block, and its next LayerNorm."""
    attn, mlp, dtype = block.attn, block.mlp, x.dtype
    q, k, v = Projection.apply(h, attn.c_attn.weight.to(dtype), attn.c_attn.bias.to(dtype), batch, attn.n_head)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
    branch = y.transpose(1, 2).reshape(x.shape) @ attn.c_proj.weight.to(dtype).T
    x, h = AddNorm.apply(x, branch, attn.c_proj.bias, block.ln_2.weight, block.ln_2.bias, block.ln_2.eps)
    branch = GeluMLP.apply(h, mlp.c_fc.weight.to(dtype), mlp.c_fc.bias.to(dtype), mlp.c_proj.weight.to(dtype))
    return AddNorm.apply(x, branch, mlp.c_proj.bias, next_norm.weight, next_norm.bias, next_norm.eps)


def mean_loss(hidden: Tensor, head: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    return LinearCrossEntropy.apply(hidden, head.to(hidden.dtype), targets.flatten(), vocab_size)


class Projection(Function):
    """Queries, keys and values (B, H, T, D) of x (B T, C). Backward packs and sums their gradients in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, batch: int, heads: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        rows, C = x.shape
        qkv = F.linear(x, weight, bias).view(batch, rows // batch, 3, heads, C // heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        packed, sums = kernels.pack(dq, dk, dv)
        return packed @ weight, packed.T @ x, sums.to(x.dtype), None, None


class GeluMLP(Function):
    """tanh-GELU of c_fc(x), x (N, C), times the weight of c_proj: (N, C). Forward saves the derivative of GELU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fc: Tensor, fc_bias: Tensor, proj: Tensor) -> Tensor:
        activation, slope = kernels.linear_gelu(x, fc, fc_bias)
        ctx.save_for_backward(x, activation, slope, fc, proj)
        return activation @ proj.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
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
        total, mean, rstd, gain = ctx.saved_tensors
        dx, sums = kernels.norm_backward(total, mean, rstd, gain, d_normal, d_total)
        d_gain, d_shift, d_bias = sums.unbind(0)
        return dx, dx, d_bias, d_gain, d_shift, None


class LinearCrossEntropy(Function):
    """Mean cross-entropy of hidden (N, C) times the weight of the head. Forward computes the gradients too."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        loss, d_hidden, d_weight = kernels.linear_cross_entropy(hidden, weight, targets, vocab_size, CHUNK_ROWS)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return (d_hidden * d_loss).to(d_hidden.dtype), (d_weight * d_loss).to(d_hidden.dtype), None, None
