"""Promise 1: same source, same settings -> byte-identical shards and manifest, for any number of workers."""

import errno
import hashlib
import json
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import refused, run

from core.data import pieces, sources, tokenizer

SHARD_TOKENS, VAL_TOKENS = 700, 900
WORDS = (
    "Ana",
    "took",
    "the",
    "lamp",
    "na\u00efve",
    "\u65e5\u672c\u8a9e",
    "\U0001f642",
    "don't",
    "\r\n",
    "\n\n",
    "  ",
    "1907",
)


def write_texts(rng, count, length):
    """Documents that include a null, an empty one, one of a space and one that spells the special token."""
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, length))) for _ in range(count)]
    texts[3:3] = [None, "Ben said <|endoftext|> and left<|endoftext|>", "", " "]
    return texts


def write_source(folder, kind, files):
    folder.mkdir(parents=True)
    for number, texts in enumerate(files):
        path = folder / f"part_{number}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=7)
        elif kind == "jsonl":
            path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
        else:
            path.write_bytes(texts[0].encode())


@dataclass
class Output:
    """The output of fineweb.py, and its source."""

    files: list[list[str | None]]
    arguments: tuple[Any, ...]
    out: Path
    manifest: dict[str, Any]
    ids: list[np.ndarray]

    def split(self, split):
        """Ids of all shards of a split, joined."""
        chosen = [ids for ids, shard in zip(self.ids, self.manifest["shards"], strict=True) if shard["split"] == split]
        return np.concatenate(chosen)


def prepare(world, source, out, *arguments, workers=1, check=True):
    common = ("--source", source, "--encoding", "data/stories", "--out", out, "--workers", workers)
    return run("fineweb.py", *common, *arguments, cwd=world, check=check)


def read_output(files, arguments, out):
    manifest = json.loads((out / "manifest.json").read_text())
    return Output(files, arguments, out, manifest, [np.load(out / shard["file"]) for shard in manifest["shards"]])


@pytest.fixture(scope="module", params=["parquet", "jsonl", "txt"])
def output(request, world):
    rng = random.Random(7)
    files = [write_texts(rng, 40, 60) for _ in range(3)]
    if request.param == "txt":
        files = [[" ".join(rng.choices(WORDS, k=length))] for length in (700, 3, 900, 500)] + [[""], ["the end"]]
    source = world / "sources" / request.param
    write_source(source, request.param, files)
    arguments = (source / f"*.{request.param}", "--shard-tokens", SHARD_TOKENS, "--val-tokens", VAL_TOKENS)
    out = world / "output" / request.param
    prepare(world, arguments[0], out, *arguments[1:])
    return read_output(files, arguments, out)


@pytest.fixture(scope="module")
def encoding(world):
    return tokenizer.load(world / "data/stories")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def split_at(ids, end_of_text):
    """The documents in a stream of ids."""
    return [part.tolist() for part in np.split(ids, np.flatnonzero(ids == end_of_text))[1:]]


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(output, world, tmp_path, workers):
    source, *settings = output.arguments
    prepare(world, source, tmp_path / "out", *settings, workers=workers)
    assert contents(tmp_path / "out") == contents(output.out)


def test_files_of_an_interrupted_run_make_no_difference(output, world, tmp_path):
    (tmp_path / "train_000099.npy").write_bytes(b"of an earlier run")
    (tmp_path / ".train_000001.npy.unfinished").write_bytes(b"half")
    source, *settings = output.arguments
    prepare(world, source, tmp_path, *settings)
    assert contents(tmp_path) == contents(output.out)


def test_shards_have_the_documents_in_order_and_the_special_id_only_before_them(output, encoding):
    end_of_text = output.manifest["end_of_text_id"]
    assert end_of_text == encoding.eot_token
    documents = split_at(np.concatenate([output.split("val"), output.split("train")]), end_of_text)
    texts = [text for file in output.files for text in file if text]
    assert [encoding.decode(ids[1:]) for ids in documents] == texts
    assert [ids[1:] for ids in documents] == [encoding.encode_ordinary(text) for text in texts]


def test_no_document_is_divided_between_shards_and_no_shard_is_a_sliver(output, encoding):
    sizes = [shard["tokens"] for shard in output.manifest["shards"] if shard["split"] == "train"]
    assert min(sizes) > SHARD_TOKENS / 3
    assert len(sizes) >= 2
    for ids in output.ids:
        assert ids[0] == encoding.eot_token


@pytest.mark.parametrize("wanted", [4000, 10_000])
def test_shards_have_about_the_wanted_tokens_across_file_borders(world, tmp_path, wanted):
    """A file of many documents, one of few, and many of one."""
    lines = (world / "data/stories/stories.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "0.jsonl").write_text("".join(lines[:300]))
    (tmp_path / "1.ndjson").write_text("".join(lines[300:310]))
    for number, line in enumerate(lines[310:]):
        (tmp_path / f"2_{number:03}.txt").write_text(json.loads(line)["text"])
    prepare(world, tmp_path / "[0-9]*", tmp_path / "out", "--shard-tokens", wanted, "--val-tokens", 3000)
    sizes = [shard["tokens"] for shard in json.loads((tmp_path / "out/manifest.json").read_text())["shards"]]
    assert 3000 <= sizes[0] < 3500
    assert all(0.85 * wanted <= size <= 1.15 * wanted for size in sizes[1:]), sizes


def test_validation_is_complete_documents_from_the_start_of_the_source_across_files(output, encoding):
    documents = split_at(output.split("val"), encoding.eot_token)
    texts = [text for file in output.files for text in file if text]
    assert [encoding.decode(ids[1:]) for ids in documents] == texts[: len(documents)]
    assert sum(map(len, documents[:-1])) < VAL_TOKENS
    assert sum(map(len, documents)) >= VAL_TOKENS
    assert [shard["split"] for shard in output.manifest["shards"]].count("val") == 1


def from_place(output, file, begin):
    """The texts of the source from the document on that begins at a shard's place in it."""
    ((kind, place),), path = begin.items(), sorted(output.arguments[0].parent.iterdir())[file]
    assert kind == ("row" if path.suffix == ".parquet" else "byte")
    if path.suffix == ".parquet":
        texts = output.files[file][place:]
    elif path.suffix == ".jsonl":
        texts = [json.loads(line)["text"] for line in path.read_bytes()[place:].split(b"\n")[:-1]]
    else:
        assert place == 0
        texts = output.files[file]
    return [*texts, *(text for others in output.files[file + 1 :] for text in others)]


def test_the_manifest_lists_the_content_and_the_place_of_each_shard(output, encoding):
    shards = output.manifest["shards"]
    names = [shard["file"] for shard in shards]
    assert names == ["val_000000.npy", *sorted(names[1:])]
    for shard, ids in zip(shards, output.ids, strict=True):
        assert re.fullmatch(shard["split"] + r"_\d{6}\.npy", shard["file"])
        assert ids.dtype == np.uint16
        assert shard["tokens"] == len(ids)
        assert shard["sha256"] == hashlib.sha256((output.out / shard["file"]).read_bytes()).hexdigest()
        assert shard["documents"] == ids.tolist().count(encoding.eot_token)
        assert shard["bytes"] == len(encoding.decode_bytes([i for i in ids.tolist() if i != encoding.eot_token]))
        texts = from_place(output, shard["source_file"], shard["begin"])
        assert texts[0]
        rest = [[encoding.eot_token, *encoding.encode_ordinary(text)] for text in texts if text]
        assert ids.tolist() == [i for document in rest for i in document][: len(ids)]
    texts = [text for file in output.files for text in file]
    assert sum(shard["documents"] for shard in shards) == sum(bool(text) for text in texts)
    assert sum(shard["bytes"] for shard in shards) == sum(len((text or "").encode()) for text in texts)
    assert output.manifest["empty_documents"] == sum(not text for text in texts)
    assert {path.name for path in output.out.glob("*.npy")} == {shard["file"] for shard in shards}


def test_the_manifest_names_source_and_encoding(output, encoding):
    source = output.manifest["source"]
    files = sorted(output.arguments[0].parent.iterdir())
    assert source["name"] == output.arguments[0].name
    assert source["revision"] is None
    assert [(file["name"], file["bytes"]) for file in source["files"]] == [(f.name, f.stat().st_size) for f in files]
    assert len({file["fingerprint"] for file in source["files"]}) == len(files)
    assert (output.manifest["encoding"], output.manifest["vocab_size"]) == ("stories", encoding.n_vocab)


def test_validation_is_one_percent_of_the_source_by_default(world, tmp_path, encoding):
    prepare(world, "data/stories/stories.jsonl", tmp_path / "out")
    output = read_output([], (), tmp_path / "out")
    documents = split_at(output.split("val"), encoding.eot_token)
    wanted = (world / "data/stories/stories.jsonl").stat().st_size / 100
    text_bytes = [len(encoding.decode(ids[1:]).encode()) for ids in documents]
    assert sum(text_bytes[:-1]) < wanted <= sum(text_bytes)


@pytest.mark.parametrize("spare", [0, -1, 1])
def test_max_tokens_ends_before_the_document_that_would_exceed_it(world, tmp_path, encoding, spare):
    lines = (world / "data/stories/stories.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    encoded = [[encoding.eot_token, *encoding.encode_ordinary(text)] for text in texts]
    limit = sum(map(len, encoded[:50])) + spare
    prepare(world, "data/stories/stories.jsonl", tmp_path / "out", "--max-tokens", limit, workers=2)
    output = read_output([], (), tmp_path / "out")
    val = split_at(output.split("val"), encoding.eot_token)
    assert val + split_at(output.split("train"), encoding.eot_token) == encoded[: 49 if spare < 0 else 50]
    assert sum(map(len, val[:-1])) < limit // 100 <= sum(map(len, val))


def test_a_second_run_keeps_a_finished_folder_refuses_other_settings_and_overwrites_on_request(world, tmp_path):
    source, out = "data/stories/stories.jsonl", tmp_path / "out"
    prepare(world, source, out, "--val-tokens", 500)
    before = contents(out)
    again = prepare(world, source, out, "--val-tokens", 500, workers=2)
    assert "already finished" in again.stdout
    for name, values, arguments in (
        ("val_tokens", ("500", "600"), ("--val-tokens", 600)),
        ("shard_tokens", ("100000000", "900"), ("--val-tokens", 500, "--shard-tokens", 900)),
        ("max_tokens", ("None", "9000"), ("--val-tokens", 500, "--max-tokens", 9000)),
    ):
        message = refused(prepare(world, source, out, *arguments, check=False))
        assert f"was made with {name} {values[0]}, but this command has {values[1]}" in message
        assert "--overwrite" in message
    assert contents(out) == before
    prepare(world, source, out, "--val-tokens", 600, "--shard-tokens", 9000, "--overwrite")
    prepare(world, source, tmp_path / "new", "--val-tokens", 600, "--shard-tokens", 9000)
    assert contents(out) == contents(tmp_path / "new")


def test_a_run_that_wrote_no_shard_does_not_fix_the_settings(world, tmp_path):
    """Another run can use another source."""
    (tmp_path / "one.txt").write_text("once upon a time " * 500)
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    message = refused(prepare(world, tmp_path / "none.jsonl", tmp_path / "out", check=False))
    assert message == f"--source {tmp_path}/none.jsonl contains no document with text. Use another source"
    assert not (tmp_path / "out/unfinished").exists()
    message = refused(prepare(world, tmp_path / "one.txt", tmp_path / "out", check=False))
    assert "has no train document. A .txt is one document: split it, e.g. split " in message
    prepare(world, "data/stories/stories.jsonl", tmp_path / "out")
    prepare(world, "data/stories/stories.jsonl", tmp_path / "new")
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_a_txt_file_without_text_is_not_to_be_split(world, tmp_path):
    (tmp_path / "empty.txt").touch()
    message = refused(prepare(world, tmp_path / "empty.txt", tmp_path / "out", check=False))
    assert message.endswith("/empty.txt contains no document with text. Use another source")
    message = refused(prepare(world, "data/stories/stories.jsonl", tmp_path / "few", "--max-tokens", 2, check=False))
    assert "stories.jsonl has no val document with --max-tokens 2. Use more text, " in message


def test_another_source_is_refused_by_name(world, tmp_path):
    prepare(world, "data/stories/stories.jsonl", tmp_path / "out")
    copy = tmp_path / "other.jsonl"
    copy.write_bytes((world / "data/stories/stories.jsonl").read_bytes())
    message = refused(prepare(world, copy, tmp_path / "out", check=False))
    assert "was made with source" in message
    assert "other.jsonl" in message


def test_a_folder_without_one_of_its_shards_is_not_reported_as_finished(world, tmp_path):
    prepare(world, "data/stories/stories.jsonl", tmp_path / "out")
    (tmp_path / "out/train_000001.npy").unlink()
    again = prepare(world, "data/stories/stories.jsonl", tmp_path / "out", check=False)
    assert "already finished" not in again.stdout


@pytest.mark.parametrize("limit", [1, 7, 64, 1000, 10**6])
def test_each_line_of_a_jsonl_file_is_in_one_piece(tmp_path, limit):
    rng = random.Random(limit)
    texts = [rng.choice(WORDS) * rng.randint(0, 40) for _ in range(60)]
    lines = [json.dumps({"text": text}, ensure_ascii=rng.random() < 0.5).encode() for text in texts]
    lines[7:7] = [b"", b"   "]
    path = tmp_path / "lines.jsonl"
    for ending in (b"", b"\n"):
        path.write_bytes(b"\n".join(lines) + ending)
        files = sources.find_source(str(path), None)[0]
        parts = pieces.cut(files, limit)
        assert sum(piece.bytes for piece in parts) == path.stat().st_size
        documents = [document for piece in parts for document in pieces.read_piece(piece, files)]
        assert [text for _, _, text in documents] == texts
        assert len({place for _, place, _ in documents}) == len(texts)


def invalid_sources():
    return {
        "no column.parquet": (lambda path: pq.write_table(pa.table({"words": ["a"]}), path), "words"),
        "numbers.parquet": (lambda path: pq.write_table(pa.table({"text": [1, 2]}), path), "text"),
        "cut.parquet": (lambda path: path.write_bytes(b"PAR1 and nothing else"), "cut short"),
        "no field.jsonl": (lambda path: path.write_text('{"text": "a"}\n{"words": "b"}\n'), "byte 14 (line 2): "),
        "number.jsonl": (lambda path: path.write_text('{"text": "a"}\n{"text": 3}\n'), "byte 14 (line 2): "),
        "half.jsonl": (
            lambda path: path.write_text('{"text": "a"}\n{"text": "b'),
            "byte 14 (line 2): not a JSON object (Unterminated string starting at: column 10)",
        ),
        "nested.jsonl": (lambda path: path.write_text('{"text": "a"}\n' + "[" * 100_000), "byte 14 (line 2): "),
        "lone surrogate.jsonl": (
            lambda path: path.write_text('{"text": "a"}\n{"text": "\\ud800"}\n'),
            "byte 14 (line 2): ",
        ),
        "latin.txt": (lambda path: path.write_bytes(b"caf\xe9"), "latin.txt: not UTF-8 text (byte 3 of the document)"),
        "page.html": (lambda path: path.write_text("a"), ".parquet"),
    }


@pytest.mark.parametrize("name", invalid_sources())
def test_a_source_without_valid_text_is_refused_with_file_and_place(world, tmp_path, name):
    write, place = invalid_sources()[name]
    write(tmp_path / name)
    message = refused(prepare(world, tmp_path / name, tmp_path / "out", check=False))
    assert name in message
    assert place in message


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (OSError(errno.EIO, "Input/output error"), OSError, "part.parquet can't be read"),
        (OSError("Corrupt snappy compressed data"), ValueError, "part.parquet is damaged"),
    ],
)
def test_an_error_of_the_machine_in_a_parquet_file_is_not_damage(tmp_path, monkeypatch, error, kind, message):
    """pyarrow raises OSError for both; only an error of the machine has an errno."""
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    files = sources.find_source(str(path), None)[0]
    (piece,) = pieces.cut(files, 1000)

    def iter_batches(*_, **__):
        raise error

    parquet = pieces.open_parquet(files[0])
    monkeypatch.setattr(parquet, "iter_batches", iter_batches)
    monkeypatch.setattr(pieces, "open_parquet", lru_cache(lambda file: parquet))
    with pytest.raises(kind, match=message):
        pieces.read_piece(piece, files)
