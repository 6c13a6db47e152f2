"""What a run leaves behind: run.json, metrics.jsonl (the truth), lines on the terminal, and a mirror in wandb."""

import contextlib
import json
import math
import netrc
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor
from tqdm import tqdm

from core import cli
from core.distributed import AgreedError, DeviceClock, Ranks, device_name, peak_flops
from core.files import METRICS, write_json

PACE = 0.1  # a step's part in the mean that the time left is told by


class RunLog:
    """Writes a run's metrics. Only rank 0 makes one. No failure of a disk, a terminal or wandb stops the run."""

    def __init__(self, run: Path, settings: dict[str, Any], steps: int, done: int, wandb_project: str | None) -> None:
        """`done` steps lie behind: metrics of later steps, which the checkpoint lacks, are cut off."""
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "run.json", settings)
        kept = truncate_metrics(run / METRICS, done if done else -1)  # a run that begins anew says its step 0 again
        self.told = frozenset(
            line["split"] for line in kept if line["step"] == done
        )  # what is known of that step already
        self._file = open(run / METRICS, "ab", buffering=0)  # noqa: SIM115  closed by __exit__
        self._unwritten = b""
        self._bar = cli.progress_bar(total=steps, initial=done, unit="step", dynamic_ncols=True)
        self._wandb: Any = start_wandb(run, settings, wandb_project) if wandb_project else None
        if not cli.terminal.quiet:
            self.say(announcement(run, settings))

    def write(self, **metrics: Any) -> None:
        """One line of metrics.jsonl; a number that isn't finite becomes null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        whole = not self._unwritten
        self._unwritten += json.dumps(finite).encode() + b"\n"
        try:
            while (
                self._unwritten
            ):  # a disk that fills up may take half a line; the other half follows where it left off
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if whole:
                self.say(f"{METRICS} can't be written ({error.strerror}): its lines wait in memory")
        if self._wandb is not None:
            self._mirror(finite)

    def _mirror(self, metrics: dict[str, Any]) -> None:
        step, split = metrics["step"], metrics["split"]
        named = {k if k in ("tokens", "lr") else f"{split}/{k}": v for k, v in metrics.items() if v is not None}
        try:
            self._wandb.log({k: v for k, v in named.items() if not k.endswith(("/step", "/split"))}, step=step)
        except Exception as error:
            self._wandb = None
            self.say(f"wandb failed and is left out from here on, {METRICS} goes on: {error}")

    def advance(self) -> None:
        with contextlib.suppress(OSError):
            self._bar.update()

    def say(self, text: str) -> None:
        """A line for the person who watches; above the progress bar on a terminal, plain in a log file."""
        with contextlib.suppress(OSError):  # a terminal that was closed, a log file on a full disk
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._bar.close()
        self._file.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                self.say(f"wandb could not finish: {error}")


class StepReports:
    """Reports each step after the next one is launched, so that reading its loss never makes the device wait."""

    def __init__(
        self,
        log: RunLog | None,
        ranks: Ranks,
        steps: int,
        tokens: int,
        log_every: int,
        seconds: float,
        bad_steps: int,
        max_bad_steps: int,
    ) -> None:
        """Of a run of so many `steps` and `tokens`; `seconds` of training and `bad_steps` lie behind. Every
        `log_every`-th step is said on the terminal."""
        self._log, self._steps, self._tokens, self._log_every, self._seconds = log, steps, tokens, log_every, seconds
        self.bad_steps, self._max_bad_steps = bad_steps, max_bad_steps
        self.stop = False  # whether any rank was asked to stop, known to all of them after the same step
        self._clock = DeviceClock(ranks.device)
        self._peak = (peak_flops(ranks.device) or 0) * ranks.world_size
        self._pending: tuple[dict[str, Any], int, float, Tensor, Any, Any] | None = None
        self._pace, self._steps_here = 0.0, 0  # seconds a token, of late; this process's steps
        self.restart_clock()

    def restart_clock(self) -> None:
        """What came before, such as a validation, is no part of the next step's time."""
        self._begin = self._clock.mark()

    def launched(
        self, step: int, tokens: int, step_tokens: int, flops_per_token: float, lr: float, stats: Tensor
    ) -> None:
        """Note the step just launched, with what `train_step` gave (3,) on the device; report the one before."""
        stats = stats.to("cpu", non_blocking=stats.is_cuda)  # read once the mark after it is reached
        end = self._clock.mark()
        self.flush()
        facts = {"step": step, "tokens": tokens, "split": "train", "lr": lr}
        self._pending = (facts, step_tokens, flops_per_token, stats, self._begin, end)
        self._begin = end

    def flush(self) -> tuple[float, int]:
        """Report the step that is pending; return the seconds of training and the bad steps so far.

        Raises AgreedError after more than `max_bad_steps` steps without a finite loss and gradient.
        """
        if self._pending is None:
            return self._seconds, self.bad_steps
        facts, step_tokens, flops_per_token, stats, begin, end = self._pending
        self._pending = None
        seconds = self._clock.seconds(begin, end)
        loss, norm, asked_to_stop = stats.tolist()
        self.stop |= asked_to_stop > 0
        rate = step_tokens / seconds
        self._steps_here += 1
        weight = PACE if self._steps_here > 2 else 1.0  # a process's first step is slow, and forgotten with the second
        self._pace += weight * (seconds / step_tokens - self._pace)
        self._seconds += seconds
        facts |= {"loss": loss, "grad_norm": norm, "tokens_per_second": rate, "seconds": self._seconds}
        facts["mfu"] = rate * flops_per_token / self._peak if self._peak else None
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        self.bad_steps += bad
        if self._log is not None:
            self._log.write(**facts, **({"skipped": True} if bad else {}))
            self._log.advance()
            if bad or (
                not cli.terminal.quiet and (facts["step"] % self._log_every == 0 or facts["step"] in (1, self._steps))
            ):
                skipped = f"  SKIPPED, {self.bad_steps} so far" if bad else ""
                self._log.say(self._line(facts) + skipped)
        if self.bad_steps > self._max_bad_steps:
            raise AgreedError(
                f"step {facts['step']}: loss {loss}, gradient norm {norm}; {self.bad_steps} steps were skipped, more "
                f"than --max-bad-steps {self._max_bad_steps}. Another --run with a lower --lr or --grad-clip, or with "
                f"longer --warmup-steps, usually helps; --init-from gives it the weights of a good checkpoint"
            )
        return self._seconds, self.bad_steps

    def _line(self, facts: dict[str, Any]) -> str:
        left = self._tokens - facts["tokens"]  # not steps, which may grow
        mfu = f"  mfu {facts['mfu']:.1%}" if facts["mfu"] else ""
        return (
            f"step {facts['step']:>6,}/{self._steps:,}  loss {facts['loss']:.4f}  lr {facts['lr']:.2e}  "
            f"norm {facts['grad_norm']:.2f}  {facts['tokens_per_second'] / 1e3:,.1f} ktok/s{mfu}"
            f"{f'  {format_duration(left * self._pace)} left' if left else ''}"
        )


def announcement(run: Path, settings: dict[str, Any]) -> str:
    """What is about to be done, in a line."""
    cards, ranks, tokens = settings["versions"]["device"], settings["world_size"], settings["tokens"]
    amount = f"{tokens / 1e9:.2f}B" if tokens >= 1e9 else f"{tokens / 1e6:.2f}M"
    # Muennighoff et al. 2023, arXiv:2305.16264: up to four passes are nearly worth new data.
    warning = " (after four, more passes over the same data gain little)" if settings["epochs"] > 4 else ""
    return (
        f"{run}: {settings['preset']}, {settings['parameters']:,} parameters, on {f'{ranks} x ' if ranks > 1 else ''}"
        f"{cards}; {settings['steps']:,} steps, {amount} tokens, {settings['epochs']:.3g} epochs of {settings['data']}"
        f"{warning}"
    )


def format_duration(seconds: float) -> str:
    """For a person: 48 s, 12.3 min, 4.6 h, 2.1 days."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def start_wandb(run: Path, settings: dict[str, Any], project: str) -> Any:
    """A wandb run that mirrors metrics.jsonl, offline where there is no login; None where wandb fails."""
    try:
        import wandb

        mode: Literal["offline"] | None = None if os.environ.get("WANDB_MODE") or logged_in() else "offline"
        name = f"{run.name}-{settings['manifest_hash'][:8]}"
        return wandb.init(project=project, name=run.name, id=name, dir=run, config=settings, resume="allow", mode=mode)
    except Exception as error:
        print(f"wandb is left out, metrics.jsonl goes on: {error}", file=sys.stderr)
        return None


def logged_in() -> bool:
    """Whether wandb will find a key; it would ask for one on a terminal, and nobody may be there to answer."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(str(host)) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def versions(device: torch.device) -> dict[str, str | None]:
    """What produced a result: interpreter, torch, device, and the git revision with a + where files were changed."""
    here = {"python": platform.python_version(), "torch": torch.__version__}
    return here | {"device": device_name(device), "git": git_revision()}


def git_revision() -> str | None:
    root = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def truncate_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop what metrics.jsonl says of steps after `step`, and a last line that a kill cut short; return the rest."""
    kept: list[dict[str, Any]] = []
    if not path.is_file():
        return kept
    for line in path.read_text().splitlines():
        try:
            metrics = json.loads(line)
        except ValueError:
            break
        if metrics["step"] <= step:
            kept.append(metrics)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text("".join(json.dumps(metrics) + "\n" for metrics in kept))
    os.replace(unfinished, path)
    return kept
