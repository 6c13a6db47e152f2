"""Token shards: finding, checking and reading them, and the order in which training reads them.

A data folder holds `val_000000.npy`, `train_000001.npy`, ... (plain uint16; documents are joined, each preceded by the
end-of-text token), a `manifest.json` that lists them, and the tokenizer's files. A shard that the manifest doesn't
list is ignored.
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
from core.files import naming, sha256, write_json

if TYPE_CHECKING:  # fineweb.py needs no torch, and starts faster without it
    from torch import Tensor

    from core.distributed import Ranks

Item = TypeVar("Item")
DEFAULT_DATA = "data/fineweb-edu"  # where fineweb.py writes and train.py reads by default
DEFAULT_VAL_TOKENS = 10_485_760
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # the folder of shards that fineweb.py has not joined yet
VERIFIED = ".verified.json"
REMEDY = "Write the folder again with fineweb.py --overwrite"
BIN_MAGIC, LLAMA_MAGIC = 20240520, 20240801  # llm.c's formats: uint16, and uint32 of Llama's vocabulary
RAW_BINS = ("train.bin", "val.bin")  # nanoGPT's names of files without a header
OPEN_SHARDS = 256  # each takes a file descriptor, of which a process has often 1,024


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

    @property
    def remedy(self) -> str:
        """What to do about a damaged shard. Adopted shards belong to another project."""
        adopted = any(shard.get("source_file", 0) is None for shard in self.manifest["shards"])
        return f"Restore the file, or --adopt {self.folder} --overwrite" if adopted else REMEDY

    def open(self, shard: dict[str, Any]) -> np.ndarray:
        """The ids (n,) uint16 of a shard that the manifest lists. Raises as `open_shard` does."""
        try:
            return open_shard(self.folder / shard["file"], shard["tokens"])
        except ValueError as error:
            raise ValueError(f"{error}. {self.remedy}") from None


def open_dataset(folder: str | Path) -> Dataset:
    """Read a data folder's manifest. Raises ValueError for a missing or damaged one, OSError for an unreadable one."""
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_file():
            has_shards = (folder.parent / MANIFEST).is_file()
            remedy = f"Use its folder, {folder.parent}" if has_shards else f"Use fineweb.py --source {folder} for text"
            raise ValueError(f"{folder} is a file, not a folder of shards. {remedy}") from None
        raise ValueError(f"no shards in {folder}: {path} is missing{_remedy(folder)}") from None
    try:
        manifest = json.loads(raw)
        check_types(manifest, vocab_size=int, end_of_text_id=int, shards=list)
        for shard in manifest["shards"]:
            check_types(shard, file=str, split=str, tokens=int, sha256=str)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({short_reason(error)}). {REMEDY}") from None
    return Dataset(folder, manifest, hashlib.sha256(raw).hexdigest())


def _remedy(folder: Path) -> str:
    """The end of the error about a data folder without a manifest."""
    if (folder / UNFINISHED).is_dir():
        return ". fineweb.py writes it last and is still running, or was interrupted. Rerun its command to resume"
    if any(folder.glob("*.npy")) or any(folder.glob("*.bin")):
        return f". To describe the shards of another project: python fineweb.py --adopt {folder}"
    others = sorted(str(path.parent) for path in folder.parent.glob(f"*/{MANIFEST}"))
    existing = f"; folders that have one: {', '.join(others)}" if others else ""
    options = "(20 GB)" if folder == Path(DEFAULT_DATA) else f"--source 'my/*.parquet' --out {folder}"
    return f"{existing}. To write it: python fineweb.py {options}"


def check_types(entry: dict[str, Any], **types: type) -> None:
    for key, kind in types.items():
        if not isinstance(entry[key], kind):
            raise TypeError(f"{key} is {type(entry[key]).__name__}, not {kind.__name__}")


def short_reason(error: BaseException) -> str:
    """An error's type and the first line of its text, cut to 200 characters: some errors quote a whole file."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:200]}"


def verify(dataset: Dataset, ranks: "Ranks") -> None:
    """Check that every shard is the one that the manifest describes. The ranks share the work.

    Raises, on every rank, ValueError for the first shard that differs, and OSError for the first that can't be read.
    `.verified.json` keeps the size and modification time of each shard that passed, so that the next start reads
    only the others.
    """
    verified: dict[str, Any] = {}
    # Where it can't be read, all shards are checked again.
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        verified = dict(json.loads((dataset.folder / VERIFIED).read_text(encoding="utf-8")))
    shards = dataset.manifest["shards"]
    own = shards[ranks.rank :: ranks.world_size]
    own = cli.progress_bar(own, "checking shards", unit="shards", leave=False, delay=1, hidden=ranks.rank > 0)
    checked = {shard["file"]: _check_shard(dataset, shard, verified) for shard in own}
    results = {file: result for of_rank in ranks.all_gather(checked) for file, result in of_rank.items()}
    for shard in shards:
        error, _ = results[shard["file"]]
        if error:
            raise error
    if ranks.is_main:
        with contextlib.suppress(OSError):  # on a read-only data folder every start checks all shards
            write_json(dataset.folder / VERIFIED, {file: stamp for file, (_, stamp) in results.items()})


def _check_shard(
    dataset: Dataset, shard: dict[str, Any], verified: dict[str, Any]
) -> tuple[Exception | None, list[Any]]:
    """The error of a shard, if any, and its stamp. It returns the error because the other ranks wait for a result."""
    path = dataset.folder / shard["file"]
    try:
        ids, status = dataset.open(shard), path.stat()
        stamp = [status.st_size, status.st_mtime_ns, shard["sha256"]]
        if verified.get(shard["file"]) == stamp:
            return None, stamp
        if sha256(path) != shard["sha256"]:
            raise ValueError(f"{path} was cut short or altered: its sha256 differs from the manifest. {dataset.remedy}")
        if (largest := int(ids.max())) >= dataset.vocab_size:
            outside = f"outside the vocabulary of {dataset.vocab_size}"
            raise ValueError(f"{path} holds token id {largest}, {outside}. {dataset.remedy}")
        return None, stamp
    except (ValueError, OSError, MemoryError) as error:
        return error, []


def open_shard(path: Path, tokens: int | None = None) -> np.ndarray:
    """A shard's ids (n,) uint16, memory-mapped: from .npy, .bin with llm.c's header, or nanoGPT's .bin without one.

    Raises ValueError for another content or another number of tokens than `tokens`, OSError for an error of the
    machine.
    """
    try:
        with naming(path):
            ids = _map_bin(path) if path.suffix == ".bin" else np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # numpy can raise anything for a damaged header
        raise ValueError(f"{path} is not a shard of tokens, or is cut short ({short_reason(error)})") from None
    if ids.dtype != np.uint16 or ids.ndim != 1 or not len(ids) or tokens not in (None, len(ids)):
        wanted = "of one dimension" if tokens is None else f"({tokens},)"
        raise ValueError(f"{path} holds {str(ids.dtype)[:40]} {ids.shape}, but a shard is uint16 {wanted}")
    return ids


def _map_bin(path: Path) -> np.ndarray:
    """llm.c's format for GPT-2: 256 int32 (20240520, version 1, number of tokens, zeros), then uint16 ids.

    nanoGPT's train.bin and val.bin are the ids alone.
    """
    header = np.fromfile(path, dtype="<i4", count=256)
    size = path.stat().st_size
    if path.name in RAW_BINS and not (len(header) and header[0] in (BIN_MAGIC, LLAMA_MAGIC)):
        return np.memmap(path, dtype="<u2", mode="r")
    if len(header) < 256 or header[0] != BIN_MAGIC or header[1] != 1:
        raise ValueError(f"its header begins with {header[:3].tolist()}, in llm.c with [{BIN_MAGIC}, 1, tokens]")
    if size != 1024 + 2 * int(header[2]):
        raise ValueError(f"it has {size} bytes, but {1024 + 2 * int(header[2])} by its header's {header[2]} tokens")
    return np.memmap(path, dtype="<u2", mode="r", offset=1024)


class Windows:
    """All sequences of a split: consecutive windows of seq_len inputs and their targets in each shard.

    A window has seq_len + 1 tokens. Its last token is the first of the next window, so that each token except a
    shard's first is a target once. A remainder at a shard's end that is shorter than a window is not used.
    """

    def __init__(self, dataset: Dataset, split: str, seq_len: int) -> None:
        self.seq_len = seq_len
        shards = dataset.shards(split)
        self._open = lru_cache(maxsize=OPEN_SHARDS)(lambda number: dataset.open(shards[number]))
        self._ends = np.cumsum([(len(self._open(i)) - 1) // seq_len for i in range(len(shards))], dtype=np.int64)
        if not len(self):
            raise ValueError(
                f"{dataset.folder} holds {dataset.tokens(split):,} {split} tokens, no window of {seq_len} + 1 in a "
                "shard. Use a smaller --seq-len"
            )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def batch(self, indices: np.ndarray | range, shifts: np.ndarray | None = None) -> "tuple[Tensor, Tensor]":
        """Inputs and targets, each (B, T) int64, of the windows with these indices (B,).

        Each begins `shifts` (B,) tokens later, as far as its shard has tokens.
        """
        import torch

        shifts = np.zeros(len(indices), dtype=np.int64) if shifts is None else shifts
        rows = np.stack([self.window(int(i), int(shift)) for i, shift in zip(indices, shifts, strict=True)])
        ids = torch.from_numpy(rows)  # (B, T + 1)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def window(self, index: int, shift: int) -> np.ndarray:
        """The ids (T + 1,) int64 of a window that begins `shift` tokens later: its inputs, then the last target."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        tokens = self._open(shard)
        start = min((index - first) * self.seq_len + shift, len(tokens) - self.seq_len - 1)
        window = tokens[start : start + self.seq_len + 1]
        return window.astype(np.int64)  # a copy, so that the file can close


class TokenOrder:
    """Maps sequence i of training to a window: a pure function of (manifest hash, seed, sequence length, i).

    Each epoch is a permutation of all windows with a random key of its own. `shifted`: in every epoch but the first,
    all windows begin a random number of tokens later, so that the text is cut at other places.
    """

    def __init__(self, manifest_hash: str, seed: int, seq_len: int, windows: int, *, shifted: bool = False) -> None:
        self._key = f"{manifest_hash} {seed} {seq_len}"
        self._seq_len, self._windows, self._shifted = seq_len, windows, shifted
        self._epoch = lru_cache(maxsize=2)(self._permutation)
        self._shift = lru_cache(maxsize=2)(self._random_shift)

    def _permutation(self, epoch: int) -> np.ndarray:
        return self._random(f"{epoch}").permutation(self._windows)

    def _random_shift(self, epoch: int) -> int:
        return int(self._random(f"{epoch} shift").randint(self._seq_len)) if self._shifted and epoch else 0

    def _random(self, name: str) -> np.random.RandomState:
        digest = hashlib.sha256(f"{self._key} {name}".encode()).digest()
        # RandomState: numpy guarantees that its stream never changes (NEP 19), unlike that of Generator.
        return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))

    def __getitem__(self, sequences: range) -> np.ndarray:
        """The window indices (n,) int64 of a range of n sequences."""
        return np.array([self._epoch(i // self._windows)[i % self._windows] for i in sequences], dtype=np.int64)

    def shifts(self, sequences: range) -> np.ndarray:
        """The tokens (n,) int64 by which the windows of these sequences begin later."""
        return np.array([self._shift(i // self._windows) for i in sequences], dtype=np.int64)


def prefetched(items: Iterator[Item], ahead: int, begin: Callable[[], None]) -> Generator[Item, None, None]:
    """The same items. A thread calls `begin` once and then prepares up to `ahead` items in advance."""
    thread = ThreadPoolExecutor(1, initializer=begin)
    try:
        pending = deque(thread.submit(next, items, None) for _ in range(ahead))
        while (item := pending.popleft().result()) is not None:
            pending.append(thread.submit(next, items, None))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
