"""train.py reports correct losses, bits per byte and run.json, writes null for NaN, and imports no heavy package."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN, execute, option_names, run, tiny_config
from processes import OWN_START
from safetensors.torch import load_file

import train
from core.data import tokenizer
from core.data.shards import open_dataset
from core.files import METRICS, read_metrics
from core.train.validation import Validation, sample_line
from model import GPT, PRESETS

STEPS = 10
COMMAND = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--val-every", 4, "--save-every", 5, "--lr", "2e-3")
HEAVY = ("datasets", "transformers", "wandb", "matplotlib", "tiktoken")


@pytest.fixture(scope="module")
def finished(world):
    """logs/features, a run that most tests read."""
    run("train.py", *COMMAND, "--run", "features", cwd=world)
    return world / "logs/features"


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def train_with(**changes):
    """Train with the options of `finished`, in this process."""
    train.main(tiny_config(**{"steps": STEPS, "val_every": 4, "lr": 2e-3} | changes))


def last_validation(folder):
    return [line for line in read_metrics(folder) if line["split"] == "val"][-1]


def test_metrics_have_every_step_and_validation(finished):
    metrics = read_metrics(finished)
    assert [line["step"] for line in metrics if line["split"] == "train"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in metrics if line["split"] == "val"] == [0, 4, 8, STEPS]
    assert all(line["tokens"] == 2048 * line["step"] for line in metrics)
    seconds = [line["seconds"] for line in metrics]
    assert seconds == sorted(seconds)
    for line in metrics:
        if line["split"] == "train":
            assert line["tokens_per_second"] > 0
            assert line["grad_norm"] > 0
            assert line["lr"] <= 2e-3
            assert line["mfu"] is None  # the table of peak FLOP/s has no CPU


def test_initial_loss_is_that_of_equal_probabilities(finished):
    vocab_size = open_dataset(finished.parents[1] / "data/small").vocab_size
    assert read_metrics(finished)[0]["loss"] == pytest.approx(math.log(vocab_size), abs=0.1)
    assert last_validation(finished)["loss"] < read_metrics(finished)[0]["loss"] - 0.5


@torch.no_grad()
def test_loss_and_bits_per_byte_equal_an_independent_computation(finished):
    """Computed from numpy.load, the decoder and the logits only."""
    data = finished.parents[1] / "data/small"
    ids = np.load(data / "val_000000.npy").astype(np.int64)
    windows = (len(ids) - 1) // 64
    inputs = torch.from_numpy(ids[: windows * 64].reshape(windows, 64))
    targets = torch.from_numpy(ids[1 : windows * 64 + 1].reshape(windows, 64))
    model = GPT.from_pretrained(finished / f"checkpoints/step_{STEPS:06d}")
    nats = -model(inputs).double().log_softmax(-1).gather(-1, targets[..., None]).mean().item()
    encoding = tokenizer.load(data)
    end_of_text = tokenizer.end_of_text_id(encoding)
    texts = [encoding.decode_single_token_bytes(i) for i in targets.flatten().tolist() if i != end_of_text]
    bits = nats / math.log(2) * targets.numel() / sum(map(len, texts))
    assert last_validation(finished)["loss"] == pytest.approx(nats, rel=1e-6)
    assert last_validation(finished)["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_eval_only_of_a_run_equals_its_last_validation(finished, here, capsys):
    before = sorted(finished.rglob("*")), (finished / METRICS).read_bytes()
    train_with(run="features", eval_only=True)
    output, expected = capsys.readouterr().out, last_validation(finished)
    assert "step_000010 on 6,016 validation tokens of data/small in sequences of 64, float32 | " in output
    assert f" | val_loss {expected['loss']:.4f} | " in output
    assert f" | perplexity {math.exp(expected['loss']):.2f}\n" in output
    assert f" | bits_per_byte {expected['bits_per_byte']:.4f} | " in output
    assert (sorted(finished.rglob("*")), (finished / METRICS).read_bytes()) == before


def test_eval_only_takes_the_sequence_length_of_the_run(here, capsys):
    train_with(run="shorter", steps=2, seq_len=32)
    expected = last_validation(Path("logs/shorter"))["loss"]
    capsys.readouterr()
    for options in ({"run": "shorter"}, {"run": "none", "init_from": "logs/shorter"}):
        train_with(seq_len=None, eval_only=True, **options)
        output = capsys.readouterr().out
        assert "validation tokens of data/small in sequences of 32, float32" in output
        assert f" | val_loss {expected:.4f} | " in output
    train_with(run="shorter", seq_len=64, eval_only=True)
    assert "in sequences of 64, float32" in capsys.readouterr().out


def test_eval_only_of_weights_needs_no_run(finished, here, capsys):
    train_with(run="none", eval_only=True, init_from="logs/features/checkpoints/step_000005")
    first = re.search(r"val_loss (\S+)", capsys.readouterr().out)[1]
    assert last_validation(finished)["loss"] < float(first) < read_metrics(finished)[0]["loss"]
    assert not Path("logs/none").exists()


def test_eval_only_uses_preset_and_context_of_the_weights(finished, here, capsys):
    train_with(preset="demo", seq_len=None, eval_only=True, init_from="logs/features", no_verify=True)
    assert f"val_loss {last_validation(finished)['loss']:.4f} | " in capsys.readouterr().out


def test_run_with_a_last_validation_loss_that_is_not_finite_fails(here, monkeypatch, capsys):
    result = {"loss": math.nan, "bits_per_byte": math.nan}
    monkeypatch.setattr(Validation, "run", lambda self, model, stop: result)
    message = "logs/lost diverged: its last validation loss is nan. Start another --run with a lower --lr"
    with pytest.raises(ValueError, match=message):
        train_with(run="lost", steps=2)
    assert [line["loss"] for line in read_metrics(Path("logs/lost")) if line["split"] == "val"] == [None, None]


def test_init_from_starts_with_the_loss_of_the_checkpoint(finished, here):
    train_with(run="tuned", steps=2, init_from="logs/features")
    first, expected = read_metrics(Path("logs/tuned"))[0], last_validation(finished)
    assert (first["step"], first["tokens"], first["split"]) == (0, 0, "val")
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert json.loads(Path("logs/tuned/run.json").read_text())["init_from"] == "logs/features"


def test_validation_uses_the_first_val_tokens(here, capsys):
    train_with(run="fewer", steps=1, val_tokens=650)
    train_with(run="fewer", steps=1, val_tokens=650, eval_only=True, micro_batch=4)
    assert " on 640 validation tokens" in capsys.readouterr().out


def test_without_a_tokenizer_bits_per_byte_is_null(world, tmp_path, monkeypatch):
    (tmp_path / "data/small").mkdir(parents=True)
    for path in (world / "data/small").iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / "data/small" / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    train_with(run="plain", steps=1)
    assert [line["bits_per_byte"] for line in read_metrics(Path("logs/plain")) if line["split"] == "val"] == [None] * 2


def test_sample_of_a_diverged_model_is_a_log_line_without_text(here):
    dataset = open_dataset("data/small")
    model = GPT(replace(PRESETS["tiny"], vocab_size=dataset.vocab_size))
    model.transformer.ln_f.weight.data.fill_(math.nan)
    assert sample_line(model, dataset.folder, seed=1).startswith("no sample: the model's logits are not finite")


def test_samples_are_logged_when_due(here, capsys):
    train_with(run="samples", steps=3, sample_every=2)
    assert len(re.findall(r"^sample: ", capsys.readouterr().out, re.MULTILINE)) == 2  # after steps 2 and 3


def test_run_json_has_all_settings_and_what_determines_the_numbers(finished):
    facts = json.loads((finished / "run.json").read_text())
    options = {name.removeprefix("--").replace("-", "_") for name in option_names(train.Config)}
    assert facts.keys() >= options - {"quiet", "no_verify"} | {"verify"}
    given = {"data": "data/small", "run": "features", "preset": "tiny", "steps": STEPS, "lr": 2e-3, "seed": 1337}
    resolved = {"recipe": "original", "warmup_steps": 0, "dtype": "float32", "compile": "off", "world_size": 1}
    assert {key: facts[key] for key in (*given, *resolved)} == given | resolved
    dataset = open_dataset(finished.parents[1] / "data/small")
    assert facts["manifest_hash"] == dataset.manifest_hash
    weights = load_file(finished / f"checkpoints/step_{STEPS:06d}/model.safetensors")
    assert facts["parameters"] == sum(weight.numel() for weight in weights.values())
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"].keys() == {"python", "torch", "device", "git"}


def heavy_imports(world, code):
    """The packages that are slow to import and that a new process has imported after `code`."""
    code = f"import sys\n{code}\nprint('imported:', *sorted(set({HEAVY}) & set(sys.modules)))"
    return execute([sys.executable, "-c", code], world, True, OWN_START).stdout.splitlines()[-1]


def test_importing_the_scripts_imports_nothing_heavy(world):
    scripts = sorted(path.stem for path in ROOT.glob("*.py"))
    assert {"model", "train", "fineweb", "eval_lambada", "eval_cbt", "sample", "report"} <= set(scripts)
    assert heavy_imports(world, f"import {', '.join(scripts)}") == "imported:"


def test_scripts_without_a_model_start_without_torch(world):
    code = "import fineweb, report\nprint('torch' in sys.modules)"
    assert execute([sys.executable, "-c", f"import sys\n{code}"], world, True, OWN_START).stdout == "False\n"


def test_a_plain_run_imports_nothing_heavy(world):
    arguments = ["train.py", *map(str, COMMAND), "--run", "light"]
    code = f"sys.argv = {arguments}\nfrom core import cli\nimport train\ncli.run(train.main, train.Config, '')"
    assert heavy_imports(world, code) == "imported:"
    assert (world / "logs/light/checkpoints/step_000010").is_dir()
