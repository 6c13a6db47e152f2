"""A data folder while it is written: what is done of each source file, so that any process can go on from there.

    data/NAME/.lock                                  byte i is locked by the process that works on source file i
    data/NAME/unfinished/settings.json               what all processes must agree on
    data/NAME/unfinished/000003/part.json            what is done of source file 3, and where to go on
    data/NAME/unfinished/000003/train_000001.npy     its shards

The processes need no talk: each works on its own source files, and who finds all parts complete joins them, which
numbers the shards, checks them, moves them up and lists them in the manifest.
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
from core.data.shards import MANIFEST, UNFINISHED, open_dataset
from core.files import ALL, FileLocks, sha256, write_json

SETTINGS = "settings.json"
DISTRUST = "fastokens-differs"


@dataclass(frozen=True)
class Documents:
    """Tokenised documents joined, each begun by the end-of-text token."""

    ids: np.ndarray  # (n,) uint16
    starts: np.ndarray  # (d,) where each document begins in ids
    rows: np.ndarray  # (d,) each document's row in its source file
    text_bytes: np.ndarray  # (d,) each document's length as UTF-8

    @property
    def ends(self) -> np.ndarray:
        return np.append(self.starts[1:], len(self.ids))  # (d,)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, some: slice) -> "Documents":
        starts = self.starts[some]
        if not len(starts):
            return Documents(self.ids[:0], starts, starts, starts)
        begin, end = starts[0], self.ends[some][-1]
        return Documents(self.ids[begin:end], starts - begin, self.rows[some], self.text_bytes[some])

    def at(self, position: int) -> int:
        """The document that holds the token before `position`, or begins there."""
        return max(int(np.searchsorted(self.starts, position, side="right")) - 1, 0)


@dataclass
class Counts:
    """What the units before a certain one held."""

    units: int = 0
    rows: int = 0
    empty: int = 0
    broken: list[str] = field(default_factory=list)
    tokens: int = 0
    val_tokens: int = 0
    val_bytes: int = 0


@dataclass
class Part:
    """What is done of one source file. All of it but `folder` stands in part.json."""

    folder: Path
    source: dict[str, Any]  # name, bytes and fingerprint of the file
    others: list[str]  # fingerprints of the source's files where a share of them all is for validation
    val_bytes: int  # and how much text that share is
    shards: list[dict[str, Any]] = field(default_factory=list)
    before: Counts = field(default_factory=Counts)  # the units whose documents are all in shards
    row: int = -1  # the shards end in this row of the file,
    token: int = 0  # after so many of its tokens
    encoders: list[str] = field(default_factory=list)
    complete: bool = False
    last: bool = False  # --max-tokens was reached in this file

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards)

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {key: value for key, value in asdict(self).items() if key != "folder"}
        write_json(self.folder / "part.json", state)

    def close(self) -> None:
        self.complete = True
        self.save()

    def drop(self) -> None:
        """Remove the shards, because the file they came from is damaged: mended, it is another file."""
        shutil.rmtree(self.folder, ignore_errors=True)


def load_part(out: Path, number: int, head: dict[str, Any], val_bytes: int | None = None) -> Part:
    """What is done of a source file, under the settings `head`. Raises ValueError where it has changed since.

    `val_bytes` gives who claimed the file: what can't be gone on from is removed. Who only looks gives none.
    """
    folder, files = out / UNFINISHED / f"{number:06d}", head["source"]["files"]
    source = files[number]
    others = [file["fingerprint"] for file in files] if number == 0 and head["val_tokens"] is None else []
    new = Part(folder, source, others, val_bytes or 0)
    try:
        state = json.loads((folder / "part.json").read_text())
        part = Part(folder=folder, **state | {"before": Counts(**state["before"])})
    except FileNotFoundError:
        return new
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder / 'part.json'} is damaged ({error!r}): delete {folder}, and this file is made again"
        ) from None
    if part.source != source:
        if part.shards:
            raise ValueError(
                f"{source['name']} has changed since shards were made of it ({part.source} then, {source} now): delete "
                f"{folder} to make this file's shards again, or start anew with --overwrite"
            )
        return new
    if (distrusted(out) and "fastokens" in part.encoders) or part.others != others:
        if val_bytes is not None:
            part.drop()
        return new
    return part


class PartWriter:
    """Cuts source files' documents into shards, none of which holds both splits, going on where each part ends."""

    def __init__(self, shard_tokens: int, token_bytes: np.ndarray) -> None:
        self.part: Part  # the one that is written to
        self._token_bytes = token_bytes  # (vocab_size,) bytes of text that each id stands for
        self._buffer, self._spare = (np.empty(shard_tokens, dtype=np.uint16) for _ in range(2))
        self._entry: dict[str, Any] = {}  # the manifest's, of the shard in the buffer
        self._thread = ThreadPoolExecutor(1)  # writes a shard while the next one fills
        self._written: tuple[Future[str], dict[str, Any], Part] | None = None  # the shard in its hands

    def add(self, split: str, documents: Documents) -> None:
        """Append documents, without what the part's shards hold already, writing each shard as it fills."""
        if not len(documents):
            return
        if self._entry and self._entry["split"] != split:
            self.flush()
        done = self._known(documents)
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
            self.part.row, self.part.token = int(documents.rows[i]), int(stop - documents.starts[i])
            done = stop
            if self._entry["tokens"] == len(self._buffer):
                self.flush()

    def _known(self, documents: Documents) -> int:
        """How many of the documents' tokens are in the part's shards or in the buffer."""
        i = int(np.searchsorted(documents.rows, self.part.row))
        if i == len(documents):
            return len(documents.ids)
        return int(documents.starts[i]) + (self.part.token if documents.rows[i] == self.part.row else 0)

    def _bytes_before(self, documents: Documents, position: int) -> int:
        i = documents.at(position)
        cut = documents.ids[documents.starts[i] : position]
        return int(documents.text_bytes[:i].sum()) + int(self._token_bytes[cut].sum())

    def flush(self) -> None:
        """Have what is buffered written as a shard. Raises OSError for the shard before it."""
        self.wait()
        if not self._entry:
            return
        entry = {"file": f"{self._entry['split']}_{len(self.part.shards):06d}.npy"} | self._entry
        path, ids = self.part.folder / entry["file"], self._buffer[: entry["tokens"]]
        self._written = self._thread.submit(write_shard, path, ids), entry, replace(self.part)
        self._entry = {}
        self._buffer, self._spare = self._spare, self._buffer

    def close(self) -> None:
        """Write no more, also not what is being written."""
        self._thread.shutdown()

    def wait(self) -> None:
        """Until the last shard is on disk; then save the part as it was when the shard was full. Raises OSError."""
        if self._written:
            digest, entry, part = self._written
            self._written = None
            part.shards.append(entry | {"sha256": digest.result()})
            part.save()


def write_shard(path: Path, ids: np.ndarray) -> str:
    """Write token ids (n,) as .npy, by rename, and return the sha256 of the file. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(ids))
            file.write(ids.data)  # np.save says nothing where the last bytes don't fit on the disk
            file.flush()
            os.fsync(file.fileno())
        digest = sha256(unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"no space left for a shard of {ids.nbytes:,} bytes in {path.parent}: make room and give the same command "
            "again, it goes on after the last whole shard"
        ) from None
    return digest


def recorded(out: Path) -> dict[str, Any]:
    """The settings that the folder was made with, or is being made with; empty where there are none."""
    if (out / MANIFEST).is_file():
        return open_dataset(out).manifest
    try:
        return json.loads((out / UNFINISHED / SETTINGS).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{out / UNFINISHED / SETTINGS} is damaged ({error}): start anew with --overwrite") from None


def settle(out: Path, head: dict[str, Any]) -> None:
    """Raise ValueError where the folder was begun with other settings; record them where it is new."""
    known = recorded(out)
    finished = (out / MANIFEST).is_file()
    for key, value in (head if finished else _without_contents(head)).items():
        if known and known.get(key) != value:
            name, old, new = _difference(key, known.get(key), value)
            raise ValueError(f"{out} was made with {name} {old}, now it is {new}: take another --out, or --overwrite")
    for shard in known["shards"] if finished else ():
        if not (out / shard["file"]).is_file():
            raise ValueError(
                f"{out / shard['file']} is missing, the manifest lists it: write all again with --overwrite"
            )
    if finished:
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    elif not known:
        (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
        write_json(out / UNFINISHED / SETTINGS, _without_contents(head))


def _without_contents(head: dict[str, Any]) -> dict[str, Any]:
    """Of the files only the names: each part knows what its own file held."""
    names = [file["name"] for file in head["source"]["files"]]
    return head | {"source": head["source"] | {"files": names}}


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The innermost entry in which two values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        return _difference(f"{name} {key}", old.get(key), new.get(key))
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{len(old)} {name}", "", f"{len(new)} of them"
        i = next(i for i in range(len(old)) if old[i] != new[i])
        label = old[i].get("name", i) if isinstance(old[i], dict) else i
        return _difference(f"{name} {label}", old[i], new[i])
    return name, old, new


def distrust(out: Path, reason: str) -> None:
    """Have every part that fastokens made, here or elsewhere, made again by tiktoken."""
    write_json(out / UNFINISHED / DISTRUST, reason)


def distrusted(out: Path) -> bool:
    return (out / UNFINISHED / DISTRUST).exists()


def clear(out: Path, claims: FileLocks) -> None:
    """Remove what earlier calls left, the manifest first. Raises ValueError where a process is at work there."""
    claims.take(0, count=ALL)
    with claims.alone():
        (out / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        remove_shards(out, keep=set())


def forget_barren(out: Path, claims: FileLocks) -> bool:
    """Forget a preparation that came to no shard, such as one of a mistyped --source; whether that was so."""
    barren = not any([(out / MANIFEST).exists(), *(out / UNFINISHED).glob("*/*.npy")])
    if barren and claims.unheld():
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        return True
    return False


def remove_shards(out: Path, keep: set[str]) -> None:
    for path in out.iterdir():
        if (
            re.fullmatch(r"(?:val|train)_\d{6}\.npy|\..*\.(?:unfinished|json\.[0-9a-f]+)", path.name)
            and path.name not in keep
        ):
            path.unlink()


def join(out: Path, parts: list[Part], head: dict[str, Any]) -> None:
    """Number the shards of all parts, move them up, check them, and list them in the manifest.

    Interrupted, it can be called again. Raises ValueError for a shard that is not as it was written.
    """
    shards: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        for shard in part.shards:
            name = f"{shard['split']}_{len(shards):06d}.npy"
            with contextlib.suppress(FileNotFoundError):  # moved already
                os.replace(part.folder / shard["file"], out / name)
            shards.append(shard | {"file": name, "source_file": number})
    with ThreadPoolExecutor(8) as pool:
        paths = [out / shard["file"] for shard in shards]
        digests = list(cli.progress_bar(pool.map(sha256, paths), "checking shards", len(paths), delay=1, leave=False))
    for path, shard, digest in zip(paths, shards, digests, strict=True):
        if digest != shard["sha256"]:
            raise ValueError(f"{path} was altered since it was written: write all again with --overwrite")
    counts = {
        "empty_documents": sum(part.before.empty for part in parts),
        "broken_documents": [place for part in parts for place in part.before.broken],
    }
    remove_shards(out, keep={shard["file"] for shard in shards})
    write_json(out / MANIFEST, head | counts | {"shards": shards})
    shutil.rmtree(out / UNFINISHED)
