"""Token shards: writing, checking, reading, and the order in which training sees them.

A data folder holds `val_000000.npy`, `train_000001.npy`, ... (plain uint16, documents joined, each begun by the
end-of-text token), a `manifest.json` that lists them, and the tokenizer's files. A shard that the manifest doesn't
list doesn't exist.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # fineweb.py needs no torch, and starts sooner without it
    from torch import Tensor

    from core.distributed import Ranks

DEFAULT_DATA = "data/fineweb-edu"  # what fineweb.py writes and train.py reads unless told otherwise
MANIFEST = "manifest.json"
VERIFIED = ".verified.json"


@dataclass(frozen=True)
class Documents:
    """Tokenised documents joined, each begun by the end-of-text token."""

    ids: np.ndarray  # (n,) uint16
    starts: np.ndarray  # (d,) where each document begins in ids
    rows: np.ndarray  # (d,) each document's row in its source file

    @property
    def ends(self) -> np.ndarray:
        return np.append(self.starts[1:], len(self.ids))  # (d,)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, some: slice) -> "Documents":
        starts = self.starts[some]
        if not len(starts):
            return Documents(self.ids[:0], starts, starts)
        begin, end = starts[0], self.ends[some][-1]
        return Documents(self.ids[begin:end], starts - begin, self.rows[some])


class ShardWriter:
    """Cuts a stream of documents into shards, none of which spans two source files or both splits."""

    def __init__(self, folder: Path, shard_tokens: int, token_bytes: np.ndarray, end_of_text_id: int) -> None:
        self.folder = folder
        self.token_bytes = token_bytes  # (vocab_size,) bytes of text that each id stands for
        self.shards: list[dict[str, Any]] = []  # the manifest's entries
        self._buffer = np.empty(shard_tokens, dtype=np.uint16)
        self._size = 0
        self._begin: dict[str, Any] = {}  # split and place in the source of the buffer's first token
        self._end_of_text_id = end_of_text_id

    def add(self, split: str, source_file: int, documents: Documents) -> None:
        """Append documents, writing each shard as it fills."""
        if not len(documents):
            return
        if self._size and (self._begin["split"], self._begin["source_file"]) != (split, source_file):
            self.flush()
        done = 0
        while done < len(documents.ids):
            if not self._size:
                i = int(np.searchsorted(documents.starts, done, side="right")) - 1
                place = {"row": int(documents.rows[i]), "token": done - int(documents.starts[i])}
                self._begin = {"split": split, "source_file": source_file, "begin": place}
            part = documents.ids[done : done + len(self._buffer) - self._size]
            self._buffer[self._size : self._size + len(part)] = part
            self._size += len(part)
            done += len(part)
            if self._size == len(self._buffer):
                self.flush()

    def flush(self) -> None:
        """Write what is buffered as a shard, by rename, and list it."""
        if not self._size:
            return
        ids = self._buffer[: self._size]
        name = f"{self._begin['split']}_{len(self.shards):06d}.npy"
        unfinished = self.folder / f".{name}.unfinished"
        with open(unfinished, "wb") as file:
            np.save(file, ids, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        entry = {
            "file": name,
            "split": self._begin["split"],
            "tokens": self._size,
            "documents": int(np.count_nonzero(ids == self._end_of_text_id)),
            "bytes": int(self.token_bytes[ids].sum()),
            "sha256": sha256(unfinished),
            "source_file": self._begin["source_file"],
            "begin": self._begin["begin"],
        }
        os.replace(unfinished, self.folder / name)
        self.shards.append(entry)
        self._size = 0


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write by rename, so that a reader finds the old file or the whole new one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(unfinished, path)


@dataclass(frozen=True)
class Dataset:
    """A data folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]
    manifest_hash: str

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    def shards(self, split: str) -> list[dict[str, Any]]:
        return [shard for shard in self.manifest["shards"] if shard["split"] == split]

    def tokens(self, split: str) -> int:
        return sum(shard["tokens"] for shard in self.shards(split))


def open_dataset(folder: str | Path) -> Dataset:
    """Read a data folder's manifest. Raises ValueError where there is none or it isn't whole."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = ", which fineweb.py writes last: it was interrupted there" if any(folder.glob("*.npy")) else ""
        raise ValueError(f"no shards in {folder}: {path} is missing{unfinished}. Run: python fineweb.py --out {folder}")
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
        check_types(manifest, vocab_size=int, end_of_text_id=int, shards=list)
        for shard in manifest["shards"]:
            check_types(shard, file=str, split=str, tokens=int, sha256=str)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): write the folder again with fineweb.py --overwrite") from None
    return Dataset(folder, manifest, hashlib.sha256(raw).hexdigest())


def check_types(entry: dict[str, Any], **types: type) -> None:
    for key, kind in types.items():
        if not isinstance(entry[key], kind):
            raise TypeError(f"{key} is {entry[key]!r}")


def verify(dataset: Dataset, ranks: "Ranks") -> None:
    """Check that every shard is the one the manifest describes, the work shared among the ranks.

    Raises ValueError, on every rank, naming the first shard that differs. What was checked is remembered by size and
    time of change, so that the next start reads only what is new.
    """
    memory = _remembered(dataset.folder)
    shards = dataset.manifest["shards"]
    mine = {shard["file"]: _check_shard(dataset, shard, memory) for shard in shards[ranks.rank :: ranks.world_size]}
    results = {file: result for part in ranks.gather(mine) for file, result in part.items()}
    for shard in shards:
        problem, _ = results[shard["file"]]
        if problem:
            raise ValueError(
                f"{dataset.folder / shard['file']} {problem}; write the folder again with fineweb.py --overwrite"
            )
    if ranks.is_main:
        with contextlib.suppress(OSError):  # a read-only data folder is as good, only checked again at each start
            write_json(dataset.folder / VERIFIED, {file: stamp for file, (_, stamp) in results.items()})


def _remembered(folder: Path) -> dict[str, Any]:
    """What earlier starts verified; nothing where that can't be read, as it can be found out again."""
    try:
        memory = json.loads((folder / VERIFIED).read_text())
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _check_shard(dataset: Dataset, shard: dict[str, Any], memory: dict[str, Any]) -> tuple[str, list[Any]]:
    """What is wrong with a shard ("" if nothing), and the stamp to remember it by."""
    path = dataset.folder / shard["file"]
    if not path.is_file():
        return "is missing", []
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns, shard["sha256"]]
    if memory.get(shard["file"]) == stamp:
        return "", stamp
    try:
        if sha256(path) != shard["sha256"]:
            return "was cut short or altered: its sha256 is not the manifest's", []
        largest = int(_open_shard(path, shard["tokens"]).max())
    except (OSError, ValueError) as error:  # returned, not raised, as the other ranks wait for this one's result
        return f"can't be read: {error}", []
    if largest >= dataset.vocab_size:
        return f"holds token id {largest}, outside the vocabulary of {dataset.vocab_size}", []
    return "", stamp


def _open_shard(path: Path, tokens: int) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing, the manifest lists it; write the folder again with fineweb.py --overwrite"
        ) from None
    except Exception as error:  # a damaged header can make numpy raise anything
        raise ValueError(f"{path} is no .npy file, or cut short ({error!r}); write the folder again") from None
    if ids.dtype != np.uint16 or ids.shape != (tokens,):
        raise ValueError(f"{path} holds {ids.dtype} {ids.shape}, the manifest says uint16 ({tokens},)")
    return ids


class Windows:
    """All sequences of a split: windows of seq_len inputs and their targets, laid end to end in each shard.

    A window is seq_len + 1 tokens, its last token the next window's first, so that every token but a shard's first
    is a target once. What is left at a shard's end is shorter than a window and unused.
    """

    def __init__(self, dataset: Dataset, split: str, seq_len: int) -> None:
        self.seq_len = seq_len
        shards = dataset.shards(split)
        self._ids = [_open_shard(dataset.folder / shard["file"], shard["tokens"]) for shard in shards]
        self._ends = np.cumsum([(len(ids) - 1) // seq_len for ids in self._ids], dtype=np.int64)
        if not len(self):
            raise ValueError(
                f"{dataset.folder} holds {dataset.tokens(split):,} {split} tokens, no window of {seq_len} + 1: take a "
                f"smaller --seq-len, or write more with fineweb.py"
            )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def batch(self, indices: np.ndarray | range) -> "tuple[Tensor, Tensor]":
        """Inputs and targets (B, T) int64 of the windows of those indices."""
        import torch

        rows = np.stack([self._window(int(i)) for i in indices])
        ids = torch.from_numpy(rows.astype(np.int64))  # (B, T + 1)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def _window(self, index: int) -> np.ndarray:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        start = (index - first) * self.seq_len
        return self._ids[shard][start : start + self.seq_len + 1]


class TokenOrder:
    """Sequence i of training as a window's index: a pure function of (manifest hash, seed, sequence length, i).

    Each epoch is a permutation of all windows, drawn from a key of its own.
    """

    def __init__(self, manifest_hash: str, seed: int, seq_len: int, windows: int) -> None:
        self._key = f"{manifest_hash} {seed} {seq_len}"
        self._windows = windows
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        digest = hashlib.sha256(f"{self._key} {epoch}".encode()).digest()
        # RandomState, because numpy promises that its stream never changes (NEP 19); Generator's may.
        return np.random.RandomState(np.frombuffer(digest, dtype="<u4")).permutation(self._windows)

    def __getitem__(self, sequences: range) -> np.ndarray:
        """The window indices of a run of sequences."""
        return np.array([self._epoch(i // self._windows)[i % self._windows] for i in sequences], dtype=np.int64)
