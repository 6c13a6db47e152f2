"""The files of a source, local or remote: finding them, identifying their content, opening them."""

import glob
import hashlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypeVar

from tqdm import tqdm

from core.data.shards import short_reason

PAUSES = (1, 2, 4, 8, 16, 32, 64)  # seconds between the attempts of a remote read
SAMPLES, SAMPLE_BYTES = 16, 16_384  # of a local file, for its fingerprint
RETRYABLE = (408, 425, 429)  # the temporary errors among the HTTP statuses 4xx; all 5xx are retried
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # not retried

T = TypeVar("T")


class UnreadableError(OSError):
    """A source file can't be reached."""


@dataclass(frozen=True)
class SourceFile:
    """A file. `fingerprint` identifies its content: the hub's hash, or a hash of samples of a local file."""

    url: str = field(repr=False)
    name: str
    bytes: int
    fingerprint: str
    path: str = field(repr=False)  # in its file system
    root: str | None = field(repr=False)  # an address in that file system; None for a plain local file

    def open(self, **settings: Any) -> Any:
        """The file, opened for reading bytes. Each range that is read from a network is retried."""
        if not self.root:
            return open(self.path, "rb")
        file = _file_system(self.root, os.getpid()).open(self.path, **settings)
        if hasattr(file, "cache"):
            fetch = file.cache.fetcher
            file.cache.fetcher = lambda start, end: retry(partial(fetch, start, end), self.url)
        return file


Files = tuple[SourceFile, ...]


@lru_cache(maxsize=1)  # fsspec reads an archive's directory at each opening
def _file_system(address: str, _: int) -> Any:
    """The file system of an address. A forked process opens its own, as it must not share a position in an archive."""
    import fsspec

    return fsspec.core.url_to_fs(address)[0]


def is_local(url: str) -> bool:
    """Whether a file is on this machine. In a chain such as zip://a.txt::b.zip the last address counts."""
    last = url.rsplit("::", 1)[-1]
    return "://" not in last or last.startswith(("file://", "local://"))


def retry(read: Callable[[], T], url: str, pauses: Iterable[int] | None = None) -> T:
    """`read()`, repeated after growing pauses (in seconds) if a remote file fails with a temporary error.

    Raises ValueError for damaged content, and UnreadableError for a file that can't be reached.
    """
    pauses = iter(PAUSES if pauses is None else pauses)
    while True:
        try:
            return read()
        except (UnreadableError, ImportError, MemoryError):
            raise
        except Exception as error:  # each library has its own errors
            of_arrow = type(error).__module__.startswith("pyarrow")
            if isinstance(error, ValueError) and not of_arrow:
                raise
            reason = short_reason(error)
            if of_arrow or (is_local(url) and not getattr(error, "errno", None)):  # errors of the machine have an errno
                raise ValueError(f"{url} is damaged or cut short ({reason}). Replace the file") from None
            status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", 500))
            final = isinstance(error, FINAL) or (400 <= status < 500 and status not in RETRYABLE)
            reason = f"{url} can't be read ({reason})"
            if is_local(url) or final or not (pause := next(pauses, 0)):
                raise UnreadableError(f"{reason}. Fix this and rerun the same command to resume") from error
        tqdm.write(f"{reason}, retrying in {pause} s")
        time.sleep(pause)


def pin_revision(pattern: str, revision: str | None) -> tuple[str, str | None]:
    """A hub address at `revision`, or at its newest commit, and that commit; other addresses unchanged and None."""
    if not pattern.startswith("hf://"):
        return pattern, None
    from huggingface_hub import HfApi, HfFileSystem

    try:
        place: Any = HfFileSystem().resolve_path(pattern)
        revision = revision or HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision).sha
    except Exception as error:
        raise ValueError(
            f"--source {pattern} was not found on the hub ({short_reason(error)}). Check the name and the network, "
            "or use local files: --source 'folder/*.parquet'"
        ) from None
    kind = "" if place.repo_type == "model" else f"{place.repo_type}s/"
    return f"hf://{kind}{place.repo_id}@{revision}/{place.path_in_repo}", revision


def find_source(pattern: str, revision: str | None) -> tuple[Files, dict[str, Any]]:
    """The files that match a glob, sorted, and the manifest's entry; those of the hub at `revision` or the newest."""
    import fsspec

    pinned, revision = pin_revision(pattern, revision)
    plain = is_local(pinned) and "::" not in pinned

    def find() -> tuple[str, dict[str, dict[str, Any]]]:
        fs, inner = fsspec.core.url_to_fs(pinned)
        if plain:  # folders and files that exist are taken literally, brackets included
            parts = inner.split("/")
            existing = next((n for n in range(len(parts), 0, -1) if os.path.lexists("/".join(parts[:n]))), 0)
            inner = "/".join([*map(glob.escape, parts[:existing]), *parts[existing:]])
        return inner, fs.glob(inner, detail=True)

    try:
        inner, found = retry(find, pinned)
    except ImportError as error:
        raise ValueError(f"--source {pattern} needs a package: {short_reason(error)}") from None
    files = []
    for path, details in sorted(found.items()):
        name, url = path.rsplit("/", 1)[-1], path if plain else pinned.replace(inner, path, 1)
        if details["type"] != "directory" and not name.startswith("."):  # a link to a file is a file
            identity = fingerprint(path, details, plain)
            files.append(SourceFile(url, name, details["size"], identity, path, None if plain else pinned))
    if not files:
        inside = f"{pattern.rstrip('/')}/*.parquet" if found else "folder/*.parquet"  # a folder matches itself
        raise ValueError(f"--source {pattern} matches no file. Use a glob in quotes, such as '{inside}'")
    # Local files are the same source in any folder.
    entry = {"name": pattern.rsplit("/", 1)[-1] if plain else pattern, "revision": revision}
    entries = [{"name": file.name, "bytes": file.bytes, "fingerprint": file.fingerprint} for file in files]
    return tuple(files), entry | {"files": entries}


def fingerprint(path: str, details: dict[str, Any], plain: bool) -> str:
    """The hash that the hub or another store has for a file; the sha256 of evenly spaced samples for a local file."""
    if "blob_id" in details:
        return details["lfs"].sha256 if details.get("lfs") else details["blob_id"]
    if not plain:
        return str(details.get("ETag") or details.get("etag") or details.get("CRC") or "")
    digest, step = hashlib.sha256(), max((details["size"] - SAMPLE_BYTES) / (SAMPLES - 1), SAMPLE_BYTES)
    with open(path, "rb") as file:
        for sample in range(min(SAMPLES, details["size"] // SAMPLE_BYTES + 1)):
            file.seek(round(sample * step))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
