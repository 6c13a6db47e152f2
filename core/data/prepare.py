"""A data folder during preparation: a plan of chunks that each make one shard, and a record of each finished chunk.

    data/NAME/.lock                             a process locks the byte of each chunk that it writes
    data/NAME/unfinished/settings.json          the settings that all processes share
    data/NAME/unfinished/train_000001.json      the manifest's entry of a shard that is complete
    data/NAME/train_000001.npy                  that shard

The processes don't communicate. The plan follows from the metadata of the source files and from where validation ends,
so that it is the same for each of them, and the records are all the state there is.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from core.data.encode import Documents, Workers
from core.data.pieces import PIECE_BYTES, cut, format_of
from core.data.settings import remove_shards
from core.data.shards import DEFAULT_VAL_TOKENS, MANIFEST, UNFINISHED, machine_error
from core.data.sources import SourceFile
from core.files import FileLocks, sha256, write_json

MAX_INVALID = 1000  # documents that --skip-broken skips for a shard; with more, the file itself counts as damaged
HEADER_BYTES = 128  # of .npy, which does not depend on the number of tokens
NO_LIMIT = 2**63
BYTES_PER_TOKEN = 4.45  # of English text
PIECES_PER_SHARD, MIN_PIECE_BYTES = 32, 1024  # shards end where pieces end
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
        self._file = open(self._unfinished, "wb", buffering=0)  # noqa: SIM115  closed by finish or discard
        self._file.seek(HEADER_BYTES)
        self.tokens = self.documents = self.bytes = self.empty = 0
        self.first: tuple[int, int] = (0, 0)  # source file of the first document, and its place in the file
        self.invalid: list[tuple[int, str]] = []

    def add(self, documents: Documents) -> None:
        """Append documents. Raises OSError."""
        if len(documents) and not self.documents:
            self.first = int(documents.facts[2, 0]), int(documents.facts[3, 0])
        data = documents.ids.data.cast("B")
        while data:  # a nearly full disk takes a part, and only the next call fails
            data = data[self._write(data) :]
        self.tokens += len(documents.ids)
        self.documents += len(documents)
        self.bytes += int(documents.facts[1].sum())

    def _write(self, data: memoryview) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            raise machine_error(error, self._path) from None

    def finish(self) -> str | None:
        """Complete the file and return its sha256, or None for a shard without documents. Raises OSError."""
        if not self.documents:
            self.discard()
            return None
        try:
            self._file.seek(0)
            header = np.lib.format.header_data_from_array_1_0(np.empty(0, np.uint16)) | {"shape": (self.tokens,)}
            np.lib.format.write_array_header_1_0(self._file, header)
            assert self._file.tell() == HEADER_BYTES
            os.fsync(self._file.fileno())
            self._file.close()
            digest = sha256(self._unfinished)
            os.replace(self._unfinished, self._path)
        except OSError as error:
            self.discard()
            raise machine_error(error, self._path) from None
        return digest

    def discard(self) -> None:
        """Remove an incomplete file."""
        self._file.close()
        self._unfinished.unlink(missing_ok=True)


@dataclass
class Preparation:
    """The conversion of a source into a data folder by this process and others."""

    out: Path
    files: tuple[SourceFile, ...]
    header: dict[str, Any]  # of the manifest
    locks: FileLocks
    rank: int
    world_size: int
    skip_broken: bool

    def __post_init__(self) -> None:
        limit = int(self.header["shard_tokens"] * BYTES_PER_TOKEN / PIECES_PER_SHARD)
        self.pieces = cut(self.files, min(max(limit, MIN_PIECE_BYTES), PIECE_BYTES))
        self.max_tokens: int = self.header["max_tokens"] or NO_LIMIT

    def identity(self, pieces: range, *settings: object) -> str:
        """Identifies the content of pieces. Links to other content of the same name have other fingerprints."""
        digest = hashlib.sha256(repr(settings).encode())
        for piece in self.pieces[pieces.start : pieces.stop]:
            digest.update(repr((piece, self.files[piece.first : piece.last])).encode())
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

    def complete(self, chunk: Chunk, shard: ShardWriter, **facts: Any) -> dict[str, Any]:
        """Complete a shard, record it with these facts, and unlock it."""
        digest = shard.finish()
        number, place = shard.first
        kind, compression = format_of(self.files[number].url)
        begin = {"line" if compression else "row" if kind == "parquet" else "byte": place}
        entry = {"file": f"{chunk.name}.npy", "split": chunk.name[:-7], "tokens": shard.tokens}
        entry |= {"documents": shard.documents, "bytes": shard.bytes, "begin": begin, "sha256": digest}
        invalid = [f"{self.files[file].name}, {reason}" for file, reason in shard.invalid]
        record = {"entry": entry | {"source_file": number}, "tokens": shard.tokens, "empty": shard.empty}
        record |= {"invalid": invalid, "identity": chunk.identity} | facts
        write_json(self.out / UNFINISHED / f"{chunk.name}.json", record)
        self.locks.release(chunk.number)
        return record

    def count(self, shard: ShardWriter, documents: Documents) -> None:
        """Count what was left out. Raises ValueError for invalid documents, unless --skip-broken allows them."""
        shard.empty += documents.empty
        shard.invalid += documents.invalid
        if shard.invalid and not self.skip_broken:
            file, place = shard.invalid[0]
            raise ValueError(f"{self.files[file].url}, {place}. Fix the document, or skip it with --skip-broken")
        if len(shard.invalid) > MAX_INVALID:
            file, place = shard.invalid[-1]
            url = self.files[file].url
            raise ValueError(f"{url} has more than {MAX_INVALID} invalid documents. Fix the file; the last: {place}")

    def write_validation(self, workers: Workers) -> dict[str, Any]:
        """The record of the validation shard: the first complete documents of the source. It is written if needed."""
        target = self.header["val_tokens"] or max(min(DEFAULT_VAL_TOKENS, self.max_tokens // 100), 1)
        total = sum(piece.bytes for piece in self.pieces)
        target_bytes = NO_LIMIT if self.header["val_tokens"] else max(total // 100, 1)
        if record := self.read_record("val_000000"):
            if record["identity"] == self.identity(range(record["piece"] + 1), target, target_bytes):
                return record
            print("val_000000.npy is written again: its source files have changed", flush=True)
        shard, last, skip = ShardWriter(self.out / "val_000000.npy", self.rank), (len(self.pieces), 0), 0
        seen_tokens, seen_bytes = 0, 0
        with contextlib.ExitStack() as on_error:
            on_error.callback(shard.discard)
            for _, key, documents in workers.encode((0, i, 0) for i in range(len(self.pieces))):
                seen_tokens, seen_bytes = seen_tokens + len(documents.ids), seen_bytes + documents.size
                tokens = shard.tokens + documents.ends  # (d,)
                text_bytes = shard.bytes + np.cumsum(documents.facts[1])  # (d,)
                more = (tokens < target) & (text_bytes < target_bytes) & (tokens <= self.max_tokens)
                skip = min(int(more.sum()) + 1, int((tokens <= self.max_tokens).sum()))
                shard.add(documents.part(0, skip))
                if not more.all():
                    last = key
                    break
                self.count(shard, documents)
            if not shard.tokens:
                raise ValueError(self.no_document("val"))
            on_error.pop_all()
        chunk = Chunk(0, range(last[0] + 1), last[1], skip, self.identity(range(last[0] + 1), target, target_bytes), 0)
        facts = {"piece": last[0], "block": last[1], "skip": skip}
        return self.complete(chunk, shard, **facts, seen_tokens=seen_tokens, seen_bytes=seen_bytes)

    def plan(self, validation: dict[str, Any]) -> list[Chunk]:
        """The chunks after validation. They are as even as the pieces allow, as estimated from validation."""
        first, done = validation["piece"], validation["tokens"]
        per_byte = validation["seen_tokens"] / max(validation["seen_bytes"], 1)
        borders = np.cumsum([0, *(piece.bytes for piece in self.pieces)], dtype=np.float64) * per_byte  # in tokens
        middles = (borders[first:-1] + borders[first + 1 :]) / 2 - done
        wanted = max(min(borders[-1], self.max_tokens) - done, 1)
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
        """The chunks that are left and that no other process writes, each locked. Each process begins elsewhere."""
        own = self.rank * len(chunks) // self.world_size
        for chunk in chunks[own:] + chunks[:own] if self.locks.supported else chunks[self.rank :: self.world_size]:
            if self.record(chunk) or not self.locks.try_acquire(chunk.number):
                continue
            if self.record(chunk):  # another process has completed it before the lock
                self.locks.release(chunk.number)
                continue
            if (self.out / MANIFEST).is_file():  # another process has finished, and removed the records
                return
            if self.read_record(chunk.name):
                tqdm.write(f"{chunk.name}.npy is written again: its source files have changed")
            yield chunk

    def write_chunks(self, chunks: list[Chunk], workers: Workers, tokens: int, bar: Any) -> None:
        """Write the shards of the chunks that are left. The source has `tokens` tokens before them."""
        written = {chunk.number: record["tokens"] for chunk in chunks if (record := self.record(chunk))}
        wanted = ((chunk, i, chunk.block) for chunk in self.claim(chunks) for i in chunk.pieces)
        last_log, finished = 0.0, Future[Any]()
        finished.set_result(None)
        with ThreadPoolExecutor(1) as thread:  # it completes a shard while the next one is written
            for chunk, results in itertools.groupby(workers.encode(wanted), key=lambda result: result[0]):
                room = self.max_tokens - tokens - sum(written[i] for i in written if i < chunk.number)
                shard = ShardWriter(self.out / f"{chunk.name}.npy", self.rank)
                with contextlib.ExitStack() as on_error:
                    on_error.callback(shard.discard)
                    limited = self.write_chunk(chunk, results, shard, room, bar)
                    finished.result()
                    on_error.pop_all()
                written[chunk.number] = shard.tokens
                finished = thread.submit(self.complete, chunk, shard, limited=limited)
                if len(chunks) <= FEW or time.monotonic() > last_log + 10:
                    last_log = time.monotonic()
                    tqdm.write(f"{chunk.name}.npy: {shard.tokens:,} tokens")
                if limited:
                    break
        finished.result()

    def write_chunk(self, chunk: Chunk, results: Any, shard: ShardWriter, room: int, bar: Any) -> bool:
        """Write the documents of a chunk, at most `room` tokens. Returns whether there are more."""
        for _, key, documents in results:
            first = chunk.skip if key == (chunk.pieces[0], chunk.block) else 0
            rest = documents.part(first)
            kept = rest.part(0, int(np.sum(shard.tokens + rest.ends <= room)))
            shard.add(kept)
            self.count(shard, documents)
            bar.update(len(kept.ids))
            if len(kept) < len(rest):
                return True
        return False

    def finish(self, validation: dict[str, Any], chunks: list[Chunk]) -> bool:
        """Write the manifest if all chunks are complete; else print how many other processes write."""
        if (self.out / MANIFEST).is_file():
            return True  # another process has written it
        found = [(chunk.name, self.record(chunk)) for chunk in chunks]
        end = next((n for n, (_, record) in enumerate(found, 1) if record and record["limited"]), len(found))
        if missing := [name for name, record in found[:end] if not record]:
            print(
                f"this process is done. Other processes write {len(missing)} of {len(chunks)} shards, e.g. "
                f"{missing[0]}.npy. The last process writes the manifest. If they fail, rerun the same command"
            )
            return False
        records = [validation, *(record for _, record in found[:end] if record)]
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
        """The error of a source without a document of this split."""
        given = {f"--{key.replace('_', '-')}": self.header[key] for key in ("max_tokens", "val_tokens")}
        limits = " and ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        remedy = "Use more text, a larger --max-tokens or a smaller --val-tokens"
        if not limits and len(self.files) == 1 and self.files[0].name.endswith(".txt"):
            remedy = "A .txt is one document: split it, e.g. split -C 50K --additional-suffix=.txt TEXT part-"
        name = self.header["source"]["name"]
        return f"--source {name} has no {split} document{f' with {limits}' if limits else ''}. {remedy}"
