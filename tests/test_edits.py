"""An edit of model.py alone changes training, validation, evaluation and checkpoints alike, with and without kernels.

Four edits, which keep all parameters, are patches in tests/patches. Triton's interpreter runs the kernels on the CPU.
"""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT, TRAIN, execute, run
from safetensors.torch import load_file

from core.files import read_metrics

# Not imported here: test_ops.py sets TRITON_INTERPRET before the first import of triton.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton exists for Linux only")

EDITS = ("relu", "half_residual", "norm_without_centring", "local_attention")
# The loss and gradients of the training copy by kernels and by plain PyTorch, the loss of GPT-2 with the same weights,
# how often each kernel ran, and the errors of conversion.
COMPARE = """
import collections, json
import torch
import torch.nn.functional as F
import convert
from core import ops
from core.convert import computes_gpt2, reference_logits
from core.ops import kernels, loss_kernels
from model import GPT, GPTConfig

torch.manual_seed(1)
kernels.NORM_PROGRAMS = 7  # the interpreter runs one after the other
shape = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=300)
model = GPT(shape, seed=1)
with torch.no_grad():
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    model.transformer.wte.weight[300:] = 0
T = 30
tokens = torch.randint(300, (1, T + 1))
calls = collections.Counter()

def counted(module, name):
    function = getattr(module, name)
    def call(*args):
        calls[name] += 1
        return function(*args)
    return call

for name in ("pack", "linear_gelu", "norm_backward"):
    setattr(kernels, name, counted(kernels, name))
loss_kernels.linear_cross_entropy = counted(loss_kernels, "linear_cross_entropy")

def measure(dtype):
    ops.select_kernels(dtype)
    copy = model.training_copy(compiled=False, stream_dtype=dtype)
    loss = copy(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return loss.item(), grads

(fused, fused_grads), (plain, plain_grads) = measure(torch.float32), measure(None)
with torch.no_grad():
    logits = reference_logits(model, tokens[:, :-1], last=T)
    gpt2 = F.cross_entropy(logits[0], tokens[0, 1:]).item()
    error = ((fused_grads - plain_grads).norm() / plain_grads.norm()).item()
    evaluated = F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:]).item()
model.save_pretrained("saved")
again = GPT.from_pretrained("saved")
same = torch.equal(again(tokens), model(tokens))
refused = {}
for form in ("llmc", "nanogpt"):
    try:
        convert.main(convert.Config(ckpt="saved", out=form, format=form))
    except ValueError as refusal:
        refused[form] = str(refusal)
facts = {"fused": fused, "plain": plain, "gpt2": gpt2, "evaluated": evaluated, "error": error, "same": same}
print(json.dumps(facts | {"is_gpt2": computes_gpt2(model), "calls": calls, "refused": refused}))
"""
# Which kernels an edit replaces by its own code.
REPLACED = {
    None: set(),
    "relu": {"linear_gelu"},
    "half_residual": {"linear_gelu", "norm_backward"},
    "norm_without_centring": {"linear_gelu", "norm_backward"},
    "local_attention": set(),
}
KERNELS = {"pack", "linear_gelu", "norm_backward", "linear_cross_entropy"}


def edited_copy(folder, edit):
    """A copy of the scripts and of core with the edit of model.py."""
    for path in [*ROOT.glob("*.py"), ROOT / "core"]:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    if edit is not None:
        subprocess.run(["git", "apply", ROOT / f"tests/patches/{edit}.patch"], cwd=folder, check=True)
    return folder


def test_another_network_than_the_one_that_was_trained_is_refused(compared):
    edit, folder, _ = compared
    load = [sys.executable, "-c", "import sys; from core.checkpoint import load_model; load_model(sys.argv[1])"]
    result = execute([*load, str(folder / "saved")], ROOT, False, {})
    if edit is None:
        assert result.returncode == 0, result.stderr
    else:
        assert "was trained with a modified model.py, and this model.py computes another network" in result.stderr
        assert (folder / "saved/model.py").read_text() == (folder / "model.py").read_text()


@pytest.fixture(scope="module", params=[None, *EDITS])
def compared(request, tmp_path_factory):
    """An edit, the folder with it, and what COMPARE prints there."""
    folder = edited_copy(tmp_path_factory.mktemp("edited"), request.param)
    env = {"PYTHONPATH": str(folder), "TRITON_INTERPRET": "1"}
    printed = execute([sys.executable, "-c", COMPARE], folder, True, env).stdout
    return request.param, folder, json.loads(printed.splitlines()[-1])


def test_kernels_and_plain_bodies_compute_the_edited_network(compared):
    edit, _, found = compared
    assert found["fused"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["evaluated"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["error"] < 1e-4
    assert (abs(found["plain"] - found["gpt2"]) < 1e-4) == (edit is None)


def test_kernels_that_an_edit_does_not_replace_are_used(compared):
    edit, _, found = compared
    assert found["calls"].keys() == KERNELS - REPLACED[edit]


def test_only_gpt2_opens_in_transformers(compared):
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel

    edit, folder, found = compared
    assert found["same"]
    assert found["is_gpt2"] == (edit is None)
    for reader in (AutoModelForCausalLM, GPT2LMHeadModel):
        if edit is None:
            reader.from_pretrained(folder / "saved")
        else:
            with pytest.raises((ValueError, KeyError)):
                reader.from_pretrained(folder / "saved")


def test_only_gpt2_is_converted_for_programs_that_compute_gpt2(compared):
    edit, folder, found = compared
    for form in ("llmc", "nanogpt"):
        assert (folder / form).exists() == (edit is None)
        message = f"--format {form} needs the network of GPT-2, and model.py computes another one. Use --format hf"
        assert found["refused"].get(form) == (None if edit is None else message)


def test_a_run_of_the_edited_network_evaluates_and_resumes_as_itself(world, tmp_path):
    folder = edited_copy(tmp_path, "half_residual")
    shutil.copytree(world / "data/small", folder / "data/small")
    command = (*TRAIN, "--data", "data/small", "--steps", 4, "--save-every", 2, "--run", "edited", "--lr", "1e-2")
    env = {"PYTHONPATH": str(folder)}
    printed = run(folder / "train.py", *command, cwd=folder, **env).stdout
    assert printed.count("model.py doesn't compute GPT-2. Checkpoints are marked as gpt2_modified") == 1
    last = folder / "logs/edited/checkpoints/step_000004"
    assert json.loads((last / "config.json").read_text())["model_type"] == "gpt2_modified"
    assert "which `transformers` refuses" in (last / "README.md").read_text()
    (loss,) = (
        line["loss"] for line in read_metrics(folder / "logs/edited") if line["step"] == 4 and line["split"] == "val"
    )
    printed = run(folder / "train.py", *command, "--eval-only", cwd=folder, **env).stdout
    assert f"val_loss {loss:.4f}" in printed
    weights = load_file(last / "model.safetensors")
    shutil.rmtree(last)
    run(folder / "train.py", *command, cwd=folder, **env)
    assert all((weights[name] == weight).all() for name, weight in load_file(last / "model.safetensors").items())
