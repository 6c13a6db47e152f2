"""The learning rate follows GPT-3's schedule, and AdamW decays matrices alone."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import train
from core.distributed import Ranks
from core.optim import adamw, learning_rate, set_learning_rate
from core.shards import open_dataset
from model import GPT, PRESETS

RECIPE = {"steps": 19_073, "warmup_steps": 715, "peak": 6e-4, "final_fraction": 0.1}


# Half a cosine over 100 - 20 = 80 steps, from 1 down to 0.1; cos(pi/4) is sqrt(2)/2, cos(pi/3) is 1/2.
@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 1 / 20),  # the first step already learns
        (9, 10 / 20),
        (19, 1.0),
        (20, 1.0),
        (40, 0.1 + 0.9 * (1 + math.sqrt(2) / 2) / 2),
        (60, 0.55),
        (100, 0.1),
        (1000, 0.1),
    ],
)
def test_points_computed_by_hand(step, expected):
    rate = learning_rate(step, steps=100, warmup_steps=20, peak=1.0, final_fraction=0.1)
    assert rate == pytest.approx(expected, rel=1e-12)


def test_the_recipe_rises_to_its_peak_and_falls_to_a_tenth():
    rates = [learning_rate(step, **RECIPE) for step in range(19_073)]
    assert rates[0] == pytest.approx(6e-4 / 715)
    assert max(rates) == rates[714] == rates[715] == 6e-4
    assert all(a < b for a, b in pairwise(rates[:715]))
    assert all(a > b for a, b in pairwise(rates[715:]))
    assert rates[-1] == pytest.approx(6e-5, rel=1e-6)
    assert rates[715 + 9179] == pytest.approx((6e-4 + 6e-5) / 2)  # half way


@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_no_warm_up_and_nothing_but_warm_up(warmup_steps):
    rates = [learning_rate(step, 10, warmup_steps, 1.0, 0.1) for step in range(10)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[0 if warmup_steps == 0 else -1] == 1.0


@pytest.mark.parametrize("steps, warmup_steps", [(19_073, 715), (38_146, 1430), (2000, 75), (10, 0)])
def test_the_default_warm_up_scales_with_the_steps(world, steps, warmup_steps):
    config = train.Config(preset="tiny", seq_len=64, batch_tokens=2048, micro_batch=16, steps=steps)
    ranks = Ranks(0, 1, torch.device("cpu"))
    assert train.resolve(config, open_dataset(world / "data/small"), ranks).warmup_steps == warmup_steps


def test_matrices_decay_and_vectors_do_not():
    model = GPT(replace(PRESETS["tiny"], vocab_size=663))
    optimizer = adamw(model, weight_decay=0.1, betas=(0.9, 0.95))
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    name_of = {id(p): name for name, p in model.named_parameters()}
    names = [[name_of[id(p)] for p in group["params"]] for group in (decayed, free)]
    assert sorted(names[0] + names[1]) == sorted(name_of.values())  # each once: the tied head is no second weight
    assert all(name.endswith(".weight") and ".ln_" not in name for name in names[0])
    assert all(name.endswith(".bias") or ".ln_" in name for name in names[1])
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


def test_a_step_without_gradient_shrinks_matrices_by_rate_times_decay():
    model = GPT(replace(PRESETS["tiny"], vocab_size=663))
    optimizer = adamw(model, weight_decay=0.1, betas=(0.9, 0.95))
    set_learning_rate(optimizer, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.dim() >= 2 else 1.0))
