"""All options of train.py: one dataclass per group of `--help`."""

from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from core import cli
from core.data.shards import DEFAULT_DATA, DEFAULT_VAL_TOKENS
from core.train.optim import OPTIMIZERS
from core.train.recipe import (
    INITIALIZERS,
    LEARNING_RATES,
    MIN_SHALLOW_BLOCKS,
    RECIPES,
    SMALL_BATCH_TOKENS,
    SMALL_FIRST_BATCH_TOKENS,
    SMALL_VOCABULARY,
    SOFTMAXES,
    TWICE_LONG_STEPS,
    WINDOWS,
    Recipe,
    RecipeValues,
)
from core.train.schedule import FIRST_PHASE_STEPS, LR_SCHEDULES, MAX_SAMPLED_TOKENS
from model import PRESETS, GPTConfig


def recipe_option(name: str, description: str) -> Any:
    """The help of an option that the recipe sets, with its value in each recipe."""
    values = ", ".join(f"{recipe}: {getattr(values, name)}" for recipe, values in RECIPES.items())
    return tyro.conf.arg(help=description, help_behavior_hint=f"({values})")


def parse_micro_batch(values: list[str]) -> int | Literal["auto"]:
    """Raises ValueError for anything else: tyro's own error would show types of Python."""
    if values == ["auto"]:
        return "auto"
    try:
        return cli.parse_number(int, values)
    except ValueError:
        raise ValueError(f"{values[0]!r:.40} is neither an integer nor auto") from None


MICRO_BATCH = PrimitiveConstructorSpec[Any](
    nargs=1,
    metavar="INT|auto",
    instance_from_str=parse_micro_batch,
    is_instance=lambda value: value == "auto" or isinstance(value, int),
    str_from_instance=lambda value: [str(value)],
)


TRACKERS = ("wandb", "trackio", "none")


@dataclass
class RunConfig:
    """The most common options: what to train, on which data, and for how long."""

    data: str = DEFAULT_DATA
    """Folder of token shards that fineweb.py wrote."""
    name: Annotated[str | None, cli.DEFAULT_IN_HELP, tyro.conf.arg(name="run", aliases=["--run-name"])] = None
    """Name of the run; its folder is logs/RUN. Default: the name of the preset. With torchrun use
    --run-name: torchrun takes --run for its own --run-path."""
    preset: Literal[tuple(PRESETS)] = "gpt2"  # type: ignore[valid-type]
    """Model size: 124M, 355M, 774M, 1558M parameters, and two small ones for the demo and for tests."""
    init_from: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """Initial weights: a run, a checkpoint folder or file, a Hugging Face folder, or a hub name such as gpt2.
    Default: random weights."""
    recipe: Literal[tuple(RECIPES)] = "original"  # type: ignore[valid-type]
    """Recipe: the default values of --lr, --batch-tokens and of the recipe options."""
    tokens: int = 10_000_000_000
    """Training tokens, rounded down to complete steps. Numbers may be written as 150_000_000 or 1.5e8."""
    lr: Annotated[
        float | None,
        recipe_option(
            "lr",
            "Peak learning rate of the block matrices; with the recipe original and adamw, of all weights. It follows "
            f"the optimizer: {LEARNING_RATES['adamw']:g} with adamw, {LEARNING_RATES['muon']:g} with muon.",
        ),
    ] = None
    batch_tokens: Annotated[
        int | None,
        recipe_option(
            "batch_tokens",
            f"Maximum tokens per optimizer step, over all ranks; demo and tiny: {SMALL_BATCH_TOKENS}.",
        ),
    ] = None
    micro_batch: Annotated[int | Literal["auto"], MICRO_BATCH] = "auto"
    """Sequences per forward pass on each rank. auto: the largest that fits, up to 65,536 tokens (on a CPU: 8)."""
    tracker: Annotated[Literal[TRACKERS] | None, cli.DEFAULT_IN_HELP] = None  # type: ignore[valid-type]
    """Service that mirrors the metrics: wandb, offline without a login, or trackio, on this machine. Default: wandb
    with --wandb-project, else none."""


@dataclass
class RecipeConfig:
    """Other values that determine the trained weights. Defaults shown are for GPT-2 124M and ten billion tokens."""

    seed: int = 1337
    """Random seed of the initial weights and of the data order."""
    seq_len: Annotated[int | None, cli.DEFAULT_IN_HELP] = None
    """Tokens per sequence. Default: the context length of the preset, which is the maximum; with --eval-only that of
    the run. Positions beyond it stay untrained."""
    steps: Annotated[int | None, cli.DEFAULT_IN_HELP] = None
    """Optimizer steps; replaces --tokens. Default: as many as --tokens allows."""
    optimizer: Annotated[
        Literal[tuple(OPTIMIZERS)] | None,  # type: ignore[valid-type]
        recipe_option("optimizer", "Optimizer of the block matrices. AdamW updates all other weights."),
    ] = None
    embed_lr: Annotated[
        float | None,
        recipe_option(
            "embed_lr", "Peak learning rate of embeddings, biases and LayerNorms. speedrun scales it to the width."
        ),
    ] = None
    beta1: Annotated[float | None, recipe_option("beta1", "AdamW decay rate of the first moment.")] = None
    beta2: Annotated[float | None, recipe_option("beta2", "AdamW decay rate of the second moment.")] = None
    momentum: Annotated[float | None, recipe_option("momentum", "Decay rate of the momentum of Muon.")] = None
    weight_decay: Annotated[
        float | None,
        recipe_option(
            "weight_decay",
            "Decoupled weight decay of matrices; vectors don't decay. speedrun raises it where tokens repeat.",
        ),
    ] = None
    token_dropout: Annotated[
        float | None,
        recipe_option(
            "token_dropout",
            "Fraction of the input tokens replaced by end-of-text, from the second epoch on. speedrun raises it where "
            "tokens repeat.",
        ),
    ] = None
    grad_clip: Annotated[float | None, recipe_option("grad_clip", "Maximum norm of the gradient.")] = None
    lr_schedule: Annotated[
        Literal[tuple(LR_SCHEDULES)] | None,  # type: ignore[valid-type]
        recipe_option("lr_schedule", "Schedule after the warm-up: cosine, or constant with linear decay (wsd)."),
    ] = None
    warmup_steps: Annotated[
        int | None,
        recipe_option("warmup_steps", "Steps of linear warm-up. original scales them with the number of steps."),
    ] = None
    decay_fraction: Annotated[
        float | None, recipe_option("decay_fraction", "Fraction of the tokens in the decay of wsd.")
    ] = None
    final_lr_fraction: Annotated[
        float | None, recipe_option("final_lr_fraction", "Final learning rate as a fraction of its peak.")
    ] = None
    first_batch_tokens: Annotated[
        int | None,
        recipe_option(
            "first_batch_tokens",
            f"Tokens per step in the first {FIRST_PHASE_STEPS} steps. The batch doubles each time the tokens seen "
            f"quadruple. speedrun with demo and tiny: {SMALL_FIRST_BATCH_TOKENS}.",
        ),
    ] = None
    short_tokens: Annotated[
        int | None,
        recipe_option(
            "short_tokens",
            "Tokens at the start of training in sequences of --short-seq-len. speedrun limits them to 0.4 of all.",
        ),
    ] = None
    short_seq_len: Annotated[int | None, recipe_option("short_seq_len", "Tokens per short sequence.")] = None
    long_every: Annotated[
        int | None,
        recipe_option(
            "long_every",
            "While sequences are short, every Nth step has long ones, which train all positions; 0: none. speedrun "
            f"halves N for --short-tokens of at least {TWICE_LONG_STEPS.start:,} and below {TWICE_LONG_STEPS.stop:,}.",
        ),
    ] = None
    shallow_fraction: Annotated[
        float | None,
        recipe_option(
            "shallow_fraction",
            "Fraction of the tokens, at the start of training, in which every second block is trained. Then the other "
            "blocks start as copies of these. speedrun takes 0 where tokens repeat, for models of fewer than "
            f"{MIN_SHALLOW_BLOCKS} blocks, and with --init-from.",
        ),
    ] = None
    windows: Annotated[
        Literal[WINDOWS] | None,  # type: ignore[valid-type]
        recipe_option("windows", "shifted: from the second epoch on, sequences are cut at other places of the text."),
    ] = None
    init: Annotated[
        Literal[tuple(INITIALIZERS)] | None,  # type: ignore[valid-type]
        recipe_option("init", "Initial weights. aligned: the keys of each head start equal to its queries."),
    ] = None
    softmax: Annotated[
        Literal[SOFTMAXES] | None,  # type: ignore[valid-type]
        recipe_option(
            "softmax",
            f"Tokens in the softmax of the training loss. sampled: after the first {FIRST_PHASE_STEPS} steps, in those "
            f"of at most {MAX_SAMPLED_TOKENS:,} tokens, the targets and a random sample of the others. speedrun takes "
            f"full where tokens repeat, and for vocabularies of at most {SMALL_VOCABULARY:,}.",
        ),
    ] = None


@dataclass
class SystemConfig:
    """Speed and memory. These options change results by rounding only; float16 can skip a step, too."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the matrix products; weights and optimizer stay float32. float16 scales the loss. auto: bfloat16 on CUDA,
    float16 on NVIDIA GPUs before Ampere (V100, T4), float32 elsewhere."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass. gpt2-xl with --fused off: half the memory, 1.2 times the time."""
    deterministic: bool = False
    """Bit-identical results on GPUs for a fixed number of ranks, also after a resume; 12 % slower on an H200."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compilation of the training step by torch.compile. auto: on with CUDA."""
    fused: Literal["auto", "on", "portable", "off"] = "auto"
    """Triton kernels of core/ops, for bfloat16 on NVIDIA GPUs. on: all, for Hopper and B200. portable: those that also
    run on Ampere, Ada and other Blackwell GPUs. auto: the most that the GPU supports."""
    device: str = "auto"
    """Device: auto, cuda, cuda:1, mps or cpu. auto: CUDA, else MPS, else the CPU."""
    profile: bool = False
    """Record three early steps: prints the ten slowest kernels and writes logs/RUN/trace.json.gz."""


@dataclass
class EvalConfig:
    """Evaluation and logging during training. Evaluations also run at step 0 and after the last step."""

    val_every: int = 250
    """Steps between validations."""
    val_tokens: int = DEFAULT_VAL_TOKENS
    """Maximum validation tokens; always the first ones of the split."""
    eval_lambada: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of LAMBADA passages to score during training by protocol openai, or standard for the standard (tokenized)
    text. Default: no LAMBADA."""
    eval_hellaswag: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of HellaSwag questions to score during training by completion-norm, as llm.c does. Default: no HellaSwag."""
    eval_every: int = 250
    """Steps between LAMBADA and HellaSwag scores."""
    sample_every: int = 0
    """Steps between text samples; 0: no samples."""
    log_every: int = 10
    """Steps between log lines; metrics.jsonl has every step."""
    wandb_project: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """Project in wandb or trackio, see --tracker. Default: gpt2."""
    eval_only: bool = False
    """Print validation loss, perplexity and bits per byte of --init-from or of the run, and exit."""


@dataclass
class CheckpointConfig:
    """Checkpointing and fault tolerance."""

    save_every: int = 1000
    """Steps between checkpoints; the last step always saves one."""
    keep: int = 3
    """Number of newest checkpoints on disk (124M: 1.5 GB each, 12 bytes per parameter)."""
    keep_every: int = 5
    """Keep every Nth checkpoint permanently; 0: none."""
    resume: Literal["auto", "never"] = "auto"
    """Start of a run that exists. auto: resume from the newest valid checkpoint. never: end with an error; a restart by
    torchrun --max-restarts still resumes."""
    max_bad_steps: int = 10
    """Maximum number of skipped steps. A step whose loss or gradient isn't finite is skipped: it changes no weight."""
    no_verify: bool = False
    """Skip the sha256 check of the shards at the start. Its result is cached: only the first start takes the time."""
    hang_timeout: float = 600
    """Seconds without a finished micro-batch, or waiting for another rank, after which the run ends with an error."""


@dataclass
class Config:
    """The command line of train.py, and what run.json records."""

    run: RunConfig = field(default_factory=RunConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    terminal: cli.Terminal = field(default_factory=cli.Terminal)

    @property
    def shape(self) -> GPTConfig:
        return PRESETS[self.run.preset]

    @property
    def overrides(self) -> dict[str, Any]:
        """The values given on the command line in place of the recipe's."""
        given = vars(self.run) | vars(self.recipe)
        names = [field.name for field in fields(RecipeValues)]
        return {name: given[name] for name in names if given[name] is not None}

    @property
    def tracker(self) -> str:
        """The tracker to use: wandb, trackio or none."""
        return self.run.tracker or ("wandb" if self.evaluation.wandb_project else "none")

    def settings(self, recipe: Recipe) -> dict[str, Any]:
        """All options by name, with the values of the resolved recipe: the settings of run.json."""
        groups = (self.run, self.recipe, self.system, self.evaluation, self.checkpoints)
        settings = {key: value for group in groups for key, value in asdict(group).items()} | asdict(recipe)
        settings["verify"] = not settings.pop("no_verify")
        del settings["name"]
        return {"run": self.run.name} | settings | {"recipe": recipe.name, "tracker": self.tracker}
