"""GPT-2 (Radford et al. 2019): the network and its four published sizes.

    model = GPT(PRESETS["gpt2"])                     # random weights
    model = GPT.from_pretrained("gpt2")              # OpenAI's weights from the Hugging Face hub, or a folder
    logits = model(tokens)                           # (B, T) -> (B, T, vocab_size)
    loss = model(tokens, targets)                    # (B, T), (B, T) -> mean cross-entropy, nats per token
    model.save_pretrained("folder")                  # transformers.GPT2LMHeadModel.from_pretrained reads it

Module names are Hugging Face's own (`transformer.h.0.attn.c_attn`), so that weights map by name.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs per token: 6 per matrix weight (head included), plus the causal half of attention.

        Chowdhery et al. 2022 (PaLM), appendix B, with half of its attention term: the masked half isn't computed.
        """
        matrices = 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd
        return 6 * matrices + 6 * self.n_layer * seq_len * self.n_embd


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
    name = next((n for n, preset in PRESETS.items() if replace(preset, vocab_size=config.vocab_size) == config), None)
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

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values of a layer (B, H, T, D); return all of them (B, H, S, D)."""
        end = self.length + k.size(2)
        self.data[layer, 0, :, :, self.length : end] = k
        self.data[layer, 1, :, :, self.length : end] = v
        return self.data[layer, 0, :, :, :end], self.data[layer, 1, :, :, :end]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, layer: int, cache: KVCache | None, visible: Tensor | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layer: int, cache: KVCache | None, visible: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), layer, cache, visible)
        return x + self.mlp(self.ln_2(x))


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
        self.activation_checkpointing = False  # True: keep only the inputs of blocks, and recompute the rest
        with torch.device("meta"):  # skips the default initialization
            self.transformer = Transformer(config)
        self.to_empty(device="cpu")
        if seed is not None:
            self._initialize(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator) -> None:
        """N(0, 0.02) as in the paper and OpenAI's code; positions 0.01; residual projections scaled by 1/sqrt(2L)."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0 if ".ln_" in name and name.endswith(".weight") else 0.0)
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
    ) -> Tensor:
        """The output of the last LayerNorm: (B, T) -> (B, T, C). With a cache, `tokens` are those that it lacks.

        Positions are consecutive and attention is causal, unless `positions` (B, T) and `visible` (B, 1, T, T) bool,
        an attention mask, are given: sequences that share a prefix can then be evaluated as one row.
        """
        T = tokens.size(1)
        start = cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(start, start + T, device=tokens.device)  # (T,)
        if start:  # a query attends to the cached tokens and, causally, to the new ones
            visible = torch.ones(T, start + T, dtype=torch.bool, device=tokens.device).tril(start)  # (T, S)
        x = self.transformer.wte(tokens) + self.transformer.wpe(positions)  # (B, T, C)
        if torch.is_grad_enabled() and torch.is_autocast_enabled(x.device.type):
            # With the residual stream in bfloat16 too, a training step is 5 % faster.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(self.transformer.h):
            if recompute:  # no dropout, hence no random state to restore
                x = checkpoint(block, x, layer, cache, visible, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, layer, cache, visible)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The tied head without padding: (..., C) -> (..., vocab_size)."""
        return F.linear(hidden, self.transformer.wte.weight)[..., : self.config.vocab_size]

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, vocab_size); with targets (B, T) the mean cross-entropy instead, in nats per token."""
        hidden = self.hidden(tokens, cache)
        return self.logits(hidden) if targets is None else self.cross_entropy(hidden, targets)

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of (B, T, C) on targets (B, T), in nats per token.

        The padding rows of the head are excluded: they get no gradient and stay zero.
        """
        if hidden.is_cuda:  # slicing takes 1.05 times as long there; on a CPU, masking takes 1.2 times (LOG.md)
            logits = self.masked_logits(hidden)
        else:
            logits = F.linear(hidden, self.transformer.wte.weight[: self.config.vocab_size])
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def masked_logits(self, hidden: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, padded_vocab_size), -inf for the padding."""
        logits = F.linear(hidden, self.transformer.wte.weight)
        padding = torch.arange(logits.size(-1), device=logits.device) >= self.config.vocab_size
        return logits.masked_fill(padding, -torch.inf)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> "GPT":
        """Load a Hugging Face GPT-2 from a folder or, by name, from the hub. Raises ValueError for anything else."""
        from core.convert import load_pretrained  # it imports this file

        return load_pretrained(name_or_folder)

    def save_pretrained(self, folder: str | Path, end_of_text_id: int | None = None) -> None:
        """Write a folder that transformers.GPT2LMHeadModel.from_pretrained reads."""
        from core.convert import save_pretrained  # it imports this file

        save_pretrained(self, folder, end_of_text_id)
