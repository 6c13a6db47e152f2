"""GPT-2 (Radford et al. 2019): the network and its four published sizes.

    model = GPT(PRESETS["gpt2"])                     # random weights
    model = GPT.from_pretrained("gpt2")              # OpenAI's weights from the Hugging Face hub, or a folder
    logits = model(tokens)                           # (B, T) -> (B, T, vocab_size)
    loss = model(tokens, targets)                    # (B, T), (B, T) -> mean cross-entropy, nats per token
    model.save_pretrained("folder")                  # transformers.GPT2LMHeadModel.from_pretrained reads it

Module names are Hugging Face's own (`transformer.h.0.attn.c_attn`), so that weights map by name.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core import ops

LAYER_NORM_EPSILON = 1e-5
VOCAB_MULTIPLE = 128  # the product of the head is faster with a padded vocabulary: 50,257 -> 50,304


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. Field names are those of Hugging Face's config.json."""

    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int = 1024
    vocab_size: int = 50257
    activation_function: str = "gelu_new"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if self.activation_function not in ops.ACTIVATIONS:
            raise ValueError(f"activation_function {self.activation_function} must be {' or '.join(ops.ACTIVATIONS)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def matrix_weights(self) -> int:
        """Weights of the matrices, head included and positions excluded: 123.5 million for gpt2."""
        return 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd

    def flops_per_token(self, seq_len: int, candidates: int = 0, shallow: bool = False) -> float:
        """Training FLOPs per token: 6 per matrix weight (head included), plus the causal half of attention.

        Chowdhery et al. 2022 (PaLM), appendix B, with half of its attention term: the masked half isn't computed.
        `candidates`: rows of the head that a sampled softmax takes; 0: all. `shallow`: every second block is computed.
        """
        blocks = math.ceil(self.n_layer / 2) if shallow else self.n_layer
        rows = candidates or self.vocab_size
        return 6 * (12 * blocks * self.n_embd**2 + rows * self.n_embd) + 6 * blocks * seq_len * self.n_embd


PRESETS = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1558M
    "demo": GPTConfig(n_layer=2, n_head=4, n_embd=128, n_positions=256),  # trains in minutes on two CPU cores
    "tiny": GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=64),  # for tests
}


def describe(config: GPTConfig) -> str:
    """The name of the preset with this shape, else the shape in words."""
    free = {"vocab_size": config.vocab_size, "activation_function": config.activation_function}
    name = next((n for n, preset in PRESETS.items() if replace(preset, **free) == config), None)  # type: ignore[arg-type]
    return name or (
        f"a GPT-2 with n_layer {config.n_layer}, n_head {config.n_head}, n_embd {config.n_embd}, context "
        f"{config.n_positions}"
    )


class KVCache:
    """Keys and values of the previous tokens, so that generation computes each token once."""

    def __init__(self, config: GPTConfig, batch_size: int, max_length: int, like: Tensor) -> None:
        """Allocate `max_length` tokens for each of `batch_size` sequences, with the dtype and device of `like`."""
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch_size, config.n_head, max_length, head_size)
        self.data = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0

    def append(self, k: Tensor, v: Tensor, *, layer: int) -> tuple[Tensor, Tensor]:
        """Store new keys and values of a layer (B, H, T, D); return all of them (B, H, S, D)."""
        end = self.length + k.size(2)
        self.data[layer, 0, :, :, self.length : end] = k
        self.data[layer, 1, :, :, self.length : end] = v
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]


# Stores the keys and values (B, H, T, D) of new tokens; returns those of all tokens (B, H, S, D).
AppendKV = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(
        self, x: Tensor, h: Tensor, norm: nn.Module, append: AppendKV | None, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x + attention(h), and norm of it; all (B, T, C)."""
        q, k, v = ops.project_heads(h, self.c_attn, self.n_head)  # (B, H, T, D) each
        if append is not None:
            k, v = append(k, v)  # (B, H, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)  # (B, H, T, D)
        return ops.add_linear_norm(x, y.transpose(1, 2).reshape(x.shape), self.c_proj, norm)  # x + c_proj(y)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = ops.ACTIVATIONS[config.activation_function]
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor, h: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """x + mlp(h), and norm of it; all (B, T, C)."""
        return ops.add_mlp_norm(x, h, self.c_fc, self.activation, self.c_proj, norm)  # x + c_proj(gelu(c_fc(h)))


class Block(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x)), as in the GPT-2 paper (pre-norm).

    The addition to x and the LayerNorm after it are one operator, as they are one kernel. Therefore attention and MLP
    receive x and its LayerNorm h, and the norm that comes next; they return the new x and its norm.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, h: Tensor, next_norm: nn.Module, append: AppendKV | None, visible: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream x and h = ln_1(x), both (B, T, C) -> the stream after the block, and next_norm of it."""
        x, h = self.attn(x, h, self.ln_2, append, visible)
        return self.mlp(x, h, next_norm)


class Transformer(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        # nn.Embedding() would initialize itself, which on the meta device imports torch.compile: 0.9 s per start.
        self.wte, self.wpe = (
            nn.Embedding.from_pretrained(torch.empty(rows, config.n_embd), freeze=False)
            for rows in (config.padded_vocab_size, config.n_positions)
        )
        self.h: Any = nn.ModuleList(Block(config) for _ in range(config.n_layer))  # Any: mypy has no type for its items
        self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig, seed: int | None = 0) -> None:
        """Random weights, the same on every device for a seed; seed None leaves them uninitialized, to be loaded."""
        super().__init__()
        self.config = config
        self.stream_dtype: torch.dtype | None = None  # of the residual stream; None: see `embed`
        self.activation_checkpointing = False  # True: keep only the inputs of blocks, and recompute the rest
        with torch.device("meta"):  # skips the default initialization
            self.transformer = Transformer(config)
        for name, _ in self.named_buffers():
            raise ValueError(f"buffer {name} would be uninitialized. Compute it in forward, or make it a parameter")
        self.to_empty(device="cpu")
        if seed is not None:
            self._initialize(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator) -> None:
        """N(0, 0.02) as in the paper and OpenAI's code; positions 0.01; residual projections scaled by 1/sqrt(2L).

        Gains of norms are 1, biases 0. Raises ValueError for a vector of another name.
        """
        for name, p in self.named_parameters():
            if p.dim() <= 1:
                if not name.endswith((".weight", "bias")):
                    raise ValueError(
                        f"parameter {name} has no initial value. Name it `weight` (1) or `bias` (0), or add a case to "
                        f"GPT._initialize"
                    )
                p.fill_(1.0 if name.endswith(".weight") else 0.0)
            else:
                std = 0.01 if ".wpe." in name else 0.02
                if name.endswith("c_proj.weight"):  # two per block are added to the residual stream
                    std /= math.sqrt(2 * self.config.n_layer)
                p.normal_(0.0, std, generator=generator)
        self.transformer.wte.weight[self.config.vocab_size :] = 0.0

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def num_parameters(self) -> int:
        """The number of weights without padding: 124,439,808 for gpt2."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        visible: Tensor | None = None,
        shallow: bool = False,
    ) -> Tensor:
        """The output of the last LayerNorm: (B, T) -> (B, T, C). With a cache, `tokens` are those that it lacks.

        Positions are consecutive and attention is causal, unless `positions` (B, T) and `visible` (B, 1, T, T) bool,
        an attention mask, are given: sequences that share a prefix can then be evaluated as one row.
        shallow: leave out every second block, as training with `--shallow-fraction` does at first.
        """
        T = tokens.size(1)
        start = cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(start, start + T, device=tokens.device)  # (T,)
        if start:  # a query attends to the cached tokens and, causally, to the new ones
            visible = torch.ones(T, start + T, dtype=torch.bool, device=tokens.device).tril(start)  # (T, S)
        x, h = self.embed(tokens, positions)
        blocks = self.transformer.h[::2] if shallow else self.transformer.h
        norms = [*(block.ln_1 for block in blocks[1:]), self.transformer.ln_f]
        for layer, (block, next_norm) in enumerate(zip(blocks, norms, strict=True)):
            append = partial(cache.append, layer=layer) if cache is not None else None
            run = partial(self.run_block, block)
            if self.activation_checkpointing and torch.is_grad_enabled():  # no dropout: no random state to restore
                run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
            x, h = run(x, h, next_norm, append, visible)
        if cache is not None:
            cache.length += T
        return h

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) at their positions -> the residual stream, and ln_1 of the first block; both (B, T, C)."""
        x = self.transformer.wte(tokens) + self.transformer.wpe(positions)
        if self.stream_dtype is not None:
            x = x.to(self.stream_dtype)
        elif torch.is_grad_enabled() and torch.is_autocast_enabled(x.device.type):
            # With the residual stream in bfloat16 too, a training step is 5 % faster. In float16 it could overflow.
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype) if dtype == torch.bfloat16 else x
        return x, self.transformer.h[0].ln_1(x.float()).to(x.dtype)

    def run_block(self, block: Block, *inputs: Any) -> tuple[Tensor, Tensor]:
        return block(*inputs)

    def training_copy(
        self, *, compiled: bool, stream_dtype: torch.dtype | None = None, activation_checkpointing: bool = False
    ) -> "GPT":
        """A GPT with the same weights, for training. `stream_dtype`: of the residual stream.

        compiled: embedding, block and loss are compiled, each by itself. All blocks share one compiled function:
        compile time doesn't depend on the depth, and DDP reduces gradients of one block during those of the next.
        """
        training = copy.copy(self)
        training.stream_dtype, training.activation_checkpointing = stream_dtype, activation_checkpointing
        if compiled:
            compiler = partial(torch.compile, dynamic=False)
            training.embed = compiler(training.embed)  # type: ignore[method-assign]
            training.run_block = compiler(training.run_block)  # type: ignore[method-assign]
            training.cross_entropy = compiler(training.cross_entropy)  # type: ignore[method-assign]
        return training

    def logits(self, hidden: Tensor) -> Tensor:
        """The tied head without padding: (..., C) -> (..., vocab_size)."""
        return F.linear(hidden, self.transformer.wte.weight)[..., : self.config.vocab_size]

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *candidates: Tensor,
        cache: KVCache | None = None,
        shallow: bool = False,
    ) -> Tensor:
        """Logits (B, T, vocab_size); with targets (B, T) the mean cross-entropy instead, in nats per token.

        candidates: see `ops.linear_cross_entropy`. shallow: see `hidden`.
        """
        hidden = self.hidden(tokens, cache, shallow=shallow)
        return self.logits(hidden) if targets is None else self.cross_entropy(hidden, targets, *candidates)

    def cross_entropy(self, hidden: Tensor, targets: Tensor, *candidates: Tensor) -> Tensor:
        """Mean cross-entropy of (B, T, C) on targets (B, T), in nats per token."""
        weight, vocab_size = self.transformer.wte.weight, self.config.vocab_size
        return ops.linear_cross_entropy(hidden, weight, targets, vocab_size, *candidates)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> "GPT":
        """Load a GPT-2 from a folder, a checkpoint file or, by name, from the hub. Raises ValueError for others."""
        from core.convert import load_pretrained  # it imports this file

        return load_pretrained(name_or_folder)

    def save_pretrained(self, folder: str | Path, end_of_text_id: int | None = None) -> None:
        """Write a folder that transformers.GPT2LMHeadModel.from_pretrained reads."""
        from core.convert import save_pretrained  # it imports this file

        save_pretrained(self, folder, end_of_text_id)
