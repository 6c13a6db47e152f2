"""Promise 4 for whole folders: --verify finds what differs from the manifest, --adopt describes foreign shards."""

import json
import shutil

import numpy as np
import pytest
from conftest import ENCODING, TRAIN, refused, run, train_here

from core.data import tokenizer
from core.data.shards import Windows, open_dataset
from core.files import sha256


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


def test_a_good_folder_passes_and_is_left_as_it_is(world, data):
    before = contents(data)
    assert "sha256, tokens, documents, bytes of text" in verify(world, data).stdout
    assert contents(data) == before


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "harm", [flip, lambda path: path.write_bytes(path.read_bytes()[:-2]), lambda path: path.unlink()]
)
def test_a_damaged_shard_is_named(world, data, harm):
    harm(data / "train_000003.npy")
    assert "train_000003.npy" in refused(verify(world, data, check=False))


def change(data, alter):
    manifest = json.loads((data / "manifest.json").read_text())
    alter(manifest["shards"])
    (data / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("key", ["tokens", "documents", "bytes", "sha256"])
def test_a_manifest_that_says_another_count_is_found_out(world, data, key):
    change(data, lambda shards: shards[3].update({key: "0" * 64 if key == "sha256" else shards[3][key] + 1}))
    assert "train_000003.npy" in refused(verify(world, data, check=False))


def test_shards_out_of_their_order_in_the_source_are_found_out(world, data):
    def swap(shards):
        shards[3]["begin"], shards[4]["begin"] = shards[4]["begin"], shards[3]["begin"]

    change(data, swap)
    assert "train_000004.npy begins at" in refused(verify(world, data, check=False))


def test_the_tokenizer_of_another_encoding_is_found_out(world, data):
    path = data / "tokenizer.json"
    facts = json.loads(path.read_text())
    vocab = facts["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    path.write_text(json.dumps(facts))
    assert "tokenizer.json is not the encoding" in refused(verify(world, data, check=False))


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
    """The same ids as other projects keep them: named otherwise, without a manifest."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for number, shard in enumerate(open_dataset(data).manifest["shards"]):
        name = f"edufineweb_{shard['split']}_{number:06d}"
        request.param(folder / name, np.load(data / shard["file"]))
    return folder


def adopt(world, folder, *arguments, check=True):
    return run("fineweb.py", "--adopt", folder, "--encoding", "data/stories", *arguments, cwd=world, check=check)


def test_adopted_shards_stay_as_they_are_and_train_like_our_own(world, data, foreign):
    before = contents(foreign)
    adopt(world, foreign)
    assert {name: contents(foreign)[name] for name in before} == before
    verify(world, foreign)
    ours, theirs = (Windows(open_dataset(folder), "train", 64) for folder in (data, foreign))
    assert len(ours) == len(theirs)
    for i in (0, len(ours) // 2, len(ours) - 1):
        assert ours.batch([i])[0].equal(theirs.batch([i])[0])
    train_here(*TRAIN, "--data", foreign, "--run", foreign.parent.name, "--steps", 2, cwd=world)


def test_training_refuses_an_adopted_shard_that_was_altered_since(world, foreign):
    adopt(world, foreign)
    path = next(foreign.glob("*train_000003*"))
    flip(path)
    with pytest.raises(ValueError, match=path.name):
        train_here(*TRAIN, "--data", foreign, "--run", "altered", "--steps", 2, cwd=world)


def test_a_folder_is_adopted_twice_only_on_demand(world, foreign):
    adopt(world, foreign)
    assert "--overwrite" in refused(adopt(world, foreign, check=False))
    adopt(world, foreign, "--overwrite")


IDS = np.array([ENCODING.eot_token, 1, 2, 3], dtype=np.uint16)
NO_SHARDS = {
    "another header": ("x_train_1.bin", header(4, magic=1) + IDS.tobytes(), "its header begins with"),
    "uint32 ids": ("x_train_1.bin", header(4, 20240801, 7) + IDS.tobytes(), "its header begins with"),
    "cut short": ("x_train_1.bin", header(5) + IDS.tobytes(), "by its header's 5 tokens"),
    "no npy": ("x_train_1.npy", b"text", "no shard of tokens"),
}


@pytest.mark.parametrize("case", NO_SHARDS)
def test_what_is_no_shard_is_refused_by_name(world, tmp_path, case):
    name, raw, reason = NO_SHARDS[case]
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
def test_ids_that_the_encoding_does_not_give_are_refused(world, tmp_path, ids, reason):
    np.save(tmp_path / "x_val_0.npy", IDS)
    np.save(tmp_path / "x_train_1.npy", ids)
    message = refused(adopt(world, tmp_path, check=False))
    assert "x_train_1.npy" in message
    assert reason in message


def test_a_folder_without_validation_is_refused(world, tmp_path):
    np.save(tmp_path / "x_train_1.npy", IDS)
    assert "no val shard" in refused(adopt(world, tmp_path, check=False))
    assert "no val shard" in refused(adopt(world, tmp_path / "nowhere", check=False))


def test_the_hash_in_an_adopted_manifest_is_the_files(world, foreign):
    adopt(world, foreign)
    for shard in open_dataset(foreign).manifest["shards"]:
        assert shard["sha256"] == sha256(foreign / shard["file"])
        assert shard["documents"] > 0
    assert tokenizer.load(foreign).n_vocab == ENCODING.n_vocab
