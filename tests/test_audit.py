"""Promise 4 for data folders: --verify finds differences from the manifest, --adopt describes foreign shards."""

import contextlib
import errno
import json
import pickle
import resource
import shutil

import numpy as np
import pytest
import torch
from conftest import ENCODING, TRAIN, refused, run, train_here

from core import cli
from core.data import audit, shards, tokenizer
from core.data.shards import Windows, open_dataset, open_shard
from core.distributed import Ranks
from core.files import sha256

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def data(world, tmp_path):
    """A finished folder of several shards."""
    if not (world / "data/many").exists():
        source = ("--source", "data/stories/stories.jsonl", "--encoding", "data/stories", "--out", "data/many")
        run("fineweb.py", *source, "--shard-tokens", 4000, "--val-tokens", 5000, "--workers", 1, cwd=world)
    shutil.copytree(world / "data/many", tmp_path / "data")
    return tmp_path / "data"


def verify(world, data, check=True):
    return run("fineweb.py", "--verify", data, cwd=world, check=check)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_intact_folder_passes_and_does_not_change(world, data):
    before = contents(data)
    assert "sha256, tokens, documents, bytes of text" in verify(world, data).stdout
    assert contents(data) == before


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:-2]), lambda path: path.unlink()]
)
def test_a_damaged_shard_is_named(world, data, damage):
    damage(data / "train_000003.npy")
    assert "train_000003.npy" in refused(verify(world, data, check=False))


def change(data, alter):
    manifest = json.loads((data / "manifest.json").read_text())
    alter(manifest["shards"])
    (data / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("key", ["tokens", "documents", "bytes", "sha256"])
def test_a_manifest_with_another_count_is_detected(world, data, key):
    change(data, lambda shards: shards[3].update({key: "0" * 64 if key == "sha256" else shards[3][key] + 1}))
    assert "train_000003.npy" in refused(verify(world, data, check=False))


def test_shards_in_another_order_than_the_source_are_detected(world, data):
    def swap(shards):
        shards[3]["begin"], shards[4]["begin"] = shards[4]["begin"], shards[3]["begin"]

    change(data, swap)
    assert "train_000004.npy is not after train_000003.npy in the source" in refused(verify(world, data, check=False))


def test_a_folder_of_the_version_before_passes_and_trains(world, data):
    """It divided documents between shards, and recorded the token of the document where a shard begins."""

    def as_before(shards):
        for number, shard in enumerate(shards):
            shard["begin"] = {"row": number // 2, "token": number % 2 * 40}

    change(data, as_before)
    verify(world, data)
    train_here(*TRAIN, "--data", data, "--run", "before", "--steps", 2, cwd=world)
    change(data, lambda shards: shards[3]["begin"].update(token=0))
    assert "train_000003.npy is not after train_000002.npy in the source" in refused(verify(world, data, check=False))


def test_the_tokenizer_of_another_encoding_is_detected(world, data):
    path = data / "tokenizer.json"
    spec = json.loads(path.read_text())
    vocab = spec["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    path.write_text(json.dumps(spec))
    assert "tokenizer.json is not the encoding" in refused(verify(world, data, check=False))


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw[:-9] + b"\xff" + raw[-8:],
        lambda raw: raw.replace(b'"vocab_size": 664', b'"vocab_size": "' + b"6" * 10_000 + b'"'),
        lambda raw: raw.replace(b'"tokens": ', b'"tokens": [' + b"4," * 10_000 + b'0], "x": ', 1),
        lambda raw: raw[:-9],
        lambda raw: b"[" * 100_000,
    ],
)
def test_a_damaged_manifest_gives_a_short_error(data, change):
    path = data / "manifest.json"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path} is damaged") as error:
        open_dataset(data)
    assert len(str(error.value)) < 500


def test_a_damaged_header_gives_a_short_error(data):
    path = data / "train_000003.npy"
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + (5000).to_bytes(2, "little") + b"'" + b"a" * 4997 + b"'\n" + raw)
    with pytest.raises(ValueError, match=f"{path} is not a shard of tokens") as error:
        open_shard(path)
    assert len(str(error.value)) < 500 + len(str(path))


@contextlib.contextmanager
def no_more_files():
    """The process can't open another file: its limit is below the descriptors in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "read, name",
    [
        (lambda dataset: open_dataset(dataset.folder), "manifest.json"),
        (lambda dataset: open_shard(dataset.folder / "train_000003.npy", 4000), "train_000003.npy"),
        (lambda dataset: Windows(dataset, "val", 64), "val_000000.npy"),
        (lambda dataset: shards.verify(dataset, ALONE), "val_000000.npy"),
    ],
    ids=["manifest", "open_shard", "Windows", "verify"],
)
def test_too_many_open_files_is_not_reported_as_damage(data, read, name):
    dataset = open_dataset(data)
    with no_more_files(), pytest.raises(OSError) as error:
        read(dataset)
    assert error.value.errno == errno.EMFILE
    assert cli.message(error.value).startswith(f"{data / name}: Too many open files")
    assert cli.message(pickle.loads(pickle.dumps(error.value))) == cli.message(error.value)  # as ranks exchange it


def test_verify_raises_an_error_of_the_machine_and_does_not_advise_to_overwrite(data, monkeypatch):
    failure = OSError(errno.EIO, "Input/output error", str(data / "train_000003.npy"))

    def fails(path):
        if path.name == "train_000003.npy":
            raise failure
        return sha256(path)

    monkeypatch.setattr(audit, "sha256", fails)
    with pytest.raises(OSError) as error:
        audit.verify(data)
    assert cli.message(error.value) == f"{data / 'train_000003.npy'}: Input/output error"


def header(tokens, magic=20240520, version=1):
    words = np.zeros(256, dtype="<i4")
    words[:3] = magic, version, tokens
    return words.tobytes()


def as_bin(path, ids):
    path.with_suffix(".bin").write_bytes(header(len(ids)) + ids.astype("<u2").tobytes())


def as_npy(path, ids):
    np.save(path.with_suffix(".npy"), ids)


@pytest.fixture(params=[as_npy, as_bin], ids=["npy", "bin"])
def foreign(request, world, data, tmp_path):
    """The same ids in the form of other projects: with other file names, without a manifest."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for number, shard in enumerate(open_dataset(data).manifest["shards"]):
        name = f"edufineweb_{shard['split']}_{number:06d}"
        request.param(folder / name, np.load(data / shard["file"]))
    return folder


def adopt(world, folder, *arguments, check=True):
    return run("fineweb.py", "--adopt", folder, "--encoding", "data/stories", *arguments, cwd=world, check=check)


def test_adopted_shards_do_not_change_and_train_like_those_of_fineweb(world, data, foreign):
    before = contents(foreign)
    adopt(world, foreign)
    assert {name: contents(foreign)[name] for name in before} == before
    verify(world, foreign)
    own, adopted = (Windows(open_dataset(folder), "train", 64) for folder in (data, foreign))
    assert len(own) == len(adopted)
    for i in (0, len(own) // 2, len(own) - 1):
        assert own.batch([i])[0].equal(adopted.batch([i])[0])
    train_here(*TRAIN, "--data", foreign, "--run", foreign.parent.name, "--steps", 2, cwd=world)


def test_training_refuses_an_adopted_shard_that_was_altered(world, foreign):
    adopt(world, foreign)
    path = next(foreign.glob("*train_000003*"))
    flip(path)
    with pytest.raises(ValueError, match=path.name):
        train_here(*TRAIN, "--data", foreign, "--run", "altered", "--steps", 2, cwd=world)


def test_a_folder_is_adopted_twice_only_on_request(world, foreign):
    adopt(world, foreign)
    assert "--overwrite" in refused(adopt(world, foreign, check=False))
    adopt(world, foreign, "--overwrite")


IDS = np.array([ENCODING.eot_token, 1, 2, 3], dtype=np.uint16)
INVALID_SHARDS = {
    "another header": ("x_train_1.bin", header(4, magic=1) + IDS.tobytes(), "its header begins with"),
    "uint32 ids": ("x_train_1.bin", header(4, 20240801, 7) + IDS.tobytes(), "its header begins with"),
    "cut short": ("x_train_1.bin", header(5) + IDS.tobytes(), "by its header's 5 tokens"),
    "not npy": ("x_train_1.npy", b"text", "not a shard of tokens"),
}


@pytest.mark.parametrize("case", INVALID_SHARDS)
def test_an_invalid_shard_is_refused_by_name(world, tmp_path, case):
    name, raw, reason = INVALID_SHARDS[case]
    np.save(tmp_path / "x_val_0.npy", IDS)
    (tmp_path / name).write_bytes(raw)
    message = refused(adopt(world, tmp_path, check=False))
    assert name in message
    assert reason in message


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (IDS.astype(np.int32), "int32"),
        (np.append(IDS, np.uint16(60_000)), "60000 is outside the vocabulary"),
        (IDS[1:], "no end-of-text token"),
    ],
)
def test_ids_of_another_encoding_or_type_are_refused(world, tmp_path, ids, reason):
    np.save(tmp_path / "x_val_0.npy", IDS)
    np.save(tmp_path / "x_train_1.npy", ids)
    message = refused(adopt(world, tmp_path, check=False))
    assert "x_train_1.npy" in message
    assert reason in message


def test_val_is_a_word_of_the_name(world, tmp_path):
    for name in ("medieval_train_000002.npy", "medieval_000003.npy", "x-VAL-1.npy", "x_validation.npy", "._x_val.npy"):
        np.save(tmp_path / name, np.append(IDS, IDS))
    adopt(world, tmp_path)
    splits = {shard["file"]: shard["split"] for shard in open_dataset(tmp_path).manifest["shards"]}
    assert [name for name, split in splits.items() if split == "val"] == ["x-VAL-1.npy", "x_validation.npy"]
    assert [name for name, split in splits.items() if split == "train"] == [
        "medieval_000003.npy",
        "medieval_train_000002.npy",
    ]


def test_the_files_of_nanogpt_without_a_header_are_adopted(world, data, tmp_path):
    """There the end-of-text token follows each document."""
    folder = tmp_path / "nanogpt"
    folder.mkdir()
    for split in ("val", "train"):
        parts = [np.load(data / shard["file"]) for shard in open_dataset(data).shards(split)]
        np.roll(np.concatenate(parts), -1).astype("<u2").tofile(folder / f"{split}.bin")
    before = contents(folder)
    adopt(world, folder)
    assert {name: contents(folder)[name] for name in before} == before
    verify(world, folder)
    own, adopted = (open_dataset(each) for each in (data, folder))
    assert [own.tokens(split) for split in ("val", "train")] == [adopted.tokens(split) for split in ("val", "train")]
    train_here(*TRAIN, "--data", folder, "--run", "nanogpt", "--steps", 2, cwd=world)


@pytest.mark.parametrize("magic", [20240520, 20240801])
def test_a_file_of_llm_c_is_never_read_as_one_without_a_header(world, tmp_path, magic):
    IDS.tofile(tmp_path / "val.bin")
    (tmp_path / "train.bin").write_bytes(header(5, magic) + IDS.tobytes())
    message = refused(adopt(world, tmp_path, check=False))
    assert f"{tmp_path / 'train.bin'} is not a shard of tokens" in message
    (tmp_path / "train.bin").write_bytes(IDS.tobytes()[:-1])
    assert "train.bin is not a shard of tokens" in refused(adopt(world, tmp_path, check=False))


@pytest.mark.parametrize("ids", [IDS[1:], np.append(IDS, np.uint16(60_000)), IDS.astype(np.int32)])
def test_a_refused_folder_of_another_project_does_not_change(world, tmp_path, ids):
    np.save(tmp_path / "x_val_0.npy", IDS)
    np.save(tmp_path / "x_train_1.npy", ids)
    before = contents(tmp_path)
    assert "--overwrite" not in refused(adopt(world, tmp_path, check=False))
    assert contents(tmp_path) == before


def test_a_damaged_shard_of_another_project_is_not_to_be_overwritten_by_fineweb(world, foreign):
    adopt(world, foreign)
    flip(next(foreign.glob("*train_000003*")))
    assert refused(verify(world, foreign, check=False)).endswith(f"Restore the file, or --adopt {foreign} --overwrite")


def test_a_lack_of_memory_is_not_reported_as_damage(data, monkeypatch):
    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(np, "load", fails)
    with pytest.raises(MemoryError):
        open_shard(data / "train_000003.npy")
    with pytest.raises(MemoryError):
        shards.verify(open_dataset(data), ALONE)


def test_a_folder_without_validation_is_refused(world, tmp_path):
    np.save(tmp_path / "x_train_1.npy", IDS)
    assert "no val shard" in refused(adopt(world, tmp_path, check=False))
    assert "no val shard" in refused(adopt(world, tmp_path / "missing", check=False))


def test_an_adopted_manifest_has_the_hash_of_each_file(world, foreign):
    adopt(world, foreign)
    for shard in open_dataset(foreign).manifest["shards"]:
        assert shard["sha256"] == sha256(foreign / shard["file"])
        assert shard["documents"] > 0
    assert tokenizer.load(foreign).n_vocab == ENCODING.n_vocab
