"""Checkpoints off the critical path: a snapshot in host memory, which a thread writes while training goes on."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import checkpoint
from core.data.shards import Dataset
from core.distributed import AgreedError, DeviceClock, Ranks
from core.train.model_card import model_card
from model import GPT


class Saver:
    """Writes a run's checkpoints and deletes those that needn't be kept. All ranks make one; rank 0's has the work."""

    def __init__(
        self, run: Path, dataset: Dataset, ranks: Ranks, keep: int, spacing: int, say: Callable[[str], None]
    ) -> None:
        """Keep the `keep` newest, and for good those whose step is a multiple of `spacing` (0: none)."""
        self._run, self._dataset, self._ranks, self._say = run, dataset, ranks, say
        self._keep, self._spacing = keep, spacing
        self._clock = DeviceClock(ranks.device)
        self._twin: GPT | None = None  # the snapshot's weights
        self._state: dict[str, Any] | None = None  # and the rest of it
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        if ranks.is_main:
            for remains in (run / "checkpoints").glob(".step_*"):  # of a process that was killed
                shutil.rmtree(remains, ignore_errors=True)

    def reserve(self, model: GPT, state: dict[str, Any]) -> None:
        """Set aside the host memory that snapshots need: page-locked for a GPU, it takes too long for a first save."""
        if self._ranks.is_main:
            self._snapshot(model, state)

    @torch.no_grad()
    def save(self, model: GPT, state: dict[str, Any]) -> None:
        """Take a snapshot and begin to write it; waits for the one before where that is still being written.

        Raises AgreedError where the last update made a weight infinite: its loss was still finite.
        """
        if not torch.nn.utils.get_total_norm(model.parameters()).isfinite():
            raise AgreedError(f"step {state['step']} made weights that aren't finite; no checkpoint has them")
        if not self._ranks.is_main:
            return
        begin = self._clock.mark()
        self.wait()
        self._snapshot(model, state)
        self._thread = threading.Thread(target=self._write, args=(begin, self._clock.mark()))
        self._thread.start()

    @torch.no_grad()
    def _snapshot(self, model: GPT, state: dict[str, Any]) -> None:
        if self._twin is None:
            self._twin = GPT(model.config, seed=None)
            for p in self._twin.parameters():
                p.data = p.data.pin_memory() if self._ranks.device.type == "cuda" else p.data
        to_host(dict(model.named_parameters()), dict(self._twin.named_parameters()))
        self._state = to_host(state, self._state)

    def _write(self, begin: Any, end: Any) -> None:
        assert self._twin is not None and self._state is not None
        stall = self._clock.seconds(begin, end)  # waits until the snapshot is there
        started = time.perf_counter()
        try:
            manifest, step = self._dataset.manifest, self._state["step"]
            written_from = (manifest["end_of_text_id"], self._dataset.folder, self._card(step))
            folder = checkpoint.save(self._run, self._twin, self._state, *written_from)
            self._delete_old(step)
        except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError, by who writes
            gigabytes = shutil.disk_usage(self._run).free / 1e9
            reason = f"{' '.join(str(error).split())} ({gigabytes:.2f} GB free)"
            self._failure = f"the checkpoint of step {self._state['step']} could not be written: {reason}"
            self._say(f"{self._failure}; earlier checkpoints are whole")
        else:
            self._failure = None
            written = time.perf_counter() - started
            self._say(f"saved {folder}: training stood still for {stall * 1000:.0f} ms, written in {written:.1f} s")

    def _card(self, step: int) -> str | None:
        try:
            return model_card(self._run, self._dataset.manifest, step)
        except Exception as error:  # no checkpoint is lost for its card
            self._say(f"the checkpoint of step {step} has no model card: {error!r}")
            return None

    def _delete_old(self, step: int) -> None:
        """Later ones than `step` are damaged ones that the resume passed over; they are written anew in their turn."""
        folders = [f for f in checkpoint.listed(self._run) if checkpoint.step_of(f) <= step]
        for folder in folders[: -self._keep]:
            if self._spacing and checkpoint.step_of(folder) % self._spacing == 0:
                continue
            doomed = folder.with_name(f".{folder.name}.old")  # so that no half-deleted one ever shows
            os.replace(folder, doomed)
            shutil.rmtree(doomed)

    def wait(self) -> None:
        """Until the checkpoint that is being written is there, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises AgreedError where it could not be written."""
        self.wait()
        failure = self._ranks.broadcast(self._failure)
        if failure:
            raise AgreedError(f"{failure}; see to it, and the same command goes on from the checkpoint before it")

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.wait()
        if error is not None and self._ranks.is_main:
            good = checkpoint.listed(self._run)
            self._say(f"the run ends early; its last good checkpoint: {good[-1] if good else 'none yet'}")
        if error is not None and issubclass(error, AgreedError):
            self._ranks.all_gather(None)  # once a rank has ended, torchrun kills the others: also one that still writes


def to_host(value: Any, memory: Any = None) -> Any:
    """`value` with its tensors copied to the host, into `memory`'s where it has them; a GPU copies while we go on."""
    if isinstance(value, Tensor):
        if memory is None:
            memory = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
        return memory.copy_(value.detach(), non_blocking=value.is_cuda)
    if isinstance(value, dict):
        memory = memory or {}
        return {key: to_host(inner, memory.get(key)) for key, inner in value.items()}
    return value
