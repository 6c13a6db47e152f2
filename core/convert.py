"""Hugging Face's GPT-2 format, read and written: config.json, generation_config.json and model.safetensors.

A network that was modified in model.py isn't a GPT-2 for other programs: its config.json gets another model type.
"""

import inspect
import json
import math
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, LAYER_NORM_EPSILON, GPTConfig

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
# What config.json says of a network that computes something else than GPT-2: `transformers` knows neither value.
MODIFIED = {"architectures": ["ModifiedGPT2"], "model_type": "gpt2_modified", "activation_function": "modified"}
# Keys of config.json that determine the logits; an absent key has the value of HF_CONSTANTS.
ARCHITECTURE_KEYS = (
    "model_type",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
)


def load_pretrained(name_or_folder: str | Path) -> GPT:
    """A Hugging Face GPT-2 from a folder or, by name, from the hub.

    Raises ValueError where it isn't a GPT-2, or a tensor is missing, unknown or of another shape.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        folder = download(str(name_or_folder))
    model = GPT(read_config(folder / "config.json"), seed=None)
    load_hf_state(model, read_weights(folder))
    check_network(model, folder / "config.json")
    return model


@torch.no_grad()
def check_network(model: GPT, path: Path) -> None:
    """Raise ValueError where a folder was written by a modified network, and model.py computes another one."""
    saved = json.loads(path.read_text(encoding="utf-8")).get("modified_logits")
    if saved is None:
        return
    logits, expected = sample_logits(model), torch.tensor(saved)
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()):
        raise ValueError(
            f"{path.parent} was trained with a modified model.py, and this model.py computes another network. "
            f"Use {path.with_name('model.py')} in its place"
        )


def sample_logits(model: GPT) -> Tensor:
    """The logits of the first 64 ids after one random sequence of the full context, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, model.config.n_positions), generator=generator)
    return model.logits(model.hidden(tokens.to(model.device))[0, -1])[:64].cpu()


@torch.no_grad()
def save_pretrained(
    model: GPT, folder: str | Path, end_of_text_id: int | None = None, is_gpt2: bool | None = None
) -> None:
    """Write a folder that transformers.GPT2LMHeadModel.from_pretrained reads, or refuses for a modified network.

    `is_gpt2`: the result of `computes_gpt2`; None: compute it here.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id}
    config = HF_CONSTANTS | asdict(model.config) | special
    is_gpt2 = computes_gpt2(model) if is_gpt2 is None else is_gpt2
    if not is_gpt2:
        config |= MODIFIED | {"modified_logits": sample_logits(model).tolist()}
        shutil.copyfile(str(inspect.getsourcefile(type(model))), folder / "model.py")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    save_file(hf_state(model), folder / "model.safetensors", metadata={"format": "pt"})


def read_config(path: Path) -> GPTConfig:
    """The shape in a Hugging Face config.json. Raises ValueError where it isn't a plain GPT-2."""
    if not path.is_file():
        raise ValueError(f"{path} is missing. A model folder contains config.json and model.safetensors")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
        config = GPTConfig(**{name: int(hf[name]) for name in GPTConfig.__dataclass_fields__})
    except KeyError as error:
        raise ValueError(f"{path} is not the config.json of a GPT-2: it lacks {error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not the config.json of a GPT-2: it isn't UTF-8 text") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the config.json of a GPT-2: {error}") from None
    is_modified = hf.get("model_type") == MODIFIED["model_type"]
    expected = HF_CONSTANTS | (MODIFIED if is_modified else {})
    for key in ARCHITECTURE_KEYS:
        if hf.get(key, expected[key]) != expected[key]:
            raise ValueError(f"{path}: {key} is {hf[key]!r}, but GPT-2 has {expected[key]!r}")
    if hf.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(f"{path}: n_inner is {hf['n_inner']}, but GPT-2 has {4 * config.n_embd}")
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of an older pytorch_model.bin without executing its pickle."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if weights.is_file():
        try:
            return load_file(weights)
        except SafetensorError as error:
            raise ValueError(f"{weights} is truncated or damaged: {error}") from None
    if pickled.is_file():
        try:
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
            return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
        except (OSError, MemoryError):
            raise
        except pickle.UnpicklingError:
            raise ValueError(f"{pickled} contains more than tensors. Use a file of tensors only") from None
        except Exception as error:  # a damaged file can make the reader raise anything
            raise ValueError(f"{pickled} can't be read as tensors ({type(error).__name__}). Fetch it again") from None
    raise ValueError(f"{folder} contains neither model.safetensors nor pytorch_model.bin")


def download(name: str) -> Path:
    """Download a GPT-2 from the Hugging Face hub, or find it in the cache of the hub; return its folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = ["config.json", "model.safetensors", "generation_config.json", "vocab.json", "merges.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=[*files, "tokenizer*.json"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name!r} is not a folder, and the Hugging Face hub has no model of that name or is unreachable: {reason}"
        ) from None


@torch.no_grad()
def hf_state(model: GPT) -> dict[str, Tensor]:
    """The weights on the CPU under Hugging Face's names and in its shapes, without padding."""
    return {name: hf_view(model, name, p).cpu().contiguous() for name, p in model.named_parameters()}


@torch.no_grad()
def load_hf_state(model: GPT, weights: dict[str, Tensor]) -> None:
    """Copy weights with Hugging Face's names and shapes into a model. Raises ValueError on any mismatch."""
    # OpenAI's upload has no "transformer." prefix and contains the causal masks; the head is tied to wte.
    given = {n if n.startswith("transformer.") else f"transformer.{n}": w for n, w in weights.items()}
    ignored = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
    given = {n: w for n, w in given.items() if not n.endswith(ignored)}
    expected = dict(model.named_parameters())
    for problem, names in (("lacks", expected.keys() - given.keys()), ("also has", given.keys() - expected.keys())):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise ValueError(f"the weights file {problem} {len(names)} tensors, such as {shown}: not this GPT-2")
    for name, p in expected.items():
        target = hf_view(model, name, p)
        if given[name].shape != target.shape:
            raise ValueError(f"{name} has shape {tuple(given[name].shape)}, but config.json says {tuple(target.shape)}")
        target.copy_(given[name])
    model.transformer.wte.weight[model.config.vocab_size :] = 0.0


def hf_view(model: GPT, name: str, p: Tensor) -> Tensor:
    """A view of a parameter in Hugging Face's shape."""
    if name == "transformer.wte.weight":
        return p[: model.config.vocab_size]
    is_linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return p.T if is_linear else p  # Hugging Face's Conv1D stores (in, out)


@torch.no_grad()
def computes_gpt2(model: GPT, tolerance: float = 1e-3) -> bool:
    """Whether the network in model.py computes GPT-2: its logits equal those of an independent forward.

    Compared at the end of one random sequence of the full context, relative to the largest logit.
    """
    generator = torch.Generator().manual_seed(0)
    size = (1, model.config.n_positions)
    tokens = torch.randint(model.config.vocab_size, size, generator=generator).to(model.device)
    logits = model.logits(model.hidden(tokens)[:, -8:])
    try:
        expected = reference_logits(model, tokens, last=8)
    except torch.OutOfMemoryError:  # says nothing about the network
        raise
    except (KeyError, RuntimeError):  # parameters with other names or shapes than those of GPT-2
        return False
    difference = (logits - expected).abs().max()
    return not difference > tolerance * expected.abs().max()  # NaN of a diverged model says nothing


def reference_logits(model: GPT, tokens: Tensor, last: int) -> Tensor:
    """GPT-2's logits (B, last, vocab_size) of the last tokens, with the weights of `model`, by a forward of its own."""
    p, config = dict(model.named_parameters()), model.config
    B, T = tokens.shape
    C, H = config.n_embd, config.n_head

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (C,), p[f"transformer.{name}.weight"], p[f"transformer.{name}.bias"], LAYER_NORM_EPSILON)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"transformer.{name}.weight"].T + p[f"transformer.{name}.bias"]

    mask = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
    wte = p["transformer.wte.weight"][: config.vocab_size]
    x = wte[tokens] + p["transformer.wpe.weight"][:T]
    for i in range(config.n_layer):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")
        q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in qkv.split(C, dim=-1))  # (B, H, T, D)
        scores = (q @ k.mT / math.sqrt(C // H)).masked_fill(~mask, -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C), f"h.{i}.attn.c_proj")
        u = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u * u * u)))
        x = x + linear(gelu, f"h.{i}.mlp.c_proj")
    return norm(x[:, -last:], "ln_f") @ wte.T
