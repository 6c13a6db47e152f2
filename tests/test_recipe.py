"""A recipe depends on model and training length; batch, sequence length and learning rate depend on the step."""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import TRAIN, config_of, on_ranks, resolved, tiny_config, train_here

from core.checkpoint import TRAINING_STATE
from core.data.shards import TokenOrder, Windows, open_dataset
from core.distributed import Ranks
from core.files import read_metrics
from core.train.init import align_keys
from core.train.loader import micro_batches
from core.train.optim import OPTIMIZERS
from core.train.recipe import LEARNING_RATES, RECIPES, SETTINGS, resolve_recipe, without_effect
from core.train.schedule import Schedule, Shape
from core.train.setup import load_model, resolve
from model import GPT, PRESETS

GPT2 = {"shape": PRESETS["gpt2"], "seq_len": 1024}


def speedrun(**options):
    return resolved(**GPT2 | {"recipe": "speedrun"} | options)


def test_default_recipe_is_that_of_the_original_project():
    recipe = resolved(**GPT2)
    schedule = Schedule(recipe)
    assert recipe.steps == 19_073
    assert {len(schedule.sequences(step)) for step in range(19_073)} == {512}
    assert schedule.sequences(100) == range(51_200, 51_712)
    assert {schedule.seq_len(step) for step in range(0, 19_073, 100)} == {1024}
    lr = [6e-4 * schedule.lr_scale(step) for step in range(19_073)]
    assert lr[0] == pytest.approx(6e-4 / 715)
    assert max(lr) == lr[714] == lr[715] == 6e-4
    assert all(a < b for a, b in pairwise(lr[:715]))
    assert all(a > b for a, b in pairwise(lr[715:]))
    assert lr[-1] == pytest.approx(6e-5, rel=1e-6)
    assert lr[715 + 9179] == pytest.approx((6e-4 + 6e-5) / 2)  # half of the steps after the warm-up
    named = {"optimizer": "adamw", "lr": 6e-4, "embed_lr": 6e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1}
    named |= {"grad_clip": 1.0, "init": "gpt2", "short_tokens": 0, "long_every": 0}
    assert {name: getattr(recipe, name) for name in named} == named


# Half a cosine over 100 - 20 = 80 steps, from 1 down to 0.1; cos(pi/4) is sqrt(2)/2, cos(pi/3) is 1/2.
@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 1 / 20),  # not 0: the first step changes the weights
        (9, 10 / 20),
        (19, 1.0),
        (20, 1.0),
        (40, 0.1 + 0.9 * (1 + math.sqrt(2) / 2) / 2),
        (60, 0.55),
    ],
)
def test_cosine_has_values_computed_by_hand(step, expected):
    schedule = Schedule(resolved(steps=100, warmup_steps=20))
    assert schedule.lr_scale(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps, warmup_steps", [(19_073, 715), (38_146, 1430), (2000, 75), (10, 0)])
def test_warmup_of_original_scales_with_steps(steps, warmup_steps):
    assert resolved(steps=steps).warmup_steps == warmup_steps


@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_warmup_of_no_step_and_of_all_steps(warmup_steps):
    schedule = Schedule(resolved(steps=10, warmup_steps=warmup_steps))
    scales = [schedule.lr_scale(step) for step in range(10)]
    assert all(0 < scale <= 1 for scale in scales)
    assert scales[0 if warmup_steps == 0 else -1] == 1.0


def test_the_first_batch_is_at_most_the_last_one():
    assert speedrun(steps=100, batch_tokens=8192).first_batch_tokens == 8192


def test_wsd_decays_linearly_over_the_last_fraction_of_tokens():
    """With a constant batch: the last 35 of 100 steps. The last step has a learning rate above 0."""
    recipe = speedrun(steps=100, first_batch_tokens=65_536, batch_tokens=65_536)
    scales = [Schedule(recipe).lr_scale(step) for step in range(100)]
    assert scales[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])  # at most a tenth of the steps
    assert set(scales[9:66]) == {1.0}
    assert scales[65:] == pytest.approx([(100 - step) / 35 for step in range(65, 100)])


def test_batch_doubles_each_time_the_tokens_seen_quadruple():
    recipe = speedrun()
    schedule = Schedule(recipe)
    sizes = [1024 * len(schedule.sequences(step)) for step in range(recipe.steps)]
    assert Counter(sizes[:5000]) == {16_384: 160, 32_768: 240, 65_536: 480, 131_072: 960, 262_144: 1920, 524_288: 1240}
    assert sizes == sorted(sizes)
    doubled = [schedule.tokens(step) for step in range(1, 5000) if sizes[step] > sizes[step - 1]]
    assert doubled == [160 * 16_384 * 4**n for n in range(5)]
    assert sum(sizes) == recipe.tokens <= 10**10 < recipe.tokens + 524_288


@pytest.mark.parametrize("options", [{}, {"tokens": 3_000_000}, {"steps": 700}, {"recipe": "original", "steps": 9}])
def test_steps_use_each_sequence_once_and_in_order(options):
    recipe = speedrun(**options)
    schedule, seen = Schedule(recipe), 0
    for step in range(min(recipe.steps, 3000)):
        assert schedule.tokens(step) == 1024 * seen
        assert schedule.sequences(step).start == seen
        seen = schedule.sequences(step).stop
    assert recipe.steps > 3000 or 1024 * seen == recipe.tokens


@pytest.mark.parametrize("tokens", [10_000, 1_000_000, 2_621_440, 2_654_207, 2_654_208, 20_000_000, 10**9])
def test_number_of_steps_is_the_largest_that_the_tokens_allow(tokens):
    recipe = speedrun(tokens=tokens, first_batch_tokens=8192)
    schedule = Schedule(recipe)
    next_step = len(schedule.sequences(recipe.steps)) * 1024
    assert recipe.tokens == schedule.tokens(recipe.steps) <= tokens < recipe.tokens + next_step


def test_sequences_are_short_for_the_first_tokens_but_for_each_nth_step():
    recipe = speedrun(tokens=100_000_000)
    schedule = Schedule(recipe)
    lengths = [schedule.seq_len(step) for step in range(recipe.steps)]
    short_steps = next(step for step in range(recipe.steps) if schedule.tokens(step) >= recipe.short_tokens)
    assert lengths == [1024 if step % 16 == 15 or step >= short_steps else 256 for step in range(recipe.steps)]
    shorter = speedrun(tokens=20_000_000)
    assert shorter.short_tokens == pytest.approx(8_000_000, rel=0.01)  # at most 0.4 of all
    lengths = [Schedule(shorter).seq_len(step) for step in range(160)]
    assert lengths == [1024 if step % 8 == 7 else 256 for step in range(160)]  # else too few steps train all positions
    assert speedrun(tokens=20_000_000, long_every=16).long_every == 16
    assert speedrun(tokens=40_000_000, short_tokens=22_000_000).long_every == 16
    assert speedrun(tokens=60_000_000, short_tokens=10_000_000).long_every == 8
    for tokens in (1_000_000, 10_000_000):  # every 8th costs loss in such short runs, and the 16th is enough
        assert speedrun(tokens=tokens).long_every == 16
    assert speedrun(tokens=60_000_000, short_tokens=0).long_every == 16
    splits = schedule.splits(0, 1024, 1, shallow=True) + schedule.splits(0, 1024, 1)
    sizes = {(shape.rows * shape.seq_len // 1024, shape.seq_len) for shape, _ in splits}
    assert sizes == {(16, 256), (16, 1024), (32, 256), (32, 1024), (64, 256), (64, 1024), (128, 1024)}
    assert schedule.splits(recipe.steps - 1, 64, 1) == [(Shape(64, 1024, 20_480), 2)]


def test_all_sequences_of_the_first_tokens_can_be_short():
    recipe = speedrun(tokens=100_000_000, long_every=0)
    schedule = Schedule(recipe)
    lengths = [schedule.seq_len(step) for step in range(recipe.steps)]
    first_long = lengths.index(1024)
    assert schedule.tokens(first_long - 1) < recipe.short_tokens <= schedule.tokens(first_long)
    assert set(lengths[first_long:]) == {1024}


def test_short_sequences_contain_the_tokens_and_targets_of_long_ones(world):
    dataset = open_dataset(world / "data/small")
    windows = Windows(dataset, "train", 64)
    order = TokenOrder(dataset.manifest_hash, 5, 64, len(windows))
    batches = {}
    for seq_len in (16, 64):
        recipe = resolved(batch_tokens=512, micro_batch=4, steps=3, short_tokens=1100, short_seq_len=seq_len)
        ranks = Ranks(0, 1, torch.device("cpu"))
        batches[seq_len] = list(micro_batches(Schedule(recipe), 4, ranks, windows, order, 2))
    assert [tokens.shape for tokens in batches[16][0]] == [(16, 16)] * 2
    for short, long in zip(batches[16], batches[64], strict=True):
        assert all(torch.equal(a.view(4, 64), b) for a, b in zip(short, long, strict=True))


def test_speedrun_regularizes_by_repeated_tokens_and_weights_per_unique_token():
    def values(epochs, unique_tokens, **options):
        options |= {"tokens": round(epochs * unique_tokens), "unique_tokens": unique_tokens}
        recipe = speedrun(**options)
        return recipe.weight_decay, recipe.token_dropout

    once = (0.1, 0.0)
    assert values(1, 19_000_000) == values(0.5, 119_000_000) == once
    assert values(8, 19_000_000) == pytest.approx((0.3, 0.1), rel=0.01)  # the point where it was measured
    assert values(16, 19_000_000) == pytest.approx((0.3, 0.1))  # no more than that
    weight_decay, token_dropout = values(4, 119_000_000)
    assert weight_decay == pytest.approx(0.1 + 0.2 * token_dropout / 0.1)
    assert token_dropout == pytest.approx(0.1 * math.sqrt(3 * 123.5e6 / 119e6 / 45.5), rel=0.01)
    medium = values(4, 119_000_000, shape=PRESETS["gpt2-medium"])
    assert once < values(2, 119_000_000) < values(4, 119_000_000) < medium < values(4, 19_000_000)
    assert values(8, 19_000_000, weight_decay=0.05, token_dropout=0.0) == (0.05, 0.0)
    assert values(8, 19_000_000, recipe="original") == (0.1, 0.0)


def test_the_repetition_is_that_of_the_data_folder(world):
    dataset = open_dataset(world / "data/small")
    for epochs, repeats in ((0.5, False), (20, True)):
        tokens = round(epochs * dataset.tokens("train"))
        config = tiny_config(recipe="speedrun", steps=None, tokens=tokens, first_batch_tokens=2048)
        recipe, _ = resolve(config, dataset, Ranks(0, 1, torch.device("cpu")))
        assert (recipe.weight_decay > 0.1, recipe.token_dropout > 0) == (repeats, repeats)


def test_embed_lr_scales_with_width_and_lr_of_muon_does_not():
    recipes = {name: speedrun(shape=PRESETS[name], seq_len=64) for name in ("tiny", "gpt2", "gpt2-xl")}
    assert {recipe.lr for recipe in recipes.values()} == {0.022}
    assert [recipe.embed_lr for recipe in recipes.values()] == [3e-3, 3e-3, pytest.approx(3e-3 * 768 / 1600)]


@pytest.mark.parametrize("name", ["gpt2", "demo", "tiny"])
def test_default_sequence_length_is_the_context(name):
    context = PRESETS[name].n_positions
    assert resolved(shape=PRESETS[name], seq_len=None).seq_len == context
    assert resolved(shape=PRESETS[name], seq_len=32).seq_len == 32
    message = f"--seq-len {context + 1} exceeds the context of {name}. Use --seq-len {context} or less"
    with pytest.raises(ValueError, match=message):
        resolved(shape=PRESETS[name], seq_len=context + 1)


@pytest.mark.parametrize("recipe, first", [("original", 8192), ("speedrun", 2048)])
@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_small_presets_have_small_default_batches(name, recipe, first):
    small = resolved(shape=PRESETS[name], seq_len=None, recipe=recipe)
    assert (small.batch_tokens, small.first_batch_tokens) == (8192, first)
    assert resolved(shape=PRESETS[name], recipe=recipe, batch_tokens=16_384).batch_tokens == 16_384


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_published_sizes_have_a_default_batch_of_524288_tokens(name):
    assert {resolved(recipe=r, shape=PRESETS[name], seq_len=None).batch_tokens for r in RECIPES} == {524_288}


def test_every_value_can_be_set_and_is_recorded_in_run_json(world):
    given = {
        "optimizer": "adamw",
        "lr": 0.001,
        "embed_lr": 0.003,
        "beta1": 0.7,
        "beta2": 0.9,
        "momentum": 0.5,
    }
    given |= {"weight_decay": 0.3, "grad_clip": 0.5, "lr_schedule": "cosine", "warmup_steps": 1, "decay_fraction": 0.2}
    given |= {"final_lr_fraction": 0.3, "batch_tokens": 1024, "first_batch_tokens": 512, "short_seq_len": 32}
    given |= {"short_tokens": 600, "init": "gpt2", "steps": 3, "token_dropout": 0.2, "windows": "fixed"}
    given |= {"long_every": 2, "softmax": "full", "shallow_fraction": 0.25}
    assert given.keys() == set(SETTINGS)
    command = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    base = ("--data", "data/small", "--preset", "tiny", "--seq-len", 64, "--device", "cpu", "--val-tokens", 640)
    train_here(*base, "--recipe", "speedrun", *command, "--run", "all-set", cwd=world)
    facts = json.loads((world / "logs/all-set/run.json").read_text())
    assert {name: facts[name] for name in given} == given
    assert facts["recipe"] == "speedrun"
    assert facts["tokens"] == 3 * 512


def test_both_recipes_train_with_their_values(world):
    command = (*TRAIN[:4], "--device", "cpu", "--data", "data/small", "--val-tokens", 2560, "--tokens", 8192)
    for name in RECIPES:
        small = ("--batch-tokens", 4096) if name == "original" else ("--first-batch-tokens", 512)
        train_here(*command, *small, "--recipe", name, "--run", name, cwd=world)
        facts = json.loads((world / "logs" / name / "run.json").read_text())
        assert facts["optimizer"] == RECIPES[name].optimizer
        assert None not in [facts[setting] for setting in SETTINGS]


def test_learning_rate_follows_the_optimizer():
    """The same number gives each optimizer another step size: AdamW would diverge at the learning rate of Muon."""
    assert OPTIMIZERS.keys() == LEARNING_RATES.keys()
    for recipe in RECIPES:
        assert resolved(recipe=recipe, optimizer="adamw", steps=9).lr == 6e-4
        assert resolved(recipe=recipe, optimizer="muon", steps=9).lr == 0.022
        assert resolved(recipe=recipe, optimizer="muon", lr=0.5, steps=9).lr == 0.5
    assert resolved(optimizer="muon", lr=0.5, steps=9).embed_lr == 6e-4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optimizer": "sgd"}, "--optimizer sgd .*[Cc]hoose from adamw, muon"),
        ({"lr_schedule": "linear"}, "--lr-schedule linear.* choose from cosine, wsd"),
        ({"init": "zeros"}, "--init zeros.* choose from gpt2, aligned"),
    ],
)
def test_unknown_names_are_refused_with_the_choices(options, message):
    with pytest.raises(ValueError, match=message):
        resolve_recipe("original", PRESETS["gpt2"], tokens=10**9, overrides=options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta1": 1.0}, "--beta1 1.0 must be below 1"),
        ({"beta2": 1.0}, "--beta2 1.0 must be below 1"),
        ({"momentum": 1.0}, "--momentum 1.0 must be below 1"),
        (
            {"short_tokens": 10_000, "short_seq_len": 16, "tokens": 8192, "batch_tokens": 2048},
            "--short-tokens 10000 must be less than the 8192 training tokens, .* sequences of 64. Use --short-tokens 0",
        ),
    ],
)
def test_values_that_disable_training_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        resolved(**options)


def test_aligned_initialization_copies_queries_to_keys_and_changes_nothing_else():
    model, unaligned = GPT(PRESETS["tiny"], seed=3), GPT(PRESETS["tiny"], seed=3)
    align_keys(model)
    width = model.config.n_embd
    for name, p in model.named_parameters():
        expected = dict(unaligned.named_parameters())[name].detach().clone()
        if name.endswith("c_attn.weight"):
            expected[width : 2 * width] = expected[:width]
        assert torch.equal(p, expected), name
    dataset = SimpleNamespace(vocab_size=PRESETS["tiny"].vocab_size)
    initial = load_model(config_of(preset="tiny"), resolved(recipe="speedrun", steps=9), dataset, None)
    weight = initial.transformer.h[0].attn.c_attn.weight
    assert torch.equal(weight[width : 2 * width], weight[:width])


def test_two_ranks_share_each_step_while_batch_and_sequences_grow(world, monkeypatch):
    monkeypatch.setattr("core.train.schedule.FIRST_PHASE_STEPS", 4)
    dataset = open_dataset(world / "data/small")
    windows = Windows(dataset, "train", 64)
    order = TokenOrder(dataset.manifest_hash, 5, 64, len(windows))
    grown = {"recipe": "speedrun", "first_batch_tokens": 128, "batch_tokens": 512, "short_seq_len": 16, "steps": 12}
    recipe = resolved(**grown, micro_batch=2, world_size=2)
    schedule = Schedule(recipe)
    assert len(schedule.splits(0, 2, 2)) > 3

    def rows(rank, world_size, step):
        ranks = Ranks(rank, world_size, torch.device("cpu"))
        batches = micro_batches(schedule, 2, ranks, windows, order, step)
        return [tuple(row) for inputs, _ in batches for row in inputs.tolist()]

    for step in range(recipe.steps):
        single, shared = rows(0, 1, step), [rows(rank, 2, step) for rank in (0, 1)]
        assert len(shared[0]) == len(shared[1])
        assert sorted(single) == sorted(shared[0] + shared[1])


def test_interrupted_run_ends_bit_identical(world, monkeypatch):
    """Batch and sequence length change before and after the interruption."""
    monkeypatch.setattr("core.train.schedule.FIRST_PHASE_STEPS", 4)
    command = (*TRAIN[:4], "--device", "cpu", "--data", "data/small", "--val-tokens", 640, "--recipe", "speedrun")
    command += ("--first-batch-tokens", 512, "--short-seq-len", 16, "--steps", 14, "--save-every", 6, "--run", "grown")
    train_here(*command, cwd=world)
    last = world / "logs/grown/checkpoints/step_000014"
    weights, state = last / "model.safetensors", last / TRAINING_STATE
    expected, moments = weights.read_bytes(), torch.load(state, weights_only=True)["optimizer"]["Muon"]["state"]
    lines = read_metrics(world / "logs/grown")
    shutil.rmtree(last)
    shutil.rmtree(world / "logs/grown/checkpoints/step_000012")
    train_here(*command, cwd=world)
    assert weights.read_bytes() == expected
    resumed = torch.load(state, weights_only=True)["optimizer"]["Muon"]["state"]
    assert all(torch.equal(moments[i]["momentum"], resumed[i]["momentum"]) for i in moments)
    tokens = [line["tokens"] for line in read_metrics(world / "logs/grown") if line["split"] == "train"]
    assert tokens == [line["tokens"] for line in lines if line["split"] == "train"]
    assert [b - a for a, b in pairwise(tokens)] == [512] * 3 + [1024] * 6 + [2048] * 4


def test_two_ranks_have_the_losses_of_one(world):
    command = (*TRAIN[:4], "--device", "cpu", "--data", "data/small", "--val-tokens", 2560, "--recipe", "speedrun")
    command += ("--first-batch-tokens", 256, "--short-seq-len", 16, "--steps", 40)
    train_here(*command, "--run", "muon-single", cwd=world)
    on_ranks(2, "train.py", *command, "--run-name", "muon-shared", cwd=world)
    names = ("muon-single", "muon-shared")
    single, shared = ([line["loss"] for line in read_metrics(world / "logs" / name)] for name in names)
    assert shared == pytest.approx(single, rel=1e-3)
    assert single[-1] < single[0] - 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokens": 0}, "--tokens 0 must be above 0"),
        ({"tokens": 100}, "--tokens 100 is less than one step of 16384 tokens. Use --tokens 16384 or more"),
        (
            {"batch_tokens": 49_152},
            "--batch-tokens 49152 must be --first-batch-tokens 16384 times a power of two. Use the same value for both",
        ),
        ({"short_seq_len": 100}, "--short-seq-len 100 must divide --seq-len 1024. Use --short-seq-len 4"),
        ({"short_seq_len": 0}, "--short-seq-len 0 must be above 0"),
        (
            {"first_batch_tokens": 1536, "batch_tokens": 3072},
            "--first-batch-tokens 1536 must be a multiple of --seq-len 1024 x 1 rank = 1024",
        ),
        ({"beta1": 1.5}, "--beta1 1.5 must be between 0 and 1"),
        ({"embed_lr": 0.0}, "--embed-lr 0.0 must be above 0"),
        ({"short_tokens": -1}, "--short-tokens -1 must be 0 or more"),
        ({"long_every": -1}, "--long-every -1 must be 0 or more"),
    ],
)
def test_invalid_values_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        speedrun(**options)


@pytest.mark.parametrize(
    "ranks, first, largest", [(32, 32_768, 524_288), (6, 12_288, 393_216), (640, 655_360, 655_360)]
)
def test_first_batch_that_does_not_divide_among_ranks_names_values_that_do(ranks, first, largest):
    message = (
        rf"--first-batch-tokens 16384 must be a multiple of .* {ranks} ranks = \d+\. Use --first-batch-tokens {first} "
        rf"--batch-tokens {largest}; to resume a run with 16384, start a number of ranks that divides 16$"
    )
    with pytest.raises(ValueError, match=message):
        speedrun(world_size=ranks)
    speedrun(world_size=ranks, first_batch_tokens=first, batch_tokens=largest)


def test_given_values_without_effect_are_named_with_the_reason():
    given = {"momentum": 0.3, "decay_fraction": 0.1, "short_seq_len": 512, "long_every": 3, "windows": "shifted"}
    given |= {"token_dropout": 0.5, "lr": 1e-3}
    recipe = resolved(**GPT2, **given)
    assert dict(without_effect(recipe, given, unique_tokens=recipe.tokens)) == {
        "--momentum 0.3": "--optimizer is adamw",
        "--decay-fraction 0.1": "--lr-schedule is cosine",
        "--short-seq-len 512": "--short-tokens is 0",
        "--long-every 3": "--short-tokens is 0",
        "--windows shifted": "no token repeats",
        "--token-dropout 0.5": "no token repeats",
    }
    recipe = speedrun(**given, unique_tokens=10**9)
    assert without_effect(recipe, given, unique_tokens=10**9) == []
    added = replace(recipe, optimizer="lion", lr_schedule="trapezoid")  # they may use any value
    assert without_effect(added, given, unique_tokens=10**9) == []
    given = {"token_dropout": 0.0, "long_every": 0}  # what these options turn on is off anyway
    assert without_effect(resolved(**GPT2, **given), given, unique_tokens=10**10) == []


def test_a_value_without_effect_is_reported_before_the_training(world, capsys):
    train_here(*TRAIN, "--data", "data/small", "--steps", 1, "--momentum", 0.3, "--run", "no-effect", cwd=world)
    assert "warning: --momentum 0.3 has no effect: --optimizer is adamw\n" in capsys.readouterr().out


def test_regularization_of_repeated_text_follows_the_shape_and_not_the_vocabulary_of_the_shards():
    """A run that was started before can resume."""
    options = {"recipe": "speedrun", "shape": PRESETS["demo"], "tokens": 3_000_000, "unique_tokens": 1_000_000}
    recipe = resolved(vocab_size=663, **options)
    assert recipe.weight_decay == resolved(**options).weight_decay > 0.15
    repetition = 2 * PRESETS["demo"].matrix_weights / 1_000_000
    assert recipe.token_dropout == pytest.approx(0.1 * (repetition / 45.5) ** 0.5, rel=0.01)
