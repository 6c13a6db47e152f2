"""Checkpoint files of other projects: nanoGPT, build-nanogpt, llm.c and the original project of this one.

Read: all four. Written: llm.c and nanoGPT. The names of their tensors are mapped in core/weights.py.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.files import refuse_pointer
from core.weights import PICKLED_NAMES, PickledConfig, canonical, hf_view, load_state, read_pickle, tensors_of
from model import GPT, PRESETS, GPTConfig

LLMC_MAGIC, LLMC_HEADER = 20240326, 256  # int32 values
LLMC_OTHER = {20240327: "debug state", 20240328: "tokenizer", 20240520: "data", 20240522: "evaluation data"}
LLMC_OTHER |= {20240527: "optimizer state", 20240801: "Llama 3 data"}
LLMC_DTYPES = {3: torch.float32, 5: torch.bfloat16}
LLMC_OLDER = {1: "float32 without padding", 2: "bfloat16 without padding", 4: "bfloat16 with float32 LayerNorms"}
LLMC_TENSORS = (  # in the file each kind stands for all layers in turn, after wte and wpe, before ln_f
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
)
PICKLES = (b"PK\x03\x04", b"\x80\x02")  # what torch.save writes, now and before torch 1.6
ACTIVATION_NAMES = {"gelu_new": "the tanh form of GELU", "gelu": "the exact (erf) GELU"}
NANOGPT_SHAPE = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "n_positions"}


def is_checkpoint_file(path: Path) -> bool:
    """Whether a file begins as a checkpoint file does. Raises ValueError for related files, by their kind."""
    refuse_pointer(path)
    with open(path, "rb") as file:
        start = file.read(8)
    if start[:4] == b"GGUF":
        raise ValueError(f"{path} is a GGUF file, which this project doesn't read. Use the model it was made from")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} contains weights without a config.json. Name a folder that contains both")
    magic = int.from_bytes(start[:4], "little")
    if magic in LLMC_OTHER:
        raise ValueError(f"{path} is an llm.c file of {LLMC_OTHER[magic]}, not a model. Name its model_*.bin")
    return magic == LLMC_MAGIC or start.startswith(PICKLES)


def read_checkpoint_file(path: Path) -> tuple[GPT, str]:
    """The model in a checkpoint file, and a note that names the format and its activation. Raises ValueError."""
    with open(path, "rb") as file:
        is_llmc = int.from_bytes(file.read(4), "little") == LLMC_MAGIC
    if is_llmc:
        model, project = read_llmc(path), "llm.c"
    else:
        content = read_pickle(path, PICKLED_NAMES)
        tensors = tensors_of(content, path)
        config, project = pickled_config(content, tensors, path)
        model = GPT(config, seed=None)
        shapes = [tensor.shape for name, tensor in tensors.items() if canonical(name) == "h.0.attn.c_attn.weight"]
        load_state(model, tensors, conv1d=shapes == [(config.n_embd, 3 * config.n_embd)])
    activation = ACTIVATION_NAMES[model.config.activation_function]
    return model, f"{path} is read as a checkpoint of {project}, with {activation}"


def pickled_config(content: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> tuple[GPTConfig, str]:
    """The shape of a model that torch.save wrote, and the project whose file it is."""
    config = content.get("config")
    if isinstance(config, PickledConfig) and "bias" not in vars(config):  # which nanoGPT's GPTConfig has
        return nanogpt_config(vars(config), path, activation="gelu_new"), "build-nanogpt"
    config = vars(config) if isinstance(config, PickledConfig) else config
    options = config if isinstance(config, dict) else {}
    arguments = content.get("model_args", options)
    if isinstance(arguments, dict) and "block_size" in arguments:
        # convert.py adds the activation: GPT-2's weights in nanoGPT's format have another one than nanoGPT.
        activation = options.get("activation_function", "gelu")
        return nanogpt_config(arguments, path, activation=activation), "nanoGPT"
    names = {canonical(name): tensor for name, tensor in tensors.items()}
    if "model_state_dict" in content and "token_embedding.weight" in tensors and "wpe.weight" in names:
        n_layer = len([name for name in names if name.endswith(".ln_1.weight")])
        (vocab_size, n_embd), n_positions = names["wte.weight"].shape, len(names["wpe.weight"])
        size = next((p for p in PRESETS.values() if (p.n_layer, p.n_embd) == (n_layer, n_embd)), None)
        if size is not None:  # the file doesn't contain the number of heads
            return GPTConfig(n_layer, size.n_head, n_embd, n_positions, vocab_size, "gelu"), "the original project"
    raise ValueError(
        f"{path} contains weights, but neither their number of heads nor their activation. Save them as "
        f"pytorch_model.bin in a folder with a config.json"
    )


def nanogpt_config(arguments: dict[str, Any], path: Path, *, activation: str) -> GPTConfig:
    if arguments.get("bias") is False:
        raise ValueError(f"{path}: bias is False, but GPT-2 has biases. Use a model that was trained with bias=True")
    names = NANOGPT_SHAPE | {"vocab_size": "vocab_size"}
    for name in names:
        if type(arguments.get(name)) is not int:
            raise ValueError(f"{path}: its configuration has no {name}. Use a checkpoint of nanoGPT's train.py")
    return GPTConfig(**{ours: arguments[name] for name, ours in names.items()}, activation_function=activation)


def read_llmc(path: Path) -> GPT:
    """The model in an llm.c model file of version 3 or 5. Raises ValueError for other versions and a wrong size."""
    header = np.fromfile(path, dtype="<i4", count=LLMC_HEADER)
    version = int(header[1]) if len(header) == LLMC_HEADER else 0
    if version in LLMC_OLDER:
        raise ValueError(
            f"{path} has version {version} of llm.c's model files ({LLMC_OLDER[version]}), which llm.c dropped. "
            f"Write it again with a current train_gpt2.py of llm.c"
        )
    if version not in LLMC_DTYPES:
        raise ValueError(f"{path} is not an llm.c model of version 3 or 5: its version is {version}. Use another file")
    n_positions, vocab_size, n_layer, n_head, n_embd, padded = (int(value) for value in header[2:8])
    try:
        config = GPTConfig(n_layer, n_head, n_embd, n_positions, vocab_size)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Copy it again") from None
    dtype = LLMC_DTYPES[version]
    expected, size = llmc_size(config, padded, dtype), path.stat().st_size
    if size != expected or padded < vocab_size:
        raise ValueError(f"{path} is damaged: it has {size:,} bytes, but its header says {expected:,}. Copy it again")
    values = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[4 * LLMC_HEADER :].view(dtype)
    model, start = GPT(config, seed=None), 0
    with torch.no_grad():
        for name, p in llmc_order(model):
            rows = padded if name == "transformer.wte.weight" else len(p)
            numel = rows * math.prod(p.shape[1:])
            tensor = values[start : start + numel].view(rows, *p.shape[1:])
            p[: min(len(p), rows)].copy_(tensor[: len(p)])
            start += numel
        model.transformer.wte.weight[vocab_size:] = 0.0
    return model


def llmc_size(config: GPTConfig, padded_vocab_size: int, dtype: torch.dtype) -> int:
    """Bytes of an llm.c model file."""
    rows = padded_vocab_size + config.n_positions + config.n_layer * (12 * config.n_embd + 13) + 2
    return 4 * LLMC_HEADER + rows * config.n_embd * dtype.itemsize


def llmc_order(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """The parameters in the order of llm.c's files."""
    parameters = dict(model.named_parameters())
    names = ["wte.weight", "wpe.weight"]
    names += [f"h.{i}.{name}" for name in LLMC_TENSORS for i in range(model.config.n_layer)]
    for name in (*names, "ln_f.weight", "ln_f.bias"):
        yield f"transformer.{name}", parameters[f"transformer.{name}"]


@torch.no_grad()
def write_llmc(model: GPT, path: Path, dtype: str = "float32") -> None:
    """Write an llm.c model file: version 3 (float32) or 5 (bfloat16). Raises ValueError for another activation."""
    config = model.config
    if config.activation_function != "gelu_new":
        raise ValueError("--format llmc: llm.c computes the tanh form of GELU, this model the exact one. Use hf")
    version = next(version for version, each in LLMC_DTYPES.items() if str(each) == f"torch.{dtype}")
    header = np.zeros(LLMC_HEADER, dtype="<i4")
    header[:5] = LLMC_MAGIC, version, config.n_positions, config.vocab_size, config.n_layer
    header[5:8] = config.n_head, config.n_embd, config.padded_vocab_size
    with open(path, "wb") as file:
        file.write(header.tobytes())
        for _, p in llmc_order(model):
            file.write(p.to(LLMC_DTYPES[version]).contiguous().view(torch.uint8).numpy().tobytes())


@torch.no_grad()
def write_nanogpt(model: GPT, path: Path) -> None:
    """Write a ckpt.pt that nanoGPT's sample.py reads, and from which its train.py resumes at step 0."""
    config = model.config
    state = {name: hf_view(model, name, p, conv1d=False).clone() for name, p in model.named_parameters()}
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    content = {
        "model": state | {"lm_head.weight": state["transformer.wte.weight"]},
        "optimizer": torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict(),
        "model_args": {name: getattr(config, ours) for name, ours in NANOGPT_SHAPE.items()}
        | {"bias": True, "vocab_size": config.vocab_size, "dropout": 0.0},
        "iter_num": 0,
        "best_val_loss": torch.tensor(1e9),
        "config": {"activation_function": config.activation_function},
    }
    torch.save(content, path)
