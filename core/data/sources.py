"""The files of a source, local or remote: finding them, identifying their content, opening them."""

import glob
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from tqdm import tqdm

from core.data.shards import short_reason

PAUSES = (1, 2, 4, 8, 16, 32, 64)  # seconds between the attempts of a remote read
SAMPLES, SAMPLE_BYTES = 16, 16_384  # of a local file, for its fingerprint
RETRYABLE = (408, 425, 429)  # the temporary errors among the HTTP statuses 4xx; all 5xx are retried
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # not retried

T = TypeVar("T")


@dataclass(frozen=True)
class SourceFile:
    """A file. `fingerprint` identifies its content: the hub's hash, or a hash of samples of a local file."""

    url: str = field(repr=False)
    name: str
    bytes: int
    fingerprint: str


@dataclass(frozen=True)
class Source:
    name: str  # the glob; only its last component for local files, which are the same source in any folder
    revision: str | None  # the hub's commit
    files: tuple[SourceFile, ...]

    def to_json(self) -> dict[str, Any]:
        """The manifest's entry."""
        files = [{key: value for key, value in asdict(file).items() if key != "url"} for file in self.files]
        return {"name": self.name, "revision": self.revision, "files": files}


def is_local(url: str) -> bool:
    """Whether a file is on this machine. In a chain such as zip://a.txt::b.zip the last address counts."""
    last = url.rsplit("::", 1)[-1]
    return "://" not in last or last.startswith(("file://", "local://"))


def retry(read: Callable[[], T], url: str) -> T:
    """`read()`, repeated after growing pauses if a remote file fails with a temporary error.

    Raises ValueError for damaged content, OSError for a file that can't be reached.
    """
    pauses = iter(PAUSES)
    while True:
        try:
            return read()
        except (ValueError, ImportError):
            raise
        except Exception as error:  # the library of each protocol has its own errors
            status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", 500))
            final = isinstance(error, FINAL) or (400 <= status < 500 and status not in RETRYABLE)
            reason = f"{url} can't be read ({short_reason(error)})"
            if is_local(url) or final or not (pause := next(pauses, 0)):
                raise OSError(f"{reason}. Fix this and rerun the same command to resume") from error
        tqdm.write(f"{reason}, retrying in {pause} s")
        time.sleep(pause)


def open_file(url: str, **settings: Any) -> Any:
    """A file, local or remote, opened for reading bytes."""
    import fsspec

    if "://" not in url:
        return open(url, "rb")
    first, *rest = url.split("::")
    if rest and "://" in first:
        protocol, path = first.split("://", 1)
        return _open_archive("::".join([f"{protocol}://", *rest]), os.getpid()).open(path, "rb")
    fs, path = fsspec.core.url_to_fs(url)
    return fs.open(path, "rb", **settings)


@lru_cache(maxsize=1)  # fsspec reads an archive's directory at each opening
def _open_archive(chain: str, _: int) -> Any:
    """The file system of an archive. A forked process opens its own, as it must not share a position in the file."""
    import fsspec

    return fsspec.core.url_to_fs(chain)[0]


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


def find_source(pattern: str, revision: str | None) -> Source:
    """The files that match a glob, sorted; those of the hub at `revision`, or at its newest commit."""
    import fsspec

    pinned, revision = pin_revision(pattern, revision)
    try:
        fs, path = retry(lambda: fsspec.core.url_to_fs(pinned), pinned)
    except ImportError as error:
        raise ValueError(f"--source {pattern} needs a package: {short_reason(error)}") from None
    plain = is_local(pinned) and "::" not in pinned
    path = _literal(path) if plain else path
    found: dict[str, dict[str, Any]] = retry(lambda: fs.glob(path, detail=True), pinned)
    files = []
    for path, details in sorted(found.items()):
        name = path.rsplit("/", 1)[-1]
        if details["type"] != "directory" and not name.startswith("."):  # a link to a file is a file
            url = path if plain else _address(pinned, path)
            files.append(SourceFile(url, name, details["size"], fingerprint(url, details)))
    if not files:
        inside = f"{pattern.rstrip('/')}/*.parquet" if found else "folder/*.parquet"  # a folder matches itself
        raise ValueError(f"--source {pattern} matches no file. Use a glob in quotes, such as '{inside}'")
    return Source(pattern.rsplit("/", 1)[-1] if plain else pattern, revision, tuple(files))


def _literal(pattern: str) -> str:
    """A local glob in which the folders and files that exist are taken literally, brackets included."""
    parts = pattern.split("/")
    existing = next((n for n in range(len(parts), 0, -1) if os.path.lexists("/".join(parts[:n]))), 0)
    return "/".join([*map(glob.escape, parts[:existing]), *parts[existing:]])


def _address(pattern: str, path: str) -> str:
    """The address of a file that a glob found, with the glob's protocol and the rest of its chain."""
    links = pattern.split("::")
    i = next((i for i, link in enumerate(links) if "://" in link), 0)
    links[i] = path if "://" in path else f"{links[i].split('://', 1)[0]}://{path}"
    return "::".join(links)


def fingerprint(url: str, details: dict[str, Any]) -> str:
    """The hash that the hub or another store has for a file; the sha256 of evenly spaced samples for a local file."""
    if "blob_id" in details:
        return details["lfs"].sha256 if details.get("lfs") else details["blob_id"]
    if "://" in url:
        return str(details.get("ETag") or details.get("etag") or details.get("CRC") or "")
    digest, step = hashlib.sha256(), max((details["size"] - SAMPLE_BYTES) / (SAMPLES - 1), SAMPLE_BYTES)
    with open(url, "rb") as file:
        for sample in range(min(SAMPLES, details["size"] // SAMPLE_BYTES + 1)):
            file.seek(round(sample * step))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
