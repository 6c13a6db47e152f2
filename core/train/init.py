"""Initializers: what `--init` changes in a model that has GPT-2's initial weights."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from model import GPT

HIGHEST_FREQUENCY = 2.8  # radians per position: neighbors differ
POSITION_AMPLITUDE = 0.1  # the norm of a position is then that of a token, 0.02 sqrt(768)
ATTENTION_SCALE = 0.5  # a query and the key that it looks for have a logit of about 12


@torch.no_grad()
def align_keys(model: GPT) -> None:
    """Initialize the keys of each head with its queries: tokens and positions that are alike attend to each other."""
    C = model.config.n_embd
    for block in model.transformer.h:
        weight = block.attn.c_attn.weight  # (3 C, C): queries, keys, values
        weight[C : 2 * C] = weight[:C]


@torch.no_grad()
def attend_locally(model: GPT) -> None:
    """As `align_keys`, and the first third of the layers attends to previous and to near tokens from the start.

    Positions are sinusoids in a subspace of the dimension of a head. A rotation of it maps the position p to p + s
    (Vaswani et al. 2017), so that the weights of queries and keys can make a head attend to the s-th previous token.
    One third of the heads attends to the previous tokens 1, 2, 3, ..., one third to near tokens.
    """
    align_keys(model)
    config = model.config
    generator = torch.Generator().manual_seed(0)  # a fixed subspace; the seed of the run draws all other weights
    C, head_size = config.n_embd, config.n_embd // config.n_head // 2 * 2
    basis = torch.linalg.qr(torch.randn(C, head_size, generator=generator))[0]  # (C, D), orthonormal columns
    ends = math.log(HIGHEST_FREQUENCY), math.log(4 * math.pi / config.n_positions)
    frequencies = torch.linspace(*ends, head_size // 2).exp()  # (D / 2,)
    angles = torch.arange(config.n_positions).float()[:, None] * frequencies
    sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)  # (n_positions, D)
    model.transformer.wpe.weight.copy_(POSITION_AMPLITUDE * sinusoids @ basis.T)
    heads = config.n_head // 3
    for block in model.transformer.h[: max(config.n_layer // 3, 1)]:
        weight = block.attn.c_attn.weight[: 2 * C].view(2, config.n_head, -1, C)  # queries and keys of each head
        for head in range(2 * heads):
            weight[1, head].normal_(0.0, 0.02, generator=generator)  # no longer that of the queries
            shift = head + 1 if head < heads else 0
            _attend_to(weight[:, head, :head_size], shift, frequencies, basis, generator)


def _attend_to(weight: Tensor, shift: int, frequencies: Tensor, basis: Tensor, generator: torch.Generator) -> None:
    """Set what queries and keys, weight (2, D, C), do to positions: a key matches the query `shift` tokens later.

    For the previous tokens the match is sharp: all frequencies between 0 and the highest have equal weight. For near
    tokens (shift 0) it falls with the logarithm of the distance.
    """
    D = basis.size(1)
    share = frequencies if shift else torch.ones_like(frequencies)
    scale = (share / share.mean()).sqrt().repeat(2)  # (D,)
    cos, sin = (frequencies * shift).cos().diag(), (frequencies * shift).sin().diag()
    rotation = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])  # (D, D): position p -> p + shift
    random = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    query = ATTENTION_SCALE * random * scale @ basis.T  # (D, C)
    key = ATTENTION_SCALE * random * scale @ rotation @ basis.T
    weight += torch.stack([query, key]) - weight @ basis @ basis.T


INITIALIZERS: dict[str, Callable[[GPT], None]] = {
    "gpt2": lambda model: None,
    "aligned": align_keys,
    "local": attend_locally,
}
