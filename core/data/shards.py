"""Token shards: writing, checking, reading, and the order in which training sees them.

A data folder holds `val_000000.npy`, `train_000001.npy`, ... (plain uint16, documents joined, each begun by the
end-of-text token), a `manifest.json` that lists them, and the tokenizer's files. A shard that the manifest doesn't
list doesn't exist.
"""

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from core import cli
from core.files import sha256, write_json

if TYPE_CHECKING:  # fineweb.py needs no torch, and starts sooner without it
    from torch import Tensor

    from core.distributed import Ranks

Item = TypeVar("Item")
DEFAULT_DATA = "data/fineweb-edu"  # what fineweb.py writes and train.py reads unless told otherwise
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # the folder of what fineweb.py has not joined yet
VERIFIED = ".verified.json"
BIN_MAGIC = 20240520
REMEDY = "write the folder again with fineweb.py --overwrite"


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
        raise ValueError(f"no shards in {folder}: {path} is missing{_remedy(folder)}")
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
        check_types(manifest, vocab_size=int, end_of_text_id=int, shards=list)
        for shard in manifest["shards"]:
            check_types(shard, file=str, split=str, tokens=int, sha256=str)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): {REMEDY}") from None
    return Dataset(folder, manifest, hashlib.sha256(raw).hexdigest())


def _remedy(folder: Path) -> str:
    """What to do about a data folder without a manifest."""
    if (folder / UNFINISHED).is_dir():
        return ", which fineweb.py writes last: it is at work there, or was interrupted and its command goes on"
    if any(folder.glob("*.npy")) or any(folder.glob("*.bin")):
        return f". Another project's shards are describe by: python fineweb.py --adopt {folder}"
    others = sorted(str(path.parent) for path in folder.parent.glob(f"*/{MANIFEST}"))
    there = f"; folders that have one: {', '.join(others)}" if others else ""
    options = "(20 GB)" if folder == Path(DEFAULT_DATA) else f"--source 'my/*.parquet' --out {folder}"
    return f"{there}. To write it: python fineweb.py {options}"


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
    mine = cli.progress_bar(
        shards[ranks.rank :: ranks.world_size], "checking shards", leave=False, delay=1, hidden=ranks.rank > 0
    )
    checked = {shard["file"]: _check_shard(dataset, shard, memory) for shard in mine}
    results = {file: result for part in ranks.all_gather(checked) for file, result in part.items()}
    for shard in shards:
        problem, _ = results[shard["file"]]
        if problem:
            raise ValueError(f"{dataset.folder / shard['file']} {problem}; {REMEDY}")
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
        largest = int(open_shard(path, shard["tokens"]).max())
    except (OSError, ValueError) as error:  # returned, not raised, as the other ranks wait for this one's result
        return f"can't be read: {error}", []
    if largest >= dataset.vocab_size:
        return f"holds token id {largest}, outside the vocabulary of {dataset.vocab_size}", []
    return "", stamp


def open_shard(path: Path, tokens: int | None = None) -> np.ndarray:
    """A shard's ids (n,) uint16, memory-mapped: from .npy, or from .bin with llm.c's header.

    Raises ValueError where it is neither, or doesn't hold `tokens`.
    """
    try:
        ids = _map_bin(path) if path.suffix == ".bin" else np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, the manifest lists it; {REMEDY}") from None
    except Exception as error:  # a damaged header can make numpy raise anything
        raise ValueError(f"{path} is no shard of tokens, or cut short ({error!r}); {REMEDY}") from None
    if ids.dtype != np.uint16 or ids.ndim != 1 or len(ids) != (len(ids) if tokens is None else tokens) or not len(ids):
        wanted = "ids in one row" if tokens is None else f"({tokens},)"
        raise ValueError(f"{path} holds {ids.dtype} {ids.shape}, and should hold uint16 {wanted}")
    return ids


def _map_bin(path: Path) -> np.ndarray:
    """llm.c's format for GPT-2: 256 int32 (20240520, version 1, number of tokens, zeros), then uint16 ids."""
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != BIN_MAGIC or header[1] != 1:
        raise ValueError(f"its header begins with {header[:3].tolist()}, llm.c's with [{BIN_MAGIC}, 1, tokens]")
    size = path.stat().st_size
    if size != 1024 + 2 * int(header[2]):
        raise ValueError(f"it has {size} bytes, and {1024 + 2 * int(header[2])} by its header's {header[2]} tokens")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)


class Windows:
    """All sequences of a split: windows of seq_len inputs and their targets, laid end to end in each shard.

    A window is seq_len + 1 tokens, its last token the next window's first, so that every token but a shard's first
    is a target once. What is left at a shard's end is shorter than a window and unused.
    """

    def __init__(self, dataset: Dataset, split: str, seq_len: int) -> None:
        self.seq_len = seq_len
        shards = dataset.shards(split)
        self._ids = [open_shard(dataset.folder / shard["file"], shard["tokens"]) for shard in shards]
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


def prefetched(items: Iterator[Item], ahead: int, begin: Callable[[], None]) -> Generator[Item, None, None]:
    """The same items, of which a thread, that begins with `begin`, makes up to `ahead` before they are asked for."""
    thread = ThreadPoolExecutor(1, initializer=begin)
    try:
        coming = deque(thread.submit(next, items, None) for _ in range(ahead))
        while (item := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, items, None))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
