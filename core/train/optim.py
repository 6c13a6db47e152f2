"""The optimizers: AdamW, and Muon for the blocks' matrices, its work shared among the ranks."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.distributed import Ranks
from core.train.recipe import Recipe
from model import GPT

# Newton-Schulz iteration of Jordan et al. 2024 (kellerjordan.github.io/posts/muon): x -> a x + b x^3 + c x^5.
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class Optimizers:
    """The optimizers of a model's weights, as one. Each parameter group has its `peak` learning rate."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    def set_rate(self, share: float) -> None:
        """The learning rate of the next step, as a part of its peak."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = share * group["peak"]

    def step(self, skip: Tensor) -> None:
        """Update all weights. Where `skip` (on the device) is 1, weights and moments stay, and nobody waits to know."""
        for part in self.parts:
            part.found_inf = skip  # type: ignore[attr-defined]  # what torch's fused optimizers look for
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    @property
    def begun(self) -> bool:
        """Whether they hold moments already."""
        return any(part.state for part in self.parts)

    def state_dict(self) -> dict[str, Any]:
        return {type(part).__name__: part.state_dict() for part in self.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part in self.parts:
            part.load_state_dict(state[type(part).__name__])


def optimizers(model: GPT, recipe: Recipe, ranks: Ranks) -> Optimizers:
    """What a resolved recipe trains a model with. Biases and LayerNorm gains don't decay."""
    blocks = dict(model.transformer.h.named_parameters())
    matrices = {name: p for name, p in blocks.items() if p.dim() == 2}
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": embeddings, "peak": recipe.embed_lr, "weight_decay": recipe.weight_decay},
        {"params": vectors, "peak": recipe.embed_lr, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        groups.append({"params": list(matrices.values()), "peak": recipe.lr, "weight_decay": recipe.weight_decay})
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(recipe.beta1, recipe.beta2), eps=1e-8, fused=True)
    if recipe.optimizer == "adamw":
        return Optimizers(adamw)
    # Queries, keys and values are matrices of their own: as one, Muon ended 0.05 higher (LOG.md).
    kinds = {"attn.c_attn.weight": 3, "attn.c_proj.weight": 1, "mlp.c_fc.weight": 1, "mlp.c_proj.weight": 1}
    stacks = [
        {"params": [p for name, p in matrices.items() if name.endswith(kind)], "pieces": pieces, "peak": recipe.lr}
        for kind, pieces in kinds.items()
    ]
    return Optimizers(adamw, Muon(stacks, recipe.momentum, recipe.weight_decay, ranks))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: all its singular values become about 1 (Jordan et al. 2024).

    torch.optim.Muon does the same one matrix after the other and on every rank; here the matrices of a group, which
    have one shape, are multiplied together, each rank orthogonalises its share, and `step` heeds `found_inf`.
    """

    found_inf: Tensor  # `Optimizers.step` sets it

    def __init__(self, groups: list[dict[str, Any]], momentum: float, weight_decay: float, ranks: Ranks) -> None:
        """`groups` of weights of one shape, each of which is so many `pieces`, matrices above one another."""
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})
        self._ranks = ranks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: the gradients are there
        taken = 1 - self.found_inf
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            grads = torch.stack([p.grad for p in params])  # (L, out, in)
            grads = grads.where(taken > 0, 0)  # NaN times 0 would be NaN
            state = self.state[params[0]]  # the group's moments lie together
            if not state:
                state["momentum"] = torch.zeros_like(grads)
            momentum = state["momentum"].lerp_(grads, taken * (1 - group["momentum"]))
            direction = grads.lerp_(momentum, group["momentum"])  # Nesterov's
            pieces = direction.view(-1, direction.size(1) // group["pieces"], direction.size(2))
            update = self._orthogonalized(pieces).to(direction.dtype).view_as(direction)
            scale = math.sqrt(max(1, pieces.size(1) / pieces.size(2)))  # the same spectral norm for any shape
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"] * taken)
            torch._foreach_add_(params, list((update * (-lr * scale * taken)).unbind(0)))

    def _orthogonalized(self, matrices: Tensor) -> Tensor:
        """Each of the matrices (N, m, n) made orthogonal, every rank doing its share of them."""
        count, world_size = len(matrices), self._ranks.world_size
        if world_size == 1:
            return orthogonalize(matrices)
        share = math.ceil(count / world_size)
        mine = matrices[self._ranks.rank * share :][:share]
        padding = mine.new_zeros(share - len(mine), *mine.shape[1:])
        mine = orthogonalize(torch.cat([mine, padding])).contiguous()  # NCCL takes no transposed view
        everyones = mine.new_empty(share * world_size, *mine.shape[1:])
        dist.all_gather(list(everyones.chunk(world_size)), mine)
        return everyones[:count]


def orthogonalize(matrices: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T of (N, m, n), its singular values 0.7 to 1.2; in bfloat16 on GPUs."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices  # the smaller of both products
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # singular values are at most 1 from here
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
