"""float16 training, for GPUs before Ampere: it scales the loss, and an overflow of the gradient is no bad step."""

import shutil

import pytest
import torch
from conftest import TRAIN, faulty, refused, run, train_here

from core.distributed import Ranks, autocast, default_dtype
from core.files import read_metrics
from model import GPT, PRESETS

STEPS = ("--data", "data/small", "--steps", 6, "--save-every", 3, "--lr", "1e-2", "--batch-tokens", 1024)
COMMAND = (*TRAIN, *STEPS)  # one micro-batch per step
HALF = ("--dtype", "float16")
OVERFLOW = "loss = loss + (0 * loss).sqrt()"  # a finite loss, whose gradient isn't


def train_lines(folder):
    return [line for line in read_metrics(folder) if line["split"] == "train"]


def test_losses_are_those_of_float32_up_to_rounding(world):
    train_here(*COMMAND, "--run", "in-float32", cwd=world)
    train_here(*COMMAND, *HALF, "--run", "in-float16", cwd=world)
    full, half = (train_lines(world / f"logs/{name}") for name in ("in-float32", "in-float16"))
    assert [line["loss"] for line in half] == pytest.approx([line["loss"] for line in full], rel=2e-3)
    assert [line["loss"] for line in half] != [line["loss"] for line in full]
    assert [line["grad_norm"] for line in half] == pytest.approx([line["grad_norm"] for line in full], rel=0.05)
    assert {line["loss_scale"] for line in half} == {65536.0}
    assert "loss_scale" not in full[0]


def test_an_overflow_is_skipped_and_halves_the_scale_but_is_no_bad_step(world, tmp_path):
    script, folder = faulty(tmp_path / "overflow.py", "call == 3", OVERFLOW), world / "logs/overflow"
    output = run(script, *COMMAND, *HALF, "--max-bad-steps", 0, "--run", "overflow", cwd=world).stdout
    lines = train_lines(folder)
    assert [line["step"] for line in lines if line.get("skipped")] == [3]
    assert [line["loss_scale"] for line in lines] == [65536.0] * 3 + [32768.0] * 3
    assert "SKIPPED (float16 overflow at loss scale 65536)" in output
    assert "steps were skipped" not in output


@pytest.mark.parametrize("fault", ["loss = loss * float('nan')", OVERFLOW])
def test_a_bad_loss_and_an_overflow_without_scale_are_bad_steps(world, tmp_path, fault):
    """A scale of 1 can't be the cause of an overflow."""
    script = faulty(tmp_path / "bad.py", "call >= 0", fault)
    scale = 65536.0 if "nan" in fault else 1.0
    defaults = f"torch.amp.GradScaler.__init__.__defaults__ = ('cuda', {scale}, 2.0, 0.5, 2000, True)\n"
    script.write_text(script.read_text().replace("import train\n", "import train\n" + defaults, 1))
    error = refused(run(script, *COMMAND, *HALF, "--max-bad-steps", 2, "--run", "worse", cwd=world, check=False))
    shutil.rmtree(world / "logs/worse")
    assert "more than --max-bad-steps 2" in error


def test_a_resumed_run_keeps_the_scale_and_ends_with_the_same_weights(world, tmp_path):
    script, folder = faulty(tmp_path / "overflow.py", "call == 1", OVERFLOW), world / "logs/scaled"
    run(script, *COMMAND, *HALF, "--run", "scaled", cwd=world)
    whole = (folder / "checkpoints/step_000006/model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoints/step_000006")
    run("train.py", *COMMAND, *HALF, "--run", "scaled", cwd=world)
    assert [line["loss_scale"] for line in train_lines(folder)][-3:] == [32768.0] * 3
    assert (folder / "checkpoints/step_000006/model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("capability, dtype", [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_default_is_float16_before_ampere(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_dtype(torch.device("cuda")) == dtype
    assert default_dtype(torch.device("cpu")) == "float32"


def test_kernels_refuse_float16(world):
    error = refused(run("train.py", *COMMAND, *HALF, "--fused", "on", "--run", "on", cwd=world, check=False))
    assert error.startswith("--fused on needs --dtype bfloat16")


@pytest.mark.parametrize("dtype, stream", [("float16", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_residual_stream_of_float16_is_float32(dtype, stream):
    """It grows with the depth; float16 ends at 65,504."""
    model, tokens = GPT(PRESETS["tiny"]), torch.zeros(1, 8, dtype=torch.long)
    with autocast(Ranks(0, 1, torch.device("cpu")), dtype):
        x, _ = model.embed(tokens, torch.arange(8))
    assert x.dtype == stream
