"""Mirrors of a run's metrics in wandb or trackio, which has the same interface. Their failures never stop the run."""

import hashlib
import importlib.util
import netrc
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from core.files import METRICS

DEFAULT_PROJECT = "gpt2"
LONGEST_NAME = 100  # characters; an id of wandb has at most 128


class Mirror:
    """The metrics of a run in a tracker. After its first failure it does nothing."""

    def __init__(
        self, tracker: str, run_folder: Path, settings: dict[str, Any], project: str | None, warn: Callable[[str], None]
    ) -> None:
        """`tracker`: wandb or trackio. `warn` gets a line where the tracker fails."""
        self._tracker, self._warn = tracker, warn
        start = {"wandb": start_wandb, "trackio": start_trackio}[tracker]
        try:
            self._run = start(run_folder, settings, project or DEFAULT_PROJECT)
        except Exception as error:
            self._disable(error)

    def write(self, metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl, as `split/name`: value."""
        if self._run is None:
            return
        step, split = metrics["step"], metrics["split"]
        named = {k if k in ("tokens", "lr") else f"{split}/{k}": v for k, v in metrics.items() if v is not None}
        try:
            self._run.log({k: v for k, v in named.items() if not k.endswith(("/step", "/split"))}, step=step)
        except Exception as error:
            self._disable(error)

    def finish(self) -> None:
        """Wait until the tracker has all metrics."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._warn(f"warning: {self._tracker} could not finish: {error}")

    def _disable(self, error: Exception) -> None:
        self._run = None
        self._warn(f"warning: {self._tracker} failed and is disabled ({error}); {METRICS} continues")


def check_installed(tracker: str | None) -> None:
    """Raise ValueError where the tracker of --tracker isn't installed."""
    if tracker in ("wandb", "trackio") and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"--tracker {tracker} needs a package that is not installed. Run pip install {tracker}")


def run_id(run_folder: Path, settings: dict[str, Any]) -> str:
    """An id that is equal after a resume, and another one for other data. wandb refuses some characters in it."""
    name = re.sub(r"[:;,#?/'\\\x00-\x1f]", "-", run_folder.name)[:LONGEST_NAME]
    if name != run_folder.name:  # a:b and a-b are different runs
        name += f"-{hashlib.sha256(run_folder.name.encode()).hexdigest()[:8]}"
    return f"{name}-{settings['manifest_hash'][:8]}"


def start_wandb(run_folder: Path, settings: dict[str, Any], project: str) -> Any:
    """A run of wandb, offline without a login."""
    import wandb

    mode: Literal["offline"] | None = None if os.environ.get("WANDB_MODE") or logged_in() else "offline"
    return wandb.init(
        project=project,
        name=run_folder.name,
        id=run_id(run_folder, settings),
        dir=run_folder,
        config=settings,
        resume="allow",
        mode=mode,
    )


def start_trackio(run_folder: Path, settings: dict[str, Any], project: str) -> Any:
    """A run of trackio in its folder on this machine. It has no ids: a resume finds the run by its name."""
    import trackio

    return trackio.init(project=project, name=run_id(run_folder, settings), config=settings, resume="allow")


def logged_in() -> bool:
    """Whether wandb will find a key. Without one it would wait for input on a terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(str(host)) is not None
    except (OSError, netrc.NetrcParseError):
        return False
