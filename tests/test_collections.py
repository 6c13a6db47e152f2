"""Any collection of text files gives the documents of its stream, in shards that training can use completely."""

import gzip
import io
import json
import random
import resource
import shutil
import sys
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ENCODING, ROOT, execute, on_ranks, refused, run

from core.data import pieces, shards, sources
from core.data.shards import Windows, open_dataset
from core.distributed import Ranks

WORDS = ("Ana", "took", "the", "lamp", "na\u00efve", "\u65e5\u672c", "\u2028", "\r", "1907")
SMALL_BLOCKS = """
import runpy, sys
from core.data import pieces

pieces.PIECE_BYTES = 2000
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def documents(seed, count, words=40):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, words))) for _ in range(count)]


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def prepare(world, source, out, *settings, check=True, workers=1, **env):
    settings = settings or ("--val-tokens", 300, "--shard-tokens", 3000)
    arguments = ("--source", source, "--out", out, "--encoding", "data/stories", "--workers", workers, *settings)
    return run("fineweb.py", *arguments, cwd=world, check=check, **env)


def ids_of(out, split):
    return np.concatenate([np.load(out / shard["file"]) for shard in open_dataset(out).shards(split)])


def texts_in(out):
    ids = np.concatenate([ids_of(out, "val"), ids_of(out, "train")])
    return [ENCODING.decode(part[1:].tolist()) for part in np.split(ids, np.flatnonzero(ids == ENCODING.eot_token))[1:]]


def write_files(folder, texts, name="{:04}.txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / name.format(number)).write_bytes(text.encode())


def test_validation_has_the_wanted_tokens_of_many_small_files(world, tmp_path):
    texts = documents(1, 400)
    write_files(tmp_path, texts)
    prepare(world, tmp_path / "*.txt", tmp_path / "out", "--val-tokens", 4000)
    assert 4000 <= open_dataset(tmp_path / "out").tokens("val") < 4200
    assert texts_in(tmp_path / "out") == texts


def test_validation_has_the_wanted_tokens_where_the_first_file_has_one_document(world, tmp_path):
    texts = documents(2, 300)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:1]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(texts[1:]))
    prepare(world, tmp_path / "*.jsonl", tmp_path / "out", "--val-tokens", 4000)
    assert 4000 <= open_dataset(tmp_path / "out").tokens("val") < 4200
    assert texts_in(tmp_path / "out") == texts


def test_windows_reach_the_tokens_of_small_files_as_those_of_one_file(world, tmp_path):
    texts = [" ".join(documents(number, 14, 60)) for number in range(80)]
    write_files(tmp_path / "files", texts)
    (tmp_path / "one.jsonl").write_bytes(jsonl(texts))
    settings = ("--val-tokens", 300)
    prepare(world, tmp_path / "files/*.txt", tmp_path / "many", *settings)
    prepare(world, tmp_path / "one.jsonl", tmp_path / "one", *settings)
    many, one = (Windows(open_dataset(tmp_path / name), "train", 256) for name in ("many", "one"))
    assert len(many) == len(one) == (open_dataset(tmp_path / "many").tokens("train") - 1) // 256


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt", "jsonl.gz"])
def test_an_empty_first_file_makes_no_difference(world, tmp_path, kind):
    texts = documents(3, 100)
    if kind == "parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"text": texts}), tmp_path / "b.parquet")
    elif kind == "txt":
        write_files(tmp_path, ["", *texts])
    else:
        (tmp_path / f"a.{kind}").write_bytes(b"")
        (tmp_path / f"b.{kind}").write_bytes(gzip.compress(jsonl(texts)) if kind.endswith("gz") else jsonl(texts))
    prepare(world, tmp_path / f"*.{kind}", tmp_path / "out")
    assert texts_in(tmp_path / "out") == texts


def test_more_shards_than_the_limit_on_open_files_can_be_checked_and_read(tmp_path):
    entries = []
    for number in range(1100):
        name = f"{'train' if number else 'val'}_{number:06}.npy"
        np.save(tmp_path / name, np.full(17, number, dtype=np.uint16))
        entries.append({"file": name, "split": name.split("_", maxsplit=1)[0], "tokens": 17, "sha256": ""})
        entries[-1]["sha256"] = shards.sha256(tmp_path / name)
    manifest = {"vocab_size": 2000, "end_of_text_id": 0, "shards": entries}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        dataset = open_dataset(tmp_path)
        shards.verify(dataset, Ranks(0, 1, torch.device("cpu")))
        windows = Windows(dataset, "train", 16)
        assert len(windows) == 1099
        inputs, _ = windows.batch(range(1099))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert inputs[:, 0].tolist() == list(range(1, 1100))


def test_an_address_within_an_archive_is_read(world, tmp_path):
    texts = documents(4, 120)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/0.jsonl", jsonl(texts[:50]))
        archive.writestr("in/._0.jsonl", b"\x00\x05\x16\x07")
        archive.writestr("in/1.jsonl", jsonl(texts[50:]))
    prepare(world, f"zip://in/*.jsonl::{tmp_path}/a.zip", tmp_path / "out", workers=2)
    assert texts_in(tmp_path / "out") == texts
    message = refused(prepare(world, f"zip://in/*.jsonl::{tmp_path}/b.zip", tmp_path / "other", check=False))
    assert "b.zip can't be read (FileNotFoundError" in message


@pytest.mark.parametrize("pattern", ["docs [old]/a[1].jsonl", "docs [old]/*.jsonl"])
def test_an_existing_path_with_brackets_is_literal(world, tmp_path, pattern):
    texts = documents(5, 100)
    (tmp_path / "docs [old]").mkdir()
    (tmp_path / "docs [old]/a[1].jsonl").write_bytes(jsonl(texts))
    prepare(world, tmp_path / pattern, tmp_path / "out")
    assert texts_in(tmp_path / "out") == texts


def test_hidden_files_are_not_data(world, tmp_path):
    texts = documents(6, 100)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07")
    prepare(world, tmp_path / "*.jsonl", tmp_path / "out")
    assert texts_in(tmp_path / "out") == texts


def test_dictionaries_and_columns_without_values_are_read(world, tmp_path):
    texts = documents(7, 90) * 2
    pq.write_table(pa.table({"text": pa.array(texts).dictionary_encode()}), tmp_path / "a.parquet", row_group_size=50)
    pq.write_table(pa.table({"text": pa.nulls(30)}), tmp_path / "b.parquet")
    large = pa.array(texts, pa.large_string()).dictionary_encode()
    pq.write_table(pa.table({"text": large}), tmp_path / "c.parquet")
    prepare(world, tmp_path / "*.parquet", tmp_path / "out")
    assert texts_in(tmp_path / "out") == texts * 2
    assert open_dataset(tmp_path / "out").manifest["empty_documents"] == 30


def test_a_column_of_lists_of_strings_is_no_text(world, tmp_path):
    pq.write_table(pa.table({"text": [["Ana", "took"]] * 30}), tmp_path / "a.parquet")
    message = refused(prepare(world, tmp_path / "a.parquet", tmp_path / "out", check=False))
    assert "a.parquet has no `text` column of strings: its columns are text (list<" in message


def test_a_deeply_nested_line_is_named_and_can_be_skipped(world, tmp_path):
    texts = documents(8, 3000)
    nested = b'{"text": "a", "other": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:1500]) + nested + jsonl(texts[1500:]))
    place = f"byte {len(jsonl(texts[:1500]))}"
    assert place in refused(prepare(world, tmp_path / "a.jsonl", tmp_path / "out", check=False))
    prepare(world, tmp_path / "a.jsonl", tmp_path / "out", "--val-tokens", 300, "--shard-tokens", 3000, "--skip-broken")
    assert texts_in(tmp_path / "out") == texts
    assert place in open_dataset(tmp_path / "out").manifest["broken_documents"][0]


def compress(kind, raw):
    """Two members or frames, as parallel compressors write them."""
    parts = (raw[: len(raw) // 3], raw[len(raw) // 3 :])
    return b"".join(gzip.compress(p) if kind == "gz" else pa.compress(p, "zstd", asbytes=True) for p in parts)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_files_of_any_size_give_the_documents_of_plain_ones(world, tmp_path, kind):
    """A small one is read by a worker; a large one is divided into blocks by the main process."""
    texts = documents(9, 700)
    for part, begin, end in ((0, 0, 3), (1, 3, 500), (2, 500, 700)):
        suffix = "ndjson" if part == 1 else "jsonl"
        (tmp_path / f"{part}.{suffix}").write_bytes(jsonl(texts[begin:end]))
        (tmp_path / f"{part}.{suffix}.{kind}").write_bytes(compress(kind, jsonl(texts[begin:end])))
    settings = ("--val-tokens", 900, "--shard-tokens", 3000)
    prepare(world, tmp_path / "*[ln]", tmp_path / "plain", *settings)
    arguments = ("--source", tmp_path / f"*.{kind}", "--out", tmp_path / "out", "--encoding", "data/stories", *settings)
    command = [sys.executable, "-c", SMALL_BLOCKS, ROOT / "fineweb.py", *arguments, "--workers", 2]
    execute(list(map(str, command)), world, True, {})
    for split in ("val", "train"):
        assert np.array_equal(ids_of(tmp_path / "out", split), ids_of(tmp_path / "plain", split))
    first = open_dataset(tmp_path / "out").shards("train")[0]
    done = open_dataset(tmp_path / "out").shards("val")[0]["documents"]
    assert first["source_file"] == 1
    assert first["begin"] == {"line": done - 3 + 1}
    run("fineweb.py", "--verify", tmp_path / "out", cwd=world)


@pytest.mark.parametrize("val_tokens", [1, 900, 3000])
def test_the_skipped_documents_of_a_divided_file_count_once(world, tmp_path, val_tokens):
    """Validation and the first training shard both read the blocks from the start of the file."""
    lines = jsonl(documents(12, 500)).splitlines(keepends=True)
    lines[0:0] = [b'{"text": ""}\n', b"broken\n"]
    lines[100:100] = [b'{"text": ""}\n', b"broken\n"]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    arguments = ("--source", tmp_path / "a.jsonl.gz", "--out", tmp_path / "out", "--encoding", "data/stories")
    arguments += ("--val-tokens", val_tokens, "--shard-tokens", 3000, "--workers", 1, "--skip-broken")
    execute([sys.executable, "-c", SMALL_BLOCKS, str(ROOT / "fineweb.py"), *map(str, arguments)], world, True, {})
    manifest = open_dataset(tmp_path / "out").manifest
    assert manifest["empty_documents"] == 2
    assert [place.partition(":")[0] for place in manifest["broken_documents"]] == [
        "a.jsonl.gz, line 2",
        "a.jsonl.gz, line 102",
    ]


def test_blocks_of_lines_are_the_lines(tmp_path, monkeypatch):
    raw = jsonl(documents(10, 200)) + b"\n\n" + b"x" * 5000 + b"\nlast"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    files = sources.find_source(str(tmp_path / "a.jsonl.gz"), None)[0]
    for size in (1, 100, 3000, 10**6):
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        blocks = [(task.begin, task.lines) for task in pieces.divide(pieces.Piece(0, 1, len(raw), 0, len(raw)), files)]
        assert b"\n".join(lines for _, lines in blocks) == raw
        for number, lines in blocks:
            assert raw.startswith(lines, sum(map(len, io.BytesIO(raw).readlines()[: number - 1])))


@pytest.mark.parametrize("damage", [lambda raw: raw[:-30], lambda raw: b"no gzip" + raw])
def test_a_damaged_compressed_file_is_named(world, tmp_path, damage):
    (tmp_path / "a.jsonl.gz").write_bytes(damage(gzip.compress(jsonl(documents(11, 300)))))
    for settings in ((), ("--shard-tokens", 2000)):
        message = refused(prepare(world, tmp_path / "*.gz", tmp_path / "out", *settings, check=False))
        assert "a.jsonl.gz is damaged" in message
        shutil.rmtree(tmp_path / "out")


def test_ranks_share_a_collection_of_small_files_and_write_the_same_bytes(world, tmp_path):
    write_files(tmp_path, documents(12, 300))
    prepare(world, tmp_path / "*.txt", tmp_path / "one")
    settings = ("--encoding", "data/stories", "--workers", 1, "--val-tokens", 300, "--shard-tokens", 3000)
    on_ranks(2, "fineweb.py", "--source", tmp_path / "*.txt", "--out", tmp_path / "two", *settings, cwd=world)
    for path in (tmp_path / "one").glob("*.*"):
        assert path.name == ".lock" or path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
