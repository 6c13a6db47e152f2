"""The files of a source: those that match a glob, local or remote, and what identifies their content."""

import glob
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from tqdm import tqdm

from core.data.shards import short_reason

PAUSES = (1, 2, 4, 8, 16, 32, 64)  # seconds between the attempts of a remote read
SAMPLES, SAMPLE_BYTES = 16, 16_384  # of a local file, for its fingerprint
RETRYABLE = (408, 425, 429)  # the temporary errors among the HTTP statuses 4xx; all 5xx are retried

T = TypeVar("T")


@dataclass(frozen=True)
class SourceFile:
    """A file. `fingerprint` identifies its content: the hub's hash, or a hash of samples of a local file."""

    url: str
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

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Source":
        return cls(entry["name"], entry["revision"], tuple(SourceFile("", **file) for file in entry["files"]))


def is_local(url: str) -> bool:
    """Whether a file, or the archive that contains it, is on this machine: `zip://a.jsonl::b.zip` is."""
    last = url.rsplit("::", 1)[-1]
    return "://" not in last or last.startswith(("file://", "local://"))


def retry(read: Callable[[], T], url: str) -> T:
    """`read()`, repeated after growing pauses if a remote file fails with a temporary error.

    Raises ValueError for damaged content, OSError for a file that can't be reached.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except (ValueError, ImportError):
            raise
        except Exception as error:  # the library of each protocol has its own errors
            status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", 500))
            refused = 400 <= status < 500 and status not in RETRYABLE
            final = refused or isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
            reason = short_reason(error)
            if is_local(url) or final or pause is None:
                raise OSError(
                    f"{url} can't be read ({reason}). Fix this and rerun the same command to resume"
                ) from error
            tqdm.write(f"{url} can't be read ({reason}), retrying in {pause} s")
        time.sleep(pause)
    raise AssertionError("the last pause is None")


def pin_revision(pattern: str, revision: str | None) -> tuple[str, str | None]:
    """A hub address at `revision`, or at its newest commit, and that commit; other addresses unchanged and None."""
    if not pattern.startswith("hf://"):
        return pattern, None
    if revision is None:
        from huggingface_hub import HfApi, HfFileSystem

        try:
            place: Any = HfFileSystem().resolve_path(pattern.split("*", 1)[0].rsplit("/", 1)[0])
            revision = HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision).sha
        except Exception as error:
            raise ValueError(
                f"--source {pattern} was not found on the hub ({short_reason(error)}). Check the name and the network, "
                "or use local files: --source 'folder/*.parquet'"
            ) from None
    explicit = r"@(?:refs/(?:convert|pr)/[^/]+|[^/]+)"  # two kinds of revision contain slashes
    return re.sub(rf"^(hf://(?:datasets/)?[^/]+/[^/@]+)(?:{explicit})?", rf"\1@{revision}", pattern), revision


def source_name(pattern: str) -> str:
    return pattern.rsplit("/", 1)[-1] if is_local(pattern) and "::" not in pattern else pattern


def find_files(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """The details of the files that match a glob. A path that exists is taken literally, with its brackets."""
    if "[" in path and fs.exists(path):
        return {path: fs.info(path)}
    folder = re.split(r"[*?]", path, maxsplit=1)[0].rpartition("/")[0]
    if "[" in folder and fs.exists(folder):
        path = glob.escape(folder) + path[len(folder) :]
    return fs.glob(path, detail=True)


def file_url(pattern: str, fs: Any, name: str) -> str:
    """The address of a file that `fs` found as `name`, with the chain of the pattern."""
    first, _, rest = pattern.partition("::")
    if not rest:
        return name if is_local(pattern) else fs.unstrip_protocol(name)
    if "://" in first:
        return f"{first.split('://')[0]}://{name}::{rest}"
    return f"{first}::{fs.unstrip_protocol(name)}"  # a cache of remote files


def find_source(pattern: str, revision: str | None) -> Source:
    """The files that match a glob, sorted; those of the hub at `revision`, or at its newest commit."""
    import fsspec

    pinned, revision = pin_revision(pattern, revision)
    try:
        fs, path = fsspec.core.url_to_fs(pinned)
    except ImportError as error:
        raise ValueError(f"--source {pattern} needs a package: {short_reason(error)}") from None
    found: dict[str, dict[str, Any]] = retry(lambda: find_files(fs, path), pinned)
    files = []
    for path, details in sorted(found.items()):
        name = path.rsplit("/", 1)[-1]
        if details["type"] != "directory" and not name.startswith("."):  # a link to a file is a file
            url = file_url(pinned, fs, path)
            files.append(SourceFile(url, name, details["size"], fingerprint(url, details)))
    if not files:
        inside = f"{pattern.rstrip('/')}/*.parquet" if found else "folder/*.parquet"  # a folder matches itself
        raise ValueError(f"--source {pattern} matches no file. Use a glob in quotes, such as '{inside}'")
    return Source(source_name(pattern), revision, tuple(files))


def fingerprint(url: str, details: dict[str, Any]) -> str:
    """The hash that the hub or another store has for a file; the sha256 of evenly spaced samples for a local file."""
    if "blob_id" in details:
        return details["lfs"].sha256 if details.get("lfs") else details["blob_id"]
    if "://" in url:
        return str(details.get("ETag") or details.get("etag") or details.get("CRC") or "")
    digest = hashlib.sha256()
    step = max((details["size"] - SAMPLE_BYTES) / (SAMPLES - 1), SAMPLE_BYTES)
    with open(url, "rb") as file:
        for sample in range(SAMPLES if details["size"] > SAMPLE_BYTES else 1):
            file.seek(round(sample * step))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
