"""Training recipes: the values that determine the trained weights.

`original` is the recipe of the original project. `speedrun` reaches the same loss in less time. Both train a plain
GPT-2.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from core import cli
from core.train.init import INITIALIZERS
from core.train.schedule import (
    FIRST_PHASE_STEPS,
    LR_SCHEDULES,
    MAX_SAMPLED_TOKENS,
    BatchSchedule,
    Schedule,
    candidate_count,
)
from model import GPTConfig, describe

REFERENCE_STEPS = 19_073  # steps of 524,288 tokens in ten billion tokens
REFERENCE_WIDTH = 768  # n_embd of GPT-2 124M, where the learning rates were tuned
SMALL_WIDTH = 256  # models with a smaller n_embd train on a CPU: their steps take fewer tokens by default
SMALL_BATCH_TOKENS, SMALL_FIRST_BATCH_TOKENS = 8192, 2048
# Where tokens repeat, speedrun regularizes with the square root of repeated tokens / unique tokens x weights / unique
# tokens, up to this point: GPT-2 124M, eight epochs of 19M tokens (docs/recipes.md has the trials).
REPETITION, REPETITION_WEIGHT_DECAY, REPETITION_TOKEN_DROPOUT = 45.5, 0.3, 0.1
WINDOWS = ("fixed", "shifted")  # where epochs after the first cut the text into sequences
SOFTMAXES = ("full", "sampled")
MIN_SHALLOW_BLOCKS = 4  # of a model that speedrun starts with half of them: one block alone learns little from context
TWICE_LONG_STEPS = range(6_000_000, 22_000_000)  # of short_tokens, where speedrun halves long_every (docs/recipes.md)
SMALL_VOCABULARY = 2 * candidate_count(MAX_SAMPLED_TOKENS)  # a sampled softmax gains little there


@dataclass(frozen=True)
class RecipeValues:
    """The values that a recipe sets; train.py has an option for each, with its description."""

    optimizer: str
    lr: float
    embed_lr: float
    beta1: float
    beta2: float
    momentum: float
    weight_decay: float
    token_dropout: float
    grad_clip: float
    lr_schedule: str
    warmup_steps: int
    decay_fraction: float
    final_lr_fraction: float
    batch_tokens: int
    first_batch_tokens: int
    short_seq_len: int
    short_tokens: int
    long_every: int
    shallow_fraction: float
    windows: str
    init: str
    softmax: str


@dataclass(frozen=True)
class Recipe(RecipeValues):
    """A resolved recipe: complete and checked, for one model shape and training length."""

    name: str
    tokens: int
    seq_len: int
    steps: int


# Peak learning rate of the block matrices by optimizer: the same number gives each optimizer another step size.
LEARNING_RATES = {"adamw": 6e-4, "muon": 0.022}
# For GPT-2 124M and ten billion tokens; `adapted_values` changes them for other models and lengths.
RECIPES = {
    "original": RecipeValues(
        optimizer="adamw",
        lr=LEARNING_RATES["adamw"],
        embed_lr=6e-4,
        beta1=0.9,
        beta2=0.95,
        momentum=0.95,
        weight_decay=0.1,
        token_dropout=0.0,
        grad_clip=1.0,
        lr_schedule="cosine",
        warmup_steps=715,  # 375M tokens, as GPT-3
        decay_fraction=0.4,
        final_lr_fraction=0.1,
        batch_tokens=524_288,
        first_batch_tokens=524_288,
        short_seq_len=256,
        short_tokens=0,
        long_every=0,
        shallow_fraction=0.0,
        windows="fixed",
        init="gpt2",
        softmax="full",
    ),
    "speedrun": RecipeValues(
        optimizer="muon",
        lr=LEARNING_RATES["muon"],
        embed_lr=3e-3,
        beta1=0.8,
        beta2=0.99,
        momentum=0.9,
        weight_decay=0.1,
        token_dropout=0.0,
        grad_clip=1.0,
        lr_schedule="wsd",
        warmup_steps=20,
        decay_fraction=0.35,
        final_lr_fraction=0.0,
        batch_tokens=524_288,
        first_batch_tokens=16_384,
        short_seq_len=256,
        short_tokens=22_000_000,
        long_every=16,
        shallow_fraction=0.4,
        windows="shifted",
        init="aligned",
        softmax="sampled",
    ),
}
# Values that may follow from the others.
DERIVED = (
    *("steps", "warmup_steps", "short_tokens", "long_every", "weight_decay", "token_dropout", "shallow_fraction"),
    "softmax",
)
# What a resumed run may not change, in the order of reporting: given values before those that follow from them.
SETTINGS = (*(field.name for field in fields(RecipeValues) if field.name not in DERIVED), *DERIVED)


def resolve_recipe(
    name: str,
    shape: GPTConfig,
    *,
    tokens: int,
    seq_len: int | None = None,
    steps: int | None = None,
    unique_tokens: int | None = None,
    vocab_size: int | None = None,
    overrides: dict[str, Any] | None = None,
    micro_batch: int = 1,
    world_size: int = 1,
) -> Recipe:
    """The recipe `name` for a model of this shape, with `overrides` of its values.

    seq_len None: the context of the model. steps None: as many as `tokens` allow. unique_tokens None: no token repeats.
    vocab_size None: that of the shape.
    Raises ValueError, with a value that works, for values that are out of range or don't divide.
    """
    if name not in RECIPES:
        raise ValueError(f"--recipe {name} is unknown. Choose from {', '.join(RECIPES)}")
    overrides = overrides or {}
    seq_len = shape.n_positions if seq_len is None else seq_len
    cli.check_positive(tokens=tokens, seq_len=seq_len, steps=steps)
    if seq_len > shape.n_positions:
        raise ValueError(
            f"--seq-len {seq_len} exceeds the context of {describe(shape)}. Use --seq-len {shape.n_positions} or less"
        )
    values = replace(adapted_values(name, shape, overrides), **overrides)
    check_values(values)
    check_batch_phases(values, seq_len)
    check_batch_divides(values, seq_len, micro_batch, world_size)
    batches = BatchSchedule(values.first_batch_tokens // seq_len, values.batch_tokens // seq_len)
    steps = steps or batches.steps_within(tokens // seq_len)
    if steps == 0:
        raise ValueError(
            f"--tokens {tokens} is less than one step of {values.first_batch_tokens} tokens. "
            f"Use --tokens {values.first_batch_tokens} or more"
        )
    tokens = batches.sequences_before(steps) * seq_len
    unique_tokens, vocab_size = unique_tokens or tokens, vocab_size or shape.vocab_size
    scaled = scaled_to_length(name, values, overrides, steps, tokens, shape, unique_tokens, vocab_size)
    values = replace(values, **{key: value for key, value in scaled.items() if key not in overrides})
    recipe = Recipe(**vars(values), name=name, tokens=tokens, seq_len=seq_len, steps=steps)
    check_lengths(recipe)
    if overrides.get("softmax") == "sampled":
        check_sampled_softmax(recipe, vocab_size)
    return recipe


def adapted_values(name: str, shape: GPTConfig, overrides: dict[str, Any]) -> RecipeValues:
    """A recipe's values for a model of this shape, where its optimizer, learning rate or batch may be overridden."""
    values = RECIPES[name]
    optimizer = overrides.get("optimizer", values.optimizer)
    if optimizer not in LEARNING_RATES:
        raise ValueError(
            f"--optimizer {optimizer} has no learning rate. Choose from {', '.join(LEARNING_RATES)}, or add it to "
            f"LEARNING_RATES in core/train/recipe.py"
        )
    values = replace(values, lr=LEARNING_RATES[optimizer])
    if shape.n_embd < SMALL_WIDTH:
        batch_tokens = max(SMALL_BATCH_TOKENS, overrides.get("first_batch_tokens", 0))
        values = replace(values, batch_tokens=batch_tokens, first_batch_tokens=SMALL_FIRST_BATCH_TOKENS)
    if name == "original":  # one batch size for all steps and, with AdamW, one learning rate for all weights
        values = replace(values, first_batch_tokens=overrides.get("batch_tokens", values.batch_tokens))
        if optimizer == "adamw":
            values = replace(values, embed_lr=overrides.get("lr", values.lr))
    else:  # Muon's update has the same spectral norm at any width, so that its rate stays; the head's doesn't
        values = replace(values, embed_lr=values.embed_lr * min(1, REFERENCE_WIDTH / shape.n_embd))
    batch_tokens = overrides.get("batch_tokens", values.batch_tokens)
    return replace(values, first_batch_tokens=min(values.first_batch_tokens, batch_tokens))


def scaled_to_length(
    name: str,
    values: RecipeValues,
    overrides: dict[str, Any],
    steps: int,
    tokens: int,
    shape: GPTConfig,
    unique_tokens: int,
    vocab_size: int,
) -> dict[str, Any]:
    """The values that depend on the length of the training, and on how often it repeats a token."""
    if name == "original":
        return {"warmup_steps": round(steps * values.warmup_steps / REFERENCE_STEPS)}
    repeats = tokens > unique_tokens  # the text is short rather than the time: no value may cost loss to save time
    repetition = max(0, tokens / unique_tokens - 1) * shape.matrix_weights / unique_tokens
    strength = min(1, math.sqrt(repetition / REPETITION))
    short_tokens = overrides.get("short_tokens", min(values.short_tokens, 4 * tokens // 10))
    return {
        "warmup_steps": min(values.warmup_steps, steps // 10),
        "short_tokens": short_tokens,
        # With fewer long steps in phases of this length, the loss rises where sequences grow.
        "long_every": values.long_every // (2 if short_tokens in TWICE_LONG_STEPS else 1),
        "weight_decay": values.weight_decay + strength * (REPETITION_WEIGHT_DECAY - values.weight_decay),
        "token_dropout": strength * REPETITION_TOKEN_DROPOUT,
        "softmax": "full" if repeats or vocab_size <= SMALL_VOCABULARY else values.softmax,
        "shallow_fraction": 0.0 if repeats or shape.n_layer < MIN_SHALLOW_BLOCKS else values.shallow_fraction,
    }


def without_effect(recipe: Recipe, overrides: dict[str, Any], unique_tokens: int) -> list[tuple[str, str]]:
    """Each of the given values that changes nothing in this recipe, as an option with its value, and the reason."""
    reasons = {}
    if recipe.optimizer == "adamw":
        reasons["momentum"] = f"--optimizer is {recipe.optimizer}"
    if recipe.lr_schedule == "cosine":
        reasons["decay_fraction"] = f"--lr-schedule is {recipe.lr_schedule}"
    if not recipe.short_tokens:
        reasons |= dict.fromkeys(("short_seq_len", "long_every"), "--short-tokens is 0")
    if recipe.tokens <= unique_tokens:
        reasons |= dict.fromkeys(("windows", "token_dropout"), "no token repeats")
    given = [name for name in reasons if overrides.get(name)]
    return [(f"{cli.option_name(name)} {overrides[name]}", reasons[name]) for name in given]


def check_values(values: RecipeValues) -> None:
    """Raise ValueError, by the name of its option, for a value outside its range."""
    positive = ("lr", "embed_lr", "grad_clip", "batch_tokens", "first_batch_tokens", "short_seq_len")
    cli.check_positive(**{name: getattr(values, name) for name in positive})
    fractions = ("beta1", "beta2", "momentum", "weight_decay", "token_dropout", "decay_fraction", "final_lr_fraction")
    cli.check_between(0, 1, **{name: getattr(values, name) for name in (*fractions, "shallow_fraction")})
    for name in ("beta1", "beta2", "momentum"):
        if getattr(values, name) == 1:
            raise ValueError(f"--{name} 1.0 must be below 1, or the moving average never changes. Use --{name} 0.9")
    for name, table in (
        ("lr_schedule", LR_SCHEDULES),
        ("windows", WINDOWS),
        ("init", INITIALIZERS),
        ("softmax", SOFTMAXES),
    ):
        if getattr(values, name) not in table:
            raise ValueError(f"{cli.option_name(name)} {getattr(values, name)}: choose from {', '.join(table)}")


def check_sampled_softmax(recipe: Recipe, vocab_size: int) -> None:
    """Raise ValueError for a sampled softmax that can't be used, or that no step of the recipe would use."""
    if vocab_size <= SMALL_VOCABULARY:
        raise ValueError(
            f"--softmax sampled needs a vocabulary of more than {SMALL_VOCABULARY:,} token ids, the shards have "
            f"{vocab_size:,}. Use --softmax full"
        )
    schedule = Schedule(recipe)
    if not any(schedule.candidates(step) for step in range(recipe.steps)):
        raise ValueError(
            f"--softmax sampled would have no effect: it is for steps of at most {MAX_SAMPLED_TOKENS:,} tokens after "
            f"the first {FIRST_PHASE_STEPS}, and this run has none. Use --softmax full, or a smaller --batch-tokens"
        )


def check_lengths(recipe: Recipe) -> None:
    """Raise ValueError for a phase that is longer than the training."""
    cli.check_between(0, recipe.steps, warmup_steps=recipe.warmup_steps)
    cli.check_between(0, 2**63 - 1, short_tokens=recipe.short_tokens, long_every=recipe.long_every)
    if recipe.shallow_fraction == 1:
        raise ValueError(
            "--shallow-fraction 1.0 must be below 1, or half of the blocks are trained in the last step only. "
            "Use --shallow-fraction 0"
        )
    if recipe.short_tokens >= recipe.tokens and recipe.short_seq_len < recipe.seq_len:
        raise ValueError(
            f"--short-tokens {recipe.short_tokens} must be less than the {recipe.tokens} training tokens, or the last "
            f"steps lack sequences of {recipe.seq_len}. Use --short-tokens 0"
        )


def check_batch_phases(values: RecipeValues, seq_len: int) -> None:
    """Raise ValueError where the first batch can't double to the last, or short sequences don't fill a long one."""
    growth = values.batch_tokens / values.first_batch_tokens
    if growth < 1:
        raise ValueError(
            f"--first-batch-tokens {values.first_batch_tokens} exceeds --batch-tokens {values.batch_tokens}. Use "
            f"--first-batch-tokens {values.batch_tokens}, or a larger --batch-tokens"
        )
    if growth != 2 ** round(math.log2(growth)):
        raise ValueError(
            f"--batch-tokens {values.batch_tokens} must be --first-batch-tokens {values.first_batch_tokens} times a "
            f"power of two. Use the same value for both, or --first-batch-tokens {values.batch_tokens} / 2, / 4, ..."
        )
    if values.short_tokens and values.short_seq_len < seq_len and seq_len % values.short_seq_len:
        raise ValueError(
            f"--short-seq-len {values.short_seq_len} must divide --seq-len {seq_len}. "
            f"Use --short-seq-len {math.gcd(values.short_seq_len, seq_len)}"
        )


def check_batch_divides(values: RecipeValues, seq_len: int, micro_batch: int, world_size: int) -> None:
    """Raise ValueError, with a value that works, where a batch doesn't divide into micro-batches on all ranks."""
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    unit, first, largest = world_size * seq_len, values.first_batch_tokens, values.batch_tokens
    if first < largest and first % unit:
        fits = unit * 2 ** max(round(math.log2(first / unit)), 0)
        raise ValueError(
            f"--first-batch-tokens {first} must be a multiple of --seq-len {seq_len} x {ranks} = {unit}. "
            f"Use --first-batch-tokens {fits} --batch-tokens {fits * 2 ** max(round(math.log2(largest / fits)), 0)}; "
            f"to resume a run with {first}, start a number of ranks that divides {first // seq_len}"
        )
    unit = micro_batch * world_size * seq_len
    if largest % unit == 0:
        return
    nearest = max(round(largest / unit), 1) * unit
    fitting = [m for m in range(1, micro_batch) if largest % (m * world_size * seq_len) == 0]
    alternative = f", or --micro-batch {fitting[-1]}" if fitting else ""
    raise ValueError(
        f"--batch-tokens {largest} must be a multiple of --micro-batch {micro_batch} x --seq-len {seq_len} x {ranks} "
        f"= {unit}. Use --batch-tokens {nearest}{alternative}"
    )
