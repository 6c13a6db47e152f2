"""Muon makes its updates orthogonal, shared among ranks or not; decay and rates reach the weights they should."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import on_ranks, resolved

from core.distributed import Ranks
from core.train.optim import Optimizers, optimizers, orthogonalize
from model import GPT, PRESETS

CPU = Ranks(0, 1, torch.device("cpu"))
SMALL = replace(PRESETS["tiny"], vocab_size=663)
TAKEN = torch.zeros(())
# Ranks' own updates of the same gradients, and the weights after them.
SHARED = """
import hashlib, torch
import torch.distributed as dist
from core.distributed import process_group
from core.train.optim import optimizers
from core.train.recipe import resolve
from model import GPT, PRESETS
import train

gather = dist.all_gather_into_tensor

def as_nccl_does(everyones, mine):
    assert everyones.is_contiguous() and mine.is_contiguous(), "NCCL takes no other"
    gather(everyones, mine)

dist.all_gather_into_tensor = as_nccl_does
with process_group("cpu") as ranks:
    config = resolve(train.Config(recipe="speedrun", steps=9), PRESETS["tiny"], 1, 1)
    model = GPT(PRESETS["tiny"])
    optimizer = optimizers(model, config, ranks)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.set_rate(1.0)
        optimizer.step(skip=torch.zeros(()))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    digests = ranks.all_gather(hashlib.sha256(weights.numpy().tobytes()).hexdigest())
    assert len(set(digests)) == 1, digests
    if ranks.is_main:
        torch.save(weights, OUT)
"""


def made(seed=0, **options):
    model = GPT(SMALL, seed)
    return model, optimizers(model, resolved(steps=9, **options), CPU)


def with_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", [(48, 48), (32, 128), (128, 32)])
def test_singular_values_become_one_and_their_vectors_stay(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    found = u.mT @ orthogonalize(matrices) @ vt.mT
    diagonal = found.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found, torch.diag_embed(diagonal))  # the same singular vectors
    reached = diagonal[s / torch.linalg.matrix_norm(matrices)[:, None] > 0.01]  # smaller ones take more iterations
    assert len(reached) > 60
    assert reached.min() > 0.65 and reached.max() < 1.25


def test_muon_takes_torchs_steps_on_each_matrix():
    """torch's own computes in bfloat16, so that updates agree by its rounding: 2**-8 of their size, iterated."""
    model, ours = made(recipe="speedrun", weight_decay=0.1)
    twin = GPT(SMALL, 0)
    pieces, width = {}, SMALL.n_embd
    for name, p in twin.transformer.h.named_parameters():
        if p.dim() == 2:
            parts = p.detach().split(width) if "c_attn" in name else [p.detach()]
            pieces[name] = [torch.nn.Parameter(part.clone()) for part in parts]
    settings = {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True, "adjust_lr_fn": "original"}
    theirs = torch.optim.Muon([part for parts in pieces.values() for part in parts], lr=0.022, **settings)
    ours.set_rate(1.0)
    for step in range(4):
        with_gradients(model, step)
        for name, p in model.transformer.h.named_parameters():
            grads = p.grad.split(width if "c_attn" in name else len(p))
            for part, grad in zip(pieces.get(name, []), grads, strict=False):
                part.grad = grad
        ours.step(skip=TAKEN)
        theirs.step()
    begun = dict(twin.transformer.h.named_parameters())
    for name, p in model.transformer.h.named_parameters():
        if p.dim() == 2:
            update, wanted = p - begun[name], torch.cat(pieces[name]) - begun[name]
            assert (update - wanted).norm() < 0.03 * wanted.norm(), name


def test_the_first_update_has_the_size_that_the_rate_says():
    """A square matrix moves by its rate times an orthogonal one; a tall one by sqrt(out / in) of that."""
    model, optimizer = made(recipe="speedrun", lr=0.5, weight_decay=0.0)
    before = weights_of(model)
    with_gradients(model, 3)
    optimizer.set_rate(0.1)
    optimizer.step(skip=TAKEN)
    block = model.transformer.h[0]
    for name, weight, scale in (
        ("attn.c_proj", block.attn.c_proj.weight, 1.0),
        ("mlp.c_fc", block.mlp.c_fc.weight, 2.0),
    ):
        moved = weight.detach() - before[f"transformer.h.0.{name}.weight"]
        sizes = torch.linalg.svdvals(moved)
        assert sizes.median() == pytest.approx(0.05 * scale, rel=0.3), name


def test_ranks_that_share_the_work_take_the_same_step(tmp_path):
    """Three ranks don't divide the two layers' matrices: the last one's share is padded."""
    exec(SHARED, {"OUT": tmp_path / "one.pt"})
    script = tmp_path / "many.py"
    script.write_text(SHARED.replace("OUT", "'many.pt'"))
    on_ranks(3, script, cwd=tmp_path)
    one, many = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "many"))
    torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_leaves_weights_and_moments_bit_for_bit(optimizer):
    model, ours = made(recipe="speedrun", optimizer=optimizer)
    other, theirs = made(recipe="speedrun", optimizer=optimizer)
    for step, bad in enumerate([False, True, False]):
        for part, parts in ((model, ours), (other, theirs)):
            if bad and part is other:
                continue  # it never sees the bad step
            with_gradients(part, step)
            if bad:
                for p in part.parameters():
                    p.grad.fill_(math.nan)
            parts.set_rate(0.5)
            parts.step(skip=TAKEN + bad)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_saved_state_goes_on_bit_for_bit():
    model, optimizer = made(recipe="speedrun")
    for step in range(4):
        if step == 2:
            state, weights = optimizer.state_dict(), weights_of(model)
            model, optimizer = made(seed=9, recipe="speedrun")
            optimizer.load_state_dict(state)
            model.load_state_dict(weights)
        with_gradients(model, step)
        optimizer.set_rate(1 / (step + 1))
        optimizer.step(skip=TAKEN)
    whole, optimizer = made(recipe="speedrun")
    for step in range(4):
        with_gradients(whole, step)
        optimizer.set_rate(1 / (step + 1))
        optimizer.step(skip=TAKEN)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def groups_of(model, optimizer: Optimizers):
    names = {id(p): name for name, p in model.named_parameters()}
    return [([names[id(p)] for p in group["params"]], group) for part in optimizer.parts for group in part.param_groups]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_weight_has_one_optimizer_its_rate_and_its_decay(name):
    model, optimizer = made(recipe="speedrun", optimizer=name, lr=0.01, embed_lr=0.002, weight_decay=0.3)
    groups = groups_of(model, optimizer)
    assert sorted(weight for names, _ in groups for weight in names) == sorted(dict(model.named_parameters()))
    for names, group in groups:
        for weight in names:
            is_matrix = ".h." in weight and weight.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            decays = is_matrix or "wte" in weight or "wpe" in weight
            assert group["peak"] == (0.01 if is_matrix else 0.002), weight
            assert group["weight_decay"] == (0.3 if decays else 0.0), weight


def test_the_original_is_adamw_with_one_rate_that_decays_matrices_alone():
    model, optimizer = made(lr=0.5)
    assert [type(part) for part in optimizer.parts] == [torch.optim.AdamW]
    assert {group["peak"] for _, group in groups_of(model, optimizer)} == {0.5}
    assert {group["betas"] for _, group in groups_of(model, optimizer)} == {(0.9, 0.95)}
    before = weights_of(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.set_rate(1.0)
    optimizer.step(skip=TAKEN)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.dim() >= 2 else 1.0))
