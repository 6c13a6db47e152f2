"""Muon orthogonalizes its updates, on any number of ranks. Each weight has one optimizer, learning rate and decay."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import TRAIN, on_ranks, resolved, train_here
from safetensors.torch import load_file
from torch import nn

from core.distributed import Ranks
from core.train import optim
from core.train.optim import OptimizerGroup, build_optimizer, orthogonalize
from model import GPT, PRESETS, Block

CPU = Ranks(0, 1, torch.device("cpu"))
SMALL = replace(PRESETS["tiny"], vocab_size=663)
NO_SKIP = torch.zeros(())
# Each rank updates its own weights with the same gradients; all must end with the same weights.
SHARED = """
import hashlib, torch
import torch.distributed as dist
from core.distributed import process_group
from core.train.optim import build_optimizer
from core.train.recipe import resolve_recipe
from model import GPT, PRESETS

all_gather = dist.all_gather

def all_gather_as_nccl(outputs, own):
    assert own.is_contiguous() and all(output.is_contiguous() for output in outputs), "NCCL requires this"
    all_gather(outputs, own)

dist.all_gather = all_gather_as_nccl
with process_group("cpu") as ranks:
    recipe = resolve_recipe("speedrun", PRESETS["tiny"], tokens=10**10, steps=9)
    model = GPT(PRESETS["tiny"])
    optimizer = build_optimizer(model, recipe, ranks)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.set_lr(1.0)
        optimizer.step(skip=torch.zeros(()))
        state = optimizer.state_dict()
        optimizer = build_optimizer(model, recipe, ranks)  # as after a resume
        optimizer.load_state_dict(state)
    momenta = [momentum["momentum"] for momentum in state["Muon"]["state"].values()]
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    digests = ranks.all_gather(hashlib.sha256(weights.numpy().tobytes()).hexdigest())
    assert len(set(digests)) == 1, digests
    if ranks.is_main:
        torch.save([weights, *momenta], OUT)
"""


def build(seed=0, **options):
    model = GPT(SMALL, seed)
    return model, build_optimizer(model, resolved(steps=9, **options), CPU)


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def copy_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", [(48, 48), (32, 128), (128, 32)])
def test_orthogonalization_sets_singular_values_to_one_and_keeps_singular_vectors(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    found = u.mT @ orthogonalize(matrices) @ vt.mT
    diagonal = found.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found, torch.diag_embed(diagonal))  # the same singular vectors
    reached = diagonal[s / torch.linalg.matrix_norm(matrices)[:, None] > 0.01]  # smaller ones need more iterations
    assert len(reached) > 60
    assert reached.min() > 0.65 and reached.max() < 1.25


def test_muon_equals_torch_muon_on_each_matrix():
    """torch.optim.Muon computes in bfloat16: updates agree up to its rounding, 2**-8 of their size, iterated."""
    model, optimizer = build(recipe="speedrun", weight_decay=0.1)
    initial = GPT(SMALL, 0)
    matrices, width = {}, SMALL.n_embd
    for name, p in initial.transformer.h.named_parameters():
        if p.dim() == 2:
            splits = p.detach().split(width) if "c_attn" in name else [p.detach()]
            matrices[name] = [nn.Parameter(split.clone()) for split in splits]
    settings = {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True, "adjust_lr_fn": "original"}
    reference = torch.optim.Muon([matrix for splits in matrices.values() for matrix in splits], lr=0.022, **settings)
    optimizer.set_lr(1.0)
    for step in range(4):
        set_gradients(model, step)
        for name, p in model.transformer.h.named_parameters():
            grads = p.grad.split(width if "c_attn" in name else len(p))
            for matrix, grad in zip(matrices.get(name, []), grads, strict=False):
                matrix.grad = grad
        optimizer.step(skip=NO_SKIP)
        reference.step()
    before = dict(initial.transformer.h.named_parameters())
    for name, p in model.transformer.h.named_parameters():
        if p.dim() == 2:
            update, expected = p - before[name], torch.cat(matrices[name]) - before[name]
            assert (update - expected).norm() < 0.03 * expected.norm(), name


def test_first_update_has_the_size_of_the_learning_rate():
    """A square matrix changes by its learning rate times an orthogonal one; a tall one by sqrt(out / in) of that."""
    model, optimizer = build(recipe="speedrun", lr=0.5, weight_decay=0.0)
    before = copy_weights(model)
    set_gradients(model, 3)
    optimizer.set_lr(0.1)
    optimizer.step(skip=NO_SKIP)
    block = model.transformer.h[0]
    for name, weight, scale in (
        ("attn.c_proj", block.attn.c_proj.weight, 1.0),
        ("mlp.c_fc", block.mlp.c_fc.weight, 2.0),
    ):
        update = weight.detach() - before[f"transformer.h.0.{name}.weight"]
        sizes = torch.linalg.svdvals(update)
        assert sizes.median() == pytest.approx(0.05 * scale, rel=0.3), name


def test_ranks_that_share_muon_have_the_weights_and_momenta_of_one_process(tmp_path):
    """Three ranks don't divide the matrices of two layers: the last one repeats a matrix."""
    exec(SHARED, {"OUT": tmp_path / "single.pt"})
    script = tmp_path / "shared.py"
    script.write_text(SHARED.replace("OUT", "'shared.pt'"))
    on_ranks(3, script, cwd=tmp_path)
    single, shared = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("single", "shared"))
    torch.testing.assert_close(shared, single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_skipped_step_changes_no_bit_of_weights_and_moments(name):
    model, optimizer = build(recipe="speedrun", optimizer=name)
    other, other_optimizer = build(recipe="speedrun", optimizer=name)
    for step, bad in enumerate([False, True, False]):
        for trained, its_optimizer in ((model, optimizer), (other, other_optimizer)):
            if bad and trained is other:
                continue  # it has no bad step
            set_gradients(trained, step)
            if bad:
                for p in trained.parameters():
                    p.grad.fill_(math.nan)
            its_optimizer.set_lr(0.5)
            its_optimizer.step(skip=NO_SKIP + bad)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_loaded_state_continues_bit_identically():
    model, optimizer = build(recipe="speedrun")
    for step in range(4):
        if step == 2:
            state, weights = optimizer.state_dict(), copy_weights(model)
            model, optimizer = build(seed=9, recipe="speedrun")
            optimizer.load_state_dict(state)
            model.load_state_dict(weights)
        set_gradients(model, step)
        optimizer.set_lr(1 / (step + 1))
        optimizer.step(skip=NO_SKIP)
    uninterrupted, optimizer = build(recipe="speedrun")
    for step in range(4):
        set_gradients(uninterrupted, step)
        optimizer.set_lr(1 / (step + 1))
        optimizer.step(skip=NO_SKIP)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), uninterrupted.parameters(), strict=True))


def test_two_optimizers_of_one_class_keep_their_own_moments():
    def build_two():
        params = [nn.Parameter(torch.ones(size)) for size in (3, 4)]
        members = [torch.optim.AdamW([{"params": [p], "initial_lr": 0.1}], fused=True) for p in params]
        return params, optim.OptimizerGroup(*members)

    params, group = build_two()
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, i + 1.0)
    group.step(skip=NO_SKIP)
    state = group.state_dict()
    assert list(state) == ["AdamW", "AdamW.1"]
    params, group = build_two()
    group.load_state_dict(state)
    moments = [member.state[p]["exp_avg"] for member, p in zip(group.members, params, strict=True)]
    torch.testing.assert_close(moments, [torch.full((3,), 0.1), torch.full((4,), 0.2)])


def named_groups(model, optimizer):
    """Each parameter group with the names of its weights."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [group for member in optimizer.members for group in member.param_groups]
    return [([names[id(p)] for p in group["params"]], group) for group in groups]


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_each_weight_has_one_optimizer_with_its_learning_rate_and_decay(name):
    model, optimizer = build(recipe="speedrun", optimizer=name, lr=0.01, embed_lr=0.002, weight_decay=0.3)
    groups = named_groups(model, optimizer)
    assert sorted(weight for names, _ in groups for weight in names) == sorted(dict(model.named_parameters()))
    for names, group in groups:
        for weight in names:
            is_matrix = ".h." in weight and dict(model.named_parameters())[weight].dim() == 2
            decays = is_matrix or "wte" in weight or "wpe" in weight
            assert group["initial_lr"] == (0.01 if is_matrix else 0.002), weight
            assert group["weight_decay"] == (0.3 if decays else 0.0), weight


def test_original_is_adamw_with_one_learning_rate_that_decays_only_matrices():
    model, optimizer = build(lr=0.5)
    assert [type(member) for member in optimizer.members] == [torch.optim.AdamW]
    assert {group["initial_lr"] for _, group in named_groups(model, optimizer)} == {0.5}
    assert {group["betas"] for _, group in named_groups(model, optimizer)} == {(0.9, 0.95)}
    before = copy_weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.set_lr(1.0)
    optimizer.step(skip=NO_SKIP)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.dim() >= 2 else 1.0))


def test_unknown_optimizer_is_refused_with_the_choices():
    recipe = replace(resolved(steps=9), optimizer="sgd")
    with pytest.raises(ValueError, match=r"--optimizer sgd .*Choose from adamw, muon"):
        build_optimizer(GPT(SMALL), recipe, CPU)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_new_matrix_of_a_block_is_trained(world, monkeypatch, name):
    class BlockWithMatrix(Block):
        def __init__(self, config):
            super().__init__(config)
            self.extra = nn.Linear(config.n_embd, config.n_embd)

        def forward(self, x, h, next_norm, *args):
            x, _ = super().forward(x, h, next_norm, *args)
            x = x + self.extra(h)
            return x, next_norm(x)

    monkeypatch.setattr("model.Block", BlockWithMatrix)
    command = (*TRAIN, "--data", "data/small", "--val-tokens", 640, "--steps", 4, "--save-every", 1, "--keep", 9)
    train_here(*command, "--optimizer", name, "--run", f"extra-{name}", cwd=world)
    folders = [world / f"logs/extra-{name}/checkpoints/step_00000{step}" for step in (1, 2, 4)]
    first, second, last = (load_file(folder / "model.safetensors") for folder in folders)
    for weight in ("transformer.h.0.extra.weight", "transformer.h.1.extra.weight", "transformer.h.0.extra.bias"):
        assert not torch.equal(first[weight], second[weight]), weight
        assert not torch.equal(second[weight], last[weight]), weight


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_parameter_that_no_group_accepts_is_refused_by_name(monkeypatch, name):
    class BlockWithKernel(Block):
        def __init__(self, config):
            super().__init__(config)
            self.kernel = nn.Parameter(torch.empty(4, 5, 6))

    monkeypatch.setattr("model.Block", BlockWithKernel)
    with pytest.raises(ValueError, match=r"parameter transformer\.h\.0\.kernel \(4, 5, 6\) is in no parameter group"):
        build(optimizer=name)


@pytest.mark.parametrize(
    "index, count, message", [(3, 0, "is in no parameter group"), (3, 2, "is in 2 parameter groups")]
)
def test_builder_that_omits_or_repeats_a_parameter_is_refused_by_its_name(monkeypatch, index, count, message):
    def builder(model, recipe, ranks):
        params = list(model.parameters())
        groups = [{"params": params[:index] + params[index + 1 :], "initial_lr": recipe.lr}]
        groups += [{"params": [params[index]], "initial_lr": recipe.lr}] * count
        return [torch.optim.AdamW([group], fused=True) for group in groups]

    monkeypatch.setitem(optim.OPTIMIZERS, "adamw", builder)
    name, p = list(GPT(SMALL).named_parameters())[index]
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value).startswith(f"parameter {name} {tuple(p.shape)} {message}. ")


def test_frozen_parameter_needs_no_group(monkeypatch):
    class BlockWithTable(Block):
        def __init__(self, config):
            super().__init__(config)
            self.table = nn.Parameter(torch.empty(4, 5, 6), requires_grad=False)

    monkeypatch.setattr("model.Block", BlockWithTable)
    build()


@pytest.mark.parametrize(
    "optimizer, options",
    [(torch.optim.SGD, {"foreach": True}), (torch.optim.AdamW, {"fused": False}), (torch.optim.Adagrad, {})],
)
def test_optimizer_that_cannot_skip_a_step_is_refused(optimizer, options):
    weights = [nn.Parameter(torch.zeros(3))]
    fused = torch.optim.AdamW(weights, fused=True)
    assert OptimizerGroup(fused).members == (fused,)
    message = rf"{optimizer.__name__} can't skip a step: it must support `found_inf`\. Use fused=True"
    with pytest.raises(ValueError, match=message):
        OptimizerGroup(fused, optimizer(weights, lr=0.1, **options))


def test_a_matrix_that_blocks_share_is_updated_once():
    """By an edit of model.py."""
    model = GPT(SMALL)
    model.transformer.h[1].mlp.c_fc = model.transformer.h[0].mlp.c_fc
    for optimizer in optim.OPTIMIZERS:
        build_optimizer(model, resolved(steps=9, optimizer=optimizer), CPU)  # which refuses a parameter in two groups
