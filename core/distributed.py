"""Ranks, devices and the process group. A single process and the ranks of torchrun use the same interface."""

import ctypes
import importlib.util
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SynchronizedError(ValueError):
    """An error that every rank raises after the same step, so that no rank waits for another."""


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run. Methods that communicate must be called by all ranks."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and log lines."""
        return self.rank == 0

    def all_reduce(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def all_gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0."""
        return self.all_gather(value)[0]

    def on_main(self, function: Callable[[], Any]) -> Any:
        """The result of a function that rank 0 alone calls. An error of a user that it raises is raised by all ranks,
        which would wait for rank 0 otherwise, and ends the group."""
        result, error = None, None
        if self.is_main:
            try:
                result = function()
            except (ValueError, OSError, MemoryError) as raised:
                error = raised
        result, error = self.broadcast((result, error))
        if error is not None:
            if self.world_size > 1:
                dist.destroy_process_group()  # gloo may abort a rank at exit where the others have ended
            raise error
        return result

    def pinned(self, *batch: Tensor) -> list[Tensor]:
        """Host tensors in page-locked memory, from which CUDA copies asynchronously; unchanged on other devices."""
        to_cuda = self.device.type == "cuda"
        return [tensor.pin_memory() if to_cuda and not tensor.is_cuda else tensor for tensor in batch]

    def to_device(self, *batch: Tensor) -> list[Tensor]:
        """Tensors on the device of this rank; asynchronous for CUDA."""
        to_cuda = self.device.type == "cuda"  # on MPS an asynchronous copy may read freed memory (pytorch issue 189690)
        return [tensor.to(self.device, non_blocking=to_cuda) for tensor in self.pinned(*batch)]

    def set_thread_device(self) -> None:
        """To be called first by a thread that pins tensors: it would create a CUDA context on cuda:0."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def log(self, text: str) -> None:
        """Print a line, from rank 0 only. A closed pipe, as of `| head`, doesn't stop the run."""
        if self.is_main:
            with suppress(BrokenPipeError):
                print(text, flush=True)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of the device or of the host ended; torch has a class of errors for CUDA only."""
    messages = ("can't allocate memory", "out of memory")  # of the host, of MPS
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto`: CUDA, else MPS, else the CPU. Raises ValueError where it isn't available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is not a device. Use auto, cuda, cuda:1, mps or cpu") from None
    if not available.get(device.type, False):
        raise ValueError(f"--device {name} is not available on this machine. Use --device cpu or auto")
    if device.type != "cuda":
        return device
    index = device.index or 0  # torch.cuda.set_device refuses a device without an index
    if index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(
            f"--device {name} doesn't exist: this machine has {count} GPUs. Use cuda:0 to cuda:{count - 1}"
        )
    return torch.device("cuda", index)


def keep_freed_memory() -> None:
    """Make glibc's malloc reuse freed memory in place of returning it to the system.

    The system would clear the pages of the logits again in each step: a small model with GPT-2's vocabulary trained 1.6
    times slower on a CPU (LOG.md). Peak memory grows by some hundred MB.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
    with suppress(OSError, AttributeError, TypeError):  # other C libraries have no mallopt, or malloc without it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


@contextmanager
def process_group(device_name: str, timeout: float = 600) -> Iterator[Ranks]:
    """The ranks that torchrun started, connected by NCCL on CUDA and by gloo elsewhere; or a single process.

    A rank that waits for the others longer than `timeout` seconds ends with an error. After an error the group isn't
    destroyed: NCCL would wait for the other ranks before the error is reported. The end of the process aborts it.
    """
    device = pick_device(device_name)
    if device.type == "cpu":
        keep_freed_memory()
    if "WORLD_SIZE" not in os.environ:
        if device.type == "cuda":
            use_stream(device)
        yield Ranks(rank=0, world_size=1, device=device)
        return
    rank, local_rank, world_size = launched_ranks()
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ValueError(
                f"torchrun started {local_rank + 1} or more processes on a machine with {count} GPUs. "
                f"Use --nproc_per_node={count}"
            )
        device = torch.device("cuda", local_rank)
        use_stream(device)
    on_cuda = device.type == "cuda"
    limit = timedelta(seconds=timeout)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        timeout=limit,
        device_id=device if on_cuda else None,
        store=rendezvous_store(rank, limit),
        rank=rank,
        world_size=world_size,
    )
    yield Ranks(rank=rank, world_size=world_size, device=device)
    dist.destroy_process_group()


def use_stream(device: torch.device) -> None:
    """Run all work of this thread on a stream of its own: the default stream can't be recorded as a CUDA graph."""
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))


def launched_ranks() -> tuple[int, int, int]:
    """RANK, LOCAL_RANK and WORLD_SIZE, as torchrun sets them. Raises ValueError for what it would not set."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE is set in the environment, but {' and '.join(missing)} not. Start with torchrun, or unset it"
        )
    values = []
    for name, low, high in zip(names, (0, 0, 1, 0), (2**31, 2**31, 2**31, 2**16), strict=False):
        text = os.environ[name]
        if not text.isdecimal() or not low <= int(text) < high:
            raise ValueError(
                f"{name} {text!r:.40} in the environment must be an integer from {low} to {high - 1}. Start with "
                f"torchrun, or unset WORLD_SIZE"
            )
        values.append(int(text))
    rank, local_rank, world_size, _ = values
    if rank >= world_size:
        raise ValueError(f"RANK {rank} in the environment must be below WORLD_SIZE {world_size}. Start with torchrun")
    return rank, local_rank, world_size


def rendezvous_store(rank: int, timeout: timedelta) -> dist.Store:
    """The key-value store through which the ranks connect, hosted by rank 0.

    The store of torchrun outlives its workers: after a restart they could read addresses of dead workers
    (https://github.com/pytorch/pytorch/issues/135712, seen with torch 2.13). It only passes on the port of rank 0 here,
    and each rank checks that this port is alive.
    """
    try:
        shared, _, world_size = next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistNetworkError as error:  # its text continues with a C++ stack trace
        address = f"MASTER_ADDR {os.environ['MASTER_ADDR']} and MASTER_PORT {os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise ValueError(f"{address}: the port is in use. Use another MASTER_PORT, or --master_port") from None
        raise ValueError(f"{address}: {str(error).splitlines()[0][:200]}. Check that rank 0 is running") from None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return shared
    host, deadline = os.environ["MASTER_ADDR"], time.monotonic() + timeout.total_seconds()
    if rank == 0:
        own = dist.TCPStore(host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        shared.set("port of rank 0", str(own.port))
        return own
    while True:
        port = int(shared.get("port of rank 0"))
        try:
            socket.create_connection((host, port), timeout=5).close()  # TCPStore would print a C++ stack trace
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return dist.TCPStore(host, port, world_size, timeout=timeout, wait_for_workers=False)


def autocast(ranks: Ranks, dtype: str) -> torch.autocast:
    """Matrix products in `dtype`: bfloat16, float16 or float32."""
    enabled = dtype != "float32"
    return torch.autocast(ranks.device.type, getattr(torch, dtype) if enabled else None, enabled=enabled)


class DeviceClock:
    """Measures device time without synchronization: marks are CUDA events; on other devices, host time."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """The time between two marks; waits until the device has reached the second."""
        if not self._cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


def device_name(device: torch.device) -> str:
    """The product name of a GPU; CPU or MPS for others."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def default_dtype(device: torch.device) -> str:
    """The fastest type for matrix products: bfloat16, or float16 on NVIDIA GPUs before Ampere (V100, T4)."""
    if device.type != "cuda":
        return "float32"
    return "float16" if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0) else "bfloat16"


def kernel_support(device: torch.device) -> str:
    """Which kernels of core/ops run there: "on" (all), "portable" (those without TMA), or "off" (none).

    All: NVIDIA Hopper, and B200, which is untested. Portable: other NVIDIA GPUs from compute capability 8.0 on.
    """
    if device.type != "cuda" or torch.version.hip or importlib.util.find_spec("triton") is None:
        return "off"
    major, _ = torch.cuda.get_device_capability(device)
    return "on" if major in (9, 10) else "portable" if major >= 8 else "off"


def check_compiler(device: torch.device) -> None:
    """Raise ValueError where the compiler that torch.compile runs is missing: of C on CUDA, of C++ on the CPU."""
    if device.type == "cuda":
        language, variable, names = "C", "CC", ["gcc", "clang", "cc"]
    else:
        language, variable, names = "C++", "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    names = [os.environ[variable]] if os.environ.get(variable) else names
    if not any(shutil.which(name.split()[0]) for name in names):
        raise ValueError(
            f"--compile on needs a {language} compiler, and {' or '.join(names)} is not installed. Install it, or use "
            f"--compile off"
        )


# Dense bf16 tensor-core FLOP/s from the data sheets of the vendor; of the SXM form where there are several.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """The dense bf16 FLOP/s of a GPU, the denominator of MFU; None where it isn't in the table."""
    if device.type != "cuda":
        return None
    return next((flops for card, flops in PEAK_FLOPS.items() if card in device_name(device)), None)
