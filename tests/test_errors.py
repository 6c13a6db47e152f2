"""Promise 8: an error of the user in train.py or sample.py ends in one line with value and remedy, and status 2."""

import json
import re
import shutil
import signal
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN, config_of, refused, run

import eval_lambada
import sample
import train
from core import cli
from core.convert import computes_gpt2
from core.data import tokenizer
from core.data.shards import open_dataset
from core.distributed import Ranks
from core.train import setup
from model import GPT, PRESETS

COMMAND = (*TRAIN, "--data", "data/small", "--steps", "3")
WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
POSITIVE = ("steps", "batch-tokens", "micro-batch", "seq-len", "val-every", "val-tokens", "save-every", "log-every")


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A new working directory with a copy of the shards of the stories."""
    shutil.copytree(world / "data/small", tmp_path / "data/small")
    (tmp_path / "data/text.txt").write_text("once upon a time")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def error_of(here, monkeypatch, capsys):
    """Runs the command line of a script in this process; returns its error, one line."""

    def stderr_of(script, *arguments):
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.run(script.main, script.Config, script.__doc__)
        stderr = capsys.readouterr().err
        assert exit_.value.code == 2, stderr
        return stderr

    def line_of(script, *arguments):
        line = stderr_of(script, *arguments)
        assert line.startswith("error: ")
        assert line.count("\n") == 1
        return line.removeprefix("error: ").strip()

    line_of.parser = stderr_of
    return line_of


def save_model(folder, preset="tiny", vocab_size=664, with_tokenizer=True):
    GPT(replace(PRESETS[preset], vocab_size=vocab_size)).save_pretrained(folder)
    if with_tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(f"data/small/{name}", folder / name)


def assert_no_run(here):
    assert not list(here.glob("logs/*"))


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/tmp/run"])
def test_a_run_name_that_would_leave_logs_is_refused(error_of, here, name):
    assert error_of(train, *COMMAND, "--run", name).startswith(f"--run {name} must be a name, not a path. ")
    assert_no_run(here)


def test_a_run_name_without_its_folder_is_answered_with_the_folder(error_of, here, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (here / "logs/mine/checkpoints").mkdir(parents=True)
    error = error_of(sample, "--ckpt", "mine", "--device", "cpu")
    assert error.startswith(
        "mine is not a folder, and the Hugging Face hub has no model of that name or is unreachable"
    )
    assert error.endswith("). Use logs/mine")


@pytest.mark.parametrize("option", [*POSITIVE, "lr", "grad-clip"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_values_that_must_be_positive(error_of, here, option, value):
    assert re.match(rf"--{option} {value}(\.0)? must be above 0", error_of(train, *COMMAND, f"--{option}", value))
    assert_no_run(here)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "data/none"], "no shards in data/none: .*manifest.json is missing.*fineweb.py .*--out data/none"),
        (
            ["--data", "data/small/manifest.json"],
            "manifest.json is a file, not a folder of shards. Use its folder, data/small$",
        ),
        (
            ["--data", "data/text.txt"],
            "data/text.txt is a file, not a folder of shards. Use fineweb.py --source data/te",
        ),
        (["--eval-only", "--eval-lambada", "none.txt"], "^none.txt: No such file or directory. Check the path$"),
        (["--run", "results"], "--run results: logs/results is the folder of the evaluation results. Use another name"),
        (["--eval-lambada", "none.txt"], "^none.txt: No such file or directory. Check the path$"),
        (["--eval-hellaswag", "data"], "^data: Is a directory. Name a file in it$"),
        (["--seq-len", 65], "--seq-len 65 exceeds the context of tiny. Use --seq-len 64"),
        (["--preset", "gpt2", "--seq-len", 1025], "--seq-len 1025 exceeds the context of gpt2. Use --seq-len 1024"),
        (["--warmup-steps", 4], "--warmup-steps 4 must be between 0 and 3"),
        (["--warmup-steps", -1], "--warmup-steps -1 must be between 0 and 3"),
        (["--lr", "nan"], "--lr nan must be a finite number above 0"),
        (["--lr", "inf"], "--lr inf must be a finite number above 0"),
        (["--hang-timeout", "inf"], "--hang-timeout inf must be a finite number above 0"),
        (["--hang-timeout", "1e10"], r"--hang-timeout 10000000000.0 must be between 0 and 1e\+09"),
        (["--first-batch-tokens", 4096], "--first-batch-tokens 4096 exceeds --batch-tokens 2048"),
        (["--weight-decay", -0.1], "--weight-decay -0.1 must be between 0 and 1"),
        (["--final-lr-fraction", -1], "--final-lr-fraction -1.* must be between 0 and 1"),
        (["--sample-every", -1], "--sample-every -1 must be 0 or more, and at most 9223372036854775807$"),
        (["--device", "gpu"], "--device gpu is not a device. Use auto, cuda, cuda:1, mps or cpu"),
        (
            ["--fused", "on"],
            "--fused on needs --dtype bfloat16 and an NVIDIA Hopper or B200 GPU.* Use --fused auto",
        ),
        (["--profile"], "--profile needs --steps 6 or more, --steps is 3"),
        (["--eval-only"], "logs/tiny has no checkpoint to evaluate. Name weights with --init-from"),
        (["--init-from", "logs/none"], "--init-from logs/none does not exist. Use a run of train.py, a "),
        (["--init-from", "data/small"], "--init-from data/small contains neither checkpoints nor a config.json. "),
        (["--init-from", "data/small/manifest.json"], "--init-from data/small/manifest.json is not a folder. "),
    ],
)
def test_invalid_option_of_train(error_of, here, arguments, message):
    assert re.search(message, error_of(train, *COMMAND, *arguments))
    assert_no_run(here)


def test_no_memory_left_on_the_host_is_a_one_line_error(error_of, here, monkeypatch):
    """An allocation of 4 EB fails. The error says nothing about the network, either."""
    monkeypatch.setattr(GPT, "hidden", lambda *arguments, **options: torch.empty(1 << 60))
    error = error_of(train, *COMMAND, "--micro-batch", 8)
    assert error == ("--micro-batch 8: out of memory. Use a smaller --micro-batch, or --activation-checkpointing")
    monkeypatch.undo()
    monkeypatch.setattr("core.convert.reference_logits", lambda *arguments, **options: torch.empty(1 << 60))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        computes_gpt2(GPT(PRESETS["tiny"]))


@WITHOUT_CUDA
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_unavailable_device(error_of, here, device):
    message = f"--device {device} is not available on this machine. Use --device cpu or auto"
    assert error_of(train, *COMMAND, "--device", device) == message
    save_model(here / "saved")
    assert error_of(sample, "--ckpt", "saved", "--device", device) == message


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--preset", "gpt3"], "gpt3"),
        (["--optimizer", "sgd"], "sgd"),
        (["--lr-schedule", "linear"], "linear"),
        (["--step", 3], "--step"),
        (["--batchtokens", 2048], "--batchtokens"),
        (["--steps", "many"], "many"),
        (["--lr"], "--lr"),
        (["--dtype", "float8"], "float8"),
        (["3"], "3"),
    ],
)
def test_mistyped_option_is_named(error_of, here, arguments, named):
    error = error_of.parser(train, *COMMAND, *arguments)
    assert named in error
    assert "Traceback" not in error
    assert_no_run(here)


@pytest.mark.parametrize(
    "option, choices",
    [("--optimizer", ("adamw", "muon")), ("--lr-schedule", ("cosine", "wsd")), ("--recipe", ("original", "speedrun"))],
)
def test_unknown_name_is_refused_with_the_choices(error_of, here, option, choices):
    error = error_of.parser(train, *COMMAND, option, "other")
    assert all(choice in error for choice in choices)
    assert_no_run(here)


@pytest.mark.parametrize("batch_tokens, micro_batch", [(1000, 16), (2112, 16), (64, 16), (3072, 32), (63, 1)])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_batch_that_does_not_divide_names_values_that_do(here, batch_tokens, micro_batch, world_size):
    dataset, ranks = open_dataset("data/small"), Ranks(0, world_size, torch.device("cpu"))
    options = {"preset": "tiny", "seq_len": 64, "batch_tokens": batch_tokens, "micro_batch": micro_batch}
    message = f"--batch-tokens {batch_tokens} must be a multiple of .* {world_size} rank"
    with pytest.raises(ValueError, match=message) as error:
        setup.resolve(config_of(**options), dataset, ranks)
    remedies = re.findall(r"--(batch-tokens|micro-batch) (\d+)", str(error.value).split("Use ")[1])
    assert remedies[0][0] == "batch-tokens"
    for option, value in remedies:
        setup.resolve(config_of(**options | {option.replace("-", "_"): int(value)}), dataset, ranks)


@pytest.mark.parametrize("script, option", [(train, "--init-from"), (sample, "--ckpt")])
def test_invalid_weights_are_refused_by_the_name_of_the_option(error_of, here, script, option):
    arguments = COMMAND if script is train else ()
    for name in ("logs/none", "data/small"):
        error = error_of(script, *arguments, option, name)
        assert f"{option} {name}" in error
        assert ("--ckpt" in error) == (option == "--ckpt")


@pytest.mark.parametrize(
    "preset, vocab_size, named",
    [("demo", 664, ["other is demo with"]), ("tiny", 600, ["other is tiny with 600", "664"])],
)
def test_init_from_weights_of_another_shape_or_vocabulary(error_of, here, preset, vocab_size, named):
    save_model(here / "other", preset, vocab_size)
    error = error_of(train, *COMMAND, "--init-from", "other")
    assert all(value in error for value in ["--preset tiny", "data/small", *named])
    assert_no_run(here)


def test_eval_only_with_another_vocabulary_or_a_sequence_beyond_the_context(error_of, here):
    save_model(here / "other", "demo", 600)
    error = error_of(train, *COMMAND, "--init-from", "other", "--eval-only")
    assert error == "other has 600 token ids, data/small has 664. Name shards of its encoding with --data"
    save_model(here / "other", "demo")
    error = error_of(train, *COMMAND, "--init-from", "other", "--eval-only", "--seq-len", 257)
    assert error == "--seq-len 257 must be between 1 and 256"


def test_eval_only_on_an_altered_shard(error_of, here):
    save_model(here / "other")
    raw = bytearray((here / "data/small/val_000000.npy").read_bytes())
    raw[-1] ^= 1
    (here / "data/small/val_000000.npy").write_bytes(raw)
    error = error_of(train, *COMMAND, "--init-from", "other", "--eval-only")
    assert error.startswith("data/small/val_000000.npy was cut short or altered")


def truncated(manifest):
    return json.dumps(manifest)[:-50]


def as_list(manifest):
    return json.dumps([manifest])


def without(key):
    def change(manifest):
        del manifest[key]
        return json.dumps(manifest)

    return change


def shard_without(key):
    def change(manifest):
        del manifest["shards"][1][key]
        return json.dumps(manifest)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda _: "",
        truncated,
        as_list,
        *(without(key) for key in ("vocab_size", "end_of_text_id", "shards")),
        *(shard_without(key) for key in ("file", "split", "tokens", "sha256")),
    ],
    ids=["empty", "truncated", "list", "vocabulary", "end", "shards", "file", "split", "tokens", "sha256"],
)
def test_damaged_manifest(error_of, here, change):
    path = here / "data/small/manifest.json"
    path.write_text(change(json.loads(path.read_text())))
    assert error_of(train, *COMMAND).startswith("data/small/manifest.json is damaged")
    assert_no_run(here)


def test_shards_without_a_manifest(error_of, here):
    (here / "data/small/manifest.json").unlink()
    error = error_of(train, *COMMAND)
    assert "data/small/manifest.json is missing" in error
    assert "fineweb.py --adopt data/small" in error
    (here / "data/small/unfinished").mkdir()
    assert "interrupted" in error_of(train, *COMMAND)


def test_mistyped_data_folder_lists_existing_ones(error_of, here):
    assert "folders that have one: data/small. To write it: python fineweb.py --source" in error_of(
        train, "--data", "data/smal"
    )
    error = error_of(train, "--steps", 3)
    assert error.endswith("folders that have one: data/small. To write it: python fineweb.py (20 GB)")


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_shorter_than_a_sequence(error_of, here, split):
    path = here / "data/small/manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        if shard["split"] == split:
            file = here / "data/small" / shard["file"]
            np.save(file, np.load(file)[:64])
            shard["tokens"] = 64
    path.write_text(json.dumps(manifest))
    assert re.match(
        f"data/small holds 64 {split} tokens, no window of 64 .* smaller --seq-len", error_of(train, *COMMAND)
    )


def test_file_with_the_name_of_a_required_folder(error_of, here):
    (here / "logs").write_text("")
    assert "logs" in error_of(train, *COMMAND)


def test_folder_with_the_name_of_a_required_file(error_of, here):
    arguments = ("--ckpt", "saved", "--data", "data", "--text", "other", "--device", "cpu")
    assert error_of(eval_lambada, *arguments) == "data: Is a directory. Name a file in it"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokens", 0], "--tokens 0 must be above 0"),
        (["--tokens", -5], "--tokens -5 must be above 0"),
        (["--samples", 0], "--samples 0 must be above 0"),
        (
            ["--tokens", 64],
            "--tokens 64 and the prompt of 1 tokens exceed .* context of 64. Use --tokens 63, or shorten the",
        ),
        (["--prompt", "word " * 70], r"prompt of .* context of 64\. Shorten the prompt"),
        (["--temperature", -1], r"--temperature -1\.0 must be 0, or at least 1e-06"),
        (["--temperature", "1e-40"], r"--temperature 1e-40 must be 0, or at least 1e-06"),
        (["--temperature", "nan"], r"--temperature nan must be 0, or at least 1e-06"),
        (["--temperature", "inf"], r"--temperature inf must be 0, or at least 1e-06"),
        (["--seed", 2**64], f"--seed {2**64} must be an integer of 64 bits"),
        (["--samples", 10**15], "--samples 10{15}: out of memory for 6 tokens each. Use fewer samples"),
        (["--top-k", -1], "--top-k -1 must be at least 1, or 0 for all tokens"),
        (["--top-p", 0], "--top-p 0.* must be above 0 and at most 1"),
        (["--top-p", 1.5], r"--top-p 1\.5 must be above 0 and at most 1"),
        (["--device", "gpu"], "--device gpu is not a device"),
        (
            ["--ckpt", "nowhere/at/all"],
            "^nowhere/at/all is not a folder, and the Hugging Face hub has no .*name and the network$",
        ),
        (["--ckpt", "logs/none"], "--ckpt logs/none does not exist. Use a run of train.py, a "),
        (["--ckpt", "data/small"], "--ckpt data/small contains neither checkpoints nor a config.json"),
        (
            ["--ckpt", "saved/config.json"],
            "--ckpt saved/config.json is one file of a model folder. Use --ckpt saved",
        ),
    ],
)
def test_invalid_option_of_sample(error_of, here, arguments, message):
    save_model(here / "saved")
    assert re.search(message, error_of(sample, "--ckpt", "saved", "--tokens", 5, "--device", "cpu", *arguments))


def test_samples_have_the_tokens_that_the_context_allows_unless_told(here, monkeypatch, capsys):
    save_model(here / "saved")  # with a context of 64
    monkeypatch.setattr("sys.argv", ["sample.py", "--ckpt", "saved", "--device", "cpu"])
    cli.run(sample.main, sample.Config, "")
    assert len(capsys.readouterr().out) > 20


def test_sample_requires_a_checkpoint(error_of):
    assert "--ckpt" in error_of.parser(sample, "--prompt", "Hello")


def test_sample_from_another_architecture(error_of, here):
    save_model(here / "saved")
    config = json.loads((here / "saved/config.json").read_text())
    (here / "saved/config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    error = error_of(sample, "--ckpt", "saved")
    assert "saved/config.json: model_type is 'gpt_neox', but GPT-2 has 'gpt2'" in error


def test_sample_without_a_tokenizer(error_of, here):
    save_model(here / "saved", with_tokenizer=False)
    error = error_of(sample, "--ckpt", "saved", "--device", "cpu")
    assert error == "saved has 664 token ids and no tokenizer.json. Add its tokenizer.json"


def test_sample_with_the_tokenizer_of_another_model(error_of, here):
    save_model(here / "saved", vocab_size=300)
    end_of_text = tokenizer.end_of_text_id(tokenizer.load("data/small"))
    error = error_of(sample, "--ckpt", "saved", "--tokens", 5, "--device", "cpu")
    assert error.startswith(f"token id {end_of_text} is outside the model's vocabulary of 300")


def test_sample_with_a_damaged_tokenizer(error_of, here):
    save_model(here / "saved")
    path = here / "saved/tokenizer.json"
    path.write_text(path.read_text()[:1000])
    error = error_of(sample, "--ckpt", "saved", "--device", "cpu")
    assert error.startswith("saved/tokenizer.json is not a Hugging Face tokenizer file")


ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE '' in the environment must be an integer from 1 to"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE 'two' in the environment must be an integer from 1 to"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE '0' in the environment must be an integer from 1 to"),
        ({"RANK": ""}, "RANK '' in the environment must be an integer from 0 to"),
        ({"RANK": "3"}, "RANK 3 in the environment must be below WORLD_SIZE 1"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT '99999' in the environment must be an integer from 0 to 65535"),
        ({"MASTER_PORT": None}, "WORLD_SIZE is set in the environment, but MASTER_PORT not"),
    ],
)
def test_invalid_variables_of_torchrun_are_named(error_of, here, monkeypatch, environment, message):
    variables = ADDRESS | {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"} | environment
    for name, value in variables.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert message in error_of(train, *COMMAND)
    assert_no_run(here)


def test_a_port_in_use_is_named(error_of, here, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        variables = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (variables | {"MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        error = error_of(train, *COMMAND)
    assert error.startswith(
        f"MASTER_ADDR 127.0.0.1 and MASTER_PORT {port}: the port is in use. Use another MASTER_PORT"
    )
    assert_no_run(here)


def test_compilation_without_a_compiler(error_of, here, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    error = error_of(train, *COMMAND, "--compile", "on")
    assert error == (
        "--compile on needs a C++ compiler, and no-such-compiler is not installed. Install it, or use --compile off"
    )
    assert_no_run(here)


# As Ctrl-C while torch is imported: raised by an import within torch.
SIGINT_AT_IMPORT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize("script", ["train.py", "sample.py", "eval_lambada.py", "convert.py"])
def test_ctrl_c_during_the_imports_ends_in_one_line(script, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SIGINT_AT_IMPORT)
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = run(script, "--ckpt", "x", "--out", "y", cwd=tmp_path, check=False, **environment)
    assert result.stderr == "stopped\n"
    assert result.returncode in (130, -signal.SIGINT)


def test_error_on_the_command_line_is_one_line(world):
    """In a process of its own: one line, status 2, no traceback."""
    error = refused(run("sample.py", "--ckpt", "no-such/model", cwd=world, check=False, HF_HUB_OFFLINE="1"))
    assert error.startswith("no-such/model is not a folder")
    assert "\n" not in error
