"""Train a GPT-2 on token shards.

    torchrun --standalone --nproc_per_node=8 train.py                # GPT-2 124M on FineWeb-Edu, 10 billion tokens
    python train.py --preset gpt2-medium                             # one GPU
    python train.py --init-from gpt2 --run tuned --data data/mine --lr 3e-5 --steps 200 --batch-tokens 32768 \\
        --warmup-steps 20
    python train.py --eval-only --init-from gpt2                     # validation loss of OpenAI's weights

Rerun the same command to resume an interrupted run. Ctrl-C, SIGTERM and SIGUSR1 stop the run and save a checkpoint.
The defaults are the recipe of the original project.
"""

import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

from core import cli  # before torch, whose import takes seconds: Ctrl-C ends it without a traceback

# isort: split
import torch
import torch.distributed as dist
from torch import Tensor

from core.data.shards import open_dataset, verify
from core.distributed import Ranks, autocast, is_out_of_memory, process_group
from core.train import compilation, setup
from core.train.config import Config
from core.train.depth import Depth
from core.train.graphs import Graphs, record_small_steps
from core.train.interrupts import Interrupts
from core.train.optim import OptimizerGroup
from core.train.sampling import shape_of
from core.train.schedule import Schedule
from core.train.session import Session, open_session
from core.train.setup import Run
from core.train.validation import Evaluation, build_evaluations, evaluate_only, sample_line


def main(config: Config) -> None:
    if config.system.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required by torch, before cuBLAS starts
    torch.use_deterministic_algorithms(config.system.deterministic)
    folder = setup.run_folder(config)
    cli.check_positive(hang_timeout=config.checkpoints.hang_timeout)
    cli.check_between(0, 10**9, hang_timeout=config.checkpoints.hang_timeout)  # seconds; the limit of system timers
    with process_group(config.system.device, config.checkpoints.hang_timeout) as ranks:
        dataset = open_dataset(config.run.data)
        if config.evaluation.eval_only:
            return evaluate_only(config, dataset, ranks, folder)
        recipe, system = setup.resolve(config, dataset, ranks)
        if not config.checkpoints.no_verify:
            verify(dataset, ranks)
        with setup.lock_run(folder, ranks):
            micro_batch = config.run.micro_batch
            try:
                run = setup.restore_or_init(config, recipe, system, dataset, ranks, folder)
                micro_batch = run.micro_batch
                if run.step == recipe.steps:
                    return ranks.log(
                        f"{folder} is finished: {recipe.steps} steps. To train its weights further, use another --run "
                        f"with --init-from {folder}"
                    )
                train(run)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                smaller = "--micro-batch" if micro_batch not in ("auto", 1) else "--seq-len or --preset"
                option = "" if system.activation_checkpointing else ", or --activation-checkpointing"
                raise ValueError(
                    f"--micro-batch {micro_batch}: out of memory. Use a smaller {smaller}{option}"
                ) from None


def train(run: Run) -> None:
    """The training loop: each iteration is one optimizer step."""
    config, recipe, ranks, model, optimizer = run.config, run.recipe, run.ranks, run.model, run.optimizer
    schedule = Schedule(recipe)
    raw_loss = setup.build_loss(model, run.system)  # mean cross-entropy of a batch
    evaluations = build_evaluations(
        config.evaluation, run.dataset, ranks, model.config, raw_loss, recipe.seq_len, run.system.dtype, run.micro_batch
    )
    depth = Depth(model)
    loss_fn, graphs = prepare_steps(run, schedule, raw_loss, depth)
    every = config.evaluation.sample_every, config.checkpoints.save_every, *(e.every for e in evaluations)
    with open_session(run) as session:
        first_step, logger, batches = run.step, session.logger, session.batches
        evaluate(run, session, evaluations, session.already_logged)  # at step 0, or what a stopped run had left to do
        step = partial(
            train_step, grad_clip=recipe.grad_clip, dtype=run.system.dtype, ranks=ranks, interrupts=session.interrupts
        )
        logger.restart_clock()
        while run.step < recipe.steps and not logger.stop:
            lr_scale, sequences = schedule.lr_scale(run.step), len(schedule.sequences(run.step))
            shape, count = schedule.split(run.step, run.micro_batch, ranks.world_size)
            if schedule.deepens(run.step):
                depth.deepen()
                session.log(f"all blocks are trained from step {run.step + 1} on")
                session.saver.compare_again()
                loss_fn = setup.wrap_ddp(raw_loss, ranks)
            optimizer.set_lr(lr_scale)
            metrics = step(
                loss_fn, optimizer, run.scaler, batches, accumulation=count, shallow=shape.shallow, graphs=graphs
            )
            if metrics is None:
                break
            run.step, run.tokens = run.step + 1, schedule.tokens(run.step + 1)
            logger.record(
                step=run.step,
                tokens=run.tokens,
                step_tokens=sequences * recipe.seq_len,
                flops_per_token=model.config.flops_per_token(shape.seq_len, shape.candidates, **shape.forward_kwargs),
                lr=lr_scale * recipe.lr,
                metrics=metrics,
            )
            session.profile_step()
            if run.step == first_step + 1:
                session.after_first_step()
            if run.is_due(*every):
                evaluate_and_save(run, session, evaluations)
        finish(run, session)
    report_end(run)


def prepare_steps(run: Run, schedule: Schedule, loss_fn: Any, depth: Depth) -> tuple[Any, Graphs]:
    """Compile, and record graphs, for all steps to come. Returns `loss_fn` with DDP, at the depth of the next step."""
    graphs: Graphs = {}
    for shallow in [False, True] if schedule.shallow(run.step) else [False]:
        depth.set(shallow)
        ddp_loss_fn = setup.wrap_ddp(loss_fn, run.ranks)
        arguments = ddp_loss_fn, run.recipe, run.system, run.micro_batch, run.ranks, run.step, shallow
        if run.system.compiles:
            compilation.compile_shapes(*arguments)
        graphs |= record_small_steps(*arguments)
    if not run.system.compiles:
        compilation.log_expected_time(
            ddp_loss_fn, *schedule.split(run.step, run.micro_batch, run.ranks.world_size), run
        )
    return ddp_loss_fn, graphs


def train_step(
    loss_fn: Any,
    optimizer: OptimizerGroup,
    scaler: torch.amp.GradScaler,
    batches: Iterator[list[Tensor]],
    *,
    accumulation: int,
    shallow: bool = False,
    grad_clip: float,
    dtype: str,
    ranks: Ranks,
    interrupts: Interrupts,
    graphs: Graphs,
) -> dict[str, Tensor] | None:
    """One optimizer step on the next `accumulation` micro-batches of each rank; shallow: see `GPT.hidden`.

    Returns its metrics by name, scalars on the device: a new entry appears in metrics.jsonl. None where a signal ended
    it between two micro-batches; no weight has changed then, and a resume computes the step again.
    """
    loss_sum = torch.zeros((), device=ranks.device)
    for i in range(accumulation):
        interrupts.restart_hang_timer()
        if interrupts.stop_step(ranks):
            return None
        batch = ranks.to_device(*next(batches))  # inputs and targets (B, T); with a sampled softmax also candidates
        is_last = i == accumulation - 1
        shape = shape_of(batch, shallow)
        if accumulation == 1 and (graph := graphs.get(shape)):
            loss = graph.backward(batch)  # the same as below
        else:
            with nullcontext() if is_last or ranks.world_size == 1 else loss_fn.no_sync():  # DDP reduces once
                with autocast(ranks, dtype):
                    loss = loss_fn(*batch, **shape.forward_kwargs) / accumulation
                scaler.scale(loss).backward()  # the loss itself, unless dtype is float16
        loss_sum += loss.detach()
    sums = torch.stack([loss_sum, torch.full_like(loss_sum, interrupts.stop_requested)])
    if ranks.world_size > 1:
        dist.all_reduce(sums)
    loss, stop_requested = sums[0] / ranks.world_size, sums[1]
    for member in optimizer.members:
        scaler.unscale_(member)
    grad_norm = torch.nn.utils.clip_grad_norm_(loss_fn.parameters(), grad_clip)
    is_finite = loss.isfinite() & grad_norm.isfinite()
    optimizer.step(skip=1 - is_finite.float())  # a bad step changes no weight
    optimizer.zero_grad()
    metrics = {"loss": loss, "grad_norm": grad_norm, "stop_requested": stop_requested}
    if scaler.is_enabled():
        metrics["loss_scale"] = scaler.scale(torch.ones_like(loss))
        scaler.update()  # halves the scale after an overflow, and doubles it after 2,000 steps without one
    return metrics


def evaluate_and_save(run: Run, session: Session, evaluations: list[Evaluation]) -> None:
    """Evaluations, text sample and checkpoint, as far as they are due after this step."""
    options = run.config.evaluation
    run.seconds, run.bad_steps = session.logger.flush()
    session.interrupts.stop_hang_timer()
    if run.step == run.recipe.steps or not session.logger.stop:  # a stopped run evaluates when it resumes
        evaluate(run, session, evaluations)
        if run.is_due(options.sample_every) and session.run_log is not None:
            session.log(sample_line(run.model, run.dataset.folder, run.step))
    if run.is_due(run.config.checkpoints.save_every):
        session.saver.save(run.model, run.training_state())
    session.logger.restart_clock()


def evaluate(
    run: Run, session: Session, evaluations: list[Evaluation], already_logged: frozenset[str] = frozenset()
) -> None:
    """Run and log the evaluations that are due at this step, except those that are `already_logged`.

    A signal ends them, accuracies before they start: a resume runs them again. Those of the last step complete.
    """

    def stop() -> bool:
        return run.step < run.recipe.steps and session.interrupts.stop_now(run.ranks)

    for evaluation in evaluations:
        if run.is_due(evaluation.every) and evaluation.split not in already_logged:
            result = evaluation.run(run.model, stop=stop)
            if result is None:
                session.logger.stop = True  # before another step, or a resume would leave out this evaluation
                return
            run.val_loss = result.get("loss", run.val_loss)
            session.log(f"step {run.step}/{run.recipe.steps} | {evaluation.describe(result)}")
            if session.run_log is not None:
                facts = {"step": run.step, "tokens": run.tokens, "split": evaluation.split}
                session.run_log.write(**facts, **result, seconds=run.seconds)


def finish(run: Run, session: Session) -> None:
    """Save the last step, where that isn't done, and wait for the checkpoint."""
    run.seconds, run.bad_steps = session.logger.flush()
    session.interrupts.stop_hang_timer()
    if run.step > session.saver.saved_step:
        session.saver.save(run.model, run.training_state())
    session.saver.finish()


def report_end(run: Run) -> None:
    """Log how the run ended. Raises ValueError where its weights are unusable."""
    if run.step < run.recipe.steps:
        return run.ranks.log(f"stopped after step {run.step}/{run.recipe.steps}. Rerun the same command to resume")
    if run.bad_steps:
        run.ranks.log(f"{run.bad_steps} of {run.recipe.steps} steps were skipped: loss or gradient not finite")
    if not math.isfinite(run.val_loss):
        raise ValueError(
            f"{run.folder} diverged: its last validation loss is {run.val_loss}. Start another --run with a lower --lr "
            f"or longer --warmup-steps"
        )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
