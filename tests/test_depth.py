"""Progressive depth: blocks that are left out at first compute nothing, and are trained from the right step on."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TRAIN, on_ranks, refused, resolved, run, train_here
from safetensors.torch import load_file

import train
from core.distributed import Ranks
from core.files import read_metrics
from core.train import depth
from core.train.config import SystemConfig
from core.train.optim import build_optimizer
from core.train.schedule import Schedule
from core.train.setup import fit_micro_batch, resolve_system
from model import GPT, MLP, PRESETS, GPTConfig

FIVE = GPTConfig(n_layer=5, n_head=2, n_embd=32, n_positions=64, vocab_size=100)
TRAIN = (*TRAIN, "--recipe", "speedrun", "--first-batch-tokens", 512, "--batch-tokens", 1024, "--device", "cpu")
TRAIN = (*TRAIN, "--data", "data/small", "--steps", 10, "--shallow-fraction", 0.6)
MLP_FORWARD = MLP.forward
# train.py, stopped by SIGTERM when the network deepens.
STOPPED = """
import os, signal
import train
from core import cli
from core.train.depth import Depth

deepen = Depth.deepen

def deepen_and_stop(self):
    deepen(self)
    os.kill(os.getpid(), signal.SIGTERM)

Depth.deepen = deepen_and_stop
cli.run(train.main, train.Config, "")
"""
LAST_SHALLOW = 6  # steps that are shallow: their tokens are 0.6 of all


def tokens(seed=0):
    return torch.randint(100, (2, 64), generator=torch.Generator().manual_seed(seed))


def shallow_model():
    """A model after a few shallow steps of SGD."""
    model = GPT(FIVE)
    depth.start_shallow(model)
    depth.Depth(model).set(True)
    for step in range(3):
        model(tokens(step), tokens(step), shallow=True).backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.sub_(p.grad)
        model.zero_grad()
    return model


def test_idle_blocks_have_no_effect_and_no_gradient():
    model = shallow_model()
    torch.testing.assert_close(model(tokens()), model(tokens(), shallow=True), rtol=0, atol=0)
    model(tokens(), tokens(), shallow=True).backward()
    with_gradient = {name.split(".")[2] for name, p in model.named_parameters() if ".h." in name and p.grad is not None}
    assert with_gradient == {"0", "2", "4"}
    assert all(p.requires_grad == (p.grad is not None) for p in model.parameters())


def test_deepening_copies_the_block_below_and_keeps_the_function():
    model = shallow_model()
    expected = model(tokens())
    depth.Depth(model).deepen()
    torch.testing.assert_close(model(tokens()), expected, rtol=0, atol=0)
    for below, block in ((0, 1), (2, 3)):
        sources = dict(model.transformer.h[below].named_parameters())
        for name, p in model.transformer.h[block].named_parameters():
            assert not p.any() if ".c_proj." in name else torch.equal(p, sources[name])
    again = {name: p.clone() for name, p in model.named_parameters()}
    depth.Depth(model).deepen()  # as after a stop in the first step of full depth
    assert all(torch.equal(p, again[name]) for name, p in model.named_parameters())


def test_an_edited_network_whose_idle_blocks_would_matter_is_refused(monkeypatch):
    """Such as one with a LayerNorm after the addition."""
    forward = MLP.forward

    def with_another_norm(self, x, h, norm):
        x, h = forward(self, x, h, norm)
        return F.layer_norm(x, (32,)), h

    monkeypatch.setattr(MLP, "forward", with_another_norm)
    refused_by_check(GPT(FIVE), "blocks change the residual stream even where their output projections")


def refused_by_check(model, reason):
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"edited model.py: .*{reason}.* Use --shallow-fraction 0"):
        depth.start_shallow(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if ".c_proj." not in name)


def test_an_edited_network_whose_idle_blocks_would_matter_later_is_refused(monkeypatch):
    """A parameter that is zero at first, and is added to the residual stream."""
    model, forward = GPT(FIVE), MLP.forward
    for block in model.transformer.h:
        block.mlp.shift = torch.nn.Parameter(torch.zeros(32))

    def with_shift(self, x, h, norm):
        x, _ = forward(self, x, h, norm)
        return x + self.shift, norm(x + self.shift)

    monkeypatch.setattr(MLP, "forward", with_shift)
    refused_by_check(model, "blocks change the residual stream")


def test_blocks_that_share_parameters_or_differ_are_refused():
    shared, same, other, wider = (GPT(FIVE) for _ in range(4))
    shared.transformer.h[1].mlp.c_fc = shared.transformer.h[0].mlp.c_fc
    refused_by_check(shared, "blocks share parameters")
    same.transformer.h[3] = same.transformer.h[1]
    refused_by_check(same, "blocks share parameters")
    other.transformer.h[1].extra = torch.nn.Parameter(torch.zeros(3))
    refused_by_check(other, "extra isn't in all blocks")
    wider.transformer.h[1].mlp.c_fc = torch.nn.Linear(32, 64)
    refused_by_check(wider, "mlp.c_fc.bias isn't in all blocks with the same shape")


def test_a_network_with_dropout_is_accepted_and_keeps_its_mode(monkeypatch):
    embed = GPT.embed
    monkeypatch.setattr(GPT, "embed", lambda self, *a: tuple(F.dropout(x, 0.5, self.training) for x in embed(self, *a)))
    model = GPT(FIVE)
    depth.start_shallow(model)
    assert model.training


def test_a_network_without_shallow_trains_at_full_depth_only(world, monkeypatch):
    """As in the model.py of an earlier checkpoint."""
    forward, flops = GPT.forward, GPTConfig.flops_per_token
    monkeypatch.setattr(GPT, "forward", lambda self, tokens, targets=None, *c: forward(self, tokens, targets, *c))
    monkeypatch.setattr(GPTConfig, "flops_per_token", lambda self, seq_len, c=0: flops(self, seq_len, c))
    refused_by_check(GPT(FIVE), "its forward pass doesn't accept shallow")
    train_here(*TRAIN[:-1], 0, "--run", "depth-without", cwd=world)
    assert len(read_metrics(world / "logs/depth-without")) == 12


def test_the_last_step_has_full_depth():
    options = {"recipe": "speedrun", "first_batch_tokens": 512, "batch_tokens": 512, "shape": FIVE}
    for steps, fraction in ((1, 0.4), (10, 0.95), (200, 0.999)):
        schedule = Schedule(resolved(steps=steps, shallow_fraction=fraction, **options))
        assert [schedule.shallow(step) for step in range(steps)] == [True] * (steps - 1) + [False]


def test_a_run_without_shallow_steps_starts_with_complete_blocks(world):
    """Of one step, which has full depth."""
    train_here(*TRAIN, "--steps", 1, "--run", "depth-complete", cwd=world)
    weights = load_file(world / "logs/depth-complete/checkpoints/step_000001/model.safetensors")
    sizes = [weights[f"transformer.h.{block}.attn.c_proj.weight"].std() for block in range(2)]
    assert sizes[1] > sizes[0] / 2


@pytest.mark.parametrize("step", [0, LAST_SHALLOW])
def test_all_depths_to_come_are_prepared_before_the_first_step(checkpoints, world, monkeypatch, step):
    record_small_steps, prepared = train.record_small_steps, []

    def recorded(loss_fn, *args):
        gradients = [p.requires_grad for p in loss_fn.transformer.h[1].parameters()]
        prepared.append((args[-1], any(gradients)))
        return record_small_steps(loss_fn, *args)

    monkeypatch.setattr(train, "record_small_steps", recorded)
    folder = world / f"logs/depth-prepared-{step}"
    shutil.copytree(checkpoints.parent, folder)
    for later in range(step + 1, 11):
        shutil.rmtree(folder / f"checkpoints/step_{later:06}")
    train_here(*TRAIN, "--keep", 20, "--run", folder.name, cwd=world)
    assert prepared == ([(False, True)] if step else [(False, True), (True, False)])


def test_a_frozen_parameter_stays_frozen():
    model = GPT(FIVE)
    frozen = model.transformer.h[1].mlp.c_fc.weight.requires_grad_(False)
    blocks = depth.Depth(model)
    for shallow in (True, False):
        blocks.set(shallow)
        assert model.transformer.h[1].ln_1.weight.requires_grad != shallow
        assert not frozen.requires_grad


def test_the_first_part_of_the_tokens_is_shallow():
    recipe = resolved(recipe="speedrun", first_batch_tokens=512, batch_tokens=2048, steps=300, shallow_fraction=0.3)
    schedule = Schedule(recipe)
    flags = [schedule.shallow(step) for step in range(recipe.steps)]
    boundary = flags.index(False)
    assert flags == [True] * boundary + [False] * (recipe.steps - boundary)
    assert schedule.tokens(boundary - 1) < 0.3 * recipe.tokens <= schedule.tokens(boundary)
    assert {schedule.split(step, 8, 1)[0].shallow for step in range(boundary)} == {True}
    assert [step for step in range(recipe.steps) if schedule.deepens(step)] == [boundary]
    for shallow in (True, False):
        assert {shape.shallow for shape, _ in schedule.splits(0, 8, 1, shallow)} == {shallow}
    assert schedule.splits(boundary, 8, 1, shallow=True) == []
    without = Schedule(replace(recipe, shallow_fraction=0.0))
    assert not any(without.shallow(step) or without.deepens(step) for step in range(recipe.steps))


@pytest.fixture(scope="module")
def checkpoints(world):
    """The checkpoints of each step of a run."""
    train_here(*TRAIN, "--save-every", 1, "--keep", 20, "--run", "depth", cwd=world)
    return world / "logs/depth/checkpoints"


def load(checkpoints, step):
    return GPT.from_pretrained(checkpoints / f"step_{step:06}")


def test_training_deepens_the_network_after_the_first_part(checkpoints):
    first, last_shallow, deep = (load(checkpoints, step) for step in (1, LAST_SHALLOW, LAST_SHALLOW + 1))
    for name, p in last_shallow.transformer.h[1].named_parameters():
        assert torch.equal(p, first.transformer.h[1].get_parameter(name)), name
    inputs = tokens()
    torch.testing.assert_close(last_shallow(inputs), last_shallow(inputs, shallow=True), rtol=0, atol=0)
    assert deep.transformer.h[1].mlp.c_proj.weight.any()
    # The first update of a copied matrix is small against its norm.
    copied, source = deep.transformer.h[1].attn.c_attn.weight, last_shallow.transformer.h[0].attn.c_attn.weight
    assert (copied - source).norm() < 0.2 * source.norm()
    assert (last_shallow.transformer.h[1].attn.c_attn.weight - source).norm() > 0.5 * source.norm()


def test_shallow_steps_compute_every_second_block(world, monkeypatch):
    hidden, flags = GPT.hidden, []

    def recorded(self, *args, shallow=False, **options):
        if torch.is_grad_enabled():
            flags.append(shallow)
        return hidden(self, *args, shallow=shallow, **options)

    monkeypatch.setattr(GPT, "hidden", recorded)
    train_here(*TRAIN, "--run", "depth-recorded", cwd=world)
    assert flags[-10:] == [True] * LAST_SHALLOW + [False] * (10 - LAST_SHALLOW)


@pytest.mark.parametrize("step", [LAST_SHALLOW - 1, LAST_SHALLOW, LAST_SHALLOW + 1])
def test_a_resumed_run_ends_bit_for_bit_like_an_undisturbed_one(checkpoints, world, step):
    expected = (checkpoints / "step_000010/model.safetensors").read_bytes()
    folder = world / f"logs/depth-{step}"
    shutil.copytree(checkpoints.parent, folder)
    for later in range(step + 1, 11):
        shutil.rmtree(folder / f"checkpoints/step_{later:06}")
    train_here(*TRAIN, "--save-every", 1, "--keep", 20, "--run", folder.name, cwd=world)
    assert (folder / "checkpoints/step_000010/model.safetensors").read_bytes() == expected


def test_a_run_that_was_stopped_in_the_first_deep_step_ends_bit_for_bit_like_an_undisturbed_one(checkpoints, world):
    """The step was not computed, but its checkpoint has the copies already."""
    script = world / "stopped.py"
    script.write_text(STOPPED)
    result = run(script, *TRAIN, "--keep", 20, "--run", "depth-stopped", cwd=world)
    assert f"stopped after step {LAST_SHALLOW}/10" in result.stdout
    folder = world / "logs/depth-stopped/checkpoints"
    stopped, last_shallow = load(folder, LAST_SHALLOW), load(checkpoints, LAST_SHALLOW)
    copied = stopped.transformer.h[1].mlp.c_fc.weight
    assert torch.equal(copied, last_shallow.transformer.h[0].mlp.c_fc.weight)
    train_here(*TRAIN, "--keep", 20, "--run", "depth-stopped", cwd=world)
    expected = (checkpoints / "step_000010/model.safetensors").read_bytes()
    assert (folder / "step_000010/model.safetensors").read_bytes() == expected


def test_memory_is_reserved_for_the_moments_of_idle_blocks(monkeypatch):
    recipe = resolved(recipe="speedrun", shape=FIVE, first_batch_tokens=512, batch_tokens=512, steps=9)
    ranks, model = Ranks(0, 1, torch.device("cpu")), GPT(FIVE)
    optimizer = build_optimizer(model, recipe, ranks)
    depth.Depth(model).set(shallow=True)
    model(tokens(), tokens(), shallow=True).backward()
    optimizer.set_lr(1.0)
    optimizer.step(skip=torch.zeros(()))
    monkeypatch.setattr("core.train.setup.largest_micro_batch", lambda *args: args[3])
    system = resolve_system(SystemConfig(), ranks)
    reserved = fit_micro_batch(model, optimizer, recipe, system, ranks)
    parameters = [p for block in depth.idle_blocks(model) for p in block.parameters()]
    assert reserved >= sum(4 * p.numel() if p.dim() == 2 else 8 * p.numel() for p in parameters)


def test_two_ranks_train_like_one(checkpoints, world):
    """A rank's share of a step is two micro-batches."""
    on_ranks(2, "train.py", *TRAIN, "--micro-batch", 2, "--run", "depth-two", cwd=world)
    one, two = ([line["loss"] for line in read_metrics(world / "logs" / name)] for name in ("depth", "depth-two"))
    assert len(one) == 12
    assert two == pytest.approx(one, rel=1e-4)


def test_an_edit_of_all_blocks_is_noticed_once(world, monkeypatch, capsys):
    monkeypatch.setattr(MLP, "forward", lambda self, x, h, norm: MLP_FORWARD(self, x, 2 * h, norm))
    train_here(*TRAIN, "--run", "depth-once", cwd=world)
    assert capsys.readouterr().out.count("warning: model.py doesn't compute GPT-2") == 1


def test_an_edit_of_idle_blocks_is_noticed_when_they_are_trained(world, monkeypatch, capsys):
    """At first they compute zero, whatever their code is."""
    initialize = GPT.__init__

    def edited(self, *args, **options):
        initialize(self, *args, **options)
        self.transformer.h[1].mlp.activation = torch.relu

    monkeypatch.setattr(GPT, "__init__", edited)
    train_here(*TRAIN, "--save-every", LAST_SHALLOW, "--run", "depth-edited", cwd=world)
    assert capsys.readouterr().out.count("warning: model.py doesn't compute GPT-2") == 1
    folders = (world / "logs/depth-edited/checkpoints").iterdir()
    types = {folder.name: json.loads((folder / "config.json").read_text())["model_type"] for folder in folders}
    assert types == {"step_000006": "gpt2", "step_000010": "gpt2_modified"}


def test_speedrun_is_shallow_at_first_where_no_token_repeats():
    options = {"recipe": "speedrun", "first_batch_tokens": 512, "batch_tokens": 512, "steps": 9, "shape": FIVE}
    for unique_tokens, fraction in ((9 * 512 - 1, 0.0), (9 * 512, 0.4)):
        assert resolved(unique_tokens=unique_tokens, **options).shallow_fraction == fraction
    assert resolved(unique_tokens=1000, shallow_fraction=0.2, **options).shallow_fraction == 0.2
    assert resolved(**(options | {"shape": PRESETS["tiny"]})).shallow_fraction == 0.0
    assert resolved(steps=9, shape=FIVE).shallow_fraction == 0.0
    with pytest.raises(ValueError, match=r"--shallow-fraction 1.0 must be below 1, .*Use --shallow-fraction 0"):
        resolved(shallow_fraction=1.0, **options)


def test_given_weights_are_all_trained_from_the_start(checkpoints, world):
    given = ("--init-from", checkpoints / "step_000010", "--run", "depth-given")
    train_here(*TRAIN[:-2], *given, "--save-every", 1, "--keep", 20, cwd=world)
    before, after = load(checkpoints, 10), load(world / "logs/depth-given/checkpoints", 1)
    assert not torch.equal(before.transformer.h[1].mlp.c_proj.weight, after.transformer.h[1].mlp.c_proj.weight)
    message = refused(run("train.py", *TRAIN, *given, cwd=world, check=False))
    assert message.startswith(
        "--shallow-fraction 0.6 would overwrite half of the blocks, whose weights are those of --"
    )
    assert message.endswith(". Use --shallow-fraction 0")


def test_flops_count_the_blocks_that_are_computed():
    shape = PRESETS["gpt2"]
    saved = shape.flops_per_token(1024) - shape.flops_per_token(1024, 0, True)
    assert saved == 6 * (6 * 12 * 768**2 + 6 * 1024 * 768)
