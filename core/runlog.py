"""What a run leaves behind: run.json, metrics.jsonl (the truth), lines on the terminal, and a mirror in wandb."""

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from core.distributed import DeviceClock, Ranks, peak_flops
from core.shards import write_json

METRICS = "metrics.jsonl"


class RunLog:
    """Writes a run's metrics. Only rank 0 makes one."""

    def __init__(self, run: Path, settings: dict[str, Any], steps: int, done: int, wandb_project: str | None) -> None:
        """`done` steps lie behind: metrics of later steps, which the checkpoint lacks, are cut off."""
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "run.json", settings)
        cut_back(run / METRICS, done if done else -1)  # a run that begins anew says its step 0 again
        self._file = open(run / METRICS, "a", buffering=1)  # noqa: SIM115  closed by __exit__
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=None, dynamic_ncols=True)
        self._wandb = start_wandb(run, settings, wandb_project) if wandb_project else None

    def write(self, **metrics: Any) -> None:
        """One line of metrics.jsonl; a number that isn't finite becomes null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self._file.write(json.dumps(finite) + "\n")
        if self._wandb is not None:
            split = metrics["split"]
            named = {k if k in ("tokens", "lr") else f"{split}/{k}": v for k, v in finite.items() if v is not None}
            self._wandb.log(
                {k: v for k, v in named.items() if not k.endswith(("/step", "/split"))}, step=metrics["step"]
            )

    def advance(self) -> None:
        self._bar.update()

    def say(self, text: str) -> None:
        """A line for the person who watches; above the progress bar on a terminal, plain in a log file."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


class StepReports:
    """Reports each step after the next one is launched, so that reading its loss never makes the device wait."""

    def __init__(
        self, log: RunLog | None, ranks: Ranks, steps: int, log_every: int, seconds: float, flops_per_token: float
    ) -> None:
        """`seconds` of training lie behind; every `log_every`-th step of `steps` is said on the terminal."""
        self._log, self._steps, self._log_every, self._seconds = log, steps, log_every, seconds
        self._clock = DeviceClock(ranks.device)
        peak = peak_flops(ranks.device)
        self._mfu_per_rate = flops_per_token / (peak * ranks.world_size) if peak else None
        self._pending: tuple[dict[str, Any], int, Tensor, Any, Any] | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """What came before, such as a validation, is no part of the next step's time."""
        self._begin = self._clock.mark()

    def launched(self, step: int, tokens: int, step_tokens: int, lr: float, stats: Tensor) -> None:
        """Note the step just launched, with its loss and gradient norm (2,) on the device; report the one before."""
        stats = stats.to("cpu", non_blocking=stats.is_cuda)  # read once the mark after it is reached
        end = self._clock.mark()
        self.flush()
        facts = {"step": step, "tokens": tokens, "split": "train", "lr": lr}
        self._pending = (facts, step_tokens, stats, self._begin, end)
        self._begin = end

    def flush(self) -> float:
        """Report the step that is pending; return the seconds of training so far.

        Raises ValueError, on every rank, where the loss or the gradient norm isn't finite.
        """
        if self._pending is None:
            return self._seconds
        facts, step_tokens, stats, begin, end = self._pending
        self._pending = None
        seconds = self._clock.seconds(begin, end)
        loss, norm = stats.tolist()
        rate = step_tokens / seconds
        self._seconds += seconds
        facts |= {"loss": loss, "grad_norm": norm, "tokens_per_second": rate, "seconds": self._seconds}
        facts["mfu"] = rate * self._mfu_per_rate if self._mfu_per_rate else None
        if self._log is not None:
            self._log.write(**facts)
            self._log.advance()
            if facts["step"] % self._log_every == 0 or facts["step"] in (1, self._steps):
                self._log.say(self._line(facts, seconds))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise ValueError(
                f"step {facts['step']}: loss {loss}, gradient norm {norm}; no checkpoint has it. A lower --lr or "
                f"--grad-clip, or a longer --warmup-steps, usually helps"
            )
        return self._seconds

    def _line(self, facts: dict[str, Any], seconds: float) -> str:
        left = (self._steps - facts["step"]) * seconds / 60
        mfu = f"  mfu {facts['mfu']:.1%}" if facts["mfu"] else ""
        return (
            f"step {facts['step']:>6,}/{self._steps:,}  loss {facts['loss']:.4f}  lr {facts['lr']:.2e}  "
            f"norm {facts['grad_norm']:.2f}  {facts['tokens_per_second'] / 1e3:,.1f} ktok/s{mfu}  {left:,.1f} min left"
        )


def cut_back(path: Path, step: int) -> None:
    """Drop what metrics.jsonl says of steps after `step`, and a last line that a kill cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text("".join(kept))
    os.replace(unfinished, path)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """A run's metrics so far, also while it goes on. A last line that is being written is left out."""
    lines = (run / METRICS).read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def start_wandb(run: Path, settings: dict[str, Any], project: str) -> Any:
    """A wandb run that mirrors metrics.jsonl, offline where there is no login; None where wandb fails."""
    try:
        import wandb

        mode = None if wandb.api.api_key or os.environ.get("WANDB_MODE") else "offline"
        name = f"{run.name}-{settings['manifest_hash'][:8]}"
        return wandb.init(project=project, name=run.name, id=name, dir=run, config=settings, resume="allow", mode=mode)
    except Exception as error:
        print(f"wandb is left out, metrics.jsonl goes on: {error}", file=sys.stderr)
        return None


def versions(device: torch.device) -> dict[str, str | None]:
    """What produced a result: interpreter, torch, device, and the git revision with a + where files were changed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return {"python": platform.python_version(), "torch": torch.__version__, "device": name, "git": git_revision()}


def git_revision() -> str | None:
    root = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
