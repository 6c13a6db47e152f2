"""A data folder during preparation: a plan of chunks that each make one shard, and a record of each finished chunk.

    data/NAME/.lock                             a process locks the byte of each chunk that it writes
    data/NAME/unfinished/settings.json          the settings that all processes share
    data/NAME/unfinished/train_000001.json      the manifest's entry of a shard that is complete
    data/NAME/train_000001.npy                  that shard

The processes don't communicate. The plan follows from the metadata of the source files and from where validation ends,
so that it is the same for each of them, and the records are all the state there is.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from core.data.encode import Documents, Encoded, Workers
from core.data.shards import DEFAULT_VAL_TOKENS, MANIFEST, UNFINISHED, open_dataset, short_reason
from core.data.sources import PIECE_BYTES, Source, cut, format_of
from core.files import PRESENCE, FileLocks, sha256, write_json

SETTINGS = "settings.json"
MAX_INVALID = 1000  # documents that --skip-broken skips for a shard; with more, the file itself counts as damaged
HEADER_BYTES = 128  # of .npy, which does not depend on the number of tokens
NO_LIMIT = 2**63
BYTES_PER_TOKEN = 4.45  # of English text
PIECES_PER_SHARD, MIN_PIECE_BYTES = 32, 1024  # shards end where pieces end
PLACES = {"parquet": "row", "jsonl": "byte", "txt": "byte"}
FEW = 20  # up to this number, each shard has its own line of progress


@dataclass(frozen=True)
class Chunk:
    """The part of the source that makes one shard: pieces, the first from its document `skip` of block `block` on."""

    number: int  # 0 for validation
    pieces: range
    block: int
    skip: int
    identity: str  # of the content
    tokens: int  # approximately

    @property
    def name(self) -> str:
        return f"{'train' if self.number else 'val'}_{self.number:06d}"


class ShardWriter:
    """A shard that is written under another name until it is complete."""

    def __init__(self, path: Path, rank: int) -> None:
        self._path, self._unfinished = path, path.with_name(f".{path.name}.{rank}.unfinished")
        self._file: Any = None
        self.tokens = self.documents = self.bytes = self.empty = 0
        self.first: tuple[int, int] = (0, 0)  # source file and place of the first document
        self.invalid: list[tuple[int, str]] = []

    def add(self, documents: Documents) -> None:
        """Append documents. Raises OSError."""
        if not len(documents):
            return
        with self._needs_space():
            if self._file is None:
                self._file = open(self._unfinished, "wb", buffering=0)  # noqa: SIM115  closed by finish or discard
                self._file.write(bytes(HEADER_BYTES))
                self.first = int(documents.files[0]), int(documents.places[0])
            write_all(self._file, documents.ids.data)
        self.tokens += len(documents.ids)
        self.documents += len(documents)
        self.bytes += int(documents.text_bytes.sum())

    def finish(self) -> str | None:
        """Complete the file and return its sha256, or None for a shard without documents. Raises OSError."""
        if self._file is None:
            return None
        with self._needs_space(), self._file as file:
            file.seek(0)
            header = np.lib.format.header_data_from_array_1_0(np.empty(0, np.uint16)) | {"shape": (self.tokens,)}
            np.lib.format.write_array_header_1_0(file, header)
            assert file.tell() == HEADER_BYTES
            os.fsync(file.fileno())
            digest = sha256(self._unfinished)
            os.replace(self._unfinished, self._path)
        return digest

    def discard(self) -> None:
        """Remove an incomplete file."""
        if self._file is not None:
            self._file.close()
            self._unfinished.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _needs_space(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.discard()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(
                f"{self._path.parent} has no space left for {self._path.name}. Free disk space and rerun the same "
                "command to resume"
            ) from None


def write_all(file: Any, data: memoryview) -> None:
    data = data.cast("B")
    while data:
        data = data[file.write(data) :]  # a nearly full disk takes a part, and only the next call fails


class Preparation:
    """The conversion of a source into a data folder."""

    def __init__(
        self,
        out: Path,
        source: Source,
        header: dict[str, Any],
        locks: FileLocks,
        rank: int,
        world_size: int,
        skip_broken: bool,
    ) -> None:
        self.out, self.header, self.files, self.locks = out, header, source.files, locks
        self.rank, self.world_size, self.skip_broken = rank, world_size, skip_broken
        self.max_tokens = header["max_tokens"] or NO_LIMIT
        limit = int(header["shard_tokens"] * BYTES_PER_TOKEN / PIECES_PER_SHARD)
        self.pieces = cut(source.files, min(max(limit, MIN_PIECE_BYTES), PIECE_BYTES))

    def identity(self, pieces: range, *settings: object) -> str:
        digest = hashlib.sha256(repr(settings).encode())
        for piece in self.pieces[pieces.start : pieces.stop]:
            digest.update(piece.key(self.files).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def read_record(self, name: str) -> dict[str, Any] | None:
        """The record of a chunk whose shard is complete."""
        try:
            record = json.loads((self.out / UNFINISHED / f"{name}.json").read_text(encoding="utf-8"))
            size = (self.out / f"{name}.npy").stat().st_size if record["tokens"] else HEADER_BYTES
            return record if size == HEADER_BYTES + 2 * record["tokens"] else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # power failed before the disk had its content
            return None

    def record(self, chunk: Chunk) -> dict[str, Any] | None:
        """The record of a chunk, if it was made from the present content of the source."""
        record = self.read_record(chunk.name)
        return record if record and record.get("identity") == chunk.identity else None

    def write_record(self, chunk: Chunk, shard: ShardWriter, **facts: Any) -> dict[str, Any]:
        """Complete a shard and record it."""
        digest = shard.finish()
        number, place = shard.first
        kind, compression = format_of(self.files[number].url)
        entry = {"file": f"{chunk.name}.npy", "split": chunk.name.split("_", 1)[0], "tokens": shard.tokens}
        entry |= {"documents": shard.documents, "bytes": shard.bytes}
        entry |= {"begin": {"line" if compression else PLACES[kind]: place}, "sha256": digest, "source_file": number}
        invalid = [f"{self.files[file].name}, {reason}" for file, reason in shard.invalid]
        record = {"entry": entry, "tokens": shard.tokens, "empty": shard.empty, "invalid": invalid}
        record |= {"identity": chunk.identity} | facts
        write_json(self.out / UNFINISHED / f"{chunk.name}.json", record)
        return record

    def count(self, shard: ShardWriter, encoded: Encoded) -> None:
        """Count what was left out. Raises ValueError for invalid documents, unless --skip-broken allows them."""
        shard.empty += encoded.empty
        shard.invalid += encoded.invalid
        if not shard.invalid:
            return
        (file, place), url = shard.invalid[-1], self.files[shard.invalid[-1][0]].url
        if not self.skip_broken:
            file, place = shard.invalid[0]
            raise ValueError(f"{self.files[file].url}, {place}. Fix the document, or skip it with --skip-broken")
        if len(shard.invalid) > MAX_INVALID:
            raise ValueError(f"{url} has more than {MAX_INVALID} invalid documents. Fix the file; the last: {place}")

    def write_validation(self, workers: Workers) -> dict[str, Any]:
        """The record of the validation shard: the first complete documents of the source. It is written if needed."""
        total = sum(piece.bytes for piece in self.pieces)
        target = self.header["val_tokens"] or max(min(DEFAULT_VAL_TOKENS, self.max_tokens // 100), 1)
        target_bytes = NO_LIMIT if self.header["val_tokens"] else max(total // 100, 1)
        if record := self.read_record("val_000000"):
            pieces = range(record["piece"] + 1)
            if record["identity"] == self.identity(pieces, target, target_bytes):
                return record
            print("val_000000.npy is written again: its source files have changed", flush=True)
        shard, last, skip = ShardWriter(self.out / "val_000000.npy", self.rank), (len(self.pieces), 0), 0
        seen_tokens, seen_bytes = 0, 0
        try:
            for _, key, encoded in workers.encode((0, i, 0) for i in range(len(self.pieces))):
                documents = encoded.documents
                seen_tokens, seen_bytes = seen_tokens + len(documents.ids), seen_bytes + encoded.bytes
                tokens = shard.tokens + documents.ends  # (d,)
                text_bytes = shard.bytes + np.cumsum(documents.text_bytes)  # (d,)
                before = (tokens < target) & (text_bytes < target_bytes) & (tokens <= self.max_tokens)
                skip = min(int(before.sum()) + 1, int((tokens <= self.max_tokens).sum()))
                shard.add(documents[:skip])
                if not before.all():
                    last = key
                    break
                self.count(shard, encoded)
        except BaseException:
            shard.discard()
            raise
        if not shard.tokens:
            raise ValueError(self.no_document("val"))
        chunk = Chunk(0, range(last[0] + 1), 0, 0, self.identity(range(last[0] + 1), target, target_bytes), target)
        facts = {"piece": last[0], "block": last[1], "skip": skip}
        return self.write_record(chunk, shard, **facts, seen_tokens=seen_tokens, seen_bytes=seen_bytes)

    def plan(self, validation: dict[str, Any]) -> list[Chunk]:
        """The chunks after validation. They are as even as the pieces allow, as estimated from validation."""
        first, done = validation["piece"], validation["tokens"]
        per_byte = validation["seen_tokens"] / max(validation["seen_bytes"], 1)
        borders = np.cumsum([0, *(piece.bytes for piece in self.pieces)], dtype=np.float64) * per_byte  # in tokens
        middles = (borders[first:-1] + borders[first + 1 :]) / 2 - done
        total = max(borders[-1] - done, 1)
        wanted = max(min(total, self.max_tokens - done), 1)
        size = wanted / max(round(wanted / self.header["shard_tokens"]), 1)
        edges = [first] if first < len(self.pieces) else []
        for edge in first + 1 + np.flatnonzero(np.diff(middles // size)):
            if min(borders[edge] - max(borders[edges[-1]], done), borders[-1] - borders[edge]) >= size / 2:
                edges.append(int(edge))
        chunks = []
        for number, (begin, end) in enumerate(itertools.pairwise([*edges, len(self.pieces)]), 1):
            block, skip = (validation["block"], validation["skip"]) if number == 1 else (0, 0)
            tokens = int(borders[end] - max(borders[begin], done))
            identity = self.identity(range(begin, end), block, skip)
            chunks.append(Chunk(number, range(begin, end), block, skip, identity, tokens))
            if (record := self.record(chunks[-1])) and record["limited"]:
                break  # --max-tokens ends here
        return chunks

    def claim(self, chunks: list[Chunk]) -> Iterator[Chunk]:
        """The chunks that are left and that no other process writes, each locked."""
        own = self.rank * len(chunks) // self.world_size
        for chunk in chunks[own:] + chunks[:own] if self.locks.supported else chunks[self.rank :: self.world_size]:
            if self.record(chunk) or not self.locks.try_acquire(chunk.number):
                continue
            if self.record(chunk):  # another process has completed it before the lock
                self.locks.release(chunk.number)
                continue
            if self.read_record(chunk.name):
                tqdm.write(f"{chunk.name}.npy is written again: its source files have changed")
            yield chunk

    def write_chunks(self, chunks: list[Chunk], workers: Workers, tokens: int, bar: Any) -> None:
        """Write the shards of the chunks that are left. The source has `tokens` tokens before them."""
        last_log, before = 0.0, {chunk.number: record["tokens"] for chunk in chunks if (record := self.record(chunk))}
        wanted = ((chunk, i, chunk.block) for chunk in self.claim(chunks) for i in chunk.pieces)
        finished: Future[Any] | None = None
        with ThreadPoolExecutor(1) as thread:  # it completes a shard while the next one is written
            for chunk, results in itertools.groupby(workers.encode(wanted), key=lambda result: result[0]):
                room = self.max_tokens - tokens - sum(before[i] for i in before if i < chunk.number)
                shard = ShardWriter(self.out / f"{chunk.name}.npy", self.rank)
                try:
                    limited = self.write_chunk(chunk, results, shard, room, bar)
                    if finished:
                        finished.result()
                except BaseException:
                    shard.discard()
                    raise
                before[chunk.number] = shard.tokens
                finished = thread.submit(self.complete, chunk, shard, limited)
                if len(chunks) <= FEW or time.monotonic() > last_log + 10:
                    last_log = time.monotonic()
                    tqdm.write(f"{chunk.name}.npy: {shard.tokens:,} tokens")
                if limited:
                    break
            if finished:
                finished.result()

    def write_chunk(self, chunk: Chunk, results: Any, shard: ShardWriter, room: int, bar: Any) -> bool:
        """Write the documents of a chunk, at most `room` tokens. Returns whether there are more."""
        for _, key, encoded in results:
            documents = encoded.documents[chunk.skip if key == (chunk.pieces[0], chunk.block) else 0 :]
            kept = documents[: int(np.sum(shard.tokens + documents.ends <= room))] if len(documents) else documents
            shard.add(kept)
            self.count(shard, encoded)
            bar.update(len(kept.ids))
            if len(kept) < len(documents):
                return True
        return False

    def complete(self, chunk: Chunk, shard: ShardWriter, limited: bool) -> None:
        self.write_record(chunk, shard, limited=limited)
        self.locks.release(chunk.number)

    def finish(self, validation: dict[str, Any], chunks: list[Chunk]) -> bool:
        """Write the manifest if all chunks are complete; else print how many other processes write."""
        if (self.out / MANIFEST).is_file():
            return True  # another process has written it
        records = [validation]
        for chunk in chunks:
            if (record := self.record(chunk)) is None:
                missing = sum(self.record(chunk) is None for chunk in chunks)
                print(
                    f"this process is done. Other processes write {missing} of {len(chunks)} shards, e.g. {chunk.name}."
                    "npy. The last process writes the manifest. If they fail, rerun the same command"
                )
                return False
            records.append(record)
            if record["limited"]:
                break
        shards = [record["entry"] for record in records if record["tokens"]]
        if len(shards) < 2:
            raise ValueError(self.no_document("train"))
        counts = {"empty_documents": sum(record["empty"] for record in records)}
        counts |= {"broken_documents": [place for record in records for place in record["invalid"]]}
        remove_shards(self.out, keep={shard["file"] for shard in shards})
        write_json(self.out / MANIFEST, self.header | counts | {"shards": shards})
        shutil.rmtree(self.out / UNFINISHED, ignore_errors=True)
        return True

    def no_document(self, split: str) -> str:
        given = {f"--{key.replace('_', '-')}": self.header[key] for key in ("max_tokens", "val_tokens")}
        limits = " and ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        remedy = "Use more text, a larger --max-tokens or a smaller --val-tokens"
        if not limits and len(self.files) == 1 and self.files[0].name.endswith(".txt"):
            remedy = "A .txt is one document: split it, e.g. split -C 50K --additional-suffix=.txt TEXT part-"
        name = self.header["source"]["name"]
        return f"--source {name} has no {split} document{f' with {limits}' if limits else ''}. {remedy}"


def recorded_settings(out: Path) -> dict[str, Any]:
    """The settings that a finished or unfinished folder was made with; empty for a new folder."""
    if (out / MANIFEST).is_file():
        return open_dataset(out).manifest
    path = out / UNFINISHED / SETTINGS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({short_reason(error)}). Start again with --overwrite") from None


def check_settings(out: Path, header: dict[str, Any]) -> None:
    """Raise ValueError if the folder was begun with other settings. Record the settings of a new folder."""
    recorded = recorded_settings(out)
    finished = (out / MANIFEST).is_file()
    for key, value in (header if finished else _without_contents(header)).items():
        if recorded and recorded.get(key) != value:
            name, old, new = _difference(key, recorded.get(key), value)
            raise ValueError(
                f"{out} was made with {name} {old}, but this command has {new}. Use another --out, or --overwrite"
            )
    for shard in recorded["shards"] if finished else ():
        if not (out / shard["file"]).is_file():
            raise ValueError(
                f"{out / shard['file']} is missing, but the manifest lists it. Write the folder again with --overwrite"
            )
    if finished:
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    elif not recorded:
        (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
        write_json(out / UNFINISHED / SETTINGS, _without_contents(header))
    if older := [path for path in (out / UNFINISHED).glob("*") if path.is_dir()]:
        print(f"{out / UNFINISHED} is of an earlier version: its shards are written again", flush=True)
        for folder in older:
            shutil.rmtree(folder)


def _without_contents(header: dict[str, Any]) -> dict[str, Any]:
    """The settings with only the names of the source files. Each chunk's record identifies its content."""
    names = [file["name"] for file in header["source"]["files"]]
    return header | {"source": header["source"] | {"files": names}}


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The innermost entry in which two values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        return _difference(f"{name} {key}", old.get(key), new.get(key))
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"a number of {name} of", len(old), len(new)
        i = next(i for i in range(len(old)) if old[i] != new[i])
        label = old[i].get("name", i) if isinstance(old[i], dict) else i
        return _difference(f"{name} {label}", old[i], new[i])
    return name, old, new


def remove_shards(out: Path, keep: set[str]) -> None:
    """Remove shards and incomplete files except for the names in `keep`."""
    for path in out.iterdir():
        if (
            re.fullmatch(r"(?:val|train)_\d{6}\.npy|\..*\.(?:unfinished|json\.[0-9a-f]+)", path.name)
            and path.name not in keep
        ):
            path.unlink()


def clear(out: Path, locks: FileLocks, only_empty: bool = False) -> bool:
    """Remove all shards, the manifest first, unless `only_empty` and there is a train shard.

    Returns whether they were removed. Raises ValueError if another process is writing the folder.
    """
    if only_empty and ((out / MANIFEST).exists() or any(out.glob("train_*.npy"))):
        return False
    locks.acquire(PRESENCE)
    (out / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    remove_shards(out, keep=set())
    return True
