"""The two recipes: train.py's options that decide what a GPT-2 becomes, their values, and what each step follows.

`original` is the original project's. `speedrun` reaches the same loss sooner, and leaves a plain GPT-2 all the same.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

import torch
import tyro

from core import cli
from model import GPT, GPTConfig, describe

STEPS = 19_073  # of 524,288 tokens that ten billion make
WIDTH = 768  # where speedrun's rates were measured
FIRST_PHASE = 160  # steps with the first batch
# What each recipe sets for GPT-2 124M on ten billion tokens. For others `values_for` says what changes.
RECIPES: dict[str, dict[str, Any]] = {
    "original": {
        "optimizer": "adamw",
        "lr": 6e-4,
        "embed_lr": 6e-4,
        "beta1": 0.9,
        "beta2": 0.95,
        "momentum": 0.95,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "lr_schedule": "cosine",
        "warmup_steps": 715,  # GPT-3's 375M tokens
        "decay_fraction": 0.4,
        "final_lr_fraction": 0.1,
        "batch_tokens": 524_288,
        "first_batch_tokens": 524_288,
        "short_seq_len": 256,
        "short_tokens": 0,
        "init": "gpt2",
    },
    "speedrun": {
        "optimizer": "muon",
        "lr": 0.022,
        "embed_lr": 3e-3,
        "beta1": 0.8,
        "beta2": 0.99,
        "momentum": 0.9,
        "weight_decay": 0.02,
        "grad_clip": 1.0,
        "lr_schedule": "wsd",
        "warmup_steps": 20,
        "decay_fraction": 0.35,
        "final_lr_fraction": 0.0,
        "batch_tokens": 524_288,
        "first_batch_tokens": 16_384,
        "short_seq_len": 256,
        "short_tokens": 22_000_000,
        "init": "aligned",
    },
}

# An option's None until `resolve` has filled it in. What runs after that may count on a value, which mypy can't follow;
# told `float | Any`, it takes the option for a float and lets it be None.
if TYPE_CHECKING:
    Later: TypeAlias = Any
else:
    Later = None


def option(name: str, meaning: str) -> Any:
    """How --help shows an option that the recipe sets."""
    values = ", ".join(f"{recipe}: {values[name]}" for recipe, values in RECIPES.items())
    return tyro.conf.arg(help=meaning, help_behavior_hint=f"({values})")


@dataclass
class Recipe:
    """What decides what the model becomes. Values shown are those of GPT-2 124M on ten billion tokens."""

    recipe: Literal["original", "speedrun"] = "original"
    """Sets what follows but for --tokens and --seq-len; each can be set by itself too."""
    tokens: int = 10_000_000_000
    """Tokens to train on; the last step is the last that is whole."""
    seq_len: Annotated[int | Later, cli.DEFAULT_IN_HELP] = None
    """Tokens a sequence. Default: the preset's context, the most it can be."""
    steps: Annotated[int | Later, cli.DEFAULT_IN_HELP] = None
    """Optimizer steps, in place of --tokens. Default: as many as --tokens takes."""
    optimizer: Annotated[
        Literal["adamw", "muon"] | Later, option("optimizer", "Of the blocks' matrices; AdamW has the rest.")
    ] = None
    lr: Annotated[float | Later, option("lr", "Peak learning rate of the blocks' matrices.")] = None
    embed_lr: Annotated[
        float | Later, option("embed_lr", "The same of embeddings, biases and LayerNorms; speedrun's by width 768.")
    ] = None
    beta1: Annotated[float | Later, option("beta1", "AdamW's decay of the gradient's mean.")] = None
    beta2: Annotated[float | Later, option("beta2", "AdamW's decay of the squared gradient's mean.")] = None
    momentum: Annotated[float | Later, option("momentum", "Muon's.")] = None
    weight_decay: Annotated[
        float | Later, option("weight_decay", "Each step, times the learning rate; of matrices alone.")
    ] = None
    grad_clip: Annotated[float | Later, option("grad_clip", "Largest norm of the gradient.")] = None
    lr_schedule: Annotated[
        Literal["cosine", "wsd"] | Later,
        option("lr_schedule", "After the warm-up: half a cosine down, or the peak and then a line down."),
    ] = None
    warmup_steps: Annotated[
        int | Later, option("warmup_steps", "Steps of linear warm-up; original's scaled with the steps.")
    ] = None
    decay_fraction: Annotated[float | Later, option("decay_fraction", "Part of the tokens where wsd decays.")] = None
    final_lr_fraction: Annotated[
        float | Later, option("final_lr_fraction", "The learning rate ends at this part of its peak.")
    ] = None
    batch_tokens: Annotated[
        int | Later, option("batch_tokens", "Tokens an optimizer step, over all ranks; the most that a step gets.")
    ] = None
    first_batch_tokens: Annotated[
        int | Later,
        option("first_batch_tokens", f"The first {FIRST_PHASE} steps' tokens; doubled when tokens seen are fourfold."),
    ] = None
    short_tokens: Annotated[
        int | Later,
        option("short_tokens", "So many tokens first, sequences are cut in pieces; speedrun's at most 0.4 of all."),
    ] = None
    short_seq_len: Annotated[int | Later, option("short_seq_len", "Tokens of such a piece.")] = None
    init: Annotated[
        Literal["gpt2", "aligned"] | Later,
        option("init", "aligned: each head's keys begin as its queries, so that it looks at what is alike."),
    ] = None


SETTINGS = tuple(field.name for field in fields(Recipe) if field.name not in ("recipe", "tokens", "seq_len"))
Options = TypeVar("Options", bound=Recipe)


def resolve(options: Options, shape: GPTConfig, micro_batch: int, world_size: int) -> Options:
    """Fill in from the recipe what wasn't given, and check each value. Raises ValueError with what would do."""
    if options.seq_len is None:
        options = replace(options, seq_len=shape.n_positions)
    cli.check_positive(tokens=options.tokens, seq_len=options.seq_len)
    if options.seq_len > shape.n_positions:
        raise ValueError(
            f"--seq-len {options.seq_len} passes the context of {describe(shape)}: take --seq-len {shape.n_positions}"
        )
    if options.steps is not None:
        cli.check_positive(steps=options.steps)
    given = {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
    options = replace(options, **values_for(options, shape) | given)
    above_0 = ("lr", "embed_lr", "grad_clip", "batch_tokens", "first_batch_tokens", "short_seq_len")
    cli.check_positive(**{name: getattr(options, name) for name in above_0})
    parts = ("beta1", "beta2", "momentum", "weight_decay", "decay_fraction", "final_lr_fraction")
    cli.check_between(0, 1, **{name: getattr(options, name) for name in parts})
    for name in ("beta1", "beta2", "momentum"):
        if getattr(options, name) == 1:
            raise ValueError(f"--{name} 1.0 must be below 1: moments would never change")
    options = replace(options, first_batch_tokens=min(options.first_batch_tokens, options.batch_tokens))
    check_phases(options)
    check_batch(options, micro_batch, world_size)
    batches = Batches(options)
    steps = options.steps or batches.whole_steps(options.tokens)
    if steps == 0:
        raise ValueError(f"--tokens {options.tokens} is less than the first step's {options.first_batch_tokens}")
    tokens = batches.before(steps) * options.seq_len
    scaled: dict[str, Any]  # what depends on the length
    if options.recipe == "original":
        scaled = {"warmup_steps": round(steps * options.warmup_steps / STEPS)}
    else:
        scaled = {
            "warmup_steps": min(options.warmup_steps, steps // 10),
            "short_tokens": min(options.short_tokens, 4 * tokens // 10),
        }
    options = replace(options, **scaled | given | {"steps": steps, "tokens": tokens})
    cli.check_between(0, steps, warmup_steps=options.warmup_steps)
    cli.check_between(0, 2**63 - 1, short_tokens=options.short_tokens)
    if options.short_tokens >= tokens and options.short_seq_len < options.seq_len:
        raise ValueError(f"--short-tokens {options.short_tokens} leaves none of {tokens} tokens for whole sequences")
    return options


def values_for(options: Recipe, shape: GPTConfig) -> dict[str, Any]:
    """What the recipe sets for a model of this shape, where its optimizer, rate and batch may be given."""
    values = dict(RECIPES[options.recipe])
    optimizer = options.optimizer or values["optimizer"]
    # The same rate means another thing to another optimizer: it is that of the recipe that has it.
    values["lr"] = next(recipe["lr"] for recipe in RECIPES.values() if recipe["optimizer"] == optimizer)
    if options.recipe == "original":
        if optimizer == "adamw":
            values["embed_lr"] = options.lr or values["lr"]  # one rate for all weights
        values["first_batch_tokens"] = options.batch_tokens or values["batch_tokens"]  # one batch for all steps
    else:
        # Muon's updates mean the same at any width, as their spectral norm is fixed; those of the tied head don't.
        values["embed_lr"] *= min(1, WIDTH / shape.n_embd)
    return values


def check_phases(options: Recipe) -> None:
    """Raise ValueError where the first batch doesn't double up to the last, or pieces don't fill a sequence."""
    growth = options.batch_tokens / options.first_batch_tokens
    if growth != 2 ** round(math.log2(growth)):
        raise ValueError(
            f"--batch-tokens {options.batch_tokens} is not --first-batch-tokens {options.first_batch_tokens} times a "
            f"power of two: take the same for both, or {options.batch_tokens} / 2, / 4, ... for the first"
        )
    if options.short_tokens and options.short_seq_len < options.seq_len and options.seq_len % options.short_seq_len:
        raise ValueError(f"--short-seq-len {options.short_seq_len} doesn't divide --seq-len {options.seq_len}")


class Batches:
    """How many sequences each step takes: first_batch_tokens' for 160 steps, then twice as many each time the tokens
    seen have grown fourfold, up to batch_tokens'.

    The batch beyond which a larger one saves no time grows like the square root of the tokens seen (Zhang et al. 2024,
    arXiv:2410.21676).
    """

    def __init__(self, recipe: Recipe) -> None:
        self.seq_len = seq_len = recipe.seq_len
        self._sizes = [recipe.first_batch_tokens // seq_len]
        self._begins, self._seen = [0], [0]  # of each size: its first step, and the sequences before that
        while self._sizes[-1] < recipe.batch_tokens // seq_len:
            steps = FIRST_PHASE if len(self._sizes) == 1 else FIRST_PHASE * 3 * 2 ** (len(self._sizes) - 1) // 4
            self._begins.append(self._begins[-1] + steps)
            self._seen.append(self._seen[-1] + steps * self._sizes[-1])
            self._sizes.append(2 * self._sizes[-1])

    def size(self, step: int) -> int:
        """The sequences of a step, over all ranks."""
        return self._sizes[bisect_right(self._begins, step) - 1]

    def before(self, step: int) -> int:
        """The sequences of all steps before this one."""
        phase = bisect_right(self._begins, step) - 1
        return self._seen[phase] + (step - self._begins[phase]) * self._sizes[phase]

    def whole_steps(self, tokens: int) -> int:
        """How many steps take no more than this many tokens."""
        sequences = tokens // self.seq_len
        phase = bisect_right(self._seen, sequences) - 1
        return self._begins[phase] + (sequences - self._seen[phase]) // self._sizes[phase]


class Schedule:
    """What each step of a resolved recipe follows; all are pure functions of the step, counted from 0."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._seq_len = recipe, recipe.seq_len
        self.steps = recipe.steps
        self.batches = Batches(recipe)
        self._sequences = self.batches.before(recipe.steps)

    def sequences(self, step: int) -> range:
        """Which sequences of the token order the step takes."""
        return range(self.batches.before(step), self.batches.before(step + 1))

    def tokens(self, step: int) -> int:
        """Tokens seen before the step."""
        return self.batches.before(step) * self._seq_len

    def piece(self, step: int) -> int:
        """Tokens of the pieces that sequences are cut into: attention sees no further."""
        recipe = self._recipe
        return min(recipe.short_seq_len, self._seq_len) if self.tokens(step) < recipe.short_tokens else self._seq_len

    def rate(self, step: int) -> float:
        """The learning rate as a part of its peak."""
        recipe = self._recipe
        if step < recipe.warmup_steps:
            return (step + 1) / recipe.warmup_steps
        final = recipe.final_lr_fraction
        if recipe.lr_schedule == "cosine":
            progress = (step - recipe.warmup_steps) / (self.steps - recipe.warmup_steps)
            # GPT-3 (Brown et al. 2020, appendix B), which gives the settings that GPT-2's paper left out.
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        # Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395), its decay a line.
        left = 1 - self.batches.before(step) / self._sequences
        return final + (1 - final) * min(1.0, left / recipe.decay_fraction) if recipe.decay_fraction else 1.0

    def shapes(self, first: int) -> list[tuple[int, int]]:
        """The different (sequences, tokens of a piece) of the steps from `first` on, in their order."""
        return list(dict.fromkeys((self.batches.size(step), self.piece(step)) for step in range(first, self.steps)))


def check_batch(recipe: Recipe, micro_batch: int, world_size: int) -> None:
    """Raise ValueError, naming what would fit, where a batch doesn't divide into micro-batches on all ranks."""
    seq_len = recipe.seq_len
    unit, first, most = world_size * seq_len, recipe.first_batch_tokens, recipe.batch_tokens
    if first < most and first % unit:
        fits = unit * 2 ** max(round(math.log2(first / unit)), 0)
        raise ValueError(
            f"--first-batch-tokens {first} is no multiple of --seq-len {seq_len} x {world_size} ranks = {unit}: "
            f"take {fits}, and --batch-tokens {fits * 2 ** max(round(math.log2(most / fits)), 0)}; a run begun with "
            f"{first} goes on with at most {first // seq_len} ranks"
        )
    unit = micro_batch * world_size * seq_len
    if recipe.batch_tokens % unit == 0:
        return
    nearest = max(round(recipe.batch_tokens / unit), 1) * unit
    fitting = [m for m in range(1, micro_batch) if recipe.batch_tokens % (m * world_size * seq_len) == 0]
    remedy = f", or --micro-batch {fitting[-1]}" if fitting else ""
    raise ValueError(
        f"--batch-tokens {recipe.batch_tokens} is no multiple of --micro-batch {micro_batch} x --seq-len {seq_len} x "
        f"{world_size} rank{'s' if world_size > 1 else ''} = {unit}: take --batch-tokens {nearest}{remedy}"
    )


@torch.no_grad()
def align_keys(model: GPT) -> None:
    """Begin with each head's keys equal to its queries: tokens and places that are alike then attend to each other."""
    width = model.config.n_embd
    for block in model.transformer.h:
        weight = block.attn.c_attn.weight  # (3 C, C): queries, keys, values
        weight[width : 2 * width] = weight[:width]
