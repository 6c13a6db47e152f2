"""Weights of a GPT-2 under any project's names, mapped to the parameters of model.py. Nothing in a file is executed."""

import errno
import json
import pickle
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.files import refuse_pointer
from model import GPT

# The weights of a Hugging Face folder: the first of these files is read. An index lists further files.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PREFIXES = re.compile(r"^(_orig_mod\.|module\.|transformer\.)+")  # of torch.compile, DDP and Hugging Face
RENAMED = (  # names of other projects -> Hugging Face's
    (re.compile(r"^(tok_emb|token_embedding)\."), "wte."),
    (re.compile(r"^(pos_emb|pos_embedding)\."), "wpe."),
    (re.compile(r"^blocks\.(\d+)\."), r"h.\1."),
    (re.compile(r"\.attn\.attn\."), ".attn.c_attn."),
    (re.compile(r"\.attn\.proj\."), ".attn.c_proj."),
    (re.compile(r"\.mlp\.fc\."), ".mlp.c_fc."),
    (re.compile(r"\.mlp\.proj\."), ".mlp.c_proj."),
    (re.compile(r"^head\."), "lm_head."),
)
MASKS = (".attn.bias", ".attn.masked_bias", ".attn.mask", ".attn.tril")  # causal masks, which are no weights
STATE_KEYS = ("model", "state_dict", "model_state_dict", "model_state")


class PickledConfig:
    """Stands for the GPTConfig of another project, whose class isn't trusted: an object without methods."""


PICKLED_NAMES = ("__main__.GPTConfig", "train_gpt2.GPTConfig", "model.GPTConfig")


def canonical(name: str) -> str:
    """Hugging Face's name of a tensor, without prefix."""
    name = PREFIXES.sub("", name)
    for pattern, replacement in RENAMED:
        name = pattern.sub(replacement, name)
    return name


@torch.no_grad()
def load_state(model: GPT, tensors: dict[str, Tensor], *, conv1d: bool) -> None:
    """Copy tensors with any known names into a model. `conv1d`: matrices are (in, out), as in Hugging Face's files.

    Raises ValueError where a tensor is missing, unknown, given twice, or of another shape or dtype, and where the head
    differs from wte.
    """
    expected = {canonical(name): (name, p) for name, p in model.named_parameters()}
    full_names = {canonical(name): name for name in tensors} | {name: full for name, (full, _) in expected.items()}
    given: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if given.setdefault(canonical(name), tensor) is not tensor:
            raise ValueError(f"the weights have {canonical(name)} under two names, such as {name}. Remove one of them")
    head = None if "lm_head.weight" in expected else given.pop("lm_head.weight", None)
    given = {name: tensor for name, tensor in given.items() if name in expected or not is_mask(name, tensor)}
    check_names(expected.keys(), given.keys(), full_names)
    for name, (full, p) in expected.items():
        target, tensor = hf_view(model, full, p, conv1d=conv1d), given[name]
        if tensor.shape != target.shape:
            raise ValueError(f"{full} has shape {tuple(tensor.shape)}, but its config says {tuple(target.shape)}")
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{full} has dtype {tensor.dtype}: quantized weights aren't supported. Use float weights")
        target.copy_(tensor)
    if head is not None and not torch.equal(head, given["wte.weight"].to(head.dtype)):
        raise ValueError(
            "lm_head.weight differs from wte.weight: GPT-2's head is tied to its token embedding. Use a model with a "
            "tied head"
        )
    model.transformer.wte.weight[model.config.vocab_size :] = 0.0


def is_mask(name: str, tensor: Tensor) -> bool:
    is_square = tensor.dim() >= 2 and tensor.size(-1) == tensor.size(-2)
    return name.endswith(MASKS) and (is_square or tensor.dim() == 0)


def check_names(expected: Iterable[str], given: Iterable[str], full_names: dict[str, str]) -> None:
    """Raise ValueError where names are missing or unknown."""
    missing, unknown = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    for problem, names, owner in (
        ("lacks", missing, "which model.py has"),
        ("also has", unknown, "which model.py lacks"),
    ):
        if names:
            shown = ", ".join(full_names[name][:80] for name in names[:3])
            raise ValueError(
                f"the weights file {problem} {len(names)} tensors, such as {shown}, {owner}: it is not of this network"
            )


def hf_view(model: GPT, name: str, p: Tensor, *, conv1d: bool = True) -> Tensor:
    """A view of a parameter without padding, in Hugging Face's shape (`conv1d`) or in that of nn.Linear."""
    if name == "transformer.wte.weight":
        return p[: model.config.vocab_size]
    is_linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return p.T if is_linear and conv1d else p  # Hugging Face's Conv1D stores (in, out)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, from one file or from several with an index."""
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} contains neither model.safetensors nor pytorch_model.bin. Add its weights")
    return read_indexed(file) if file.name.endswith(".index.json") else read_tensors(file)


def read_indexed(index: Path) -> dict[str, Tensor]:
    """The tensors of the files that an index lists. Raises ValueError where a file or a tensor is missing."""
    refuse_pointer(index)
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
        if not all(Path(name).name == name for name in names):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} is not an index of weight files. Download it again") from None
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent / name} is missing, but {index.name} lists it. Download it again")
        tensors |= read_tensors(index.parent / name)
    if lacking := sorted(places.keys() - tensors.keys()):
        raise ValueError(f"{index.parent} lacks {lacking[0][:80]}, which {index.name} lists. Download it again")
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickle of tensors by their names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    refuse_pointer(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged: {str(error)[:200]}. Download it again") from None
    return tensors_of(read_pickle(path), path)


def tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a pickle contains, also as its "model" or "state_dict"."""
    nested = next((content[key] for key in STATE_KEYS if isinstance(content.get(key), dict)), content)
    tensors = {name: tensor for name, tensor in nested.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not tensors:
        raise ValueError(f"{path} contains no tensors. Use a file with the weights of a model")
    return tensors


def read_pickle(path: Path, classes: Sequence[str] = ()) -> dict[str, Any]:
    """A dictionary of plain values and tensors. `classes`: names of classes that become a PickledConfig."""
    allowed: list[Any] = [(PickledConfig, name) for name in classes]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError:
        raise ValueError(f"{path} contains more than tensors. Use a file of tensors only") from None
    except Exception as error:  # a damaged file can make the reader raise anything
        if "memory" in str(error)[:500]:  # of the allocator, which raises RuntimeError
            raise OSError(errno.ENOMEM, "not enough memory to read it", str(path)) from None
        raise ValueError(f"{path} can't be read as tensors ({type(error).__name__}). Download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains no tensors by name, but a {type(content).__name__}. Use another file")
    return content
