"""Everything around the training loop: settings, model and optimizer at their start, DDP, compilation."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel

from core import checkpoint, cli, ops
from core.data.shards import Dataset, Windows
from core.distributed import Ranks, autocast, check_compiler, default_dtype, kernel_support
from core.eval.results import RESULTS
from core.files import LOCK, FileLocks
from core.train.config import Config, EvalConfig, SystemConfig
from core.train.depth import start_shallow
from core.train.memory import largest_micro_batch
from core.train.optim import OptimizerGroup, build_optimizer, loss_scaler
from core.train.profiling import PROFILED_STEPS
from core.train.recipe import INITIALIZERS, SETTINGS, Recipe, resolve_recipe, without_effect
from core.train.schedule import Schedule
from core.train.trackers import check_installed
from model import GPT, describe


@dataclass(frozen=True)
class System:
    """Resolved system options."""

    dtype: str  # bfloat16, float16 or float32
    compile: bool
    fused: str  # kernels of core/ops: on, portable or off
    activation_checkpointing: bool
    micro_batch: int | None  # None: to be chosen by memory

    @property
    def compiles(self) -> bool:
        """Whether the first step of each shape compiles something."""
        return self.compile or self.fused != "off"

    def settings(self) -> dict[str, Any]:
        """As run.json records them."""
        return {"dtype": self.dtype, "compile": "on" if self.compile else "off", "fused": self.fused}


@dataclass
class Run:
    """A training run: its settings, what it trains, and its progress."""

    config: Config
    recipe: Recipe
    system: System
    ranks: Ranks
    dataset: Dataset
    folder: Path
    model: GPT  # the raw module, which is saved and evaluated
    optimizer: OptimizerGroup
    scaler: torch.amp.GradScaler  # of the loss; it changes nothing unless dtype is float16
    micro_batch: int = 1
    step: int = 0  # completed steps
    tokens: int = 0
    seconds: float = 0.0  # of training steps, without compilation, validation and checkpoints
    bad_steps: int = 0  # steps skipped because their loss or gradient wasn't finite
    val_loss: float = float("nan")  # the latest

    def is_due(self, *intervals: int) -> bool:
        """Whether something done every N steps (0: never) is due after the current step; it is after the last one."""
        return any(n > 0 and (self.step % n == 0 or self.step == self.recipe.steps) for n in intervals)

    def training_state(self) -> dict[str, Any]:
        """What a resume needs in addition to the weights, as plain values and tensors."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "bad_steps": self.bad_steps,
            "rng": torch.get_rng_state(),
            "settings": fixed_settings(self.config, self.recipe, self.dataset),
            "micro_batch": self.micro_batch,
            "world_size": self.ranks.world_size,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }


def run_folder(config: Config) -> Path:
    """The folder of the run. Raises ValueError for a name that can't be one, and for a run of other options."""
    name = config.run.preset if config.run.name is None else config.run.name
    if not name or Path(name).name != name or name == "..":
        raise ValueError(f"--run {name} must be a name, not a path. The folder of the run is logs/RUN")
    folder = Path("logs") / name
    if folder == RESULTS:
        raise ValueError(f"--run {name}: {RESULTS} is the folder of the evaluation results. Use another name")
    if not config.evaluation.eval_only and config.checkpoints.resume == "auto":
        options = config.run
        checkpoint.check_preset(folder, {"preset": options.preset, "data": options.data, "recipe": options.recipe})
    return folder


def resolve(config: Config, dataset: Dataset, ranks: Ranks) -> tuple[Recipe, System]:
    """Check every option before the first step, and fill in those that follow from others."""
    micro_batch = 1 if config.run.micro_batch == "auto" else config.run.micro_batch
    evaluation, checkpoints = config.evaluation, config.checkpoints
    cli.check_positive(
        micro_batch=micro_batch,
        val_tokens=evaluation.val_tokens,
        val_every=evaluation.val_every,
        eval_every=evaluation.eval_every,
        log_every=evaluation.log_every,
        save_every=checkpoints.save_every,
        keep=checkpoints.keep,
    )
    overrides = recipe_overrides(config)
    recipe = resolve_recipe(
        config.run.recipe,
        config.shape,
        tokens=config.run.tokens,
        seq_len=config.recipe.seq_len,
        steps=config.recipe.steps,
        unique_tokens=dataset.tokens("train"),
        vocab_size=dataset.vocab_size,
        overrides=overrides,
        micro_batch=micro_batch,
        world_size=ranks.world_size,
    )
    if config.system.profile and recipe.steps < PROFILED_STEPS:
        raise ValueError(f"--profile needs --steps {PROFILED_STEPS} or more, --steps is {recipe.steps}")
    cli.check_between(
        0,
        2**63 - 1,
        seed=config.recipe.seed,
        sample_every=evaluation.sample_every,
        keep_every=checkpoints.keep_every,
        max_bad_steps=checkpoints.max_bad_steps,
    )
    if evaluation.sample_every and not (dataset.folder / "tokenizer.json").is_file():
        raise ValueError(f"--sample-every needs {dataset.folder / 'tokenizer.json'}, which is missing. Use 0")
    for split in ("train", "val"):
        Windows(dataset, split, recipe.seq_len)
    system = resolve_system(config.system, ranks, config.run.micro_batch)
    if system.compile:
        check_compiler(ranks.device)
    check_installed(config.tracker)
    for option, reason in without_effect(recipe, overrides, dataset.tokens("train")):
        ranks.log(f"warning: {option} has no effect: {reason}")
    return recipe, system


def check_files(options: EvalConfig) -> None:
    """Raise OSError for a file of questions that can't be read."""
    for file in filter(None, (options.eval_lambada, options.eval_hellaswag)):
        open(file, "rb").close()


def recipe_overrides(config: Config) -> dict[str, Any]:
    """The values that replace the recipe's. Raises ValueError for one that would overwrite given weights."""
    overrides = config.overrides
    if config.run.init_from and (fraction := overrides.setdefault("shallow_fraction", 0.0)):
        raise ValueError(
            f"--shallow-fraction {fraction} would overwrite half of the blocks, whose weights are those of "
            f"--init-from {config.run.init_from}. Use --shallow-fraction 0"
        )
    return overrides


def resolve_system(config: SystemConfig, ranks: Ranks, micro_batch: int | Literal["auto"] = "auto") -> System:
    """Replace "auto" by the value for this device. Raises ValueError for kernels that it doesn't support."""
    on_cuda = ranks.device.type == "cuda"
    dtype = default_dtype(ranks.device) if config.dtype == "auto" else config.dtype
    supported = kernel_support(ranks.device) if dtype == "bfloat16" else "off"
    if config.fused == "on" and supported != "on":
        raise ValueError(
            "--fused on needs --dtype bfloat16 and an NVIDIA Hopper or B200 GPU with Triton. Use --fused auto"
        )
    if config.fused == "portable" and supported == "off":
        raise ValueError(
            "--fused portable needs --dtype bfloat16 and an NVIDIA GPU of compute capability 8.0 or later with Triton. "
            "Use --fused auto"
        )
    return System(
        dtype=dtype,
        compile=on_cuda if config.compile == "auto" else config.compile == "on",
        fused=supported if config.fused == "auto" else config.fused,
        activation_checkpointing=config.activation_checkpointing,
        micro_batch=None if micro_batch == "auto" else micro_batch,
    )


def fixed_settings(config: Config, recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """What a resumed run may not change, so that its metrics are those of an uninterrupted run."""
    settings = {"preset": config.run.preset, "seed": config.recipe.seed, "init_from": config.run.init_from}
    settings |= {"val_tokens": config.evaluation.val_tokens, "manifest_hash": dataset.manifest_hash}
    return settings | {name: getattr(recipe, name) for name in ("seq_len", *SETTINGS)}


@contextlib.contextmanager
def lock_run(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Lock a run's folder. Raises, on every rank, ValueError where another process is training the run, and OSError
    where the folder can't be written."""
    locks = []

    def lock() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        locks.append(FileLocks(folder, "--run"))
        locks[0].acquire(0)

    ranks.on_main(lock)
    try:
        yield
    finally:
        if locks and [path.name for path in folder.iterdir()] == [LOCK]:  # the run never started
            shutil.rmtree(folder)


def restore_or_init(
    config: Config, recipe: Recipe, system: System, dataset: Dataset, ranks: Ranks, folder: Path
) -> Run:
    """The run at its newest valid checkpoint; without one, at step 0 with the weights of --init-from or random ones."""
    found = checkpoint.find(folder, ranks, restart=config.checkpoints.resume == "never")
    fixed = fixed_settings(config, recipe, dataset)
    state = checkpoint.load_training_state(found, fixed, config.run.recipe) if found else None
    if state is None or state["step"] < recipe.steps:
        check_files(config.evaluation)
    source = found or (checkpoint.resolve_init(config.run.init_from, ranks) if config.run.init_from else None)
    if isinstance(source, str) and config.recipe.init:
        ranks.log(f"warning: --init {config.recipe.init} has no effect, as --init-from {source} sets the weights")
    model = load_model(config, recipe, dataset, source).to(ranks.device)
    optimizer = build_optimizer(model, recipe, ranks)
    scaler = loss_scaler(system.dtype, ranks)
    run = Run(config, recipe, system, ranks, dataset, folder, model, optimizer, scaler)
    micro_batch = system.micro_batch
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        if scaler_state := state.get("scaler"):  # empty unless the checkpoint is of a float16 run
            scaler.load_state_dict(scaler_state)
        torch.set_rng_state(state["rng"])
        run.step, run.tokens = state["step"], state["tokens"]
        run.seconds, run.bad_steps = state["seconds"], state["bad_steps"]
        if config.system.deterministic and state.get("world_size") == ranks.world_size:
            micro_batch = micro_batch or state["micro_batch"]  # another size would round differently
        ranks.log(f"resuming from {found} | step {run.step}/{recipe.steps} | {run.tokens:,} tokens seen")
    if micro_batch is None and run.step < recipe.steps:
        micro_batch = fit_micro_batch(model, optimizer, recipe, system, ranks)
        ranks.log(f"using --micro-batch {micro_batch}")
    run.micro_batch = micro_batch or 1
    return run


def load_model(config: Config, recipe: Recipe, dataset: Dataset, source: Path | str | None) -> GPT:
    """The model at its start. Raises ValueError where the weights don't fit the preset or the shards."""
    shape = replace(config.shape, vocab_size=dataset.vocab_size)
    if source is None:
        model = GPT(shape, seed=config.recipe.seed)
        INITIALIZERS[recipe.init](model)
        if Schedule(recipe).shallow(0):
            start_shallow(model)
        return model
    model = checkpoint.load_model(str(source))
    free = {"vocab_size": shape.vocab_size, "activation_function": shape.activation_function}
    if replace(model.config, **free) != shape or model.config.vocab_size < shape.vocab_size:  # type: ignore[arg-type]
        preset = config.run.preset
        raise ValueError(
            f"{source} is {describe(model.config)} with {model.config.vocab_size:,} token ids, but --preset {preset} "
            f"and {dataset.folder} need {preset} with {shape.vocab_size:,}. Use the --preset of these weights, and "
            f"shards of their vocabulary"
        )
    if isinstance(source, str):  # --init-from
        checkpoint.check_tokens(source, model, dataset.folder, dataset.vocab_size)
    return model


def build_loss(model: GPT, system: System, compiled: bool | None = None) -> Any:
    """The function that training minimizes, of inputs and targets (B, T); with a sampled softmax also of candidates.

    Its weights are those of `model`.

    `compiled` replaces the system's choice.
    """
    compiled = system.compile if compiled is None else compiled
    fused = system.fused != "off"
    stream_dtype = torch.bfloat16 if fused else None
    ops.select_kernels(stream_dtype, portable=system.fused == "portable")
    loss_fn = model.training_copy(
        compiled=compiled and fused,
        stream_dtype=stream_dtype,
        activation_checkpointing=system.activation_checkpointing,
    )
    return torch.compile(loss_fn, dynamic=False) if compiled and not fused else loss_fn


def wrap_ddp(loss_fn: Any, ranks: Ranks) -> Any:
    """The same function with gradients averaged over the ranks."""
    if ranks.world_size == 1:
        return loss_fn
    # The last micro-batch of a step moves the gradients into the buckets; accumulated gradients are separate tensors.
    return DistributedDataParallel(loss_fn, gradient_as_bucket_view=True)


def fit_micro_batch(model: GPT, optimizer: OptimizerGroup, recipe: Recipe, system: System, ranks: Ranks) -> int:
    """The largest micro-batch that fits on every rank, next to the moments and DDP buckets to be allocated."""
    loss_fn = build_loss(model, system, compiled=False)
    moments = max(0, 8 * model.num_parameters() - optimizer.state_bytes)
    buckets = 4 * model.num_parameters() if ranks.world_size > 1 else 0
    sequences = recipe.batch_tokens // recipe.seq_len // ranks.world_size
    with autocast(ranks, system.dtype):
        micro_batch = largest_micro_batch(loss_fn, sequences, recipe.seq_len, moments + buckets, ranks)
    optimizer.zero_grad()
    return micro_batch
