"""A data folder during preparation: the recorded progress of each source file, from which any process can resume.

    data/NAME/.lock                                  byte i is locked by the process that works on source file i
    data/NAME/unfinished/settings.json               the settings that all processes share
    data/NAME/unfinished/000003/part.json            the progress of source file 3
    data/NAME/unfinished/000003/train_000001.npy     its shards

The processes don't communicate: each works on its own source files. A process that finds all files complete joins the
shards: it numbers them, moves them up, checks them and lists them in the manifest.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from core import cli
from core.data.encode import Documents
from core.data.shards import MANIFEST, UNFINISHED, open_dataset, short_reason
from core.files import ALL_FILES, FileLocks, sha256, write_json

SETTINGS = "settings.json"
PROGRESS = "part.json"
# The names in part.json that differ from those of the fields.
KEYS = {"source_fingerprints": "others", "counts": "before", "reached_limit": "last"}
KEYS |= {"chunks": "units", "invalid": "broken"}
FIELDS = {key: field for field, key in KEYS.items()}


@dataclass
class Counts:
    """Totals over the first chunks of a source file."""

    chunks: int = 0
    rows: int = 0
    empty: int = 0
    invalid: list[str] = field(default_factory=list)
    tokens: int = 0
    val_tokens: int = 0
    val_bytes: int = 0


@dataclass
class SourceProgress:
    """The progress of one source file. part.json holds all fields except `folder`."""

    folder: Path
    source: dict[str, Any]  # name, bytes and fingerprint of the file
    source_fingerprints: list[str]  # of all source files, where validation is a share of all of them
    val_bytes: int  # the size of that share, in bytes of text
    shards: list[dict[str, Any]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)  # of the chunks whose documents are all in shards
    row: int = -1  # the shards end in this row of the file,
    token: int = 0  # after this number of its tokens
    encoders: list[str] = field(default_factory=list)
    complete: bool = False
    reached_limit: bool = False  # the file contains the end of --max-tokens

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards)

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = _rename(asdict(self), KEYS)
        del state["folder"]
        write_json(self.folder / PROGRESS, state | {"before": _rename(state["before"], KEYS)})

    def finish(self) -> None:
        self.complete = True
        self.save()

    def discard(self) -> None:
        """Remove the shards of a damaged file: the repaired file is another file."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _rename(entries: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in entries.items()}


def load_progress(out: Path, number: int, header: dict[str, Any], val_bytes: int | None = None) -> SourceProgress:
    """The progress of a source file under the settings in `header`. Raises ValueError if the file has changed.

    The process that has locked the file passes `val_bytes`; then progress that can't be resumed is removed. Without
    it the folder is only read.
    """
    folder, files = out / UNFINISHED / f"{number:06d}", header["source"]["files"]
    source = files[number]
    fingerprints = [file["fingerprint"] for file in files] if number == 0 and header["val_tokens"] is None else []
    new = SourceProgress(folder, source, fingerprints, val_bytes or 0)
    try:
        state = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        counts = Counts(**_rename(state["before"], FIELDS))
        progress = SourceProgress(folder=folder, **_rename(state, FIELDS) | {"counts": counts})
    except FileNotFoundError:
        return new
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder / PROGRESS} is damaged ({short_reason(error)}). Delete {folder} and rerun the same command"
        ) from None
    if progress.source != source:
        if progress.shards:
            raise ValueError(
                f"{source['name']} has changed since its shards were written (from {progress.source} to {source}). "
                f"Delete {folder} to write the shards of this file again, or use --overwrite"
            )
        return new
    if progress.source_fingerprints != fingerprints:
        if val_bytes is not None:
            progress.discard()
        return new
    return progress


class ShardWriter:
    """Cuts the documents of source files into shards of one split each, from the end of each file's progress on."""

    def __init__(self, shard_tokens: int, token_bytes: np.ndarray) -> None:
        self.progress: SourceProgress  # of the file whose documents are added now
        self._token_bytes = token_bytes  # (vocab_size,) bytes of text per id
        self._buffer, self._spare = (np.empty(shard_tokens, dtype=np.uint16) for _ in range(2))
        self._entry: dict[str, Any] = {}  # the manifest entry of the shard in the buffer
        self._thread = ThreadPoolExecutor(1)  # writes a shard while the next one fills
        self._in_flight: tuple[Future[str], dict[str, Any], SourceProgress] | None = None  # the shard being written

    def add(self, split: str, documents: Documents) -> None:
        """Append the documents that the shards don't contain yet. Write each shard when it is full."""
        if not len(documents):
            return
        if self._entry and self._entry["split"] != split:
            self.flush()
        done = self._tokens_written(documents)
        while done < len(documents.ids):
            if not self._entry:
                i = documents.at(done)
                begin = {"row": int(documents.rows[i]), "token": int(done - documents.starts[i])}
                self._entry = {"split": split, "tokens": 0, "documents": 0, "bytes": 0, "begin": begin}
            size = self._entry["tokens"]
            stop = min(done + len(self._buffer) - size, len(documents.ids))
            self._buffer[size : size + stop - done] = documents.ids[done:stop]
            self._entry["tokens"] += stop - done
            self._entry["documents"] += int(np.count_nonzero((documents.starts >= done) & (documents.starts < stop)))
            self._entry["bytes"] += self._bytes_before(documents, stop) - self._bytes_before(documents, done)
            i = documents.at(stop)
            self.progress.row, self.progress.token = int(documents.rows[i]), int(stop - documents.starts[i])
            done = stop
            if self._entry["tokens"] == len(self._buffer):
                self.flush()

    def _tokens_written(self, documents: Documents) -> int:
        """The number of the documents' tokens that are in the file's shards or in the buffer."""
        i = int(np.searchsorted(documents.rows, self.progress.row))
        if i == len(documents):
            return len(documents.ids)
        return int(documents.starts[i]) + (self.progress.token if documents.rows[i] == self.progress.row else 0)

    def _bytes_before(self, documents: Documents, position: int) -> int:
        """Bytes of text of the tokens before `position`."""
        i = documents.at(position)
        last = documents.ids[documents.starts[i] : position]
        return int(documents.text_bytes[:i].sum()) + int(self._token_bytes[last].sum())

    def flush(self) -> None:
        """Start to write the buffer as a shard. Raises OSError for the shard before it."""
        self.wait()
        if not self._entry:
            return
        entry = {"file": f"{self._entry['split']}_{len(self.progress.shards):06d}.npy"} | self._entry
        path, ids = self.progress.folder / entry["file"], self._buffer[: entry["tokens"]]
        self._in_flight = self._thread.submit(write_shard, path, ids), entry, replace(self.progress)
        self._entry = {}
        self._buffer, self._spare = self._spare, self._buffer

    def close(self) -> None:
        """Stop the thread. A shard in flight is not recorded."""
        self._thread.shutdown()

    def wait(self) -> None:
        """Wait for the shard in flight, then save the progress as of that shard. Raises OSError."""
        if self._in_flight:
            digest, entry, progress = self._in_flight
            self._in_flight = None
            progress.shards.append(entry | {"sha256": digest.result()})
            progress.save()


def write_shard(path: Path, ids: np.ndarray) -> str:
    """Write token ids (n,) uint16 as .npy, by rename, and return the sha256 of the file. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(ids))
            file.write(ids.data)  # np.save reports no error if the last bytes don't fit on the disk
            file.flush()
            os.fsync(file.fileno())
        digest = sha256(unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"{path.parent} has no space left for a shard of {ids.nbytes:,} bytes. Free disk space and rerun the same "
            "command to resume"
        ) from None
    return digest


def recorded_settings(out: Path) -> dict[str, Any]:
    """The settings that a finished or unfinished folder was made with; empty for a new folder."""
    if (out / MANIFEST).is_file():
        return open_dataset(out).manifest
    path = out / UNFINISHED / SETTINGS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({short_reason(error)}). Start again with --overwrite") from None


def check_settings(out: Path, header: dict[str, Any]) -> None:
    """Raise ValueError if the folder was begun with other settings. Record the settings of a new folder."""
    recorded = recorded_settings(out)
    finished = (out / MANIFEST).is_file()
    for key, value in (header if finished else _without_contents(header)).items():
        if recorded and recorded.get(key) != value:
            name, old, new = _difference(key, recorded.get(key), value)
            raise ValueError(
                f"{out} was made with {name} {old}, but this command has {new}. Use another --out, or --overwrite"
            )
    for shard in recorded["shards"] if finished else ():
        if not (out / shard["file"]).is_file():
            raise ValueError(
                f"{out / shard['file']} is missing, but the manifest lists it. Write the folder again with --overwrite"
            )
    if finished:
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    elif not recorded:
        (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
        write_json(out / UNFINISHED / SETTINGS, _without_contents(header))


def _without_contents(header: dict[str, Any]) -> dict[str, Any]:
    """The settings with only the names of the source files. Each file's progress records its content."""
    names = [file["name"] for file in header["source"]["files"]]
    return header | {"source": header["source"] | {"files": names}}


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The innermost entry in which two values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        return _difference(f"{name} {key}", old.get(key), new.get(key))
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"a number of {name} of", len(old), len(new)
        i = next(i for i in range(len(old)) if old[i] != new[i])
        label = old[i].get("name", i) if isinstance(old[i], dict) else i
        return _difference(f"{name} {label}", old[i], new[i])
    return name, old, new


def clear(out: Path, locks: FileLocks) -> None:
    """Remove all shards, the manifest first. Raises ValueError if another process is writing the folder."""
    locks.acquire(0, count=ALL_FILES)
    with locks.exclusive():
        (out / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        remove_shards(out, keep=set())


def discard_empty(out: Path, locks: FileLocks) -> bool:
    """Remove the settings of a run that ended before its first shard, e.g. with a mistyped --source.

    Returns whether they were removed.
    """
    empty = not any([(out / MANIFEST).exists(), *(out / UNFINISHED).glob("*/*.npy")])
    if empty and locks.is_free():
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        return True
    return False


def remove_shards(out: Path, keep: set[str]) -> None:
    """Remove shards and incomplete files except for the names in `keep`."""
    for path in out.iterdir():
        if (
            re.fullmatch(r"(?:val|train)_\d{6}\.npy|\..*\.(?:unfinished|json\.[0-9a-f]+)", path.name)
            and path.name not in keep
        ):
            path.unlink()


def join(out: Path, progress: list[SourceProgress], header: dict[str, Any]) -> None:
    """Number the shards of all source files, move them up, check them, and list them in the manifest.

    After an interruption it can be called again. Raises ValueError for a shard that was altered.
    """
    shards: list[dict[str, Any]] = []
    for number, of_file in enumerate(progress):
        for shard in of_file.shards:
            name = f"{shard['split']}_{len(shards):06d}.npy"
            with contextlib.suppress(FileNotFoundError):  # an interrupted call moved it
                os.replace(of_file.folder / shard["file"], out / name)
            shards.append(shard | {"file": name, "source_file": number})
    with ThreadPoolExecutor(8) as pool:
        paths = [out / shard["file"] for shard in shards]
        digests = list(cli.progress_bar(pool.map(sha256, paths), "checking shards", len(paths), delay=1, leave=False))
    for path, shard, digest in zip(paths, shards, digests, strict=True):
        if digest != shard["sha256"]:
            raise ValueError(f"{path} was altered after it was written. Write the folder again with --overwrite")
    counts = {
        "empty_documents": sum(of_file.counts.empty for of_file in progress),
        "broken_documents": [place for of_file in progress for place in of_file.counts.invalid],
    }
    remove_shards(out, keep={shard["file"] for shard in shards})
    write_json(out / MANIFEST, header | counts | {"shards": shards})
    shutil.rmtree(out / UNFINISHED)
