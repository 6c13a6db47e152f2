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
import operator
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from core import cli
from core.data.encode import HEADER_BYTES, ShardWriter, Workers
from core.data.pieces import PIECE_BYTES, cut, format_of
from core.data.shards import DEFAULT_VAL_TOKENS, MANIFEST, REMEDY, UNFINISHED, open_dataset
from core.data.sources import Files
from core.files import FileLocks, write_json

NO_LIMIT = 2**63
BYTES_PER_TOKEN = 4.45  # of English text
PIECES_PER_SHARD, MIN_PIECE_BYTES = 32, 1024  # shards end where pieces end
SETTINGS = "settings.json"


def read_json(path: Path) -> dict[str, Any]:
    """An object; empty if there is none, or where power failed before the disk had its content."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, RecursionError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


def recorded_settings(out: Path) -> dict[str, Any]:
    """The settings that a finished or unfinished folder was made with; empty for a new folder."""
    return open_dataset(out).manifest if (out / MANIFEST).is_file() else read_json(out / UNFINISHED / SETTINGS)


def check_settings(out: Path, header: dict[str, Any]) -> None:
    """Raise ValueError if the folder was made with other settings. Record the settings of an unfinished folder."""
    recorded, finished, unfinished = recorded_settings(out), (out / MANIFEST).is_file(), out / UNFINISHED
    if not finished:  # only the names of the source files: each record identifies their content
        names = [file["name"] for file in header["source"]["files"]]
        header = header | {"source": header["source"] | {"files": names}}
    made_with = {key: recorded.get(key) for key in header}
    if made_with != header and (finished or (unfinished / "val_000000.json").exists()):
        name, old, new = _difference(made_with, header)
        raise ValueError(
            f"{out} was made with{name} {old}, but this command has {new}. Use another --out, or --overwrite"
        )
    if finished:
        names = [shard["file"] for shard in recorded["shards"]]
        if missing := [name for name in names if not (out / name).is_file()]:
            raise ValueError(f"{out / missing[0]} is missing, but the manifest lists it. {REMEDY}")
        clear(out, keep=[MANIFEST, *names])
    else:
        unfinished.mkdir(exist_ok=True)
        write_json(unfinished / SETTINGS, header)


def _difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any]:
    """The name of an entry in which two settings differ, and both values."""
    if isinstance(old, list) and isinstance(new, list):
        return name, *next((a, b) for a, b in itertools.zip_longest(old, new) if a != b)
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in old | new if old.get(key) != new.get(key))
        return _difference(old.get(key), new.get(key), f"{name} {key}")
    return name, old, new


def clear(out: Path, keep: Iterable[str] = ()) -> None:
    """Remove shards, the manifest before them, except for the names in `keep`; incomplete files; and the records."""
    own = re.compile(r"manifest\.json|(?:val|train)_\d{6}\.npy|\..*\.(?:unfinished|json\.[0-9a-f]+)")
    for path in sorted(out.iterdir()):
        if own.fullmatch(path.name) and path.name not in keep:
            path.unlink()
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)


@dataclass(frozen=True)
class Chunk:
    """The part of the source that makes one shard: pieces, without the first `skip` documents."""

    number: int  # 0 for validation
    pieces: range
    skip: int
    identity: str  # of the content
    tokens: int  # approximately

    @property
    def name(self) -> str:
        return f"{'train' if self.number else 'val'}_{self.number:06d}"


@dataclass
class Preparation:
    """The conversion of a source into a data folder by this process and others."""

    out: Path
    files: Files
    header: dict[str, Any]  # of the manifest
    locks: FileLocks
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        limit = int(self.header["shard_tokens"] * BYTES_PER_TOKEN / PIECES_PER_SHARD)
        self.pieces = cut(self.files, min(max(limit, MIN_PIECE_BYTES), PIECE_BYTES))
        self.max_tokens: int = self.header["max_tokens"] or NO_LIMIT
        default = min(DEFAULT_VAL_TOKENS, self.max_tokens // 100), sum(piece.bytes for piece in self.pieces) // 100
        wanted = self.header["val_tokens"]
        self.val_targets = (wanted, NO_LIMIT) if wanted else (max(default[0], 1), max(default[1], 1))

    def chunk(self, number: int, begin: int, end: int, skip: int, tokens: int) -> Chunk:
        """A chunk, identified by its pieces and the content of their files."""
        digest = hashlib.sha256(repr((skip, None if number else self.val_targets)).encode())
        for piece in self.pieces[begin:end]:  # links to other content of the same name have other fingerprints
            digest.update(repr((piece, self.files[piece.first : piece.last])).encode())
        return Chunk(number, range(begin, end), skip, digest.hexdigest(), tokens)

    def read_record(self, name: str) -> dict[str, Any]:
        """The record of a chunk whose shard is complete; otherwise empty."""
        record, path = read_json(self.out / UNFINISHED / f"{name}.json"), self.out / f"{name}.npy"
        size = path.stat().st_size if record.get("tokens") and path.exists() else HEADER_BYTES
        return record if size == HEADER_BYTES + 2 * record.get("tokens", -1) else {}

    def record(self, chunk: Chunk) -> dict[str, Any]:
        """The record of a chunk, if it was made from the present content of the source; otherwise empty."""
        record = self.read_record(chunk.name)
        return record if record.get("identity") == chunk.identity else {}

    def complete(self, chunk: Chunk, shard: ShardWriter, **facts: Any) -> dict[str, Any]:
        """Complete a shard and record it with these facts."""
        if self.read_record(chunk.name):
            tqdm.write(f"{chunk.name}.npy is written again: its source files have changed")
        digest = shard.finish() if shard.tokens else None
        number, place = shard.first
        begin = {format_of(self.files[number])[2]: place}
        entry = {"file": f"{chunk.name}.npy", "split": chunk.name[:-7], "tokens": shard.tokens}
        entry |= {"documents": shard.documents, "bytes": shard.bytes, "begin": begin, "sha256": digest}
        record = {"entry": entry | {"source_file": number}, "tokens": shard.tokens, "empty": shard.empty}
        record |= {"invalid": shard.invalid, "identity": chunk.identity} | facts
        write_json(self.out / UNFINISHED / f"{chunk.name}.json", record)
        return record

    def write(self, chunk: Chunk, results: Any, room: int, bar: Any) -> tuple[ShardWriter, tuple[int, int] | None]:
        """Write a shard of at most `room` tokens from the results of `Workers.encode`.

        Returns it, and where it ended early, if it did: the piece, and the number of its documents that are used.
        """
        target, target_bytes = self.val_targets if chunk.number == 0 else (NO_LIMIT, NO_LIMIT)
        shard, current, used, skip = ShardWriter(self.out / f"{chunk.name}.npy", self.rank), -1, 0, chunk.skip
        for _, piece, documents in results:
            current, used = piece, used if piece == current else 0
            first = min(skip, len(documents.text_bytes))
            tokens = shard.tokens + documents.edges[first + 1 :] - documents.edges[first]
            text_bytes = shard.bytes + np.cumsum(documents.text_bytes[first:])
            fits = tokens <= room
            more = (tokens < target) & (text_bytes < target_bytes) & fits
            last = first + min(int(more.sum()) + 1, int(fits.sum()))
            bar.update(shard.add(documents, first, last))
            # What validation uses completely is counted there; the block where it ends counts for the next shard.
            if skip <= len(documents.text_bytes) and (chunk.number or more.all()):
                shard.empty += documents.empty
                shard.invalid += documents.invalid
            if not more.all():
                return shard, (piece, used + last)
            used, skip = used + last, skip - first
        return shard, None

    def write_validation(self, workers: Workers) -> dict[str, Any]:
        """The record of the validation shard: the first complete documents of the source. It is written if needed."""
        last = self.read_record("val_000000").get("piece", 0) + 1
        if record := self.record(self.chunk(0, 0, last, 0, 0)):
            return record
        chunk = self.chunk(0, 0, len(self.pieces), 0, 0)
        results = workers.encode((chunk, i) for i in chunk.pieces)
        shard, end = self.write(chunk, results, self.max_tokens, cli.progress_bar(hidden=True))
        if not shard.tokens:
            if not any((self.out / UNFINISHED).glob("*_*.json")):  # records of shards, from when the source had text
                clear(self.out)
            raise ValueError(self.no_document("val"))
        piece, skip = end or (len(self.pieces), 0)
        facts = {"piece": piece, "skip": skip, "seen_tokens": shard.seen_tokens, "seen_bytes": shard.seen_bytes}
        return self.complete(self.chunk(0, 0, piece + 1, 0, 0), shard, **facts)

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
        chunks: list[Chunk] = []
        for number, (begin, end) in enumerate(itertools.pairwise([*edges, len(self.pieces)]), 1):
            tokens = int(borders[end] - max(borders[begin], done))
            chunks.append(self.chunk(number, begin, end, 0 if chunks else validation["skip"], tokens))
            if self.record(chunks[-1]).get("limited"):
                break  # --max-tokens ends here
        return chunks

    def claim(self, chunks: list[Chunk]) -> Iterator[Chunk]:
        """The chunks that are left and that no other process writes, each locked. Each process begins elsewhere."""
        own = self.rank * len(chunks) // self.world_size
        for chunk in chunks[own:] + chunks[:own] if self.locks.supported else chunks[self.rank :: self.world_size]:
            if not self.locks.try_acquire(chunk.number) or self.record(chunk):
                continue
            if (self.out / MANIFEST).is_file():  # another process has finished, and removed the records
                return
            yield chunk

    def write_chunks(self, chunks: list[Chunk], workers: Workers, tokens: int, bar: Any) -> None:
        """Write the shards of the chunks that are left. The source has `tokens` tokens before them."""
        written = {chunk.number: record["tokens"] for chunk in chunks if (record := self.record(chunk))}
        wanted = ((chunk, i) for chunk in self.claim(chunks) for i in chunk.pieces)
        with ThreadPoolExecutor(1) as thread:  # it completes a shard while the next one is written
            completed: Future[Any] = thread.submit(dict)
            for chunk, results in itertools.groupby(workers.encode(wanted), key=operator.itemgetter(0)):
                room = self.max_tokens - tokens - sum(written[i] for i in written if i < chunk.number)
                shard, end = self.write(chunk, results, room, bar)
                written[chunk.number] = shard.tokens
                completed.result()
                completed = thread.submit(self.complete, chunk, shard, limited=end is not None)
                if end:
                    break
            completed.result()

    def finish(self, validation: dict[str, Any]) -> bool:
        """Write the manifest if all chunks are complete; else print how many other processes write."""
        if (self.out / MANIFEST).is_file():
            return True  # another process has written it
        chunks = self.plan(validation)
        records = [validation, *map(self.record, chunks)]
        if missing := [chunk.name for chunk, record in zip(chunks, records[1:], strict=True) if not record]:
            print(
                f"this process is done. Other processes write {len(missing)} of {len(chunks)} shards, e.g. "
                f"{missing[0]}.npy. The last process writes the manifest. If they fail, rerun the same command"
            )
            return False
        shards = [record["entry"] for record in records if record["tokens"]]
        if len(shards) < 2:
            clear(self.out)  # so that the same folder takes other settings
            raise ValueError(self.no_document("train"))
        counts = {"empty_documents": sum(record["empty"] for record in records)}
        counts |= {"broken_documents": [place for record in records for place in record["invalid"]]}
        write_json(self.out / MANIFEST, self.header | counts | {"shards": shards})
        clear(self.out, keep=[MANIFEST, *(shard["file"] for shard in shards)])
        return True

    def no_document(self, split: str) -> str:
        """The error of a source without a document of this split; validation has the first documents."""
        given = {cli.option_name(key): self.header[key] for key in ("max_tokens", "val_tokens") if self.header[key]}
        limits = " and ".join(f"{name} {value}" for name, value in given.items())
        remedy = "Use more text, a larger --max-tokens or a smaller --val-tokens"
        if split == "train" and not limits and len(self.files) == 1 and self.files[0].name.endswith(".txt"):
            remedy = "A .txt is one document: split it, e.g. split -C 50K --additional-suffix=.txt TEXT part-"
        name = self.files[0].url if len(self.files) == 1 else self.header["source"]["name"]
        if split == "val" and not self.header["max_tokens"]:
            return f"--source {name} contains no document with text. Use another source"
        return f"--source {name} has no {split} document{f' with {limits}' if limits else ''}. {remedy}"
