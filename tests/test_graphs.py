"""CUDA graphs of small steps: which steps have one, and that it gives the gradients of DDP."""

import pytest
import torch
from conftest import execute, resolved
from torch import nn

from core.distributed import Ranks
from core.train import graphs
from core.train.graphs import python_state, record_small_steps, small_shapes
from core.train.schedule import Shape
from core.train.setup import System
from model import GPT, PRESETS

COMPILED = System(dtype="bfloat16", compile=True, fused="off", activation_checkpointing=False, micro_batch=None)
GROWING = {"recipe": "speedrun", "first_batch_tokens": 256, "batch_tokens": 2048, "short_seq_len": 16, "steps": 60}
# Run by torchrun on two GPUs. SETUP may edit the network, CHECK is run with its graph and with DDP.
ON_GPUS = """
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from core.distributed import autocast, process_group
from core.train import graphs
from core.train.config import SystemConfig
from core.train.depth import Depth
from core.train.recipe import resolve_recipe
from core.train.sampling import blank_batch
from core.train.setup import build_loss, resolve_system, wrap_ddp
from model import GPT, GPTConfig

class Edited(GPT):
    factor = 1.0

    def cross_entropy(self, hidden, targets, *candidates):
        LOSS

seconds = iter(range(100, 0, -1))  # use the graph whether or not it is faster
graphs.seconds_of = lambda work, module: (work(), module.zero_grad(), next(seconds))[-1]
# The attention kernels of a GPU add gradients in varying order, which can change them by 1e-3; these don't.
with process_group("cuda") as ranks, sdpa_kernel(SDPBackend.MATH):
    shape = GPTConfig(n_layer=5, n_head=4, n_embd=256)
    model = Edited(shape).to(ranks.device)
    model.factor = 1.0
    system = resolve_system(SystemConfig(), ranks)
    recipe = resolve_recipe("speedrun", shape, tokens=10**7, world_size=2)
    raw, depth, found = build_loss(model, system), Depth(model), {}
    for shallow in (False, True):
        depth.set(shallow)
        loss_fn = wrap_ddp(raw, ranks)
        found |= graphs.record_small_steps(loss_fn, recipe, system, 16, ranks, 0, shallow)
    generator = torch.Generator(ranks.device).manual_seed(ranks.rank)

    def compare(graph, shape):
        depth.set(shape.shallow)
        loss_fn = wrap_ddp(raw, ranks)
        params = [p for p in model.parameters() if p.requires_grad]
        ids = shape.candidates or 50257
        batch = blank_batch(shape, ranks.device)
        for tokens in batch[:2]:
            tokens.random_(ids, generator=generator)
        loss = graph.backward(batch).clone()
        gradients = [p.grad.clone() for p in params]
        model.zero_grad()
        with autocast(ranks, system.dtype):
            expected = loss_fn(*batch, shallow=shape.shallow)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
        for gradient, p in zip(gradients, params, strict=True):
            assert (gradient - p.grad).norm() <= 1e-3 * p.grad.norm()  # atomic additions vary in order
        model.zero_grad()

    CHECK
    print("passed")
"""


def on_two_gpus(tmp_path, loss, check):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    script = tmp_path / "graphs.py"
    script.write_text(ON_GPUS.replace("LOSS", loss).replace("CHECK", check))
    command = ["torchrun", "--standalone", "--nproc_per_node=2", str(script)]
    output = execute(command, tmp_path, True, {}).stdout
    assert output.count("passed") == 2
    return output


def test_graphs_give_the_loss_and_the_gradients_of_ddp(tmp_path):
    check = "assert len(found) >= 3 and {shape.shallow for shape in found} == {False, True}; "
    check += "[compare(graph, shape) for _ in range(3) for shape, graph in found.items()]"
    on_two_gpus(tmp_path, "return super().cross_entropy(hidden, targets, *candidates)", check)


def test_a_changed_attribute_of_the_network_is_used(tmp_path):
    """As with torch.compile, which compiles again."""
    check = "shape, graph = next(iter(found.items())); compare(graph, shape); raw.factor = 3.0; compare(graph, shape)"
    on_two_gpus(tmp_path, "return self.factor * super().cross_entropy(hidden, targets, *candidates)", check)


def test_a_network_that_waits_for_the_gpu_trains_without_graphs(tmp_path):
    edited = "return super().cross_entropy(hidden, targets, *candidates) * (1 + 0 * hidden.sum().item())"
    assert "warning: no CUDA graph for small steps" in on_two_gpus(tmp_path, edited, "assert not found")


def test_small_shapes_are_single_micro_batches_of_few_tokens(monkeypatch):
    """Per rank, 256 to 2,048 tokens in sequences of 64, which are split into short ones at first."""
    recipe = resolved(**GROWING, micro_batch=32)
    assert small_shapes(recipe, 32, 1, 0) == [Shape(16, 16), Shape(4, 64)]
    assert small_shapes(recipe, 2, 2, 0) == [Shape(8, 16), Shape(2, 64)]
    assert small_shapes(recipe, 1, 2, 0) == []  # two micro-batches on each rank
    monkeypatch.setattr(graphs, "MAX_TOKENS_OF_ONE", 255)
    assert small_shapes(recipe, 32, 1, 0) == []
    assert small_shapes(recipe, 2, 2, 0) == [Shape(8, 16), Shape(2, 64)]
    monkeypatch.setattr(graphs, "MAX_TOKENS", 255)
    assert small_shapes(recipe, 32, 2, 0) == [Shape(8, 16), Shape(2, 64)]


def test_no_graphs_on_a_cpu():
    model, recipe = GPT(PRESETS["tiny"]), resolved(**GROWING)
    assert record_small_steps(model, recipe, COMPILED, 32, Ranks(0, 2, torch.device("cpu")), 0) == {}


def test_no_graphs_of_a_network_with_hooks():
    """A hook must run in each step; a graph would run it once."""
    model, recipe, two = GPT(PRESETS["tiny"]), resolved(**GROWING), Ranks(0, 2, torch.device("cuda"))
    model.transformer.h[1].mlp.register_forward_hook(lambda *_: None)
    assert record_small_steps(model, recipe, COMPILED, 32, two, 0) == {}


def test_python_state_changes_with_any_plain_attribute():
    model = GPT(PRESETS["tiny"])
    before = python_state(model)
    assert python_state(model) == before
    model.transformer.h[1].attn.window = 256
    after = python_state(model)
    assert after != before
    model.transformer.h[1].attn.window = 257
    assert python_state(model) != after
    model.weight = nn.Parameter(torch.zeros(()))
    del model.transformer.h[1].attn.window
    assert python_state(model) == before  # parameters are no plain attributes
