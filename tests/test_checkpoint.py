"""A truncated or altered checkpoint or shard is refused by name; transformers reads a valid checkpoint."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAIN, on_ranks, refused, run, tiny_config, train_here

import train
from core import checkpoint
from core.data import tokenizer
from core.data.shards import VERIFIED, open_dataset, verify
from core.distributed import Ranks
from core.files import sha256, write_json
from model import GPT

STEP_6 = "logs/short/checkpoints/step_000006"
ONE_PROCESS = Ranks(0, 1, torch.device("cpu"))
FILES = (
    "README.md",
    "checksums.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_state.pt",
)


def settings(**options):
    return tiny_config(**({"run": "short", "steps": 6, "save_every": 2} | options))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A folder with data/small and logs/short, a run with checkpoints at steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(world / "data/small", folder / "data/small")
    with contextlib.chdir(folder):
        train.main(settings())
    return folder


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """A copy of that folder, as the working directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flip(path):
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_header(path):
    """Change one bit in the header of an .npy file: the closing parenthesis of its shape becomes an opening one."""
    content = bytearray(path.read_bytes())
    content[content.index(b")")] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def test_a_checkpoint_folder_has_all_files(finished):
    for step in (2, 4, 6):
        folder = finished / f"logs/short/checkpoints/step_{step:06d}"
        assert tuple(sorted(path.name for path in folder.iterdir())) == FILES
        assert checkpoint.find_damage(folder) is None


@torch.no_grad()
def test_transformers_reads_model_and_tokenizer(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished / "logs/short/checkpoints/step_000006"
    hf_model, hf_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model, encoding = GPT.from_pretrained(folder), tokenizer.load(folder)
    end_of_text = open_dataset(finished / "data/small").manifest["end_of_text_id"]
    assert hf_model.config.eos_token_id == hf_model.config.bos_token_id == end_of_text
    assert hf_model.generation_config.eos_token_id == hf_tokenizer.eos_token_id == end_of_text
    text = "One morning the fox, who was 12, ran.\n\n  Überall “Wörter”!"
    ids = encoding.encode(text)
    assert hf_tokenizer(text)["input_ids"] == ids
    assert hf_tokenizer.decode(ids) == encoding.decode(ids) == text
    tokens = torch.tensor([[end_of_text, *ids]])
    torch.testing.assert_close(model(tokens), hf_model.eval()(tokens).logits, atol=1e-4, rtol=0)


def test_the_training_state_is_plain_values_and_tensors(finished):
    path = finished / "logs/short/checkpoints/step_000004" / checkpoint.TRAINING_STATE
    state = torch.load(path, weights_only=True)
    assert (state["step"], state["tokens"]) == (4, 4 * 2048)
    assert state["settings"]["seed"] == 1337
    assert state["settings"]["manifest_hash"] == open_dataset(finished / "data/small").manifest_hash
    moments = state["optimizer"]["AdamW"]["state"].values()
    assert len(moments) == len(list(GPT.from_pretrained(path.parent).parameters()))
    assert {int(moment["step"]) for moment in moments} == {4}


@pytest.mark.parametrize("damage", [flip, cut, empty])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_skipped(here, file, damage):
    newest = Path("logs/short/checkpoints/step_000006")
    damage(newest / file)
    found, warnings = checkpoint.newest_valid(Path("logs/short"))
    assert found == newest.with_name("step_000004")
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: skipping {newest}: ")
    assert file in warnings[0]
    assert checkpoint.resolve("logs/short") == str(found)
    with pytest.raises(ValueError, match=rf"--ckpt {newest}: .*{file}"):
        checkpoint.resolve(str(newest))


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named_and_the_checkpoint_skipped(here, file):
    newest = Path("logs/short/checkpoints/step_000006")
    (newest / file).unlink()
    found, (line,) = checkpoint.newest_valid(Path("logs/short"))
    assert found == newest.with_name("step_000004")
    assert file in line


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE], ids=["permission", "open-files"])
@pytest.mark.parametrize("file", ["checksums.json", "model.safetensors"])
def test_a_file_that_cannot_be_read_is_not_reported_as_damage(here, monkeypatch, file, number):
    """A resume from the checkpoint before would overwrite a valid one."""
    path = Path("logs/short/checkpoints/step_000006", file)

    def unreadable(function):
        def reading(given, *args, **options):
            if given == path:
                raise OSError(number, os.strerror(number), str(path))
            return function(given, *args, **options)

        return reading

    monkeypatch.setattr(checkpoint, "sha256", unreadable(sha256))
    monkeypatch.setattr(Path, "read_text", unreadable(Path.read_text))
    with pytest.raises(OSError, match=f"{os.strerror(number)}: '{path}'"):
        checkpoint.find_damage(path.parent)
    with pytest.raises(OSError, match=f"{os.strerror(number)}: '{path}'"):
        train.main(settings())


def test_resume_uses_the_checkpoint_before_a_damaged_one(here, finished, capsys):
    newest = Path("logs/short/checkpoints/step_000006/model.safetensors")
    flip(newest)
    train.main(settings())
    output = capsys.readouterr().out
    assert f"warning: skipping {newest.parent}: model.safetensors is truncated or altered" in output
    assert re.search("resuming from .* step 4/6 ", output)
    assert newest.read_bytes() == (finished / newest).read_bytes()
    assert checkpoint.find_damage(newest.parent) is None


def test_without_a_valid_checkpoint_there_is_none_to_evaluate(here):
    for folder in Path("logs/short/checkpoints").iterdir():
        flip(folder / "model.safetensors")
    with pytest.raises(ValueError, match="--ckpt logs/short: the run has no valid checkpoint"):
        checkpoint.resolve("logs/short")


def test_the_newest_checkpoint_has_the_largest_step(here):
    for step in ("step_999998", "step_1000000"):
        shutil.copytree("logs/short/checkpoints/step_000006", f"logs/short/checkpoints/{step}")
    found, _ = checkpoint.newest_valid(Path("logs/short"))
    assert found.name == "step_1000000"


def test_an_unfinished_checkpoint_is_ignored(here):
    folder = Path("logs/short/checkpoints")
    shutil.copytree(folder / "step_000006", folder / ".step_000008.unfinished")
    assert checkpoint.newest_valid(Path("logs/short")) == (folder / "step_000006", [])


def test_ckpt_accepts_a_run_a_checkpoint_a_hugging_face_folder_or_a_hub_name(here):
    GPT.from_pretrained("logs/short/checkpoints/step_000002").save_pretrained("elsewhere")
    assert checkpoint.resolve("logs/short") == "logs/short/checkpoints/step_000006"
    assert checkpoint.resolve(str(here / "logs/short/")) == str(here / "logs/short/checkpoints/step_000006")
    assert checkpoint.resolve("logs/short/checkpoints/step_000002") == "logs/short/checkpoints/step_000002"
    assert checkpoint.resolve("logs/short/checkpoints/") == "logs/short/checkpoints/step_000006"
    assert checkpoint.resolve("elsewhere") == "elsewhere"
    assert checkpoint.resolve("gpt2-medium") == "gpt2-medium"


@pytest.mark.parametrize(
    "ckpt, message",
    [
        ("logs/long", r"--ckpt logs/long does not exist\. Use a run \(logs/short\), a Hugging Face folder, "),
        ("data/small", r"--ckpt data/small contains neither checkpoints nor a config\.json\. Use a run \(logs/short\)"),
        ("data/small/manifest.json", "is not a folder, and not a checkpoint file of a known format. Use a run"),
        ("~/model", "--ckpt ~/model does not exist"),
        *(
            (f"{STEP_6}/{name}", f"is one file of a model folder. Use --ckpt {STEP_6}$")
            for name in ("model.safetensors", "config.json", "training_state.pt", "tokenizer.json")
        ),
    ],
)
def test_ckpt_refuses_anything_else_and_names_the_runs(here, ckpt, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.resolve(ckpt)


@pytest.mark.parametrize(
    "altered",
    [lambda text: text[:-1], lambda text: "{}\n", lambda text: text.replace("\n", ""), lambda text: "[" * 100_000],
)
def test_checksums_that_lost_a_line_or_their_last_byte_are_damaged(here, altered):
    """The rest is still valid JSON, and all files that it lists exist."""
    path = Path("logs/short/checkpoints/step_000006/checksums.json")
    path.write_text(altered(path.read_text(encoding="utf-8")), encoding="utf-8")
    found, (line,) = checkpoint.newest_valid(Path("logs/short"))
    assert found.name == "step_000004"
    assert "checksums.json is truncated or altered" in line


def test_200_random_flips_and_cuts_are_each_refused_by_name(here):
    rng, checkpoints = random.Random(5), Path("logs/short/checkpoints")
    files = [*(checkpoints / "step_000006").iterdir(), *Path("data/small").glob("*.npy")]
    for _ in range(200):
        path = rng.choice(files)
        intact = path.read_bytes()
        place, bit = rng.randrange(len(intact)), rng.randrange(8)
        flipped = intact[:place] + bytes([intact[place] ^ 1 << bit]) + intact[place + 1 :]
        path.write_bytes(rng.choice([flipped, intact[:place]]))
        if path.suffix == ".npy":
            with pytest.raises(ValueError, match=path.name):
                train.main(settings(run="new"))
        else:
            found, (line,) = checkpoint.newest_valid(Path("logs/short"))
            assert found.name == "step_000004"
            assert path.name in line, (place, bit)
            with pytest.raises(ValueError, match=path.name):
                checkpoint.resolve(str(path.parent))
        path.write_bytes(intact)
    assert not Path("logs/new").exists()
    assert checkpoint.newest_valid(Path("logs/short")) == (checkpoints / "step_000006", [])


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_training_state_with_code_is_refused_and_not_executed(here):
    """Its checksums are valid: its author computed them too."""
    folder = Path("logs/short/checkpoints/step_000006")
    torch.save({"step": 6, "optimizer": Malicious()}, folder / checkpoint.TRAINING_STATE)
    checksums = json.loads((folder / checkpoint.CHECKSUMS).read_text(encoding="utf-8"))
    checksums[checkpoint.TRAINING_STATE] = sha256(folder / checkpoint.TRAINING_STATE)
    write_json(folder / checkpoint.CHECKSUMS, checksums)
    assert checkpoint.find_damage(folder) is None
    with pytest.raises(ValueError, match=rf"{checkpoint.TRAINING_STATE} contains more than plain values and tensors"):
        train.main(settings())
    assert not Path("ran").exists()


@pytest.mark.parametrize("script", ["eval_lambada.py", "train.py"])
def test_a_model_pickle_with_code_is_refused_and_not_executed(here, world, script):
    Path("malicious").mkdir()
    shutil.copy("logs/short/checkpoints/step_000006/config.json", "malicious")
    torch.save({"transformer.wte.weight": Malicious()}, "malicious/pytorch_model.bin")
    if script == "train.py":
        arguments = [*TRAIN, "--data", "data/small", "--run", "malicious", "--init-from", "malicious"]
    else:
        arguments = [
            "--ckpt",
            "malicious",
            "--data",
            world / "data/stories/lambada.txt",
            "--text",
            "other",
            "--device",
            "cpu",
        ]
    message = refused(run(script, *arguments, cwd=here, check=False))
    assert "malicious/pytorch_model.bin contains more than tensors" in message
    assert not Path("ran").exists()


def replace_shard(folder, name, ids):
    """Replace a shard by other ids, and update the manifest."""
    np.save(folder / name, ids)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for shard in manifest["shards"]:
        if shard["file"] == name:
            shard |= {"sha256": sha256(folder / name), "tokens": len(ids)}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def outside_vocabulary(path):
    ids = np.load(path)
    ids[1000] = 664
    replace_shard(path.parent, path.name, ids)


def as_int64(path):
    replace_shard(path.parent, path.name, np.load(path).astype(np.int64))


@pytest.mark.parametrize("verified_before", [False, True], ids=["new", "verified"])
@pytest.mark.parametrize("name", ["train_000001.npy", "val_000000.npy"])
@pytest.mark.parametrize(
    "damage, message",
    [
        (flip, "was cut short or altered"),
        (flip_header, ""),
        (cut, "cut short"),
        (empty, "cut short"),
        (Path.unlink, "is missing"),
        (outside_vocabulary, "holds token id 664, outside the vocabulary of 664"),
        (as_int64, "holds int64"),
    ],
)
def test_a_damaged_shard_is_refused_by_name_before_the_first_step(here, name, damage, message, verified_before):
    if verified_before:
        verify(open_dataset("data/small"), ONE_PROCESS)
        stamps = json.loads(Path("data/small", VERIFIED).read_text(encoding="utf-8"))
        assert set(stamps) == {"val_000000.npy", "train_000001.npy"}
    else:
        Path("data/small", VERIFIED).unlink()
    damage(Path("data/small", name))
    with pytest.raises(ValueError, match=rf"^data/small/{name} .*{message}"):
        train.main(settings(run="new"))
    assert not Path("logs/new").exists()


def test_a_shard_verified_once_is_not_read_again(here):
    """The cache compares size and modification time: while both are the same, the file is not read."""
    path = Path("data/small/train_000001.npy")
    verify(open_dataset("data/small"), ONE_PROCESS)
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    verify(open_dataset("data/small"), ONE_PROCESS)
    os.utime(path)
    with pytest.raises(ValueError, match=r"train_000001\.npy was cut short or altered"):
        verify(open_dataset("data/small"), ONE_PROCESS)


@pytest.mark.parametrize("cache", ["", "{", "[" * 100_000, "[]", "null", '{"val_000000.npy": 3}'], ids=range(6))
def test_a_damaged_cache_only_repeats_the_hashing(here, cache):
    path = Path("data/small", VERIFIED)
    intact = path.read_text(encoding="utf-8")
    path.write_text(cache, encoding="utf-8")
    verify(open_dataset("data/small"), ONE_PROCESS)
    assert path.read_text(encoding="utf-8") == intact
    path.write_text(cache, encoding="utf-8")
    flip(Path("data/small/val_000000.npy"))
    with pytest.raises(ValueError, match=r"val_000000\.npy was cut short or altered"):
        verify(open_dataset("data/small"), ONE_PROCESS)


def test_no_verify_hashes_nothing(here):
    Path("data/small", VERIFIED).unlink()
    flip(Path("data/small/train_000001.npy"))
    train.main(settings(run="unverified", steps=1, no_verify=True))
    assert Path("logs/unverified/checkpoints/step_000001").is_dir()
    assert not Path("data/small", VERIFIED).exists()


RESOLVE_ON_RANKS = """
import os
from core import checkpoint
from core.distributed import process_group

if os.environ["RANK"] == "1":
    list_checkpoints = checkpoint.list_checkpoints
    checkpoint.list_checkpoints = lambda run: list_checkpoints(run)[:1]
with process_group("cpu") as ranks:
    print(checkpoint.resolve_init("logs/in-training", ranks))
"""


FAIL_ON_RANK_0 = """
import errno, os
from pathlib import Path
from core import checkpoint, cli
from core.distributed import process_group
from core.train import setup

def unreadable(folder):
    raise PermissionError(errno.EACCES, "Permission denied", str(folder))

def main(_terminal):
    if os.environ["RANK"] == "0":
        checkpoint.find_damage = unreadable
        setup.FileLocks = lambda folder, option: unreadable(folder)
    with process_group("cpu", timeout=60) as ranks:
        CALL

cli.run(main, cli.Terminal, "")
"""


@pytest.mark.parametrize(
    "call",
    [
        "checkpoint.find(Path('logs/run'), ranks, restart=False)",
        "checkpoint.resolve_init('logs/run', ranks)",
        "setup.lock_run(Path('logs/run/checkpoints/step_000002'), ranks).__enter__()",
    ],
    ids=["find", "resolve_init", "lock_run"],
)
def test_an_error_of_rank_0_alone_ends_all_ranks_with_the_same_line(tmp_path, call):
    (tmp_path / "logs/run/checkpoints/step_000002").mkdir(parents=True)
    (tmp_path / "script.py").write_text(FAIL_ON_RANK_0.replace("CALL", call), encoding="utf-8")
    start = time.monotonic()
    result = on_ranks(2, tmp_path / "script.py", cwd=tmp_path, check=False)
    path = "logs/run/checkpoints/step_000002"
    line = f"error: {path}: Permission denied. Choose another path, or change its permissions"
    assert [text for text in result.stderr.splitlines() if "error" in text] == [line, line]
    assert result.returncode == 2
    assert time.monotonic() - start < 50  # no rank waited for the other one's time-out


def test_all_ranks_start_with_the_checkpoint_that_rank_0_finds(world, tmp_path):
    """Rank 1 looked before the second one was written."""
    run = ("--run", "in-training", "--steps", 2, "--save-every", 1, "--val-tokens", 640)
    train_here(*TRAIN, "--data", "data/small", *run, cwd=world)
    script = tmp_path / "resolve_on_ranks.py"
    script.write_text(RESOLVE_ON_RANKS, encoding="utf-8")
    found = on_ranks(2, script, cwd=world).stdout.split()
    assert found == ["logs/in-training/checkpoints/step_000002"] * 2
