"""Units of text -> token ids, in worker processes: by tiktoken, the reference, or by fastokens, about ten times sooner.

fastokens is not taken on trust: one document of every batch is encoded by tiktoken too.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from core.data import tokenizer
from core.data.prepare import Documents
from core.data.sources import Broken, Unit, read_texts

BATCH = 256  # documents: a row group of 1,000 at once spends 10 % more time, in fresh memory


class EncodersDifferError(Exception):
    """fastokens gave other ids than tiktoken."""


def choose(name: str) -> str:
    """`auto` takes fastokens where it is installed. Raises ValueError where the encoder named isn't."""
    if name == "tiktoken":
        return name
    try:
        from fastokens import _native

        _native.Tokenizer.encode_batch_flat  # noqa: B018
    except Exception:  # not there, too old, or built for another machine
        if name == "auto":
            return "tiktoken"
        raise ValueError(
            "--encoder fastokens: it is not installed: pip install fastokens, or --encoder tiktoken"
        ) from None
    return "fastokens"


class Encoder:
    """Encodes ordinary text: "<|endoftext|>" within a document stays text."""

    def __init__(self, name: str, encoding_name: str, folder: Path) -> None:
        """`name` is tiktoken or fastokens; fastokens reads `folder`/tokenizer.json."""
        self.encoding = tokenizer.load(encoding_name)
        self.end_of_text_id = tokenizer.end_of_text_id(self.encoding)
        self._fast = name == "fastokens"
        self._folder = folder

    def encode(self, texts: list[str], number: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents joined, each begun by the end-of-text token: ids (n,) uint16, and where each starts (d,).

        Of each batch that fastokens encodes one document is checked; `number` says which. Raises EncodersDifferError.
        """
        encode_batch = self._by_fastokens if self._fast else self._by_tiktoken
        batches = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
        parts = [part for i, batch in enumerate(batches) for part in encode_batch(batch, (number + i) % len(batch))]
        lengths = np.array([len(part) + 1 for part in parts], dtype=np.int64)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        ids = np.empty(ends[-1] if parts else 0, dtype=np.uint16)
        ids[starts] = self.end_of_text_id
        for part, start, end in zip(parts, starts.tolist(), ends.tolist(), strict=True):
            ids[start + 1 : end] = part
        return ids, starts

    def _by_tiktoken(self, texts: list[str], _: int = 0) -> list[np.ndarray]:
        return [self.encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]

    def _by_fastokens(self, texts: list[str], checked: int) -> list[np.ndarray]:
        try:
            flat, offsets = self._fast_tokenizer.encode_batch_flat(texts, split_special_tokens=True)
            parts = np.split(np.frombuffer(flat, "<u4"), np.frombuffer(offsets, "<u8")[1:-1].astype(np.int64))
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            raise EncodersDifferError(f"it failed: {error!r}") from None
        if len(parts) != len(texts) or not np.array_equal(parts[checked], self._by_tiktoken([texts[checked]])[0]):
            raise EncodersDifferError(f"in the document that begins with {texts[checked][:80]!r}")
        return parts

    @cached_property
    def _fast_tokenizer(self) -> Any:
        os.environ.setdefault("RAYON_NUM_THREADS", "1")  # the workers are processes
        from fastokens._native import Tokenizer

        return Tokenizer.from_file(str(self._folder / "tokenizer.json"))


@dataclass(frozen=True)
class Encoded:
    """A unit's documents, their rows counted from the unit's first."""

    unit: Unit
    documents: Documents
    rows: int  # in all, the empty and the broken among them
    broken: list[str]


ENCODER: Encoder  # a worker's own, by `start_worker`


def start_worker(encoder: str, encoding: str, folder: Path) -> None:
    global ENCODER  # each worker loads it once
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the others
    threading.Thread(target=end_with_parent, daemon=True).start()
    ENCODER = Encoder(encoder, encoding, folder)


def end_with_parent() -> None:
    """A worker whose main process was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def encode_unit(unit: Unit, number: int) -> Encoded:
    rows = read_texts(unit)
    texts = {row: text for row, text in enumerate(rows) if text and isinstance(text, str)}
    broken = [str(text) for text in rows if isinstance(text, Broken)]
    ids, starts = ENCODER.encode(list(texts.values()), number)
    text_bytes = np.array([len(text.encode()) for text in texts.values()], dtype=np.int64)
    return Encoded(unit, Documents(ids, starts, np.array(list(texts), dtype=np.int64), text_bytes), len(rows), broken)


def encode_in_order(
    units: list[Unit], workers: int, encoder: str, encoding: str, folder: Path
) -> Generator[Encoded, None, None]:
    """Every unit tokenised, in order, by `workers` processes; four for each are in flight, so memory stays flat."""
    in_flight: deque[Future] = deque()
    arguments = (encoder, encoding, folder)
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=arguments) as pool:
        try:
            for number, unit in enumerate(units):
                in_flight.append(pool.submit(encode_unit, unit, number))
                if len(in_flight) >= 4 * workers:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        except BrokenProcessPool:
            raise OSError(
                "a worker was killed, perhaps for want of memory: take fewer --workers; the same command goes on after "
                "the last whole shard"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
