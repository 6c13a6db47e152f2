"""Opens the resources of the training loop: data loader, logs, saver, profiler, signal handlers."""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from core.train.interrupts import Interrupts
from core.train.loader import open_loader
from core.train.logging import RunLog, StepLogger, versions
from core.train.profiling import PROFILED_STEPS, profiled
from core.train.saver import Saver, permanent_checkpoints
from core.train.setup import Run


@dataclass
class Session:
    """The open resources of a run in training."""

    run: Run
    run_log: RunLog | None  # on rank 0
    logger: StepLogger
    saver: Saver
    interrupts: Interrupts
    batches: Iterator[list[Tensor]]  # inputs and targets (B, T), and candidates, in host memory (core/train/loader.py)
    profile_step: Callable[[], None]
    already_logged: frozenset[str]  # evaluations of the current step that an earlier process logged

    def log(self, text: str) -> None:
        """A line on the terminal, from rank 0 only."""
        if self.run_log is not None:
            self.run_log.log(text)

    def after_first_step(self) -> None:
        """Allocate memory for snapshots, and exclude existing objects from garbage collection.

        Otherwise each full collection, which looks at all of them, pauses training for half a second.
        """
        self.interrupts.stop_hang_timer()
        self.saver.preallocate(self.run.model, self.run.training_state())
        gc.collect()
        gc.freeze()
        self.logger.restart_clock()


@contextmanager
def open_session(run: Run) -> Iterator[Session]:
    config, recipe, ranks = run.config, run.recipe, run.ranks
    with ExitStack() as stack:
        logs: list[RunLog] = []
        permanent = permanent_checkpoints(run.folder) if ranks.is_main else frozenset()  # before run.json changes

        def start_log() -> frozenset[str]:
            logs.append(open_log(run))
            return logs[0].already_logged

        already_logged = ranks.on_main(start_log)
        run_log = stack.enter_context(logs[0]) if logs else None
        log = run_log.log if run_log is not None else ranks.log
        saver = Saver(
            run.folder,
            run.dataset,
            ranks,
            keep=config.checkpoints.keep,
            keep_multiple=config.checkpoints.keep_every * config.checkpoints.save_every,
            step=run.step,
            log=log,
            permanent=permanent,
        )
        stack.enter_context(saver)
        profile_step = open_profiler(run, log, stack)
        interrupts = stack.enter_context(Interrupts(config.checkpoints.hang_timeout, ranks.is_main))
        batches = open_loader(
            run.dataset,
            recipe,
            seed=config.recipe.seed,
            micro_batch=run.micro_batch,
            ranks=ranks,
            steps=range(run.step, recipe.steps),
            log=log,
        )
        stack.enter_context(closing(batches))
        logger = StepLogger(
            run_log,
            ranks,
            steps=recipe.steps,
            tokens=recipe.tokens,
            log_every=config.evaluation.log_every,
            seconds=run.seconds,
            bad_steps=run.bad_steps,
            max_bad_steps=config.checkpoints.max_bad_steps,
        )
        yield Session(run, run_log, logger, saver, interrupts, batches, profile_step, already_logged)


def open_log(run: Run) -> RunLog:
    """The log of a run. run.json records all that determines or explains its numbers."""
    facts: dict[str, Any] = run.config.settings(run.recipe) | run.system.settings()
    facts |= {"run": run.folder.name, "micro_batch": run.micro_batch, "world_size": run.ranks.world_size}
    facts |= {"manifest_hash": run.dataset.manifest_hash, "versions": versions(run.ranks.device)}
    facts |= {"parameters": run.model.num_parameters(), "epochs": run.recipe.tokens / run.dataset.tokens("train")}
    project = run.config.evaluation.wandb_project
    return RunLog(run.folder, facts, step=run.step, tracker=run.config.tracker, project=project)


def open_profiler(run: Run, log: Callable[[str], None], stack: ExitStack) -> Callable[[], None]:
    """A function to call after each step."""
    if not run.config.system.profile or not run.ranks.is_main:
        return lambda: None
    if run.recipe.steps - run.step < PROFILED_STEPS:
        log(f"no profile: it needs {PROFILED_STEPS} steps, and {run.recipe.steps - run.step} are left")
        return lambda: None
    return stack.enter_context(profiled(run.folder, run.ranks.device, log))
