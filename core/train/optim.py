"""The optimizers: AdamW, and Muon for the matrices of the blocks, its work shared among the ranks."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.distributed import Ranks
from core.train.depth import idle_blocks
from core.train.recipe import Recipe
from model import GPT

# Newton-Schulz iteration of Jordan et al. 2024 (kellerjordan.github.io/posts/muon): x -> a x + b x^3 + c x^5.
NEWTON_SCHULZ, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class OptimizerGroup:
    """The optimizers of a model as one. Each parameter group has an `initial_lr`, the peak of its learning rate."""

    def __init__(self, *members: torch.optim.Optimizer) -> None:
        """Raises ValueError for a member that can't skip a step whose gradient isn't finite."""
        for member in members:
            # The contract of torch's fused optimizers: `step` changes nothing where `found_inf` is 1.
            if not getattr(member, "_step_supports_amp_scaling", False):
                raise ValueError(
                    f"{type(member).__name__} can't skip a step: it must support `found_inf`. Use fused=True, or make "
                    f"`step` leave weights and state unchanged where `found_inf` is 1 (gradients can be NaN there) and "
                    f"set `_step_supports_amp_scaling`"
                )
        self.members = members

    def set_lr(self, scale: float) -> None:
        """Set the learning rates of the next step, as a fraction of their peaks."""
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = scale * group["initial_lr"]

    def step(self, skip: Tensor) -> None:
        """Update all weights. Where `skip`, a scalar on the device, is 1, weights and moments stay; no host sync."""
        for member in self.members:
            member.found_inf = skip  # type: ignore[attr-defined]
            member.step()

    def zero_grad(self) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=True)

    @property
    def state_bytes(self) -> int:
        """Memory of the moments that are allocated."""
        states = [state for member in self.members for state in member.state.values()]
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))

    @property
    def _names(self) -> list[str]:
        """Of the members in a checkpoint: their classes; the second AdamW is AdamW.1."""
        names = [type(member).__name__ for member in self.members]
        return [f"{name}.{n}" if (n := names[:i].count(name)) else name for i, name in enumerate(names)]

    def state_dict(self) -> dict[str, Any]:
        return {name: member.state_dict() for name, member in zip(self._names, self.members, strict=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the moments; hyperparameters stay those of the recipe, which a resumed run must not change."""
        for name, member in zip(self._names, self.members, strict=True):
            own = member.state_dict()
            member.load_state_dict(own | {"state": state[name]["state"]})


def build_optimizer(model: GPT, recipe: Recipe, ranks: Ranks) -> OptimizerGroup:
    """The optimizers of a resolved recipe.

    Raises ValueError for an unknown name, and where a trainable parameter is in no parameter group or in several.
    """
    if recipe.optimizer not in OPTIMIZERS:
        raise ValueError(f"--optimizer {recipe.optimizer} is unknown. Choose from {', '.join(OPTIMIZERS)}")
    group = OptimizerGroup(*OPTIMIZERS[recipe.optimizer](model, recipe, ranks))
    check_coverage(model, group)
    return group


def loss_scaler(dtype: str, ranks: Ranks) -> torch.amp.GradScaler:
    """Scales the loss of float16 training, whose small gradients would become zero (Micikevicius et al. 2018)."""
    return torch.amp.GradScaler(ranks.device.type, enabled=dtype == "float16")


def check_coverage(model: torch.nn.Module, optimizer: OptimizerGroup) -> None:
    """Raise ValueError, naming the parameter, unless each trainable one is in exactly one parameter group."""
    in_groups = [id(p) for member in optimizer.members for group in member.param_groups for p in group["params"]]
    for name, p in model.named_parameters():
        count = in_groups.count(id(p))
        if p.requires_grad and count != 1:
            where = "no parameter group" if count == 0 else f"{count} parameter groups"
            raise ValueError(f"parameter {name} {tuple(p.shape)} is in {where}. Put it into one in core/train/optim.py")


def adamw(model: GPT, recipe: Recipe, matrices: Iterable[Tensor] = ()) -> torch.optim.Optimizer:
    """AdamW for `matrices`, embeddings, and vectors (biases and LayerNorm gains), which don't decay."""
    in_blocks = {id(p) for p in model.transformer.h.parameters()}
    embeddings = [p for p in model.parameters() if p.dim() == 2 and id(p) not in in_blocks]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": embeddings, "initial_lr": recipe.embed_lr, "weight_decay": recipe.weight_decay},
        {"params": vectors, "initial_lr": recipe.embed_lr, "weight_decay": 0.0},
    ]
    if matrices := list(matrices):
        groups.append({"params": matrices, "initial_lr": recipe.lr, "weight_decay": recipe.weight_decay})
    return torch.optim.AdamW(groups, lr=0.0, betas=(recipe.beta1, recipe.beta2), eps=1e-8, fused=True)


def build_adamw(model: GPT, recipe: Recipe, _ranks: Ranks) -> list[torch.optim.Optimizer]:
    return [adamw(model, recipe, [p for p in model.transformer.h.parameters() if p.dim() == 2])]


def build_muon(model: GPT, recipe: Recipe, ranks: Ranks) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    idle = {id(p) for block in idle_blocks(model) for p in block.parameters()} if recipe.shallow_fraction else set()
    # By name within the block and by shape; those of idle blocks by themselves, as they have no gradients at first.
    stacks: dict[tuple[str, torch.Size, bool], list[Tensor]] = {}
    for name, p in model.transformer.h.named_parameters():
        if p.dim() == 2 and p.requires_grad:
            stacks.setdefault((name.partition(".")[2], p.shape, id(p) in idle), []).append(p)
    # Queries, keys and values are three matrices: as one, the final loss was 0.05 higher (LOG.md).
    groups = [
        {"params": params, "splits": 3 if name == "attn.c_attn.weight" else 1, "initial_lr": recipe.lr}
        for (name, _, _), params in stacks.items()
    ]
    muon = Muon(groups, momentum=recipe.momentum, weight_decay=recipe.weight_decay, ranks=ranks)
    return [adamw(model, recipe), muon]


# The choices of --optimizer. Each also needs a learning rate in core/train/recipe.py.
OPTIMIZERS: dict[str, Callable[[GPT, Recipe, Ranks], list[torch.optim.Optimizer]]] = {
    "adamw": build_adamw,
    "muon": build_muon,
}


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with an orthogonalized update, whose singular values are about 1 (Jordan et al. 2024).

    torch.optim.Muon computes the same one matrix at a time and on every rank. Here the matrices of a group, which have
    one shape, are multiplied as a batch, `step` supports `found_inf`, and each rank has a share of the matrices: it
    keeps their momentum and computes their update. `state_dict` and `load_state_dict` have the momentum of all.
    """

    found_inf: Tensor  # set by OptimizerGroup.step: 1 where the step is to be skipped
    _step_supports_amp_scaling = True

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, weight_decay: float, ranks: Ranks) -> None:
        """`groups` hold weights of one shape (out, in), each of which is `splits` matrices stacked along `out`."""
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})
        self._ranks = ranks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: the gradients exist
        keep = 1 - self.found_inf  # 0 where the step is to be skipped
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            if all(p.grad is None for p in params):  # of idle blocks
                continue
            own = [params[i] for i in self._share(len(params))]
            grads = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in own])  # (l, out, in)
            grads = grads.where(keep > 0, 0)  # NaN times 0 is NaN
            state = self.state[params[0]]  # one tensor for all matrices of the share
            if not state:
                state["momentum"] = torch.zeros_like(grads)
            momentum = state["momentum"].lerp_(grads, keep * (1 - group["momentum"]))
            direction = grads.lerp_(momentum, group["momentum"])  # Nesterov
            matrices = direction.view(-1, direction.size(1) // group["splits"], direction.size(2))  # (n, m, k)
            update = self._all_gather(orthogonalize(matrices).reshape(direction.shape))[: len(params)]  # (L, out, in)
            scale = math.sqrt(max(1, matrices.size(1) / matrices.size(2)))  # equal spectral norm for all shapes
            factor = (-lr * scale * keep).view(1)  # of one dimension: the product of bfloat16 with it is float32
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"] * keep)
            torch._foreach_add_(params, list((update * factor).unbind(0)))

    def _share(self, count: int) -> list[int]:
        """The indices of this rank's matrices among `count`; all ranks have equally many, the last ones repeated."""
        size = math.ceil(count / self._ranks.world_size)
        return [min(i, count - 1) for i in range(self._ranks.rank * size, (self._ranks.rank + 1) * size)]

    def _all_gather(self, own: Tensor) -> Tensor:
        """The shares (l, out, in) of all ranks, concatenated."""
        if self._ranks.world_size == 1:
            return own
        gathered = own.new_empty(len(own) * self._ranks.world_size, *own.shape[1:])
        dist.all_gather(list(gathered.chunk(self._ranks.world_size)), own.contiguous())  # NCCL accepts no views
        return gathered

    def state_dict(self) -> dict[str, Any]:
        """As of any number of ranks. All ranks must call it."""
        packed = super().state_dict()
        counts = {group["params"][0]: len(group["params"]) for group in packed["param_groups"]}
        momenta = {i: self._all_gather(state["momentum"])[: counts[i]] for i, state in packed["state"].items()}
        return packed | {"state": {i: {"momentum": momentum} for i, momentum in momenta.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["momentum"] = state["momentum"][self._share(len(state["momentum"]))]


def orthogonalize(matrices: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T in (N, m, n), with singular values of 0.7 to 1.2; in bfloat16 on GPUs."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices  # the Gram matrix is the smaller of the two
    norm = torch.linalg.matrix_norm(x, keepdim=True) + 1e-7
    x = torch.div(x, norm, out=torch.empty_like(x, dtype=torch.bfloat16 if x.is_cuda else x.dtype))  # norm at most 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
