"""GPT-2 (Radford et al., 2019): the transformer, its four published sizes, and Hugging Face weights in and out.

    model = GPT(PRESETS["gpt2"])                     # random weights
    model = GPT.from_pretrained("gpt2")              # OpenAI's weights from the Hugging Face hub, or a folder
    logits = model(tokens)                           # (B, T) -> (B, T, vocab_size)
    loss = model(tokens, targets)                    # (B, T), (B, T) -> mean cross-entropy, nats a token
    model.save_pretrained("folder")                  # transformers.GPT2LMHeadModel.from_pretrained reads it

Module names are Hugging Face's own (`transformer.h.0.attn.c_attn`), so that every weight maps by name.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LAYER_NORM_EPSILON = 1e-5
VOCAB_MULTIPLE = 128  # the head's matrix product is faster on a padded vocabulary: 50,257 -> 50,304


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
        """Training FLOPs a token: 6 a matrix weight (head included) plus the causal half of attention.

        Chowdhery et al. 2022 (PaLM), appendix B, with half its attention term: the masked half is never computed.
        """
        matrices = 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd
        return 6 * matrices + 6 * self.n_layer * seq_len * self.n_embd


PRESETS = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),  # 1558M
    "demo": GPTConfig(n_layer=2, n_head=4, n_embd=128, n_positions=256),  # minutes on two CPU cores
    "tiny": GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=64),  # for tests
}


def describe(config: GPTConfig) -> str:
    """A shape in words: its preset's name where it is one's."""
    name = next((n for n, preset in PRESETS.items() if replace(preset, vocab_size=config.vocab_size) == config), None)
    layers = (
        f"a GPT-2 of {config.n_layer} layers of {config.n_embd}, {config.n_head} heads, context {config.n_positions}"
    )
    return name or layers


class KVCache:
    """The keys and values of the tokens seen so far, so that generation pays for each token once."""

    def __init__(self, config: GPTConfig, batch_size: int, max_length: int, like: Tensor) -> None:
        """Room for `max_length` tokens in each of `batch_size` rows, with the dtype and device of `like`."""
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch_size, config.n_head, max_length, head_size)
        self.memory = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, H, T, D); return all of them so far (B, H, S, D)."""
        end = self.length + k.size(2)
        self.memory[layer, 0, :, :, self.length : end] = k
        self.memory[layer, 1, :, :, self.length : end] = v
        return self.memory[layer, 0, :, :, :end], self.memory[layer, 1, :, :, :end]


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
        # nn.Embedding() would draw values, which on the meta device imports torch's compiler: 0.9 s of each start.
        self.wte, self.wpe = (
            nn.Embedding.from_pretrained(torch.empty(rows, config.n_embd), freeze=False)
            for rows in (config.padded_vocab_size, config.n_positions)
        )
        self.h: Any = nn.ModuleList(Block(config) for _ in range(config.n_layer))  # whose items have no type of theirs
        self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPSILON)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig, seed: int | None = 0) -> None:
        """Random weights, the same on every device for the same seed; None leaves them to be loaded."""
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: a training step keeps blocks' inputs alone, and computes twice
        with torch.device("meta"):  # torch's own initial values would be drawn only to be overwritten
            self.transformer = Transformer(config)
        self.to_empty(device="cpu")
        if seed is not None:
            self._initialize(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator) -> None:
        """N(0, 0.02) as in the paper and OpenAI's code: 0.01 for positions, residual projections by 1/sqrt(2L)."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0 if ".ln_" in name and name.endswith(".weight") else 0.0)
            else:
                std = 0.01 if ".wpe." in name else 0.02
                if name.endswith("c_proj.weight"):  # each block adds two of these to the residual stream
                    std /= math.sqrt(2 * self.config.n_layer)
                p.normal_(0.0, std, generator=generator)
        self.transformer.wte.weight[self.config.vocab_size :] = 0.0

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def num_parameters(self) -> int:
        """How many weights the model has, padding left out: 124,439,808 for gpt2."""
        return sum(self._unpadded(name, p).numel() for name, p in self.named_parameters())

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """The last layer's output, normalised: (B, T) -> (B, T, C). With a cache, `tokens` are those it lacks.

        A token stands one place after the one before it and sees all before it, unless `positions` (B, T) and
        `visible` (B, 1, T, T) bool say otherwise: sequences that branch can share their beginning so.
        """
        T = tokens.size(1)
        start = cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(start, start + T, device=tokens.device)  # (T,)
        if start:  # a query sees the cached tokens and, of the new ones, those up to itself
            visible = torch.ones(T, start + T, dtype=torch.bool, device=tokens.device).tril(start)  # (T, S)
        x = self.transformer.wte(tokens) + self.transformer.wpe(positions)  # (B, T, C)
        if torch.is_grad_enabled() and torch.is_autocast_enabled(x.device.type):
            # A training step is 5 % faster where the residual stream is bfloat16 too.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(self.transformer.h):
            if recompute:  # no random state to restore: GPT-2 is trained here without dropout
                x = checkpoint(block, x, layer, cache, visible, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, layer, cache, visible)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The tied head, cut to the real vocabulary: (..., C) -> (..., vocab_size)."""
        return F.linear(hidden, self.transformer.wte.weight)[..., : self.config.vocab_size]

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, vocab_size); with targets (B, T) the mean cross-entropy instead, in nats a token."""
        hidden = self.hidden(tokens, cache)
        return self.logits(hidden) if targets is None else self.cross_entropy(hidden, targets)

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of (B, T, C) on targets (B, T), in nats a token.

        The padded rows are left out of the loss: they get no gradient and stay zero.
        """
        if hidden.is_cuda:  # where cutting the head would take 1.05 times as long; on a CPU masking takes 1.2 (LOG.md)
            logits = self.masked_logits(hidden)
        else:
            logits = F.linear(hidden, self.transformer.wte.weight[: self.config.vocab_size])
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def masked_logits(self, hidden: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, padded_vocab_size), -inf where the vocabulary is padded."""
        logits = F.linear(hidden, self.transformer.wte.weight)
        padding = torch.arange(logits.size(-1), device=logits.device) >= self.config.vocab_size
        return logits.masked_fill(padding, -torch.inf)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> "GPT":
        """Load a Hugging Face GPT-2 from a folder or, by name, from the hub.

        Raises ValueError where it isn't a GPT-2 or a weight is missing, unknown or of another shape.
        """
        folder = Path(name_or_folder)
        if not folder.is_dir():
            folder = download(str(name_or_folder))
        model = cls(read_config(folder / "config.json"), seed=None)
        model.load_hf_state(read_weights(folder))
        return model

    def save_pretrained(self, folder: str | Path, end_of_text_id: int | None = None) -> None:
        """Write config.json, generation_config.json and model.safetensors for transformers.GPT2LMHeadModel."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        special = {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id}
        (folder / "config.json").write_text(json.dumps(HF_CONSTANTS | asdict(self.config) | special, indent=2) + "\n")
        (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
        save_file(self.hf_state(), folder / "model.safetensors", metadata={"format": "pt"})

    @torch.no_grad()
    def hf_state(self) -> dict[str, Tensor]:
        """The weights on the CPU under Hugging Face's names, in its shapes, without the padding."""
        return {name: self._unpadded(name, p).cpu().contiguous() for name, p in self.named_parameters()}

    @torch.no_grad()
    def load_hf_state(self, weights: dict[str, Tensor]) -> None:
        """Copy weights in Hugging Face's names and shapes into this model. Raises ValueError on any mismatch."""
        # OpenAI's upload names no "transformer." prefix and holds the causal masks; the head is tied to wte.
        given = {n if n.startswith("transformer.") else f"transformer.{n}": w for n, w in weights.items()}
        given = {
            n: w for n, w in given.items() if not n.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight"))
        }
        wanted = dict(self.named_parameters())
        for problem, names in (("lacks", wanted.keys() - given.keys()), ("also holds", given.keys() - wanted.keys())):
            if names:
                shown = ", ".join(sorted(names)[:3])
                raise ValueError(f"not this GPT-2: the weights file {problem} {len(names)} tensors, such as {shown}")
        for name, p in wanted.items():
            target = self._unpadded(name, p)
            if given[name].shape != target.shape:
                raise ValueError(f"{name} has shape {tuple(given[name].shape)}, config.json says {tuple(target.shape)}")
            target.copy_(given[name])
        self.transformer.wte.weight[self.config.vocab_size :] = 0.0

    def _unpadded(self, name: str, p: Tensor) -> Tensor:
        """A view of a parameter in Hugging Face's shape."""
        if name == "transformer.wte.weight":
            return p[: self.config.vocab_size]
        is_linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        return p.T if is_linear else p  # Hugging Face's Conv1D keeps (in, out)


HF_CONSTANTS = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": LAYER_NORM_EPSILON,
    "initializer_range": 0.02,
    "n_inner": None,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
# What a config.json may not say otherwise, or the logits would differ; an absent key has the constant's value.
ARCHITECTURE_KEYS = (
    "model_type",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
)


def read_config(path: Path) -> GPTConfig:
    """The shape in a Hugging Face config.json. Raises ValueError where it isn't a plain GPT-2."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: a model folder holds config.json and model.safetensors")
    try:
        hf = json.loads(path.read_text())
        config = GPTConfig(**{field: int(hf[field]) for field in GPTConfig.__dataclass_fields__})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the config.json of a GPT-2: {error!r}") from None
    for key in ARCHITECTURE_KEYS:
        if hf.get(key, HF_CONSTANTS[key]) != HF_CONSTANTS[key]:
            raise ValueError(f"{path}: {key} is {hf[key]!r}, GPT-2 has {HF_CONSTANTS[key]!r}")
    if hf.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(f"{path}: n_inner is {hf['n_inner']}, GPT-2 has {4 * config.n_embd}")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of an old pytorch_model.bin without running what a pickle may hold."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if weights.is_file():
        try:
            return load_file(weights)
        except SafetensorError as error:
            raise ValueError(f"{weights} is cut short or damaged: {error}") from None
    if pickled.is_file():
        try:
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
            return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        except Exception as error:  # a damaged or hostile pickle can make the reader raise anything
            raise ValueError(f"{pickled} is damaged or holds more than tensors ({type(error).__name__})") from None
    raise ValueError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def download(name: str) -> Path:
    """Fetch a GPT-2 from the Hugging Face hub (or find it in the hub's cache) and return its folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["config.json", "model.safetensors", "generation_config.json", "vocab.json", "merges.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=[*wanted, "tokenizer*.json"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"no folder {name!r} here, and the Hugging Face hub gave no model of that name: {reason}"
        ) from None
