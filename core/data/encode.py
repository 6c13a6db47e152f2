"""Pieces of text -> token ids, in worker processes: by tiktoken, the reference, or by fastokens, about 10x faster.

fastokens is checked: tiktoken encodes one document of each batch too.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from core.data import tokenizer
from core.data.pieces import InvalidDocument, Piece, line_blocks, read_lines, read_piece
from core.data.shards import prefetched, short_reason
from core.data.sources import SourceFile

BATCH = 256  # documents; a row group of 1,000 in one batch takes 10 % longer, as it touches new memory
IN_FLIGHT = 4  # tasks per worker, to bound memory

Tag = TypeVar("Tag")
Key = tuple[int, int]  # number of a piece, and of a block of lines in it if it is a large compressed file


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
        """The d documents joined, each preceded by the end-of-text token: ids (n,) uint16 and each one's start (d,).

        `number` selects the document of each batch that is checked with tiktoken. Raises EncoderMismatchError.
        """
        encode_batch = self._by_fastokens if self._fast else self._by_tiktoken
        batches = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
        encoded = [ids for i, batch in enumerate(batches) for ids in encode_batch(batch, (number + i) % len(batch))]
        lengths = np.array([len(ids) + 1 for ids in encoded], dtype=np.int64)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        joined = np.empty(ends[-1] if encoded else 0, dtype=np.uint16)
        joined[starts] = self.end_of_text_id
        for ids, start, end in zip(encoded, starts.tolist(), ends.tolist(), strict=True):
            joined[start + 1 : end] = ids
        return joined, starts

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
    facts: np.ndarray  # (4, d): index in ids of the first token, bytes of text, number of the source file, place in it
    size: int = 0  # bytes of the task's text, approximately
    empty: int = 0  # documents left out
    invalid: tuple[tuple[int, str], ...] = ()  # documents left out: number of the source file, place and reason

    def __len__(self) -> int:
        return self.facts.shape[1]

    @property
    def ends(self) -> np.ndarray:
        return np.append(self.facts[0], len(self.ids))[1:]  # (d,)

    def part(self, first: int, last: int | None = None) -> "Documents":
        """The documents from `first` to before `last`."""
        starts = np.append(self.facts[0], len(self.ids))
        begin, end = starts[first], starts[len(self) if last is None else last]
        return Documents(self.ids[begin:end], self.facts[:, first:last] - [[begin], [0], [0], [0]])


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
    return encode_rows(read_piece(piece, FILES), piece.bytes, number)


def encode_lines(file: int, first: int, lines: bytes, number: int) -> Documents:
    """Encode lines of a .jsonl file; `first` is the number of the first line."""
    return encode_rows([(file, place, text) for place, text in read_lines(first, lines)], len(lines), number)


def encode_rows(rows: list[tuple[int, int, str | None]], size: int, number: int) -> Documents:
    """Encode documents, each a number of its file, its place in it and its text, of about `size` bytes in all."""
    invalid = tuple((file, str(text)) for file, _, text in rows if isinstance(text, InvalidDocument))
    valid = [(file, place, text) for file, place, text in rows if text and not isinstance(text, InvalidDocument)]
    ids, starts = ENCODER.encode([text for _, _, text in valid], number)
    text_bytes = [len(text) if text.isascii() else len(text.encode()) for _, _, text in valid]
    files, places = [file for file, _, _ in valid], [place for _, place, _ in valid]
    facts = np.array([starts, text_bytes, files, places], dtype=np.int64)
    return Documents(ids, facts, size, len(rows) - len(valid) - len(invalid), invalid)


class Workers:
    """Processes that encode the pieces of a source."""

    def __init__(
        self, count: int, pieces: list[Piece], files: tuple[SourceFile, ...], encoder: str, encoding: str, folder: Path
    ) -> None:
        self._count, self._pieces, self._files = count, pieces, files
        self._pool = ProcessPoolExecutor(count, initializer=start_worker, initargs=(files, encoder, encoding, folder))
        self._results: dict[Key, Future[Documents]] = {}  # also those that an earlier stream did not use

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encode(self, wanted: Iterable[tuple[Tag, int, int]]) -> Iterator[tuple[Tag, Key, Documents]]:
        """Encode the wanted pieces, in order, each with its tag.

        Each is a tag, the number of a piece, and the first block that is wanted of a large compressed file.
        The last result stays for the next call, as its first documents can be all that this caller needs.
        """
        in_flight: deque[tuple[Tag, Key]] = deque()
        tasks = self._tasks(wanted)
        try:
            while True:
                for tag, key, function, arguments in itertools.islice(tasks, IN_FLIGHT * self._count - len(in_flight)):
                    if key not in self._results:
                        self._results[key] = self._pool.submit(function, *arguments, key[0])
                    in_flight.append((tag, key))
                if not in_flight:
                    return
                tag, key = in_flight.popleft()
                yield tag, key, self._results[key].result()
                del self._results[key]
        except (BrokenProcessPool, MemoryError):
            raise OSError(
                "a worker process ended, probably because memory ran out. Use fewer --workers and rerun the same "
                "command to resume"
            ) from None

    def _tasks(
        self, wanted: Iterable[tuple[Tag, int, int]]
    ) -> Iterator[tuple[Tag, Key, Callable[..., Documents], tuple[Any, ...]]]:
        for tag, number, first_block in wanted:
            piece = self._pieces[number]
            if not piece.large:
                yield tag, (number, 0), encode_piece, (piece,)
                continue
            blocks = line_blocks(self._files[piece.first].url)  # only one process can decompress it
            for block, (line, lines) in enumerate(prefetched(blocks, ahead=2, begin=lambda: None)):
                if block >= first_block:
                    yield tag, (number, block), encode_lines, (piece.first, line, lines)
