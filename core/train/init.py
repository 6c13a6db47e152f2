"""Initializers: what `--init` changes in a model that has GPT-2's initial weights."""

from collections.abc import Callable

import torch

from model import GPT


@torch.no_grad()
def align_keys(model: GPT) -> None:
    """Initialize the keys of each head with its queries: tokens and positions that are alike attend to each other."""
    C = model.config.n_embd
    for block in model.transformer.h:
        weight = block.attn.c_attn.weight  # (3 C, C): queries, keys, values
        weight[C : 2 * C] = weight[:C]


INITIALIZERS: dict[str, Callable[[GPT], None]] = {"gpt2": lambda model: None, "aligned": align_keys}
