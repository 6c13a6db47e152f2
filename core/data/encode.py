"""Text -> token ids, in worker processes: by tiktoken, the reference, or by fastokens, about 10x faster.

fastokens is checked: tiktoken encodes one document of each batch too.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from core.data import tokenizer
from core.data.pieces import InvalidDocument, Lines, Piece, read_texts
from core.data.shards import short_reason

BATCH = 256  # documents; a row group of 1,000 in one batch takes 10 % longer, as it touches new memory
Key = tuple[Any, int, int]


class EncoderMismatchError(Exception):
    """fastokens failed, or gave other ids than tiktoken."""


@dataclass(frozen=True)
class Documents:
    """Tokenized documents, joined, each preceded by the end-of-text token."""

    ids: np.ndarray  # (n,) uint16
    starts: np.ndarray  # (d,) index in ids of each document's first token
    text_bytes: np.ndarray  # (d,) length of each document in bytes of UTF-8

    @property
    def ends(self) -> np.ndarray:
        return np.append(self.starts[1:], len(self.ids))  # (d,)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, selection: slice) -> "Documents":
        starts = self.starts[selection]
        if not len(starts):
            return Documents(self.ids[:0], starts, starts)
        begin, end = starts[0], self.ends[selection][-1]
        return Documents(self.ids[begin:end], starts - begin, self.text_bytes[selection])


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
        except (KeyboardInterrupt, SystemExit, MemoryError):
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

        return Tokenizer.from_file(str(self._folder / "tokenizer.json"))


@dataclass(frozen=True)
class Encoded:
    """The result of a task."""

    documents: Documents
    source_bytes: int
    empty: int  # documents without text
    invalid: list[InvalidDocument]


ENCODER: Encoder  # of this worker process, from `start_worker`


def start_worker(encoder: str, encoding: str, folder: Path) -> None:
    global ENCODER  # each worker process loads it once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    threading.Thread(target=end_with_parent, daemon=True).start()
    ENCODER = Encoder(encoder, encoding, folder)


def end_with_parent() -> None:
    """End this worker when its main process is killed; otherwise it waits forever for work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def encode_task(task: Piece | Lines, number: int) -> Encoded:
    """Read and encode in a worker process. `number` selects the documents to check."""
    found = read_texts(task)
    texts = [text for text in found if text and isinstance(text, str)]
    invalid = [text for text in found if isinstance(text, InvalidDocument)]
    ids, starts = ENCODER.encode(texts, number)
    text_bytes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
    return Encoded(Documents(ids, starts, text_bytes), task.bytes, len(found) - len(texts) - len(invalid), invalid)


class EncoderPool:
    """Worker processes that encode."""

    def __init__(self, workers: int, encoder: str, encoding: str, folder: Path) -> None:
        """`encoder`: tiktoken, or fastokens, which reads `folder`/tokenizer.json."""
        self._workers = workers
        arguments = (encoder, encoding, folder)
        self._pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=arguments)
        self._ahead: dict[tuple[int, int], Future[Encoded]] = {}
        self._count = 0

    def encode(self, tasks: Iterable[tuple[Key, Piece | Lines]]) -> Generator[tuple[Key, Encoded], None, None]:
        """The result of each task, in order, with its key, whose last two numbers are its place in the stream.

        At most four tasks per worker are in flight, to bound memory. Results that a caller doesn't wait for are kept
        for the next call.
        """
        in_flight: deque[tuple[Key, Future[Encoded]]] = deque()
        try:
            for key, task in tasks:
                future = self._ahead.pop(key[1:], None) or self._pool.submit(encode_task, task, self._count)
                in_flight.append((key, future))
                self._count += 1
                if len(in_flight) >= 4 * self._workers:
                    yield result_of(in_flight.popleft())
            while in_flight:
                yield result_of(in_flight.popleft())
        except BrokenProcessPool:
            raise OSError(
                "a worker process was killed, probably because memory ran out. Use fewer --workers and rerun the same "
                "command to resume"
            ) from None
        finally:
            self._ahead = {key[1:]: future for key, future in in_flight}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def result_of(item: tuple[Key, Future[Encoded]]) -> tuple[Key, Encoded]:
    return item[0], item[1].result()
