"""Ranks, devices and the process group: a single process and torchrun look alike to the rest of the code."""

import importlib.util
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class AgreedError(ValueError):
    """What every rank raises after the same step, so that no rank waits for another that won't come."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all of them."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The one process that writes files and speaks."""
        return self.rank == 0

    def all_reduce(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks. All ranks must call it."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)  # gloo has no average, so ranks sum and divide
        return total.tolist()

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. All ranks must call it."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def pinned(self, *batch: Tensor) -> list[Tensor]:
        """Tensors of the host from where a CUDA device copies by itself: in page-locked memory."""
        to_cuda = self.device.type == "cuda"
        return [tensor.pin_memory() if to_cuda and not tensor.is_cuda else tensor for tensor in batch]

    def to_device(self, *batch: Tensor) -> list[Tensor]:
        """Tensors on this rank's device; to CUDA without making the host wait."""
        to_cuda = self.device.type == "cuda"  # MPS would go on reading memory that is free again (pytorch issue 189690)
        return [tensor.to(self.device, non_blocking=to_cuda) for tensor in self.pinned(*batch)]

    def set_thread_device(self) -> None:
        """What a thread that pins tensors does first: threads begin on cuda:0, and would open a context there."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def log(self, text: str) -> None:
        """A line for the person who watches, once."""
        if self.is_main:
            print(text, flush=True)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank. All ranks must call it."""
        return self.all_gather(value)[0]


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, else Apple's MPS, else the CPU. Raises ValueError where the device named isn't there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is no device; take auto, cuda, cuda:1, mps or cpu") from None
    if not available.get(device.type, False):
        raise ValueError(f"--device {name} is not available on this machine; take --device cpu, or auto")
    if device.type != "cuda":
        return device
    index = device.index or 0  # torch.cuda.set_device refuses a device without one
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return torch.device("cuda", index)


@contextmanager
def process_group(device_name: str, timeout: float = 600) -> Iterator[Ranks]:
    """The ranks that torchrun started, joined by NCCL on CUDA and gloo elsewhere; or this process alone.

    A rank that waits for the others longer than `timeout` seconds ends with an error.
    After an error the group isn't destroyed: there NCCL would wait for the others, which may never come, before the
    error is said. The end of the process aborts what is left of it.
    """
    device = pick_device(device_name)
    if "WORLD_SIZE" not in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # cuda:1's events belong on its own stream, not on cuda:0's
        yield Ranks(rank=0, world_size=1, device=device)
        return
    missing = [key for key in ("RANK", "LOCAL_RANK") if key not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is set in the environment but not {' and '.join(missing)}: start with torchrun")
    rank, local_rank, world_size = (int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started {local_rank + 1} or more processes on a machine of {torch.cuda.device_count()} "
                f"GPUs; take --nproc_per_node={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    on_cuda = device.type == "cuda"
    backend, patience = "nccl" if on_cuda else "gloo", timedelta(seconds=timeout)
    store, device_id = meeting_place(rank, patience), device if on_cuda else None
    dist.init_process_group(
        backend, timeout=patience, device_id=device_id, store=store, rank=rank, world_size=world_size
    )
    yield Ranks(rank=rank, world_size=world_size, device=device)
    dist.destroy_process_group()


def meeting_place(rank: int, timeout: timedelta) -> dist.Store:
    """The store through which the ranks find each other, rank 0's own.

    torchrun has one that outlives its workers, and after a restart they could read the addresses of dead ones there
    (https://github.com/pytorch/pytorch/issues/135712; seen with 2.13). Only rank 0's port is told through it, and one
    that is dead is noticed.
    """
    shared, _, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return shared
    host, end = os.environ["MASTER_ADDR"], time.monotonic() + timeout.total_seconds()
    if rank == 0:
        own = dist.TCPStore(host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        shared.set("port of rank 0", str(own.port))
        return own
    while True:
        port = int(shared.get("port of rank 0"))
        try:
            socket.create_connection((host, port), timeout=5).close()  # TCPStore would print a page of C++ frames
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return dist.TCPStore(host, port, world_size, timeout=timeout, wait_for_workers=False)


def autocast(ranks: Ranks, dtype: str) -> torch.autocast:
    """Matrix products in `dtype`, bfloat16 or float32."""
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=dtype == "bfloat16")


class DeviceClock:
    """Times what the device does without waiting for it: marks are CUDA events, or the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """The time between two marks; waits until the device has reached the second."""
        if not self._cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def device_name(device: torch.device) -> str:
    """What the vendor calls the card; CPU or MPS elsewhere."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def runs_triton(device: torch.device) -> bool:
    """Whether core/kernels.py's kernels run there: Triton, and NVIDIA's Hopper, or B200, which is untried."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return False
    return importlib.util.find_spec("triton") is not None


# Dense bf16 tensor-core rates from the vendors' data sheets, FLOP/s; the SXM form where there are several.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """What MFU is measured against: the card's dense bf16 rate, None where it isn't in the table."""
    if device.type != "cuda":
        return None
    return next((flops for card, flops in PEAK_FLOPS.items() if card in device_name(device)), None)
