"""Promise 8: what a user gets wrong in train.py and sample.py ends in one sentence that says so, with exit status 2."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TRAIN, refused, run

import eval_lambada
import sample
import train
from core import cli
from core.data import tokenizer
from core.data.shards import open_dataset
from core.distributed import Ranks
from model import GPT, PRESETS

RUN = (*TRAIN, "--data", "data/small", "--steps", "3")
WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
POSITIVE = ("steps", "batch-tokens", "micro-batch", "seq-len", "val-every", "val-tokens", "save-every", "log-every")


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A working directory of its own with the stories' shards."""
    shutil.copytree(world / "data/small", tmp_path / "data/small")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mistake(here, monkeypatch, capsys):
    """Runs a script's command line within this process; the sentence in which it ends."""

    def call(script, *arguments):
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.run(script.main, script.Config, script.__doc__)
        said = capsys.readouterr().err
        assert ended.value.code == 2, said
        return said

    def sentence(script, *arguments):
        said = call(script, *arguments)
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said.removeprefix("error: ").strip()

    sentence.of_the_parser = call
    return sentence


def save_model(folder, preset="tiny", vocab_size=664, with_tokenizer=True):
    GPT(replace(PRESETS[preset], vocab_size=vocab_size)).save_pretrained(folder)
    if with_tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(f"data/small/{name}", folder / name)


def assert_began_nothing(here):
    assert not list(here.glob("logs/*"))


@pytest.mark.parametrize("option", [*POSITIVE, "lr", "grad-clip"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_what_must_be_above_0(mistake, here, option, value):
    assert re.match(rf"--{option} {value}(\.0)? must be above 0", mistake(train, *RUN, f"--{option}", value))
    assert_began_nothing(here)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "data/none"], "no shards in data/none: .*manifest.json is missing.*fineweb.py .*--out data/none"),
        (["--seq-len", 65], "--seq-len 65 passes the context of tiny: take --seq-len 64"),
        (["--preset", "gpt2", "--seq-len", 1025], "--seq-len 1025 passes the context of gpt2: take --seq-len 1024"),
        (["--warmup-steps", 4], "--warmup-steps 4 must lie between 0 and 3"),
        (["--warmup-steps", -1], "--warmup-steps -1 must lie between 0 and 3"),
        (["--lr", "nan"], "--lr nan"),
        (["--lr", "inf"], "--lr inf"),
        (["--weight-decay", -0.1], "--weight-decay -0.1"),
        (["--final-lr-fraction", -1], "--final-lr-fraction -1"),
        (["--sample-every", -1], "--sample-every -1"),
        (["--device", "gpu"], "--device gpu is no device; take auto, cuda, cuda:1, mps or cpu"),
        (
            ["--fused", "on"],
            "--fused on takes --dtype bfloat16, and an NVIDIA Hopper or B200 GPU.*: take auto",
        ),
        (["--profile"], "--profile records until step 6, --steps is 3"),
        (["--eval-only"], "logs/tiny has no checkpoint to evaluate: name weights with --init-from"),
        (["--init-from", "logs/none"], "logs/none is no folder"),
        (["--init-from", "data/small"], "data/small holds neither checkpoints nor a config.json"),
        (["--init-from", "data/small/manifest.json"], "data/small/manifest.json is no folder"),
    ],
)
def test_settings_of_train(mistake, here, arguments, message):
    assert re.search(message, mistake(train, *RUN, *arguments))
    assert_began_nothing(here)


@WITHOUT_CUDA
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there(mistake, here, device):
    message = f"--device {device} is not available on this machine; take --device cpu, or auto"
    assert mistake(train, *RUN, "--device", device) == message
    save_model(here / "saved")
    assert mistake(sample, "--ckpt", "saved", "--device", device) == message


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--preset", "gpt3"], "gpt3"),
        (["--step", 3], "--step"),
        (["--batchtokens", 2048], "--batchtokens"),
        (["--steps", "many"], "many"),
        (["--lr"], "--lr"),
        (["--dtype", "float16"], "float16"),
        (["3"], "3"),
    ],
)
def test_mistyped_options(mistake, here, arguments, named):
    said = mistake.of_the_parser(train, *RUN, *arguments)
    assert named in said
    assert "Traceback" not in said
    assert_began_nothing(here)


@pytest.mark.parametrize("batch_tokens, micro_batch", [(1000, 16), (2112, 16), (64, 16), (3072, 32), (63, 1)])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_a_batch_that_does_not_divide_names_values_that_do(here, batch_tokens, micro_batch, world_size):
    dataset, ranks = open_dataset("data/small"), Ranks(0, world_size, torch.device("cpu"))
    config = train.Config(preset="tiny", seq_len=64, batch_tokens=batch_tokens, micro_batch=micro_batch)
    with pytest.raises(ValueError, match=f"--batch-tokens {batch_tokens} is no multiple .* {world_size} rank") as error:
        train.resolve(config, dataset, ranks)
    remedies = re.findall(r"--(batch-tokens|micro-batch) (\d+)", str(error.value).split("take ")[1])
    assert remedies[0][0] == "batch-tokens"
    for option, value in remedies:
        train.resolve(replace(config, **{option.replace("-", "_"): int(value)}), dataset, ranks)


@pytest.mark.parametrize("script, option", [(train, "--init-from"), (sample, "--ckpt")])
def test_weights_are_refused_by_the_option_that_named_them(mistake, here, script, option):
    arguments = RUN if script is train else ()
    for name in ("logs/none", "data/small"):
        said = mistake(script, *arguments, option, name)
        assert f"{option} {name}" in said
        assert ("--ckpt" in said) == (option == "--ckpt")


@pytest.mark.parametrize(
    "preset, vocab_size, named",
    [("demo", 664, ["other is demo with"]), ("tiny", 700, ["other is tiny with 700", "664"])],
)
def test_init_from_weights_of_another_shape_or_vocabulary(mistake, here, preset, vocab_size, named):
    save_model(here / "other", preset, vocab_size)
    said = mistake(train, *RUN, "--init-from", "other")
    assert all(value in said for value in ["--preset tiny", "data/small", *named])
    assert_began_nothing(here)


def test_evaluating_weights_of_another_vocabulary_or_past_their_context(mistake, here):
    save_model(here / "other", "demo", 700)
    said = mistake(train, *RUN, "--init-from", "other", "--eval-only")
    assert said == "other knows 700 token ids, data/small has 664: name shards of its encoding with --data"
    save_model(here / "other", "demo")
    said = mistake(train, *RUN, "--init-from", "other", "--eval-only", "--seq-len", 257)
    assert said == "--seq-len 257 must lie between 1 and 256"


def test_evaluating_on_an_altered_shard(mistake, here):
    save_model(here / "other")
    raw = bytearray((here / "data/small/val_000000.npy").read_bytes())
    raw[-1] ^= 1
    (here / "data/small/val_000000.npy").write_bytes(raw)
    said = mistake(train, *RUN, "--init-from", "other", "--eval-only")
    assert said.startswith("data/small/val_000000.npy was cut short or altered")


def cut_short(manifest):
    return json.dumps(manifest)[:-50]


def no_object(manifest):
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
        cut_short,
        no_object,
        *(without(key) for key in ("vocab_size", "end_of_text_id", "shards")),
        *(shard_without(key) for key in ("file", "split", "tokens", "sha256")),
    ],
    ids=["empty", "cut", "list", "vocabulary", "end", "shards", "file", "split", "tokens", "sha256"],
)
def test_a_damaged_manifest(mistake, here, change):
    path = here / "data/small/manifest.json"
    path.write_text(change(json.loads(path.read_text())))
    assert mistake(train, *RUN).startswith("data/small/manifest.json is damaged")
    assert_began_nothing(here)


def test_shards_whose_writing_was_interrupted(mistake, here):
    (here / "data/small/manifest.json").unlink()
    said = mistake(train, *RUN)
    assert "data/small/manifest.json is missing" in said
    assert "fineweb.py --adopt data/small" in said
    (here / "data/small/unfinished").mkdir()
    assert "interrupted" in mistake(train, *RUN)


def test_a_mistyped_data_folder_names_those_there_are(mistake, here):
    assert "folders that have one: data/small. To write it: python fineweb.py --source" in mistake(
        train, "--data", "data/smal"
    )
    said = mistake(train, "--steps", 3)
    assert said.endswith("folders that have one: data/small. To write it: python fineweb.py (20 GB)")


@pytest.mark.parametrize("split", ["train", "val"])
def test_data_shorter_than_a_sequence(mistake, here, split):
    path = here / "data/small/manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        if shard["split"] == split:
            file = here / "data/small" / shard["file"]
            np.save(file, np.load(file)[:64])
            shard["tokens"] = 64
    path.write_text(json.dumps(manifest))
    assert re.match(f"data/small holds 64 {split} tokens, no window of 64 .* smaller --seq-len", mistake(train, *RUN))


def test_a_file_where_a_folder_is_to_be(mistake, here):
    (here / "logs").write_text("")
    assert "logs" in mistake(train, *RUN)


def test_a_folder_where_a_file_is_to_be(mistake, here):
    asked = ("--ckpt", "saved", "--data", "data", "--text", "other", "--device", "cpu")
    assert mistake(eval_lambada, *asked) == "data: Is a directory: name a file in it"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokens", 0], "--tokens 0 must be above 0"),
        (["--tokens", -5], "--tokens -5 must be above 0"),
        (["--samples", 0], "--samples 0 must be above 0"),
        (["--tokens", 64], "a prompt of 1 tokens and 64 more pass .* context of 64: .* at most 63"),
        (["--prompt", "word " * 70], "a prompt of .* context of 64: shorten the prompt"),
        (["--temperature", -1], r"temperature -1\.0.*need >= 0"),
        (["--top-k", -1], "top_k -1.*need .*>= 1"),
        (["--top-p", 0], "top_p 0.*0 < p <= 1"),
        (["--top-p", 1.5], r"top_p 1\.5.*0 < p <= 1"),
        (["--device", "gpu"], "--device gpu is no device"),
        (["--ckpt", "nowhere/at/all"], "nowhere/at/all"),
        (["--ckpt", "logs/none"], "--ckpt logs/none is no folder; train one with train.py"),
        (["--ckpt", "data/small"], "--ckpt data/small holds neither checkpoints nor a config.json"),
        (["--ckpt", "saved/config.json"], "--ckpt saved/config.json is no folder"),
    ],
)
def test_settings_of_sample(mistake, here, arguments, message):
    save_model(here / "saved")
    assert re.search(message, mistake(sample, "--ckpt", "saved", "--tokens", 5, "--device", "cpu", *arguments))


def test_sample_needs_a_checkpoint(mistake):
    assert "--ckpt" in mistake.of_the_parser(sample, "--prompt", "Hello")


def test_sample_of_another_kind_of_model(mistake, here):
    save_model(here / "saved")
    config = json.loads((here / "saved/config.json").read_text())
    (here / "saved/config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    said = mistake(sample, "--ckpt", "saved")
    assert "saved/config.json: model_type is 'gpt_neox', GPT-2 has 'gpt2'" in said


def test_sample_without_the_tokenizer(mistake, here):
    save_model(here / "saved", with_tokenizer=False)
    said = mistake(sample, "--ckpt", "saved", "--device", "cpu")
    assert said == "saved has a vocabulary of 664 and no tokenizer.json to encode text with"


def test_sample_with_another_models_tokenizer(mistake, here):
    save_model(here / "saved", vocab_size=300)
    end_of_text = tokenizer.end_of_text_id(tokenizer.load("data/small"))
    said = mistake(sample, "--ckpt", "saved", "--tokens", 5, "--device", "cpu")
    assert said.startswith(f"token id {end_of_text} is outside the model's vocabulary of 300")


def test_sample_with_a_damaged_tokenizer(mistake, here):
    save_model(here / "saved")
    path = here / "saved/tokenizer.json"
    path.write_text(path.read_text()[:1000])
    said = mistake(sample, "--ckpt", "saved", "--device", "cpu")
    assert said.startswith("saved/tokenizer.json is no Hugging Face tokenizer file")


def test_on_the_command_line(world):
    """The same through a real process: one line, status 2, no traceback."""
    said = refused(run("sample.py", "--ckpt", "no-such/model", cwd=world, check=False, HF_HUB_OFFLINE="1"))
    assert "'no-such/model'" in said
    assert "\n" not in said
