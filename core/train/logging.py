"""The log of a run: run.json, metrics.jsonl (authoritative), lines on the terminal, and a mirror in a tracker."""

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from core import cli
from core.distributed import DeviceClock, Ranks, SynchronizedError, device_name, peak_flops
from core.files import METRICS, write_json
from core.train.trackers import Mirror

SMOOTHING = 0.1  # weight of the latest step in the mean time per token, from which the ETA follows


class RunLog:
    """Writes the metrics of a run; only rank 0 has one. No failure of a disk, a terminal or a tracker stops the run."""

    def __init__(
        self, run_folder: Path, settings: dict[str, Any], *, step: int, tracker: str, project: str | None
    ) -> None:
        """`step` steps are complete: metrics of later steps, which the checkpoint lacks, are removed."""
        run_folder.mkdir(parents=True, exist_ok=True)
        write_json(run_folder / "run.json", settings)
        last_step = step or -1  # a run that restarts logs step 0 again
        kept, damaged = truncate_metrics(run_folder / METRICS, last_step)
        self.already_logged = frozenset(line["split"] for line in kept if line["step"] == step)
        self._file = open(run_folder / METRICS, "ab", buffering=0)  # noqa: SIM115  closed by __exit__
        self._unwritten = b""
        self._bar = cli.progress_bar(
            total=settings["steps"], initial=step, unit="step", lines=False, dynamic_ncols=True
        )
        self._mirror = Mirror(tracker, run_folder, settings, project, self.log) if tracker != "none" else None
        if damaged:
            self.log(f"warning: {damaged} damaged line{'s' if damaged > 1 else ''} of {run_folder / METRICS} removed")
        if not cli.terminal.quiet:
            self.log(summary(run_folder, settings))

    def write(self, **metrics: Any) -> None:
        """Append a line to metrics.jsonl; a number that isn't finite becomes null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        was_complete = not self._unwritten
        self._unwritten += json.dumps(finite).encode() + b"\n"
        try:
            while self._unwritten:  # a full disk may accept part of a line; the rest follows later
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if was_complete:
                self.log(f"warning: {METRICS} can't be written ({error.strerror}); its lines are kept in memory")
        if self._mirror is not None:
            self._mirror.write(finite)

    def advance(self) -> None:
        with contextlib.suppress(OSError):
            self._bar.update()

    def log(self, text: str) -> None:
        """A line on the terminal, above the progress bar, or in a log file."""
        with contextlib.suppress(OSError):  # a closed terminal, or a log file on a full disk
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._bar.close()
        self._file.close()
        if self._mirror is not None:
            self._mirror.finish()


@dataclass
class PendingStep:
    """A step that was launched and may still run on the device."""

    step: int
    tokens: int  # after the step
    step_tokens: int
    flops_per_token: float
    lr: float
    names: list[str]  # of the metrics
    values: Tensor  # (len(names),) on the host, complete once the device has reached `end`
    start: Any
    end: Any


class StepLogger:
    """Logs each step after the next one was launched, so that reading its loss never makes the device wait."""

    def __init__(
        self,
        log: RunLog | None,
        ranks: Ranks,
        *,
        steps: int,
        tokens: int,
        log_every: int,
        seconds: float,
        bad_steps: int,
        max_bad_steps: int,
    ) -> None:
        """For a run of `steps` and `tokens`, with `seconds` of training and `bad_steps` so far. Every `log_every`-th
        step is a line on the terminal."""
        self._log, self._steps, self._tokens, self._log_every, self._seconds = log, steps, tokens, log_every, seconds
        self.bad_steps, self._max_bad_steps = bad_steps, max_bad_steps
        self.stop = False  # whether any rank was asked to stop; all ranks know it after the same step
        self._clock = DeviceClock(ranks.device)
        self._peak = (peak_flops(ranks.device) or 0) * ranks.world_size
        self._pending: PendingStep | None = None
        self._seconds_per_token, self._steps_here = 0.0, 0  # smoothed; steps of this process
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude what happened since the last step, such as a validation, from the time of the next step."""
        self._start = self._clock.mark()

    def record(
        self, *, step: int, tokens: int, step_tokens: int, flops_per_token: float, lr: float, metrics: dict[str, Tensor]
    ) -> None:
        """Record the step just launched, and log the one before.

        `metrics` are scalars on the device: `loss`, `grad_norm`, `stop_requested`, and any others; each except
        `stop_requested` is written to metrics.jsonl by its name.
        """
        values = torch.stack(list(metrics.values()))
        values = values.to("cpu", non_blocking=values.is_cuda)  # one copy; complete once `end` is reached
        end = self._clock.mark()
        self.flush()
        names = list(metrics)
        self._pending = PendingStep(step, tokens, step_tokens, flops_per_token, lr, names, values, self._start, end)
        self._start = end

    def flush(self) -> tuple[float, int]:
        """Log the pending step; return the seconds of training and the number of bad steps so far.

        Raises SynchronizedError after more than `max_bad_steps` steps without a finite loss and gradient.
        """
        if self._pending is None:
            return self._seconds, self.bad_steps
        pending, self._pending = self._pending, None
        seconds = self._clock.seconds(pending.start, pending.end)
        values = dict(zip(pending.names, pending.values.tolist(), strict=True))
        self.stop |= values.pop("stop_requested") > 0
        throughput = pending.step_tokens / seconds
        self._steps_here += 1
        weight = SMOOTHING if self._steps_here > 2 else 1.0  # the first step is slow; the second replaces it
        self._seconds_per_token += weight * (seconds / pending.step_tokens - self._seconds_per_token)
        self._seconds += seconds
        bad = not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]))
        # Loss scaling tries scales that are too large: an overflow of the gradient says nothing about the run.
        overflow = bad and math.isfinite(values["loss"]) and values.get("loss_scale", 1.0) > 1
        self.bad_steps += bad and not overflow
        metrics = {"step": pending.step, "tokens": pending.tokens, "split": "train", "lr": pending.lr, **values}
        metrics |= {"tokens_per_second": throughput, "seconds": self._seconds}
        metrics["mfu"] = throughput * pending.flops_per_token / self._peak if self._peak else None
        if self._log is not None:
            self._log.write(**metrics, **({"skipped": True} if bad else {}))
            self._log.advance()
            is_logged = pending.step % self._log_every == 0 or pending.step in (1, self._steps)
            if bad or (is_logged and not cli.terminal.quiet):
                reason = f"float16 overflow at loss scale {values['loss_scale']:.0f}" if overflow else ""
                reason = reason or f"{self.bad_steps} so far"
                self._log.log(self._line(metrics) + (f" | SKIPPED ({reason})" if bad else ""))
        if self.bad_steps > self._max_bad_steps:
            raise SynchronizedError(
                f"step {pending.step}: loss {values['loss']}, gradient norm {values['grad_norm']}. {self.bad_steps} "
                f"steps were skipped, more than --max-bad-steps {self._max_bad_steps}. Start another --run with a "
                f"lower --lr or --grad-clip, or longer --warmup-steps"
            )
        return self._seconds, self.bad_steps

    def _line(self, metrics: dict[str, Any]) -> str:
        tokens_left = self._tokens - metrics["tokens"]  # not steps, whose size may grow
        parts = [
            f"step {metrics['step']}/{self._steps}",
            f"loss {metrics['loss']:.4f}",
            f"lr {metrics['lr']:.1e}",
            f"grad_norm {metrics['grad_norm']:.2f}",
            f"{format_count(metrics['tokens_per_second'])} tok/s",
        ]
        if metrics["mfu"]:
            parts.append(f"mfu {metrics['mfu']:.1%}")
        if tokens_left:
            parts.append(f"eta {format_duration(tokens_left * self._seconds_per_token)}")
        return " | ".join(parts)


def summary(run_folder: Path, settings: dict[str, Any]) -> str:
    """A line on what the run will do."""
    ranks, device = settings["world_size"], settings["versions"]["device"]
    # Muennighoff et al. 2023, arXiv:2305.16264: up to four epochs are almost as good as new data.
    unique_tokens = settings["tokens"] / settings["epochs"]
    warning = f" (more than 4 gain little: --tokens {4 * unique_tokens:.0f})" if settings["epochs"] > 4 else ""
    parts = [
        str(run_folder),
        f"{settings['preset']}, {settings['parameters']:,} parameters",
        f"{ranks} x {device}" if ranks > 1 else device,
        f"{settings['steps']} steps",
        f"{format_count(settings['tokens'])} tokens",
        f"{settings['epochs']:.3g} epochs of {settings['data']}{warning}",
    ]
    return " | ".join(parts)


def format_count(number: float) -> str:
    """950, 12.3k, 1.06M, 10.00B."""
    for suffix, size, digits in (("B", 1e9, 2), ("M", 1e6, 2), ("k", 1e3, 1)):
        if number >= size:
            return f"{number / size:.{digits}f}{suffix}"
    return f"{number:.0f}"


def format_duration(seconds: float) -> str:
    """48s, 38m, 4.6h, 2.1d."""
    for unit, size, digits in (("d", 86_400, 1), ("h", 3600, 1), ("m", 60, 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f}{unit}"
    return f"{seconds:.0f}s"


def versions(device: torch.device) -> dict[str, str | None]:
    """What produced a result: Python, torch, device, and the git revision, with a + where files were changed."""
    packages = {"python": platform.python_version(), "torch": torch.__version__}
    return packages | {"device": device_name(device), "git": git_revision()}


def git_revision() -> str | None:
    root = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def truncate_metrics(path: Path, step: int) -> tuple[list[dict[str, Any]], int]:
    """Remove lines of metrics.jsonl of steps after `step`, damaged lines, and an incomplete last line.

    Returns the rest, and the number of damaged lines.
    """
    kept: list[dict[str, Any]] = []
    damaged = 0
    if not path.exists():
        return kept, damaged
    *lines, _ = path.read_bytes().split(b"\n")
    for line in lines:
        try:
            metrics = json.loads(line)
            is_usable = isinstance(metrics["step"], int) and isinstance(metrics["split"], str)
        except (ValueError, TypeError, KeyError, RecursionError):
            is_usable = False
        if not is_usable:
            damaged += 1
        elif metrics["step"] <= step:
            kept.append(metrics)
    temporary = path.with_name(f".{path.name}.unfinished")
    temporary.write_text("".join(json.dumps(metrics) + "\n" for metrics in kept), encoding="utf-8")
    os.replace(temporary, path)
    return kept, damaged
