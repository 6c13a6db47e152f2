"""What train.py reports is true: losses, bits per byte, run.json, null for what isn't finite; and it imports little."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN, execute, run
from safetensors.torch import load_file

import train
from core.data import tokenizer
from core.data.shards import open_dataset
from core.files import METRICS, read_metrics
from core.train.validation import Validation
from model import GPT, PRESETS

STEPS = 10
RECIPE = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--val-every", 4, "--save-every", 5, "--lr", "2e-3")
HEAVY = ("datasets", "transformers", "wandb", "matplotlib", "tiktoken")


@pytest.fixture(scope="module")
def finished(world):
    """logs/features, the one run that most tests read."""
    run("train.py", *RECIPE, "--run", "features", cwd=world)
    return world / "logs/features"


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def settings(**changes):
    """The same recipe for a run within this process."""
    tiny = {"preset": "tiny", "seq_len": 64, "batch_tokens": 2048, "micro_batch": 16, "device": "cpu"}
    return train.Config(**(tiny | {"data": "data/small", "steps": STEPS, "val_every": 4, "lr": 2e-3} | changes))


def last_validation(folder):
    return [line for line in read_metrics(folder) if line["split"] == "val"][-1]


def test_metrics_tell_of_every_step_and_validation(finished):
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
            assert line["mfu"] is None  # the CPU isn't in the table of peak rates


def test_untrained_loss_is_that_of_a_guess(finished):
    vocab_size = open_dataset(finished.parents[1] / "data/small").vocab_size
    assert read_metrics(finished)[0]["loss"] == pytest.approx(math.log(vocab_size), abs=0.1)
    assert last_validation(finished)["loss"] < read_metrics(finished)[0]["loss"] - 0.5


@torch.no_grad()
def test_loss_and_bits_per_byte_equal_a_recount(finished):
    """From numpy.load, the decoder and the logits alone."""
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
    train.main(settings(run="features", eval_only=True))
    said, expected = capsys.readouterr().out, last_validation(finished)
    assert "step_000010 on 6,016 validation tokens of data/small" in said
    assert f"loss {expected['loss']:.4f} nats a token" in said
    assert f"perplexity {math.exp(expected['loss']):.2f}" in said
    assert f"{expected['bits_per_byte']:.4f} bits per byte" in said
    assert (sorted(finished.rglob("*")), (finished / METRICS).read_bytes()) == before


def test_eval_only_of_weights_needs_no_run(finished, here, capsys):
    train.main(settings(run="none", eval_only=True, init_from="logs/features/checkpoints/step_000005"))
    first = re.search(r"loss (\S+) nats", capsys.readouterr().out)[1]
    assert last_validation(finished)["loss"] < float(first) < read_metrics(finished)[0]["loss"]
    assert not Path("logs/none").exists()


def test_eval_only_takes_size_and_length_from_the_weights(finished, here, capsys):
    train.main(settings(preset="demo", seq_len=None, eval_only=True, init_from="logs/features", verify=False))
    assert f"loss {last_validation(finished)['loss']:.4f} nats a token" in capsys.readouterr().out


def test_a_run_whose_last_validation_is_not_finite_fails(here, monkeypatch, capsys):
    monkeypatch.setattr(Validation, "run", lambda self, model: {"loss": math.nan, "bits_per_byte": math.nan})
    with pytest.raises(ValueError, match="last validation loss is nan, and the weights in logs/lost are of no use"):
        train.main(settings(run="lost", steps=2))
    assert [line["loss"] for line in read_metrics(Path("logs/lost")) if line["split"] == "val"] == [None, None]


def test_init_from_starts_at_that_checkpoints_loss(finished, here):
    train.main(settings(run="tuned", steps=2, init_from="logs/features"))
    first, expected = read_metrics(Path("logs/tuned"))[0], last_validation(finished)
    assert (first["step"], first["tokens"], first["split"]) == (0, 0, "val")
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert json.loads(Path("logs/tuned/run.json").read_text())["init_from"] == "logs/features"


def test_validation_takes_the_first_val_tokens(here, capsys):
    train.main(settings(run="fewer", steps=1, val_tokens=650))
    train.main(settings(run="fewer", steps=1, val_tokens=650, eval_only=True, micro_batch=4))
    assert " on 640 validation tokens" in capsys.readouterr().out


def test_without_a_tokenizer_bits_per_byte_is_null(world, tmp_path, monkeypatch):
    (tmp_path / "data/small").mkdir(parents=True)
    for path in (world / "data/small").iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / "data/small" / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    train.main(settings(run="plain", steps=1))
    assert [line["bits_per_byte"] for line in read_metrics(Path("logs/plain")) if line["split"] == "val"] == [None] * 2


def test_a_model_that_diverged_writes_no_sample_and_the_run_goes_on(here):
    dataset = open_dataset("data/small")
    model = GPT(replace(PRESETS["tiny"], vocab_size=dataset.vocab_size))
    model.transformer.ln_f.weight.data.fill_(math.nan)
    run = SimpleNamespace(model=model, dataset=dataset, step=1)
    assert train.sample_text(run).startswith("no sample: the model's logits are not finite")


def test_samples_are_said_when_due(here, capsys):
    train.main(settings(run="samples", steps=3, sample_every=2))
    assert len(re.findall(r"^sample: ", capsys.readouterr().out, re.MULTILINE)) == 2  # after steps 2 and 3


def test_run_json_holds_all_settings_and_what_decided_the_numbers(finished):
    facts = json.loads((finished / "run.json").read_text())
    assert facts.keys() >= set(train.Config.__dataclass_fields__)
    given = {"data": "data/small", "run": "features", "preset": "tiny", "steps": STEPS, "lr": 2e-3, "seed": 1337}
    followed = {"warmup_steps": 0, "dtype": "float32", "compile": "off", "world_size": 1}
    assert {key: facts[key] for key in (*given, *followed)} == given | followed
    dataset = open_dataset(finished.parents[1] / "data/small")
    assert facts["manifest_hash"] == dataset.manifest_hash
    weights = load_file(finished / f"checkpoints/step_{STEPS:06d}/model.safetensors")
    assert facts["parameters"] == sum(weight.numel() for weight in weights.values())
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"].keys() == {"python", "torch", "device", "git"}


def heavy_imports(world, code):
    """Which of the packages that take long to import a fresh process holds after `code`."""
    code = f"import sys\n{code}\nprint('imported:', *sorted(set({HEAVY}) & set(sys.modules)))"
    return execute([sys.executable, "-c", code], world, True, {}).stdout.splitlines()[-1]


def test_importing_the_scripts_imports_nothing_heavy(world):
    scripts = sorted(path.stem for path in ROOT.glob("*.py"))
    assert {"model", "train", "fineweb", "eval_lambada", "eval_cbt", "sample", "report"} <= set(scripts)
    assert heavy_imports(world, f"import {', '.join(scripts)}") == "imported:"


def test_scripts_that_compute_nothing_start_without_torch(world):
    code = "import fineweb, report\nprint('torch' in sys.modules)"
    assert execute([sys.executable, "-c", f"import sys\n{code}"], world, True, {}).stdout == "False\n"


def test_a_plain_run_imports_nothing_heavy(world):
    arguments = ["train.py", *map(str, RECIPE), "--run", "light"]
    code = f"sys.argv = {arguments}\nfrom core import cli\nimport train\ncli.run(train.main, train.Config, '')"
    assert heavy_imports(world, code) == "imported:"
    assert (world / "logs/light/checkpoints/step_000010").is_dir()
