"""Pieces of text -> token ids, in worker processes; and token ids -> a shard.

tiktoken is the reference. fastokens is about ten times as fast, and checked: tiktoken encodes one document of each
batch too.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from core.data import tokenizer
from core.data.pieces import InvalidDocument, Piece, divide, read_piece
from core.data.shards import short_reason
from core.data.sources import SourceFile
from core.files import machine_error, sha256

HEADER_BYTES = 128  # of .npy, which does not depend on the number of tokens
BATCH = 256  # documents; a row group of 1,000 in one batch takes 10 % longer, as it touches new memory
IN_FLIGHT = 4  # tasks per worker, to bound memory

Tag = TypeVar("Tag")


class EncoderMismatchError(Exception):
    """fastokens failed, or gave other ids than tiktoken."""


def choose(name: str) -> str:
    """Resolve `auto`: fastokens if it is installed, else tiktoken. Raises ValueError if `name` isn't installed."""
    if name == "tiktoken":
        return name
    try:
        from fastokens import _native

        _native.Tokenizer.encode_batch_flat  # noqa: B018
    except (ImportError, AttributeError):  # missing, built for another machine, or too old
        if name == "auto":
            return "tiktoken"
        raise ValueError(
            "--encoder fastokens is not installed. Use --encoder tiktoken, or pip install fastokens"
        ) from None
    return "fastokens"


class Encoder:
    """Encodes ordinary text: "<|endoftext|>" within a document is text, not a special token."""

    def __init__(self, name: str, encoding_name: str, folder: Path) -> None:
        """`name` is tiktoken or fastokens; fastokens reads `folder`/tokenizer.json."""
        self.encoding = tokenizer.load(encoding_name)
        self.end_of_text_id = tokenizer.end_of_text_id(self.encoding)
        self._fast = name == "fastokens"
        self._folder = folder

    def encode(self, texts: list[str], number: int) -> tuple[np.ndarray, np.ndarray]:
        """The d documents joined, each preceded by the end-of-text token: ids (n,) uint16 and their edges (d + 1,).

        `number` selects the document of each batch that is checked with tiktoken. Raises EncoderMismatchError.
        """
        encode_batch = self._by_fastokens if self._fast else self._by_tiktoken
        batches = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
        encoded = [ids for i, batch in enumerate(batches) for ids in encode_batch(batch, (number + i) % len(batch))]
        edges = np.cumsum([0, *(len(ids) + 1 for ids in encoded)])
        joined = np.empty(edges[-1], dtype=np.uint16)
        joined[edges[:-1]] = self.end_of_text_id
        for ids, (start, end) in zip(encoded, itertools.pairwise(edges.tolist()), strict=True):
            joined[start + 1 : end] = ids
        return joined, edges

    def _by_tiktoken(self, texts: list[str], _: int = 0) -> list[np.ndarray]:
        return [self.encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]

    def _by_fastokens(self, texts: list[str], checked: int) -> list[np.ndarray]:
        try:
            flat, offsets = self._fast_tokenizer.encode_batch_flat(texts, split_special_tokens=True)
            encoded = np.split(np.frombuffer(flat, "<u4"), np.frombuffer(offsets, "<u8")[1:-1].astype(np.int64))
        except (KeyboardInterrupt, SystemExit, MemoryError, OSError):
            raise
        except BaseException as error:  # a panic in Rust is not an Exception
            raise EncoderMismatchError(f"fails ({short_reason(error)})") from None
        expected = self._by_tiktoken([texts[checked]])[0]
        if len(encoded) != len(texts) or not np.array_equal(encoded[checked], expected):
            beginning = repr(texts[checked][:80])
            raise EncoderMismatchError(f"gives other ids than tiktoken in the document that begins with {beginning}")
        return encoded

    @cached_property
    def _fast_tokenizer(self) -> Any:
        os.environ.setdefault("RAYON_NUM_THREADS", "1")  # the parallel workers are processes
        from fastokens._native import Tokenizer

        return Tokenizer.from_json_str((self._folder / "tokenizer.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Documents:
    """The n tokens of d documents, joined, each preceded by the end-of-text token."""

    ids: np.ndarray  # (n,) uint16
    edges: np.ndarray  # (d + 1,): index in ids of each document's first token, and n
    text_bytes: np.ndarray  # (d,)
    places: np.ndarray  # (d, 2): number of the source file, and place in it
    size: int = 0  # bytes of the task's text, approximately
    empty: int = 0  # documents left out
    invalid: tuple[tuple[int, str], ...] = ()  # documents left out: number of the source file, place and reason


ENCODER: Encoder  # of this worker process, from `start_worker`
FILES: tuple[SourceFile, ...]


def start_worker(files: tuple[SourceFile, ...], encoder: str, encoding: str, folder: Path) -> None:
    global ENCODER, FILES  # each worker process loads them once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    threading.Thread(target=end_with_parent, daemon=True).start()
    ENCODER, FILES = Encoder(encoder, encoding, folder), files


def end_with_parent() -> None:
    """End this worker when its main process is killed; otherwise it waits forever for work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def encode_piece(piece: Piece, number: int) -> Documents:
    """Read and encode a piece in a worker process. `number` selects the documents to check."""
    rows = read_piece(piece, FILES)
    invalid = tuple((file, str(text)) for file, _, text in rows if isinstance(text, InvalidDocument))
    valid = [(file, place, text) for file, place, text in rows if text and not isinstance(text, InvalidDocument)]
    ids, edges = ENCODER.encode([text for _, _, text in valid], number)
    text_bytes = [len(text) if text.isascii() else len(text.encode()) for _, _, text in valid]
    places = np.array([row[:2] for row in valid], dtype=np.int64)
    empty = len(rows) - len(valid) - len(invalid)
    return Documents(ids, edges, np.array(text_bytes, dtype=np.int64), places, piece.bytes, empty, invalid)


class Workers(ProcessPoolExecutor):
    """Processes that encode the pieces of a source."""

    def __init__(
        self, count: int, pieces: list[Piece], files: tuple[SourceFile, ...], encoder: str, encoding: str, folder: Path
    ) -> None:
        super().__init__(count, initializer=start_worker, initargs=(files, encoder, encoding, folder))
        self._limit, self._pieces, self._files = IN_FLIGHT * count, pieces, files
        self._results: dict[tuple[int, int], Future[Documents]] = {}  # also those that an earlier stream did not use

    def __exit__(self, *_: object) -> None:
        self.shutdown(cancel_futures=True)

    def encode(self, wanted: Iterable[tuple[Tag, int]]) -> Iterator[tuple[Tag, int, Documents]]:
        """Encode the wanted pieces, each a tag and a number, in order. A large piece gives several results.

        The last result stays for the next call, as its first documents can be all that this caller needs.
        """
        in_flight: deque[tuple[Tag, tuple[int, int]]] = deque()
        tasks = (
            (tag, (number, i), task)
            for tag, number in wanted
            for i, task in enumerate(divide(self._pieces[number], self._files))
        )
        try:
            while True:
                for tag, key, task in itertools.islice(tasks, self._limit - len(in_flight)):
                    if key not in self._results:
                        self._results[key] = self.submit(encode_piece, task, key[0])
                    in_flight.append((tag, key))
                if not in_flight:
                    return
                tag, key = in_flight.popleft()
                yield tag, key[0], self._results[key].result()
                del self._results[key]
        except (BrokenProcessPool, MemoryError):
            raise OSError(
                "a worker process ended, probably because memory ran out. Use fewer --workers and rerun the same "
                "command to resume"
            ) from None


class ShardWriter:
    """A shard that is written under another name until it is complete."""

    def __init__(self, path: Path, rank: int) -> None:
        self._path, self._unfinished = path, path.with_name(f".{path.name}.{rank}.unfinished")
        self._file = open(self._unfinished, "wb", buffering=0)  # noqa: SIM115  closed by finish or discard
        self._file.seek(HEADER_BYTES)
        self.tokens = self.documents = self.bytes = self.empty = 0
        self.seen_tokens = self.seen_bytes = 0  # of the tasks that it is made of, including other documents
        self.first = [0, 0]  # source file of the first document, and its place in the file
        self.invalid: list[tuple[int, str]] = []

    def add(self, documents: Documents, first: int, last: int) -> int:
        """Append the documents from `first` to before `last`, and return the number of tokens. Raises OSError."""
        if first < last and not self.documents:
            self.first = documents.places[first].tolist()
        begin, end = documents.edges[[first, last]].tolist()
        data = documents.ids[begin:end].data.cast("B")
        try:
            while data:  # a nearly full disk takes a part, and only the next call fails
                data = data[self._file.write(data) :]
        except OSError as error:
            raise machine_error(error, self._path) from None
        self.tokens += end - begin
        self.documents += last - first
        self.bytes += int(documents.text_bytes[first:last].sum())
        self.seen_tokens += len(documents.ids)
        self.seen_bytes += documents.size
        return end - begin

    def finish(self) -> str | None:
        """Complete the file and return its sha256; remove it and return None without documents. Raises OSError."""
        try:
            with self._file as file:
                file.seek(0)
                header = {"descr": "<u2", "fortran_order": False, "shape": (self.tokens,)}
                np.lib.format.write_array_header_1_0(file, header)
                assert file.tell() == HEADER_BYTES
                os.fsync(file)
            if not self.documents:
                return None
            digest = sha256(self._unfinished)
            os.replace(self._unfinished, self._path)
            return digest
        except OSError as error:
            raise machine_error(error, self._path) from None
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove an incomplete file."""
        self._file.close()
        self._unfinished.unlink(missing_ok=True)
