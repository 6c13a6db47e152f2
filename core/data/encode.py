"""Pieces of text -> token ids, in worker processes; and token ids -> a shard.

tiktoken is the reference. fastokens is about ten times as fast, and checked: tiktoken encodes one document of each
batch too.
"""

import importlib.util
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from core.data import tokenizer
from core.data.pieces import InvalidDocument, Piece, describe_place, divide, format_of, read_piece
from core.data.shards import short_reason
from core.data.sources import Files
from core.files import naming, sha256

HEADER_BYTES = 128  # of .npy, which does not depend on the number of tokens
BATCH = 256  # documents; a row group of 1,000 in one batch takes 10 % longer, as it touches new memory
IN_FLIGHT = 4  # tasks per worker, to bound memory
MAX_INVALID = 1000  # documents that --skip-broken skips in a task; with more, the file itself counts as damaged

Tag = TypeVar("Tag")


class Encoder:
    """Encodes ordinary text: "<|endoftext|>" within a document is text, not a special token."""

    def __init__(self, name: str, encoding_name: str, folder: Path) -> None:
        """`name` is tiktoken, fastokens, or auto: fastokens if it is installed. It reads `folder`/tokenizer.json."""
        self.encoding = tokenizer.load(encoding_name)
        self.end_of_text_id = tokenizer.end_of_text_id(self.encoding)
        is_fast = name == "fastokens" or (name == "auto" and importlib.util.find_spec("fastokens") is not None)
        self._encode_batch = self._by_fastokens if is_fast else self._by_tiktoken
        self._folder = folder

    def encode(self, texts: list[str], number: int) -> tuple[np.ndarray, np.ndarray]:
        """The d documents joined, each preceded by the end-of-text token: ids (n,) uint16 and their edges (d + 1,).

        `number` selects the document of each batch that is checked with tiktoken. Raises ValueError if it differs.
        """
        batches = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
        numbered = enumerate(batches, number)
        encoded = [ids for i, batch in numbered for ids in self._encode_batch(batch, i % len(batch))]
        edges = np.cumsum([0, *(len(ids) + 1 for ids in encoded)])
        joined = np.empty(edges[-1], dtype=np.uint16)
        joined[edges[:-1]] = self.end_of_text_id
        for ids, (start, end) in zip(encoded, itertools.pairwise(edges.tolist()), strict=True):
            joined[start + 1 : end] = ids
        return joined, edges

    def _by_tiktoken(self, texts: list[str], _: int = 0) -> list[np.ndarray]:
        return [self.encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]

    def _by_fastokens(self, texts: list[str], checked: int) -> list[np.ndarray]:
        remedy = "Use --encoder tiktoken --overwrite"
        try:
            flat, offsets = self._fast_tokenizer.encode_batch_flat(texts, split_special_tokens=True)
            encoded = np.split(np.frombuffer(flat, "<u4"), np.frombuffer(offsets, "<u8")[1:-1].astype(np.int64))
        except (ImportError, AttributeError):  # missing, built for another machine, or too old
            raise ValueError("--encoder: fastokens can't be imported. Use tiktoken, or pip install fastokens") from None
        except (KeyboardInterrupt, SystemExit, MemoryError, OSError):
            raise
        except BaseException as error:  # a panic in Rust is not an Exception
            raise ValueError(f"--encoder fastokens fails ({short_reason(error)}). {remedy}") from None
        expected = self._by_tiktoken([texts[checked]])[0]
        if len(encoded) != len(texts) or not np.array_equal(encoded[checked], expected):
            place = f"in the document that begins with {texts[checked][:80]!r}"
            raise ValueError(f"--encoder fastokens gives other ids than tiktoken {place}. {remedy}")
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
    invalid: tuple[str, ...] = ()  # documents left out: file, place and reason


ENCODER: Encoder  # of this worker process, from `start_worker`
FILES: Files
SKIP_BROKEN: bool


def start_worker(files: Files, skip_broken: bool, *encoder: Any) -> None:
    global ENCODER, FILES, SKIP_BROKEN  # each worker process loads them once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    threading.Thread(target=end_with_parent, daemon=True).start()
    ENCODER, FILES, SKIP_BROKEN = Encoder(*encoder), files, skip_broken


def end_with_parent() -> None:
    """End this worker when its main process is killed; otherwise it waits forever for work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def encode_piece(piece: Piece, number: int) -> Documents:
    """Read and encode a piece in a worker process. `number` selects the documents to check.

    Raises ValueError for invalid documents, unless --skip-broken allows them.
    """
    rows = read_piece(piece, FILES)
    invalid = [(FILES[file], place, text) for file, place, text in rows if isinstance(text, InvalidDocument)]
    if len(invalid) > (MAX_INVALID if SKIP_BROKEN else 0):
        file, place, reason = invalid[-1 if SKIP_BROKEN else 0]
        many = f" is the last of more than {MAX_INVALID} invalid documents. Fix the file"
        remedy = many if SKIP_BROKEN else ". Fix the document, or skip it with --skip-broken"
        raise ValueError(f"{describe_place(file, place)}: {reason}{remedy}")
    valid = [(file, place, text) for file, place, text in rows if text and not isinstance(text, InvalidDocument)]
    ids, edges = ENCODER.encode([text for _, _, text in valid], number)
    text_bytes = [len(text) if text.isascii() else len(text.encode()) for _, _, text in valid]
    places = np.array([row[:2] for row in valid], dtype=np.int64)
    empty = len(rows) - len(valid) - len(invalid)
    skipped = tuple(f"{file.name}, {format_of(file)[2]} {place}: {reason}" for file, place, reason in invalid)
    return Documents(ids, edges, np.array(text_bytes, dtype=np.int64), places, piece.bytes, empty, skipped)


class Workers(ProcessPoolExecutor):
    """Processes that encode the pieces of a source."""

    def __init__(self, count: int, pieces: list[Piece], files: Files, *settings: Any) -> None:
        """`settings`: skip_broken, and the arguments of Encoder."""
        super().__init__(count, initializer=start_worker, initargs=(files, *settings))
        self._limit, self._pieces, self._files = IN_FLIGHT * count, pieces, files
        # A second stream finds the last tasks of the first one.
        self._start = lru_cache(self._limit)(lambda task, number: self.submit(encode_piece, task, number))

    def __exit__(self, *_: object) -> None:
        self.shutdown(cancel_futures=True)

    def encode(self, wanted: Iterable[tuple[Tag, int]]) -> Iterator[tuple[Tag, int, Documents]]:
        """Encode the wanted pieces, each a tag and a number, in order. A large piece gives several results."""
        tasks = ((tag, i, task) for tag, i in wanted for task in divide(self._pieces[i], self._files))
        started = ((tag, i, self._start(task, i)) for tag, i, task in tasks)
        try:
            in_flight = deque(itertools.islice(started, self._limit))
            while in_flight:
                tag, number, future = in_flight.popleft()
                yield tag, number, future.result()
                in_flight.extend(itertools.islice(started, 1))
        except (BrokenProcessPool, MemoryError):
            raise OSError(
                "a worker process ended, probably because memory ran out. Use fewer --workers and rerun the same "
                "command to resume"
            ) from None


class ShardWriter:
    """A shard that is written under another name until it is complete. An incomplete file stays until `finish`."""

    def __init__(self, path: Path, rank: int) -> None:
        self._path, self._unfinished = path, path.with_name(f".{path.name}.{rank}.unfinished")
        self._file = open(self._unfinished, "wb", buffering=0)  # noqa: SIM115  closed by finish
        self._file.seek(HEADER_BYTES)
        self.tokens = self.documents = self.bytes = self.empty = 0
        self.seen_tokens = self.seen_bytes = 0  # of the tasks that it is made of, including other documents
        self.first = [0, 0]  # source file of the first document, and its place in the file
        self.invalid: list[str] = []

    def add(self, documents: Documents, first: int, last: int) -> int:
        """Append the documents from `first` to before `last`, and return the number of tokens. Raises OSError."""
        if first < last and not self.documents:
            self.first = documents.places[first].tolist()
        begin, end = documents.edges[[first, last]].tolist()
        data = documents.ids[begin:end].data.cast("B")
        with naming(self._path):
            while data:  # a nearly full disk takes a part, and only the next call fails
                data = data[self._file.write(data) :]
        self.tokens += end - begin
        self.documents += last - first
        self.bytes += int(documents.text_bytes[first:last].sum())
        self.seen_tokens += len(documents.ids)
        self.seen_bytes += documents.size
        return end - begin

    def finish(self) -> str:
        """Complete the file and return its sha256. Raises OSError."""
        with naming(self._path):
            with self._file as file:
                file.seek(0)
                header = {"descr": "<u2", "fortran_order": False, "shape": (self.tokens,)}
                np.lib.format.write_array_header_1_0(file, header)
                assert file.tell() == HEADER_BYTES
                os.fsync(file)
            digest = sha256(self._unfinished)
            os.replace(self._unfinished, self._path)
        return digest
