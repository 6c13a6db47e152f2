"""Hugging Face's GPT-2 format, read and written: config.json, generation_config.json and model.safetensors.

A network that was modified in model.py isn't a GPT-2 for other programs: its config.json gets another model type.
"""

import inspect
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.data import tokenizer_files
from core.data.shards import short_reason
from core.distributed import is_out_of_memory
from core.files import refuse_pointer
from core.formats import read_checkpoint_file
from core.weights import WEIGHT_FILES, hf_view, load_state, read_weights
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
ACTIVATIONS = {  # names of the same functions in `transformers` -> those of GPTConfig
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu": "gelu",
    "gelu_python": "gelu",
}
# The shape: names in config.json -> older or general names of the same value.
SHAPE_KEYS: dict[str, tuple[str, ...]] = {
    "n_layer": ("num_hidden_layers",),
    "n_head": ("num_attention_heads",),
    "n_embd": ("hidden_size",),
    "n_positions": ("max_position_embeddings", "n_ctx"),
    "vocab_size": (),
}
ADAPTER = "adapter_config.json"
# Keys of config.json that determine the logits; an absent key has the value of HF_CONSTANTS.
ARCHITECTURE_KEYS = (
    "model_type",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
)


def load_pretrained(source: str | Path) -> GPT:
    """A GPT-2 from a Hugging Face folder, from a checkpoint file of another project or, by name, from the hub.

    Raises ValueError where it isn't a GPT-2, or a tensor is missing, unknown or of another shape.
    """
    path = Path(source)
    if path.is_file():
        return read_checkpoint_file(path)[0]
    folder = path if path.is_dir() else download(str(source))
    refuse_adapter(folder)
    model = GPT(read_config(folder / "config.json"), seed=None)
    load_state(model, read_weights(folder), conv1d=True)
    check_network(model, folder / "config.json")
    return model


def refuse_adapter(folder: Path) -> None:
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"{folder} is a PEFT adapter ({ADAPTER}), not a model. Merge it into its base model with PEFT's "
            f"merge_and_unload(), and save that"
        )


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
        config |= {"modified_activation": model.config.activation_function}
        shutil.copyfile(str(inspect.getsourcefile(type(model))), folder / "model.py")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    save_file(hf_state(model), folder / "model.safetensors", metadata={"format": "pt"})


def read_config(path: Path) -> GPTConfig:
    """The shape in a Hugging Face config.json. Raises ValueError where it isn't a plain GPT-2."""
    if not path.is_file():
        raise ValueError(f"{path} is missing. A model folder contains config.json and model.safetensors")
    refuse_pointer(path)
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(hf, dict):
            raise TypeError("it isn't an object")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not the config.json of a GPT-2: {short_reason(error)}") from None
    check_architecture(path, hf)
    activation = str(hf.get("modified_activation", hf.get("activation_function", "gelu_new")))
    activation = ACTIVATIONS.get(activation, "gelu_new")  # modified networks of earlier versions name none
    shape: dict[str, int] = {}
    for name, others in SHAPE_KEYS.items():
        values = {key: hf[key] for key in (name, *others) if key in hf}
        if not values:
            raise ValueError(f"{path} is not the config.json of a GPT-2: it lacks {name}")
        shape[name] = next(iter(values.values()))
        for key, value in values.items():
            if type(value) is not int:
                raise ValueError(f"{path} is not the config.json of a GPT-2: {key} is {shown(value)}, not an integer")
            if value != shape[name]:
                raise ValueError(f"{path}: {name} is {shape[name]}, but {key}, its other name, is {value}. Remove one")
    try:
        config = GPTConfig(**shape, activation_function=activation)
    except ValueError as error:
        raise ValueError(f"{path} is not the config.json of a GPT-2: {error}") from None
    if hf.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(f"{path}: n_inner is {shown(hf['n_inner'])}, but GPT-2 has {4 * config.n_embd}")
    return config


def check_architecture(path: Path, hf: dict[str, Any]) -> None:
    """Raise ValueError, naming the key, where a config.json is that of another network than GPT-2."""
    is_modified = hf.get("model_type") == MODIFIED["model_type"]
    if hf.get("model_type") == "openai-gpt":
        raise ValueError(f"{path}: model_type is 'openai-gpt', GPT-1, which is another network. Use a GPT-2")
    expected = HF_CONSTANTS | (MODIFIED if is_modified else {})
    for key in ARCHITECTURE_KEYS:
        value = hf.get(key, expected[key])
        is_known = key == "activation_function" and isinstance(value, str) and value in ACTIVATIONS
        if value != expected[key] and not is_known:
            raise ValueError(f"{path}: {key} is {shown(value)}, but GPT-2 has {expected[key]!r}")
    for key in ("quantization_config", "transformers_weights"):
        if hf.get(key) is not None:
            raise ValueError(f"{path}: {key} is set, which this project doesn't support. Use float weights without it")


def shown(value: Any) -> str:
    return repr(value)[:80]


def download(name: str) -> Path:
    """Download a GPT-2 from the Hugging Face hub, or find it in the cache of the hub; return its folder.

    Of several forms of the weights only the first is downloaded, the one that read_weights reads.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = ["config.json", "generation_config.json", ADAPTER, *tokenizer_files.NAMES]
    try:
        for weights in WEIGHT_FILES:
            shards = [weights.replace(".index.json", "").replace(".", "-*.")] if weights.endswith(".index.json") else []
            folder = Path(snapshot_download(name, allow_patterns=[*files, weights, *shards]))
            if (folder / weights).is_file():
                break
        return folder
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        is_network = isinstance(error, (ConnectionError, TimeoutError))
        if isinstance(error, OSError) and error.errno is not None and not is_network:
            raise  # of this machine, such as a full disk
        run_folder = Path("logs") / name
        remedy = f"Use {run_folder}" if (run_folder / "checkpoints").is_dir() else "Check the name and the network"
        raise ValueError(
            f"{name} is not a folder, and the Hugging Face hub has no model of that name or is unreachable "
            f"({short_reason(error)}). {remedy}"
        ) from None


@torch.no_grad()
def hf_state(model: GPT) -> dict[str, Tensor]:
    """The weights on the CPU under Hugging Face's names and in its shapes, without padding."""
    return {name: hf_view(model, name, p).cpu().contiguous() for name, p in model.named_parameters()}


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
    except (KeyError, RuntimeError) as error:  # parameters with other names or shapes than those of GPT-2
        if is_out_of_memory(error):  # says nothing about the network
            raise
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
        if config.activation_function == "gelu":
            gelu = 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))
        else:
            gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u * u * u)))
        x = x + linear(gelu, f"h.{i}.mlp.c_proj")
    return norm(x[:, -last:], "ln_f") @ wte.T
