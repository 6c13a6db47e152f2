"""CUDA graphs of the steps that are one micro-batch on each GPU.

The GPUs finish a small step faster than the host can launch its kernels one by one: 22 ms against 55 ms for 16,384
tokens on two H200s. A CUDA graph launches all kernels of the forward and backward pass at once. The gradients of
several GPUs are averaged after it in one piece, which for 65,536 tokens per GPU is 1.8 % faster than DDP.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.distributed import Ranks, autocast
from core.train.recipe import Recipe
from core.train.sampling import blank_batch
from core.train.schedule import Schedule, Shape
from core.train.setup import System

MAX_TOKENS = 65_536  # of a rank's share of a step: the largest micro-batch
MAX_TOKENS_OF_ONE = 32_768  # of a step on one GPU; larger ones take longer than the launches by the host
MARGIN = 0.1  # fraction of the GPU's memory kept free


class StepGraph:
    """The loss and gradients of a step that is one micro-batch: recorded once, replayed with other tokens."""

    def __init__(self, loss_fn: Any, shape: Shape, dtype: str, ranks: Ranks) -> None:
        """Record `loss_fn`, which is not wrapped by DDP, for micro-batches of this shape."""
        self._loss_fn, self._dtype, self._ranks = loss_fn, dtype, ranks
        self._kwargs, self._params = shape.forward_kwargs, [p for p in loss_fn.parameters() if p.requires_grad]
        self._batch = blank_batch(shape, ranks.device)
        self._record()

    def _record(self) -> None:
        self._recorded_state = python_state(self._loss_fn)
        self._loss_and_gradients()  # compiles, and allocates the workspaces of libraries
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as the watchdog of NCCL, may call CUDA during the capture.
        with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self._loss, self._flat = self._loss_and_gradients()

    def _loss_and_gradients(self) -> tuple[Tensor, Tensor]:
        """The loss, and the gradients of the parameters as one vector."""
        with autocast(self._ranks, self._dtype):
            loss = self._loss_fn(*self._batch, **self._kwargs)
        gradients = torch.autograd.grad(loss, self._params)
        return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    def backward(self, batch: list[Tensor]) -> Tensor:
        """The loss of a micro-batch. Sets the gradients to their means over the ranks."""
        if python_state(self._loss_fn) != self._recorded_state:
            self._record()
        for own, given in zip(self._batch, batch, strict=True):
            own.copy_(given)
        self._graph.replay()
        if self._ranks.world_size > 1:
            dist.all_reduce(self._flat, op=dist.ReduceOp.AVG)
        gradients = self._flat.split([p.numel() for p in self._params])
        for p, gradient in zip(self._params, gradients, strict=True):
            p.grad = gradient.view_as(p)
        return self._loss


Graphs = dict[Shape, StepGraph]  # by the shape of the micro-batch


def python_state(module: nn.Module) -> list[tuple[str, Any]]:
    """The plain attributes of all submodules. After a change of one, a recorded forward pass is out of date."""
    kinds = (bool, int, float, str, type(None))
    return [item for m in module.modules() for item in vars(m).items() if isinstance(item[1], kinds)]


def record_small_steps(
    loss_fn: Any, recipe: Recipe, system: System, micro_batch: int, ranks: Ranks, step: int, shallow: bool = False
) -> Graphs:
    """Graphs of the small steps from `step` on, where they are faster than single launches and, on several GPUs, DDP.

    `shallow`: of the steps that compute every second block, or else of those that compute all (`Depth.set`).
    DDP reduces gradients during the backward pass: over a slow connection between GPUs it can be the faster one. All
    ranks must call it.
    """
    graphs: Graphs = {}
    if ranks.device.type != "cuda" or not system.compile or system.dtype == "float16":
        return graphs
    if torch.are_deterministic_algorithms_enabled():  # DDP and a graph may add the gradients of the ranks differently
        return graphs
    if any(module._forward_hooks or module._forward_pre_hooks for module in loss_fn.modules()):  # must run each time
        return graphs
    budget = free_bytes(loss_fn)
    for shape in small_shapes(recipe, micro_batch, ranks.world_size, step, shallow):
        try:
            graph, used = faster_graph(loss_fn, shape, system.dtype, ranks, budget)
        except torch.OutOfMemoryError:  # perhaps on this rank only: the others must not wait for it
            raise
        except RuntimeError as error:  # of the capture: model.py was edited, and its forward waits for the GPU
            ranks.log(f"warning: no CUDA graph for small steps ({str(error).strip().splitlines()[0][:100]})")
            return {}
        if graph is not None:
            graphs[shape] = graph
            budget -= used
    return graphs


def free_bytes(loss_fn: nn.Module) -> float:
    """Memory of the GPU for graphs, next to that of the steps without one, which `compile_shapes` has reserved."""
    free, total = torch.cuda.mem_get_info()
    moments = 8 * sum(p.numel() for p in loss_fn.parameters())  # of the optimizer, from the first step on
    return free - moments - MARGIN * total


def small_shapes(recipe: Recipe, micro_batch: int, world_size: int, step: int, shallow: bool = False) -> list[Shape]:
    """The shapes of the steps from `step` on that are one micro-batch of few tokens on each rank."""
    limit = MAX_TOKENS if world_size > 1 else MAX_TOKENS_OF_ONE
    splits = Schedule(recipe).splits(step, micro_batch, world_size, shallow)
    return [shape for shape, count in splits if count == 1 and shape.rows * shape.seq_len <= limit]


def faster_graph(loss_fn: Any, shape: Shape, dtype: str, ranks: Ranks, budget: float) -> tuple[StepGraph | None, int]:
    """The graph of a step, and the bytes of its activations, which it keeps.

    None where it needs more than `budget` bytes, or where `loss_fn` is as fast. All ranks must call it.
    """
    batch = blank_batch(shape, ranks.device)

    def eager() -> None:
        with autocast(ranks, dtype):
            loss = loss_fn(*batch, **shape.forward_kwargs)
        loss.backward()

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    eager_seconds = seconds_of(eager, loss_fn)
    used = torch.cuda.max_memory_allocated() - before
    if ranks.all_reduce([used > budget])[0]:
        return None, used
    graph = StepGraph(loss_fn.module if ranks.world_size > 1 else loss_fn, shape, dtype, ranks)
    graph_seconds = seconds_of(lambda: graph.backward(batch), loss_fn)
    eager_total, graph_total = ranks.all_reduce([eager_seconds, graph_seconds])
    return (graph if graph_total < eager_total else None), used


def seconds_of(work: Callable[[], Any], module: nn.Module, repeats: int = 5) -> float:
    """The time of `work`, which computes gradients of the module; they are removed."""
    for repeat in range(repeats + 1):
        if repeat == 1:  # the first is a warm-up
            torch.cuda.synchronize()
            start = time.perf_counter()
        work()
        module.zero_grad()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats
