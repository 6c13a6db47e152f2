"""Preparation: the source is a stream of documents, and one chunk of the stream makes one shard.

    data/NAME/.lock                            byte k is locked by the process that works on chunk k
    data/NAME/unfinished/settings.json         the settings that all processes share
    data/NAME/train_000003.npy                 the shard of chunk 3
    data/NAME/unfinished/train_000003.json     its entry of the manifest, written after it: chunk 3 is done

Chunk 0 is the validation shard: the first complete documents of the stream. The rest of the stream is cut into equal
chunks from metadata alone. All processes compute the same chunks, and each works on the next one that isn't done and
that no other process has locked. The process that finds all chunks done writes the manifest.
"""

import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from core import cli
from core.data import audit
from core.data.encode import Documents, Encoded, EncoderPool
from core.data.pieces import PIECE_BYTES, Lines, Piece, split
from core.data.settings import remove_shards
from core.data.shards import DEFAULT_VAL_TOKENS, MANIFEST, UNFINISHED, open_dataset, short_reason
from core.data.sources import Source, SourceFile
from core.data.writer import HEADER_BYTES, ShardWriter
from core.files import FileLocks, write_json

MAX_INVALID = 1000  # documents that --skip-broken skips in a chunk; with more, the source itself counts as damaged
LOG_SECONDS = 10  # between two lines about complete shards


@dataclass(frozen=True)
class Chunk:
    """Consecutive pieces of the stream from number `first` on, without the first `skip` documents."""

    number: int
    pieces: tuple[Piece, ...]
    first: int
    skip: int
    identity: str  # a hash of the content of their files

    @property
    def name(self) -> str:
        return f"{'train' if self.number else 'val'}_{self.number:06d}"

    @property
    def bytes(self) -> int:
        return sum(piece.bytes for piece in self.pieces)

    def tasks(self) -> "Iterator[tuple[Key, Piece | Lines]]":
        for i, piece in enumerate(self.pieces, start=self.first):
            for part, task in enumerate(piece.tasks()):
                yield (self, i, part), task


Key = tuple[Chunk, int, int]  # of a task: its chunk, the number of its piece, and its number in the piece


def make_chunk(
    number: int, pieces: list[Piece], files: tuple[SourceFile, ...], *, first: int = 0, skip: int = 0
) -> Chunk:
    spans = [span for piece in pieces for span in piece.spans]
    facts = [[files[s.file].fingerprint, s.begin, s.end, s.row_group] for s in spans]
    identity = hashlib.sha256(json.dumps([skip, facts]).encode()).hexdigest()
    return Chunk(number, tuple(pieces), first, skip, identity)


def cut_chunks(
    pieces: list[Piece], val: dict[str, Any], shard_tokens: int, files: tuple[SourceFile, ...]
) -> list[Chunk]:
    """The chunks of the stream after the validation shard, of about `shard_tokens` each.

    Its record `val` has the place where it ends, and the measured source bytes per token.
    """
    end = val["end"]["piece"]
    before = [0, *itertools.accumulate(piece.bytes for piece in pieces[end:])]
    count = max(round(before[-1] / val["bytes_per_token"] / shard_tokens), 1)
    numbers = [start * count // max(before[-1], 1) for start in before[:-1]]
    groups = [list(group) for _, group in itertools.groupby(range(len(numbers)), key=numbers.__getitem__)]
    return [
        make_chunk(
            number,
            [pieces[end + i] for i in group],
            files,
            first=end + group[0],
            skip=val["end"]["document"] if number == 1 else 0,
        )
        for number, group in enumerate(groups, start=1)
    ]


def record_path(out: Path, chunk: Chunk) -> Path:
    return out / UNFINISHED / f"{chunk.name}.json"


def read_record(out: Path, chunk: Chunk) -> dict[str, Any] | None:
    """The record of a chunk that is done; None for another. Raises ValueError for a damaged record."""
    path = record_path(out, chunk)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        entry, identity = record["shard"], record["identity"]
        is_complete = entry is None or (out / entry["file"]).stat().st_size == HEADER_BYTES + 2 * entry["tokens"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({short_reason(error)}). Delete it and rerun the same command") from None
    return record if is_complete and identity == chunk.identity else None


class Limits:
    """Ends the stream after a number of tokens or bytes of text."""

    def __init__(self, max_tokens: float = math.inf, val_tokens: float = math.inf, val_bytes: float = math.inf) -> None:
        """`max_tokens` isn't exceeded. The document that reaches `val_tokens` or `val_bytes` is the last."""
        self._max_tokens, self._val_tokens, self._val_bytes = max_tokens, val_tokens, val_bytes
        self.tokens = self._bytes = 0
        self.reached = False

    def keep(self, documents: Documents) -> Documents:
        """The next documents, as far as they are within the limits."""
        tokens = self.tokens + documents.ends  # (d,)
        text_bytes = self._bytes + np.cumsum(documents.text_bytes)  # (d,)
        is_last = (tokens >= self._val_tokens) | (text_bytes >= self._val_bytes)
        wanted = int(np.argmax(is_last)) + 1 if is_last.any() else len(documents)
        count = min(wanted, int(np.sum(tokens <= self._max_tokens)))
        self.reached = bool(is_last.any()) or count < len(documents)
        if count:
            self.tokens, self._bytes = int(tokens[count - 1]), int(text_bytes[count - 1])
        return documents[:count]


class Preparation:
    """The work of one process."""

    def __init__(
        self, out: Path, source: Source, header: dict[str, Any], locks: FileLocks, pool: EncoderPool, skip_broken: bool
    ) -> None:
        """`header`: of the manifest, with the settings."""
        self._out, self._files, self._header, self._locks, self._pool = out, source.files, header, locks, pool
        self._skip_broken = skip_broken
        self._pieces = split(source.files, max(min(PIECE_BYTES, header["shard_tokens"] // 8), 1))
        self._max_tokens = header["max_tokens"] or math.inf
        self._last_log = -math.inf

    def run(self, rank: int, world_size: int) -> None:
        """Write the chunks that no other process writes, and the manifest where all are done."""
        for folder in (self._out / UNFINISHED).glob("*/"):  # its version had another plan
            print(f"{folder} was made by an earlier version; its part of the source is encoded again", flush=True)
            shutil.rmtree(folder)
        val = self._validation()
        chunks = cut_chunks(self._pieces, val, self._header["shard_tokens"], self._files)
        limits = Limits(self._max_tokens)
        limits.tokens = val["shard"]["tokens"]
        if self._header["max_tokens"]:
            chunks = self._without_chunks_after_limit(chunks, limits)
        self._report_start(chunks, val)
        while self._write(self._chunks_left(chunks, rank, world_size), limits, self._expected_tokens(chunks, val)):
            if limits.reached:
                break
        with self._locks.exclusive():
            self._finish(val, chunks)

    def _without_chunks_after_limit(self, chunks: list[Chunk], limits: Limits) -> list[Chunk]:
        """The chunks that contain --max-tokens; `limits` counts those that are done, and any after them are redone."""
        for i, chunk in enumerate(chunks):
            record = read_record(self._out, chunk)
            if record is None:
                for later in chunks[i:]:
                    record_path(self._out, later).unlink(missing_ok=True)
                return chunks
            limits.tokens += record["shard"]["tokens"] if record["shard"] else 0
            if record["reached_limit"]:
                return chunks[: i + 1]
        return chunks

    def _validation(self) -> dict[str, Any]:
        """The record of chunk 0, which is written where that isn't done."""
        chunk = make_chunk(0, self._pieces, self._files)
        if not self._locks.try_acquire(0):
            print("waiting for the process that writes the validation shard", flush=True)
            self._locks.try_acquire(0, wait=True)
        if read_record(self._out, chunk) is None:
            given = self._header["val_tokens"]
            wanted = given or min(DEFAULT_VAL_TOKENS, (self._header["max_tokens"] or 2**63) // 100)
            limits = Limits(self._max_tokens, wanted, math.inf if given else chunk.bytes // 100)
            self._write(iter([chunk]), limits, wanted)
        if not self._header["max_tokens"]:
            self._locks.release(0)
        record = read_record(self._out, chunk)
        assert record is not None
        return record

    def _chunks_left(self, chunks: list[Chunk], rank: int, world_size: int) -> Iterator[Chunk]:
        """The chunks that aren't done and that no other process works on, locked; each process begins elsewhere."""
        start = rank * len(chunks) // world_size
        for chunk in [*chunks[start:], *chunks[:start]]:
            if read_record(self._out, chunk) or not self._locks.try_acquire(chunk.number):
                continue
            is_own = self._locks.supported or chunk.number % world_size == rank
            if is_own and read_record(self._out, chunk) is None:  # no other process has finished it meanwhile
                if record_path(self._out, chunk).exists():
                    print(f"{chunk.name}.npy is missing or was made from other text: it is written again", flush=True)
                yield chunk

    def _expected_tokens(self, chunks: list[Chunk], val: dict[str, Any]) -> int:
        """Of the chunks that aren't done, by the source bytes per token of the validation shard."""
        left = sum(chunk.bytes for chunk in chunks if read_record(self._out, chunk) is None)
        return int(min(left / val["bytes_per_token"], self._max_tokens))

    def _report_start(self, chunks: list[Chunk], val: dict[str, Any]) -> None:
        """Raise ValueError if the shards that are left clearly don't fit on the disk."""
        done = [record for chunk in chunks if (record := read_record(self._out, chunk))]
        if done:
            tokens = sum(record["shard"]["tokens"] for record in done if record["shard"])
            print(f"resuming after {tokens:,} tokens in {len(done)} of {len(chunks)} shards", flush=True)
        needed, free = 2 * self._expected_tokens(chunks, val), shutil.disk_usage(self._out).free
        if needed > 1.1 * free:
            raise ValueError(
                f"--out {self._out} has {free / 1e9:,.3f} GB free, but the shards need about {needed / 1e9:,.3f} GB. "
                "Free disk space, or use another --out or a smaller --max-tokens"
            )

    def _write(self, chunks: Iterator[Chunk], limits: Limits, expected_tokens: int) -> bool:
        """Write chunks until there are no more, or a limit is reached. Returns whether there was one."""
        stream = self._pool.encode(itertools.chain.from_iterable(chunk.tasks() for chunk in chunks))
        count = 0
        bar = cli.progress_bar(unit="tok", unit_scale=True, total=expected_tokens)
        with closing(bar), closing(stream), closing(ShardWriter(self._out)) as writer:
            for chunk, results in itertools.groupby(stream, key=lambda result: result[0][0]):
                self._write_chunk(writer, chunk, results, limits, bar)
                count += 1
                if limits.reached:
                    break
            writer.wait()
        return count > 0

    def _write_chunk(
        self, writer: ShardWriter, chunk: Chunk, results: Iterator[tuple[Key, Encoded]], limits: Limits, bar: Any
    ) -> None:
        writer.begin(chunk.name)
        skip, piece, documents, empty, source_bytes, tokens = chunk.skip, chunk.first, 0, 0, 0, 0
        invalid: list[str] = []
        for (_, number, _), encoded in results:
            if not skip:  # the chunk before it has listed those before the place where it ends
                empty += encoded.empty
                invalid += self._listed(chunk, encoded, len(invalid))
            kept = limits.keep(encoded.documents[skip:])
            skip = max(skip - len(encoded.documents), 0)
            writer.add(kept)
            bar.update(len(kept.ids))
            piece, documents = number, (documents if number == piece else 0) + len(kept)
            source_bytes, tokens = source_bytes + encoded.source_bytes, tokens + len(encoded.documents.ids)
            if limits.reached:
                break
        record = {"identity": chunk.identity, "empty": empty, "invalid": invalid, "reached_limit": limits.reached}
        if chunk.number == 0:
            if not (writer.tokens and limits.reached):
                raise ValueError(self._no_document("train" if writer.tokens else "val"))
            record |= {"end": {"piece": piece, "document": documents}, "bytes_per_token": source_bytes / tokens}
        first = chunk.pieces[0].spans[0]
        begin = first.place | ({"document": chunk.skip} if chunk.skip else {})
        writer.finish(chunk.name, {"source_file": first.file, "begin": begin}, record)
        if time.monotonic() > self._last_log + LOG_SECONDS:
            tqdm.write(f"{chunk.name}: {writer.tokens:,} tokens")
            self._last_log = time.monotonic()

    def _listed(self, chunk: Chunk, encoded: Encoded, count: int) -> list[str]:
        """The invalid documents. Raises ValueError unless --skip-broken allows them."""
        if not encoded.invalid:
            return []
        if not self._skip_broken:
            raise ValueError(f"{encoded.invalid[0]}. Fix the document, or skip it with --skip-broken")
        if count + len(encoded.invalid) > MAX_INVALID:
            last = encoded.invalid[-1]
            raise ValueError(f"more than {MAX_INVALID} documents of {chunk.name} are invalid. Fix the file of: {last}")
        return [document.listed for document in encoded.invalid]

    def _no_document(self, split: str) -> str:
        """The error about a source without a document for `split`."""
        given = {"--max-tokens": self._header["max_tokens"], "--val-tokens": self._header["val_tokens"]}
        limits = " and ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        if self._files[0].name.endswith(".txt") and len(self._files) == 1:
            remedy = "A .txt is one document: split it, e.g. split -C 50K --additional-suffix=.txt TEXT part-"
        else:
            remedy = "Use more text, a larger --max-tokens or a smaller --val-tokens"
        source = self._header["source"]["name"]
        return f"--source {source} has no {split} document{f' with {limits}' if limits else ''}. {remedy}"

    def _finish(self, val: dict[str, Any], chunks: list[Chunk]) -> None:
        """Write the manifest if all chunks are done; else print how many other processes work on."""
        if (self._out / MANIFEST).is_file():
            return  # another process has written it
        records = [val]
        for chunk in chunks:
            record = read_record(self._out, chunk)
            if record is None:
                left = [chunk.name for chunk in chunks if read_record(self._out, chunk) is None]
                return print(
                    f"this process is done. {len(left)} of {len(chunks)} shards are left to others, e.g. {left[0]}. "
                    "The last process writes the manifest. If one fails, rerun the same command"
                )
            records.append(record)
            if record["reached_limit"]:
                break
        shards = [record["shard"] for record in records if record["shard"]]
        if len(shards) == 1:
            shutil.rmtree(self._out / UNFINISHED)
            remove_shards(self._out, keep=set())
            raise ValueError(self._no_document("train"))
        counts = {
            "empty_documents": sum(record["empty"] for record in records),
            "broken_documents": [place for record in records for place in record["invalid"]],
        }
        remove_shards(self._out, keep={shard["file"] for shard in shards})
        write_json(self._out / MANIFEST, self._header | counts | {"shards": shards})
        shutil.rmtree(self._out / UNFINISHED)
        audit.summarize(open_dataset(self._out))
