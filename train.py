"""Train a GPT-2 on token shards.

    torchrun --standalone --nproc_per_node=8 train.py                # GPT-2 124M on FineWeb-Edu, 10 billion tokens
    python train.py --preset gpt2-medium                             # one GPU
    python train.py --data data/mine --run tuned --init-from gpt2 --steps 200 --lr 3e-5 --warmup-steps 20
    python train.py --eval-only --init-from gpt2                     # validation loss of OpenAI's weights

The same command goes on where an interrupted run stopped: Ctrl-C, SIGTERM and SIGUSR1 finish the step and save. The
defaults are the recipe of the original project.
"""

import gc
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from core import checkpoint, cli
from core.data.shards import DEFAULT_DATA, Dataset, TokenOrder, Windows, open_dataset, verify
from core.distributed import Ranks, process_group
from core.train import recipe
from core.train.interrupts import Interrupts
from core.train.logging import RunLog, StepReports, versions
from core.train.optim import Optimizers, optimizers
from core.train.profiling import PROFILED_UNTIL, profiled
from core.train.recipe import SETTINGS, Schedule, align_keys
from core.train.saver import Saver
from core.train.setup import (
    StepConfig,
    fitting_micro_batch,
    lock_run,
    loss_model,
    open_loader,
    parallel,
    resolve_computation,
    train_step,
    warm_up,
)
from core.train.validation import Measurement, evaluate, open_measures
from model import GPT, PRESETS, describe


@dataclass
class Origin:
    """What is trained, and on what."""

    data: str = DEFAULT_DATA
    """Folder of shards that fineweb.py wrote."""
    run: Annotated[str | None, cli.DEFAULT_IN_HELP, tyro.conf.arg(aliases=["--run-name"])] = None
    """Name of the run, logs/RUN. Default: the preset's. Under torchrun, which has a --run-path, write --run-name."""
    preset: Literal[tuple(PRESETS)] = "gpt2"  # type: ignore[valid-type]
    """Size of the model: 124M, 355M, 774M, 1558M, and two small ones for the demo and tests."""
    seed: int = 1337
    """Draws the initial weights and the order of the data."""
    init_from: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """Begin with these weights: a run, a checkpoint or Hugging Face folder, or a hub name such as gpt2.
    Default: random ones."""
    verify: Annotated[bool, cli.DEFAULT_IN_HELP] = True
    """Leave out the hashing of all shards at the start (remembered, so that only the first start takes the time)."""


@dataclass
class Survival:
    """What a run does about interruptions and trouble."""

    save_every: int = 1000
    """Steps between checkpoints; there is one after the last step too."""
    keep: int = 3
    """Newest checkpoints that stay on disk (124M: 1.5 GB each, 12 bytes a weight)."""
    keep_every: int = 5
    """Every so many checkpoints one that stays for good; 0: none."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest valid checkpoint. never: refuse a run that exists; torchrun's restarts go on."""
    max_bad_steps: int = 10
    """Steps whose loss or gradient isn't finite change no weight and are counted; more than this end the run."""
    hang_timeout: float = 600
    """Seconds without a micro-batch, or of waiting for another rank, after which the run ends with an error."""


@dataclass
class Config(Origin, StepConfig, Measurement, Survival):
    """Each of the dataclasses is a group of --help."""


@dataclass
class Run:
    """Everything a training step needs; `step`, `tokens` and `seconds` are what lies behind it."""

    config: Config
    ranks: Ranks
    dataset: Dataset
    folder: Path
    model: GPT = field(init=False)  # what is saved and evaluated
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training: no compiling, validation or saving
    bad_steps: int = 0  # skipped, as their loss or gradient wasn't finite
    val_loss: float = math.nan  # as last measured


def main(config: Config) -> None:
    if config.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # which torch asks for, before cuBLAS starts
    torch.use_deterministic_algorithms(config.deterministic)
    with process_group(config.device, config.hang_timeout) as ranks:
        dataset = open_dataset(config.data)
        if config.eval_only:
            return evaluate_only(config, ranks, dataset)
        config = resolve(config, dataset, ranks)
        if config.verify:
            verify(dataset, ranks)
        folder = Path("logs") / str(config.run)
        with lock_run(folder, ranks):
            run = Run(config, ranks, dataset, folder)
            try:
                optimizer = begin(run)
                if run.step < config.steps:
                    train(run, optimizer)
                else:
                    ranks.log(f"{folder} is finished: {config.steps} steps")
            except torch.OutOfMemoryError:
                at = run.config.micro_batch
                smaller = "--micro-batch" if at not in ("auto", 1) else "--seq-len or --preset"
                more = "" if config.activation_checkpointing else ", or --activation-checkpointing"
                raise ValueError(f"out of memory at --micro-batch {at}: take a smaller {smaller}{more}") from None


def resolve(config: Config, dataset: Dataset, ranks: Ranks) -> Config:
    """Check every setting before the first step and fill in those that follow from others."""
    micro_batch = 1 if config.micro_batch == "auto" else config.micro_batch
    cli.check_positive(micro_batch=micro_batch)
    intervals = ("val_every", "eval_every", "save_every", "log_every", "keep", "hang_timeout")
    cli.check_positive(**{name: getattr(config, name) for name in ("val_tokens", *intervals)})
    config = recipe.resolve(config, PRESETS[config.preset], micro_batch, ranks.world_size)
    if config.profile and config.steps < PROFILED_UNTIL:
        raise ValueError(f"--profile records until step {PROFILED_UNTIL}, --steps is {config.steps}")
    may_be_zero = ("seed", "sample_every", "keep_every", "max_bad_steps")
    cli.check_between(0, 2**63 - 1, **{name: getattr(config, name) for name in may_be_zero})
    cli.check_between(0, 10**9, hang_timeout=config.hang_timeout)  # in seconds; clocks know no larger ones
    run = run_name(config)
    if config.sample_every and not (dataset.folder / "tokenizer.json").is_file():
        raise ValueError(f"--sample-every needs {dataset.folder / 'tokenizer.json'}, which is missing: take 0")
    for split in ("train", "val"):
        Windows(dataset, split, config.seq_len)
    return resolve_computation(replace(config, run=run), ranks)


def run_name(config: Config) -> str:
    run = config.run or config.preset
    if Path(run).name != run:
        raise ValueError(f"--run {run} is no plain name: the run's folder is logs/RUN")
    return run


def must_agree(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What a resumed run may not change, or its steps would not be those of one that was never interrupted."""
    names = ("preset", "seed", "seq_len", "val_tokens", "init_from", *SETTINGS)
    settings = {name: getattr(config, name) for name in names}
    return settings | {"manifest_hash": dataset.manifest_hash}


def begin(run: Run) -> Optimizers:
    """Put the run where its newest valid checkpoint left it; else at step 0, with --init-from's or random weights."""
    config, ranks = run.config, run.ranks
    found = checkpoint.find(run.folder, ranks, anew=config.resume == "never")
    state = checkpoint.load_training_state(found, must_agree(config, run.dataset)) if found else None
    source = found or (checkpoint.resolve_init(config.init_from, ranks) if config.init_from else None)
    run.model = load_model(config, run.dataset, source).to(ranks.device)
    optimizer = optimizers(run.model, config, ranks)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        run.step, run.tokens = state["step"], state["tokens"]
        run.seconds, run.bad_steps = state["seconds"], state["bad_steps"]
        if config.deterministic and state.get("world_size") == ranks.world_size and config.micro_batch == "auto":
            run.config = config = replace(config, micro_batch=state["micro_batch"])  # another would round otherwise
        ranks.log(f"resuming {found}: step {run.step:,} of {config.steps:,}, {run.tokens:,} tokens seen")
    if config.micro_batch == "auto" and run.step < config.steps:
        run.config = replace(config, micro_batch=fitting_micro_batch(run.model, optimizer, config, ranks))
        ranks.log(f"--micro-batch {run.config.micro_batch}")
    return optimizer


def training_state(run: Run, optimizer: Optimizers) -> dict[str, Any]:
    """All that a resume needs but the weights: plain values and tensors."""
    state: dict[str, Any] = {"step": run.step, "tokens": run.tokens, "seconds": run.seconds, "bad_steps": run.bad_steps}
    state |= {"rng": torch.get_rng_state(), "settings": must_agree(run.config, run.dataset)}
    state |= {"micro_batch": run.config.micro_batch, "world_size": run.ranks.world_size}
    return state | {"optimizer": optimizer.state_dict()}


def load_model(config: Config, dataset: Dataset, source: Path | str | None) -> GPT:
    """The model at its start. Raises ValueError where weights given don't fit the preset or the shards."""
    shape = replace(PRESETS[config.preset], vocab_size=dataset.vocab_size)
    if source is None:
        model = GPT(shape, seed=config.seed)
        if config.init == "aligned":
            align_keys(model)
        return model
    model = checkpoint.load_model(str(source))
    if model.config != shape:
        raise ValueError(
            f"{source} is {describe(model.config)} with {model.config.vocab_size:,} token ids, but --preset "
            f"{config.preset} and {dataset.folder} need {config.preset} with {shape.vocab_size:,}: take the preset of "
            f"these weights, and shards of their vocabulary"
        )
    return model


def train(run: Run, optimizer: Optimizers) -> None:
    config, ranks = run.config, run.ranks
    windows = Windows(run.dataset, "train", config.seq_len)
    order = TokenOrder(run.dataset.manifest_hash, config.seed, config.seq_len, len(windows))
    schedule = Schedule(config)
    loss = loss_model(run.model, config, config.compile == "on")
    measures = open_measures(config, run.dataset, ranks, loss, run.model.config.n_positions)
    model = parallel(loss, ranks)
    if "on" in (config.compile, config.fused):
        warm_up(model, config, schedule, ranks, run.step)
    interrupts = Interrupts(config.hang_timeout, ranks.is_main)
    with (
        open_log(run) as log,
        open_saver(run, log) as saver,
        open_profiler(run, log) as profiled_step,
        interrupts,
        closing(open_loader(config, schedule, ranks, windows, order, range(run.step, config.steps))) as batches,
    ):
        told = ranks.broadcast(log.told if log is not None else None)
        measure(run, measures, log, told)  # at step 0, or what a run that was stopped left to be measured
        reports = open_reports(run, log)
        intervals = (*(every for every, _ in measures), config.sample_every, config.save_every)
        first = run.step
        while run.step < config.steps and not reports.stop:
            interrupts.alive()
            rate, sequences = schedule.rate(run.step), len(schedule.sequences(run.step))
            flops = run.model.config.flops_per_token(schedule.piece(run.step))
            optimizer.set_rate(rate)
            stats = train_step(model, optimizer, batches, sequences, config, ranks, interrupts)
            run.step, run.tokens = run.step + 1, schedule.tokens(run.step + 1)
            reports.launched(run.step, run.tokens, sequences * config.seq_len, flops, rate * config.lr, stats)
            profiled_step()
            if run.step == first + 1:
                saver.reserve(run.model, training_state(run, optimizer))
                gc.collect()
                gc.freeze()  # what is there now stays; looking through it again would be a pause of half a second
                reports.restart_clock()
            if reports.stop or any(is_due(run, every) for every in intervals):
                run.seconds, run.bad_steps = reports.flush()
                interrupts.pause()
                if run.step == config.steps or not reports.stop:  # a run that is stopped measures when it goes on
                    measure(run, measures, log)
                    if is_due(run, config.sample_every) and log is not None:
                        log.say(sample_text(run))
                if is_due(run, config.save_every) or reports.stop:
                    saver.save(run.model, training_state(run, optimizer))
                reports.restart_clock()
        saver.finish()
    conclude(run)


def conclude(run: Run) -> None:
    """Say how the run ended. Raises ValueError where its weights are of no use."""
    say, steps = run.ranks.log, run.config.steps
    if run.step < steps:
        return say(f"stopped after step {run.step:,} of {steps:,}: the same command goes on")
    if run.bad_steps:
        say(f"{run.bad_steps} of {steps:,} steps were skipped: no finite loss or gradient")
    if not math.isfinite(run.val_loss):
        raise ValueError(
            f"the last validation loss is {run.val_loss}, and the weights in {run.folder} are of no use: another --run "
            f"with a lower --lr or longer --warmup-steps usually helps"
        )


def is_due(run: Run, every: int) -> bool:
    """Whether something done every so many steps (0: never) is due after this one; after the last one it is."""
    return every > 0 and (run.step % every == 0 or run.step == run.config.steps)


def open_log(run: Run) -> AbstractContextManager[RunLog | None]:
    """The run's log on rank 0, None on the others. run.json gets all that decides or explains the numbers."""
    if not run.ranks.is_main:
        return nullcontext()
    facts = asdict(run.config) | {"manifest_hash": run.dataset.manifest_hash, "world_size": run.ranks.world_size}
    facts |= {"versions": versions(run.ranks.device), "parameters": run.model.num_parameters()}
    facts |= {"epochs": run.config.tokens / run.dataset.tokens("train")}
    return RunLog(run.folder, facts, run.config.steps, run.step, run.config.wandb_project)


def open_reports(run: Run, log: RunLog | None) -> StepReports:
    config = run.config
    behind = (run.seconds, run.bad_steps)
    length = (config.steps, config.tokens)
    return StepReports(log, run.ranks, *length, config.log_every, *behind, config.max_bad_steps)


def open_saver(run: Run, log: RunLog | None) -> Saver:
    config = run.config
    say = log.say if log is not None else run.ranks.log
    return Saver(run.folder, run.dataset, run.ranks, config.keep, config.keep_every * config.save_every, say)


def open_profiler(run: Run, log: RunLog | None) -> AbstractContextManager[Callable[[], None]]:
    if not run.config.profile or log is None:
        return nullcontext(lambda: None)
    if run.config.steps - run.step < PROFILED_UNTIL:
        log.say(f"no profile: it takes {PROFILED_UNTIL} steps, and {run.config.steps - run.step} are left")
        return nullcontext(lambda: None)
    return profiled(run.folder, run.ranks.device, log.say)


def measure(run: Run, measures: list[tuple[int, Any]], log: RunLog | None, told: frozenset[str] = frozenset()) -> None:
    """Take and report the measures that are due at this step, but for those whose split is `told` already."""
    for every, taken in measures:
        if is_due(run, every) and taken.split not in told:
            result = taken.run(run.model)
            run.val_loss = result.get("loss", run.val_loss)
            if log is not None:
                log.write(step=run.step, tokens=run.tokens, split=taken.split, **result, seconds=run.seconds)
                log.say(f"step {run.step:>6,}/{run.config.steps:,}  {taken.describe(result)}")


def evaluate_only(config: Config, ranks: Ranks, dataset: Dataset) -> None:
    """Say what --init-from, or else the run's newest checkpoint, comes to."""
    if config.init_from:
        source: Path | str | None = checkpoint.resolve_init(config.init_from, ranks)
    else:
        source = checkpoint.find(Path("logs") / run_name(config), ranks, anew=False)
    if source is None:
        raise ValueError(f"logs/{run_name(config)} has no checkpoint to evaluate: name weights with --init-from")
    evaluate(str(source), config, dataset, ranks)


def sample_text(run: Run) -> str:
    """A few words from the model, to watch it learn."""
    from core import generation
    from core.data import tokenizer

    length = min(64, run.model.config.n_positions - 1)
    texts = generation.sample_text(run.model, tokenizer.load(run.dataset.folder), "", length, top_k=50, seed=run.step)
    try:
        return f"sample: {next(texts)}"
    except ValueError as error:
        return f"no sample: {error}"


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
