"""A recipe is a function of model and budget; batch, pieces and rate are functions of the step; each can be set."""

import json
import math
import shutil
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAIN, on_ranks, resolved, train_here

import train
from core.checkpoint import TRAINING_STATE
from core.data.shards import TokenOrder, Windows, open_dataset
from core.distributed import Ranks
from core.files import read_metrics
from core.train.recipe import RECIPES, SETTINGS, Schedule, align_keys
from core.train.setup import micro_batches
from model import GPT, PRESETS

GPT2 = {"shape": PRESETS["gpt2"], "seq_len": 1024}


def speedrun(**options):
    return resolved(**GPT2 | {"recipe": "speedrun"} | options)


def test_the_original_is_the_original():
    config = resolved(**GPT2)
    schedule = Schedule(config)
    assert config.steps == schedule.steps == 19_073
    assert {len(schedule.sequences(step)) for step in range(19_073)} == {512}
    assert schedule.sequences(100) == range(51_200, 51_712)
    assert {schedule.piece(step) for step in range(0, 19_073, 100)} == {1024}
    rates = [6e-4 * schedule.rate(step) for step in range(19_073)]
    assert rates[0] == pytest.approx(6e-4 / 715)
    assert max(rates) == rates[714] == rates[715] == 6e-4
    assert all(a < b for a, b in pairwise(rates[:715]))
    assert all(a > b for a, b in pairwise(rates[715:]))
    assert rates[-1] == pytest.approx(6e-5, rel=1e-6)
    assert rates[715 + 9179] == pytest.approx((6e-4 + 6e-5) / 2)  # half way
    named = {"optimizer": "adamw", "lr": 6e-4, "embed_lr": 6e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
    named |= {"grad_clip": 1.0, "init": "gpt2", "short_tokens": 0}
    assert {name: getattr(config, name) for name in named} == named


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
    ],
)
def test_the_cosine_by_hand(step, expected):
    schedule = Schedule(resolved(steps=100, warmup_steps=20))
    assert schedule.rate(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps, warmup_steps", [(19_073, 715), (38_146, 1430), (2000, 75), (10, 0)])
def test_the_originals_warm_up_scales_with_the_steps(steps, warmup_steps):
    assert resolved(steps=steps).warmup_steps == warmup_steps


@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_no_warm_up_and_nothing_but_warm_up(warmup_steps):
    schedule = Schedule(resolved(steps=10, warmup_steps=warmup_steps))
    rates = [schedule.rate(step) for step in range(10)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[0 if warmup_steps == 0 else -1] == 1.0


def test_a_line_down_over_the_last_part_of_the_tokens():
    """Of a constant batch, that is the last 35 of 100 steps; the last step still learns."""
    config = speedrun(steps=100, first_batch_tokens=65_536, batch_tokens=65_536)
    rates = [Schedule(config).rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])  # never more than a tenth
    assert set(rates[9:66]) == {1.0}
    assert rates[65:] == pytest.approx([(100 - step) / 35 for step in range(65, 100)])


def test_the_batch_doubles_each_time_the_tokens_seen_are_fourfold():
    config = speedrun()
    schedule = Schedule(config)
    sizes = [1024 * len(schedule.sequences(step)) for step in range(config.steps)]
    assert Counter(sizes[:5000]) == {16_384: 160, 32_768: 240, 65_536: 480, 131_072: 960, 262_144: 1920, 524_288: 1240}
    assert sizes == sorted(sizes)
    doubled = [schedule.tokens(step) for step in range(1, 5000) if sizes[step] > sizes[step - 1]]
    assert doubled == [160 * 16_384 * 4**n for n in range(5)]
    assert sum(sizes) == config.tokens <= 10**10 < config.tokens + 524_288


@pytest.mark.parametrize("options", [{}, {"tokens": 3_000_000}, {"steps": 700}, {"recipe": "original", "steps": 9}])
def test_steps_take_all_sequences_once_and_in_order(options):
    config = speedrun(**options)
    schedule, seen = Schedule(config), 0
    for step in range(min(config.steps, 3000)):
        assert schedule.tokens(step) == 1024 * seen
        assert schedule.sequences(step).start == seen
        seen = schedule.sequences(step).stop
    assert config.steps > 3000 or 1024 * seen == config.tokens


@pytest.mark.parametrize("tokens", [10_000, 1_000_000, 2_621_440, 2_654_207, 2_654_208, 20_000_000, 10**9])
def test_the_steps_are_as_many_whole_ones_as_the_tokens_take(tokens):
    config = speedrun(tokens=tokens, first_batch_tokens=8192)
    schedule = Schedule(config)
    last = len(schedule.sequences(config.steps)) * 1024
    assert config.tokens == schedule.tokens(config.steps) <= tokens < config.tokens + last


def test_sequences_are_cut_in_pieces_for_the_first_tokens():
    config = speedrun(tokens=100_000_000)
    schedule = Schedule(config)
    pieces = [schedule.piece(step) for step in range(config.steps)]
    assert set(pieces) == {256, 1024}
    first_whole = pieces.index(1024)
    assert schedule.tokens(first_whole - 1) < config.short_tokens <= schedule.tokens(first_whole)
    assert set(pieces[first_whole:]) == {1024}
    assert speedrun(tokens=10_000_000).short_tokens == pytest.approx(4_000_000, rel=0.01)  # never more than 0.4
    assert schedule.shapes(0) == [(16, 256), (32, 256), (64, 256), (64, 1024), (128, 1024)]
    assert schedule.shapes(config.steps - 1) == [(128, 1024)]


def test_pieces_hold_the_tokens_that_whole_sequences_would(world):
    """And every target, the pieces' last ones too."""
    dataset = open_dataset(world / "data/small")
    windows = Windows(dataset, "train", 64)
    order = TokenOrder(dataset.manifest_hash, 5, 64, len(windows))
    batches = {}
    for piece in (16, 64):
        config = resolved(batch_tokens=512, micro_batch=4, steps=3, short_tokens=1100, short_seq_len=piece)
        ranks = Ranks(0, 1, torch.device("cpu"))
        batches[piece] = list(micro_batches(config, Schedule(config), ranks, windows, order, 2))
    assert [tokens.shape for tokens in batches[16][0]] == [(16, 16)] * 2
    for cut, whole in zip(batches[16], batches[64], strict=True):
        assert all(torch.equal(a.view(4, 64), b) for a, b in zip(cut, whole, strict=True))


def test_the_tied_heads_rate_falls_with_width_and_muons_does_not():
    rates = {name: speedrun(shape=PRESETS[name], seq_len=64) for name in ("tiny", "gpt2", "gpt2-xl")}
    assert {config.lr for config in rates.values()} == {0.022}
    assert [config.embed_lr for config in rates.values()] == [3e-3, 3e-3, pytest.approx(3e-3 * 768 / 1600)]


@pytest.mark.parametrize("name", ["gpt2", "demo", "tiny"])
def test_sequences_are_as_long_as_the_context_unless_said(name):
    assert resolved(shape=PRESETS[name], seq_len=None).seq_len == PRESETS[name].n_positions
    assert resolved(shape=PRESETS[name], seq_len=32).seq_len == 32
    with pytest.raises(ValueError, match=f"passes the context of {name}"):
        resolved(shape=PRESETS[name], seq_len=PRESETS[name].n_positions + 1)


def test_every_value_can_be_set_and_is_in_run_json(world):
    given = {"optimizer": "adamw", "lr": 0.001, "embed_lr": 0.003, "beta1": 0.7, "beta2": 0.9, "momentum": 0.5}
    given |= {"weight_decay": 0.3, "grad_clip": 0.5, "lr_schedule": "cosine", "warmup_steps": 1, "decay_fraction": 0.2}
    given |= {"final_lr_fraction": 0.3, "batch_tokens": 1024, "first_batch_tokens": 512, "short_seq_len": 32}
    given |= {"short_tokens": 600, "init": "gpt2", "steps": 3}
    assert given.keys() == set(SETTINGS)
    command = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    base = ("--data", "data/small", "--preset", "tiny", "--seq-len", 64, "--device", "cpu", "--val-tokens", 640)
    train_here(*base, "--recipe", "speedrun", *command, "--run", "all-set", cwd=world)
    facts = json.loads((world / "logs/all-set/run.json").read_text())
    assert {name: facts[name] for name in given} == given
    assert facts["recipe"] == "speedrun"
    assert facts["tokens"] == 3 * 512


def test_both_recipes_run_with_their_values(world):
    command = (*TRAIN[:4], "--device", "cpu", "--data", "data/small", "--val-tokens", 2560, "--tokens", 8192)
    for name in RECIPES:
        small = ("--batch-tokens", 4096) if name == "original" else ("--first-batch-tokens", 512)
        train_here(*command, *small, "--recipe", name, "--run", name, cwd=world)
        facts = json.loads((world / "logs" / name / "run.json").read_text())
        assert facts["optimizer"] == RECIPES[name]["optimizer"]
        assert None not in [facts[setting] for setting in SETTINGS]


def test_another_optimizer_has_its_own_rate():
    """A rate means another thing to each: AdamW at Muon's would diverge."""
    for recipe in RECIPES:
        assert resolved(recipe=recipe, optimizer="adamw", steps=9).lr == 6e-4
        assert resolved(recipe=recipe, optimizer="muon", steps=9).lr == 0.022
        assert resolved(recipe=recipe, optimizer="muon", lr=0.5, steps=9).lr == 0.5
    assert resolved(optimizer="muon", lr=0.5, steps=9).embed_lr == 6e-4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta1": 1.0}, "--beta1 1.0 must be below 1"),
        ({"beta2": 1.0}, "--beta2 1.0 must be below 1"),
        ({"momentum": 1.0}, "--momentum 1.0 must be below 1"),
        ({"short_tokens": 10_000, "short_seq_len": 16, "tokens": 8192, "batch_tokens": 2048}, "leaves none of 8192"),
    ],
)
def test_values_that_would_teach_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        resolved(**options)


def test_aligned_keys_are_the_queries_and_all_else_is_as_drawn():
    model, drawn = GPT(PRESETS["tiny"], seed=3), GPT(PRESETS["tiny"], seed=3)
    align_keys(model)
    width = model.config.n_embd
    for name, p in model.named_parameters():
        wanted = dict(drawn.named_parameters())[name].detach().clone()
        if name.endswith("c_attn.weight"):
            wanted[width : 2 * width] = wanted[:width]
        assert torch.equal(p, wanted), name
    config = resolved(recipe="speedrun", preset="tiny", steps=9)
    dataset = SimpleNamespace(vocab_size=PRESETS["tiny"].vocab_size)
    block = train.load_model(config, dataset, None).transformer.h[0].attn.c_attn.weight
    assert torch.equal(block[width : 2 * width], block[:width])


def test_two_ranks_share_each_step_while_batch_and_pieces_grow(world, monkeypatch):
    monkeypatch.setattr("core.train.recipe.FIRST_PHASE", 4)
    dataset = open_dataset(world / "data/small")
    windows = Windows(dataset, "train", 64)
    order = TokenOrder(dataset.manifest_hash, 5, 64, len(windows))
    grown = {"recipe": "speedrun", "first_batch_tokens": 128, "batch_tokens": 512, "short_seq_len": 16, "steps": 12}
    config = resolved(**grown, micro_batch=2, world_size=2)
    schedule = Schedule(config)
    assert len(schedule.shapes(0)) > 3

    def rows(rank, world_size, step):
        ranks = Ranks(rank, world_size, torch.device("cpu"))
        batches = micro_batches(config, schedule, ranks, windows, order, step)
        return [tuple(row) for inputs, _ in batches for row in inputs.tolist()]

    for step in range(config.steps):
        alone, shared = rows(0, 1, step), [rows(rank, 2, step) for rank in (0, 1)]
        assert len(shared[0]) == len(shared[1])
        assert sorted(alone) == sorted(shared[0] + shared[1])


def test_a_run_that_was_cut_in_two_ends_bit_for_bit(world, monkeypatch):
    """Where batch and pieces have changed before and after."""
    monkeypatch.setattr("core.train.recipe.FIRST_PHASE", 4)
    command = (*TRAIN[:4], "--device", "cpu", "--data", "data/small", "--val-tokens", 640, "--recipe", "speedrun")
    command += ("--first-batch-tokens", 512, "--short-seq-len", 16, "--steps", 14, "--save-every", 6, "--run", "grown")
    train_here(*command, cwd=world)
    last = world / "logs/grown/checkpoints/step_000014"
    whole, state = last / "model.safetensors", last / TRAINING_STATE
    expected, moments = whole.read_bytes(), torch.load(state, weights_only=True)["optimizer"]["Muon"]["state"]
    lines = read_metrics(world / "logs/grown")
    shutil.rmtree(last)
    shutil.rmtree(world / "logs/grown/checkpoints/step_000012")
    train_here(*command, cwd=world)
    assert whole.read_bytes() == expected
    again = torch.load(state, weights_only=True)["optimizer"]["Muon"]["state"]
    assert all(torch.equal(moments[i]["momentum"], again[i]["momentum"]) for i in moments)
    tokens = [line["tokens"] for line in read_metrics(world / "logs/grown") if line["split"] == "train"]
    assert tokens == [line["tokens"] for line in lines if line["split"] == "train"]
    assert [b - a for a, b in pairwise(tokens)] == [512] * 3 + [1024] * 6 + [2048] * 4


def test_two_ranks_learn_what_one_does(world):
    command = (*TRAIN[:4], "--device", "cpu", "--data", "data/small", "--val-tokens", 2560, "--recipe", "speedrun")
    command += ("--first-batch-tokens", 256, "--short-seq-len", 16, "--steps", 40)
    train_here(*command, "--run", "muon-alone", cwd=world)
    on_ranks(2, "train.py", *command, "--run-name", "muon-shared", cwd=world)
    names = ("muon-alone", "muon-shared")
    alone, shared = ([line["loss"] for line in read_metrics(world / "logs" / name)] for name in names)
    assert shared == pytest.approx(alone, rel=1e-3)
    assert alone[-1] < alone[0] - 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokens": 0}, "--tokens 0 must be above 0"),
        ({"tokens": 100}, "--tokens 100 is less than the first step's 16384"),
        ({"batch_tokens": 49_152}, "--batch-tokens 49152 is not --first-batch-tokens 16384 times a power of two"),
        ({"short_seq_len": 100}, "--short-seq-len 100 doesn't divide --seq-len 1024"),
        ({"short_seq_len": 0}, "--short-seq-len 0 must be above 0"),
        ({"first_batch_tokens": 1536, "batch_tokens": 3072}, "--first-batch-tokens 1536 is no multiple of --seq-len"),
        ({"beta1": 1.5}, "--beta1 1.5 must lie between 0 and 1"),
        ({"embed_lr": 0.0}, "--embed-lr 0.0 must be above 0"),
        ({"short_tokens": -1}, "--short-tokens -1 must lie between"),
    ],
)
def test_values_that_fit_nothing_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        speedrun(**options)


@pytest.mark.parametrize("ranks, first, most", [(32, 32_768, 524_288), (6, 12_288, 393_216), (640, 655_360, 655_360)])
def test_ranks_that_the_first_batch_does_not_divide_among(ranks, first, most):
    wanted = (
        rf"--first-batch-tokens 16384 is no multiple .* {ranks} ranks = \d+: take {first}, and --batch-tokens {most}; "
        r"a run begun with 16384 goes on with at most 16 ranks$"
    )
    with pytest.raises(ValueError, match=wanted):
        speedrun(world_size=ranks)
    speedrun(world_size=ranks, first_batch_tokens=first, batch_tokens=most)
