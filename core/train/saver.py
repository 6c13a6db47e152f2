"""Asynchronous checkpoints: a snapshot in host memory, written by a thread while training continues."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import checkpoint, cli
from core.convert import computes_gpt2
from core.data.shards import Dataset
from core.distributed import DeviceClock, Ranks, SynchronizedError
from core.train.model_card import model_card
from model import GPT


def permanent_checkpoints(run_folder: Path) -> frozenset[Path]:
    """The checkpoints that earlier processes kept permanently, perhaps with other intervals than this one.

    run.json has the settings of the last process. Where it can't be read, all that exist.
    """
    folders = checkpoint.list_checkpoints(run_folder)
    try:
        last = checkpoint.read_settings(run_folder)
        keep, multiple = int(last["keep"]), int(last["keep_every"]) * int(last["save_every"])
    except (ValueError, KeyError, TypeError):
        return frozenset(folders)
    return frozenset([*folders[:-keep], *(f for f in folders if multiple and checkpoint.step_of(f) % multiple == 0)])


class Saver:
    """Writes the checkpoints of a run and deletes old ones. Every rank has one; rank 0 does the work."""

    def __init__(
        self,
        run_folder: Path,
        dataset: Dataset,
        ranks: Ranks,
        *,
        keep: int,
        keep_multiple: int,
        step: int,
        log: Callable[[str], None],
        permanent: frozenset[Path] = frozenset(),
    ) -> None:
        """Keep the `keep` newest checkpoints, and permanently those whose step is a multiple of `keep_multiple`.

        `keep_multiple` 0: no others but `permanent`. `step`: the run starts there, and needs no checkpoint of it.
        """
        self._run_folder, self._dataset, self._ranks, self._log = run_folder, dataset, ranks, log
        self._keep, self._keep_multiple, self._permanent = keep, keep_multiple, permanent
        self.saved_step = step  # of the newest checkpoint
        self.blocked_seconds: list[float] = []  # training waited this long for each snapshot
        self.write_seconds: list[float] = []
        self._clock = DeviceClock(ranks.device)
        self._is_gpt2: bool | None = None
        self._model_copy: GPT | None = None
        self._state_copy: dict[str, Any] | None = None
        self._thread: threading.Thread | None = None
        self._failure: str | None = None
        if ranks.is_main:
            for remains in (run_folder / "checkpoints").glob(".step_*"):  # of a process that was killed
                shutil.rmtree(remains, ignore_errors=True)

    def preallocate(self, model: GPT, state: dict[str, Any]) -> None:
        """Do once what would delay the first save: allocate page-locked host memory, and compare the network."""
        if self._ranks.is_main:
            self._compare_network(model)
            self._snapshot(model, state)

    def _compare_network(self, model: GPT) -> None:
        """Compare the network with GPT-2 once, after a step: then no bias is zero any more."""
        if self._is_gpt2 is None:
            self._is_gpt2 = computes_gpt2(model)
            if not self._is_gpt2:
                self._log(
                    "warning: model.py doesn't compute GPT-2. Checkpoints are marked as gpt2_modified: transformers "
                    "refuses them. This project reads them with the same model.py"
                )

    def compare_again(self) -> None:
        """Let the next save compare the network with GPT-2 again: blocks that computed zero don't any more."""
        if self._is_gpt2:
            self._is_gpt2 = None

    @torch.no_grad()
    def save(self, model: GPT, state: dict[str, Any]) -> None:
        """Take a snapshot and start to write it, after waiting for the previous write.

        Raises SynchronizedError where a weight isn't finite: the last update can overflow after a finite loss.
        """
        start = self._clock.mark()
        if not torch.nn.utils.get_total_norm(model.parameters()).isfinite():
            raise SynchronizedError(
                f"step {state['step']} produced weights that aren't finite; no checkpoint contains them. "
                f"Start another --run with a lower --lr"
            )
        self.saved_step = state["step"]
        if not self._ranks.is_main:
            return
        self._compare_network(model)
        self.wait()
        self._snapshot(model, state)
        self._thread = threading.Thread(target=self._write, args=(start, self._clock.mark(), self._is_gpt2))
        self._thread.start()

    @torch.no_grad()
    def _snapshot(self, model: GPT, state: dict[str, Any]) -> None:
        if self._model_copy is None:
            self._model_copy = GPT(model.config, seed=None)
            for p in self._model_copy.parameters():
                p.data = p.data.pin_memory() if self._ranks.device.type == "cuda" else p.data
        copy_to_host(dict(model.named_parameters()), dict(self._model_copy.named_parameters()))
        self._state_copy = copy_to_host(state, self._state_copy)

    def _write(self, start: Any, end: Any, is_gpt2: bool | None) -> None:
        assert self._model_copy is not None and self._state_copy is not None
        self.blocked_seconds.append(self._clock.seconds(start, end))  # waits until the copy is complete
        write_start, step = time.perf_counter(), self._state_copy["step"]
        try:
            folder = checkpoint.save(
                self._run_folder,
                self._model_copy,
                self._state_copy,
                end_of_text_id=self._dataset.manifest["end_of_text_id"],
                tokenizer_from=self._dataset.folder,
                card=self._card(step, is_gpt2),
                is_gpt2=is_gpt2,
            )
            self._delete_old(step)
        except Exception as error:  # a full disk is an OSError, a RuntimeError or a SafetensorError
            gigabytes = shutil.disk_usage(self._run_folder).free / 1e9
            reason = f"{' '.join(str(error).split())} ({gigabytes:.2f} GB free)"
            self._failure = f"the checkpoint of step {step} could not be written: {reason}"
            self._log(f"warning: {self._failure}; earlier checkpoints are intact")
        else:
            self._failure = None
            self.write_seconds.append(time.perf_counter() - write_start)
            blocked = 1000 * self.blocked_seconds[-1]
            self._log(f"saved {folder} | blocked training {blocked:.0f} ms | written in {self.write_seconds[-1]:.1f} s")

    def _card(self, step: int, is_gpt2: bool | None) -> str | None:
        try:
            return model_card(self._run_folder, self._dataset.manifest, step, is_gpt2=is_gpt2 is not False)
        except Exception as error:  # a checkpoint without a model card is better than none
            self._log(f"warning: the checkpoint of step {step} has no model card ({type(error).__name__}: {error})")
            return None

    def _delete_old(self, step: int) -> None:
        """Delete all but those to keep. Checkpoints after `step` are damaged ones, to be overwritten later."""
        folders = [f for f in checkpoint.list_checkpoints(self._run_folder) if checkpoint.step_of(f) <= step]
        for folder in folders[: -self._keep]:
            is_multiple = self._keep_multiple and checkpoint.step_of(folder) % self._keep_multiple == 0
            if is_multiple or folder in self._permanent:
                continue
            to_delete = folder.with_name(f".{folder.name}.old")  # renamed first: a partly deleted one never shows
            try:
                os.replace(folder, to_delete)
                shutil.rmtree(to_delete)
            except OSError as error:  # such as a file on NFS that another process reads; the new checkpoint is complete
                self._log(f"warning: old checkpoint {folder} can't be deleted completely ({cli.message(error)})")

    def wait(self) -> None:
        """Wait until the checkpoint in progress is written, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises SynchronizedError where it could not be written."""
        self.wait()
        failure = self._ranks.broadcast(self._failure)
        if failure:
            raise SynchronizedError(f"{failure}. Fix this and rerun the same command to resume from the one before")

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.wait()
        if error is not None and self._ranks.is_main:
            good = checkpoint.list_checkpoints(self._run_folder)
            self._log(f"the run ends early | last good checkpoint: {good[-1] if good else 'none'}")
        if error is not None and issubclass(error, SynchronizedError):
            self._ranks.all_gather(None)  # torchrun kills the other ranks, one that writes too, when a rank ends


def copy_to_host(value: Any, memory: Any = None) -> Any:
    """`value` with its tensors copied to host memory, into those of `memory`; asynchronous from a GPU.

    Dictionaries, lists and tuples are copied with all that they contain.
    """
    if isinstance(value, Tensor):
        if memory is None:
            memory = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
        return memory.copy_(value.detach(), non_blocking=value.is_cuda)
    if isinstance(value, dict):
        memory = memory or {}
        return {key: copy_to_host(inner, memory.get(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        memory = memory or [None] * len(value)
        return type(value)(copy_to_host(inner, old) for inner, old in zip(value, memory, strict=True))
    return value
