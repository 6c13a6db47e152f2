"""Text files, local or remote, as chunks that can be read independently: parquet, jsonl and txt."""

import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

from tqdm import tqdm

from core import cli
from core.data.shards import short_reason

JSONL_CHUNK = 16 * 2**20  # bytes of a jsonl file per chunk: about as much text as in a parquet row group
ROW_GROUP_CHUNK = 64 * 2**20  # bytes of text; a larger row group is split into several chunks
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


@dataclass(frozen=True)
class Chunk:
    """The input of one task: rows of a parquet row group, a byte range of a jsonl file, or a txt file."""

    url: str
    bytes: int  # of text, approximately
    begin: int = 0  # first row of the row group, or first byte of the file
    end: int = 0
    row_group: int = 0


@dataclass(frozen=True)
class InvalidDocument:
    """A document that can't be read as text: its place in the file and the reason."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://"))


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
            final = refused or isinstance(error, FileNotFoundError | PermissionError)
            reason = short_reason(error)
            if is_local(url) or final or pause is None:
                raise OSError(
                    f"{url} can't be read ({reason}). Fix this and rerun the same command to resume"
                ) from error
            tqdm.write(f"{url} can't be read ({reason}), retrying in {pause} s")
            open_parquet.cache_clear()
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
    return pattern.rsplit("/", 1)[-1] if is_local(pattern) else pattern


def find_source(pattern: str, revision: str | None) -> Source:
    """The files that match a glob, sorted; those of the hub at `revision`, or at its newest commit."""
    import fsspec

    pinned, revision = pin_revision(pattern, revision)
    try:
        fs, path = fsspec.core.url_to_fs(pinned)
    except ImportError as error:
        raise ValueError(f"--source {pattern} needs a package: {short_reason(error)}") from None
    found: dict[str, dict[str, Any]] = retry(lambda: fs.glob(path, detail=True), pinned)
    files = []
    for name, details in sorted(found.items()):
        url = name if is_local(pinned) else fs.unstrip_protocol(name)
        if details["type"] != "directory":  # a link to a file is a file
            files.append(SourceFile(url, name.rsplit("/", 1)[-1], details["size"], fingerprint(fs, name, details)))
    if not files:
        inside = f"{pattern.rstrip('/')}/*.parquet" if found else "folder/*.parquet"  # a folder matches itself
        raise ValueError(f"--source {pattern} matches no file. Use a glob in quotes, such as '{inside}'")
    return Source(source_name(pattern), revision, tuple(files))


def fingerprint(fs: Any, name: str, details: dict[str, Any]) -> str:
    """The hash that the hub or another store has for a file; the sha256 of evenly spaced samples for a local file."""
    if "blob_id" in details:
        return details["lfs"].sha256 if details.get("lfs") else details["blob_id"]
    if (known := details.get("ETag") or details.get("etag")) or not is_local(fs.unstrip_protocol(name)):
        return str(known or "")
    digest = hashlib.sha256()
    step = max((details["size"] - SAMPLE_BYTES) / (SAMPLES - 1), SAMPLE_BYTES)
    with open(name, "rb") as file:
        for sample in range(SAMPLES):
            file.seek(round(sample * step))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def split_files(files: list[SourceFile]) -> list[list[Chunk]]:
    """The chunks of each file, in order. Raises ValueError for a file whose content doesn't match its suffix."""
    remote = not all(is_local(file.url) for file in files)
    with ThreadPoolExecutor(16 if remote else 1) as pool:
        tasks = pool.map(lambda file: retry(partial(split_file, file.url, file.bytes), file.url), files)
        chunks = list(cli.progress_bar(tasks, "opening files", len(files), leave=False, delay=1))
    open_parquet.cache_clear()  # a forked worker must not read through this process's open file
    return chunks


def split_file(url: str, size: int) -> list[Chunk]:
    if url.endswith(".parquet"):
        file, column = open_parquet(url)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        sizes = [group.column(column).total_uncompressed_size for group in groups]
        return [chunk for i, group in enumerate(groups) for chunk in _split_row_group(url, i, group.num_rows, sizes[i])]
    if url.endswith(".jsonl"):
        starts = range(0, size, JSONL_CHUNK)
        ranges = [(start, min(start + JSONL_CHUNK, size)) for start in starts]
        return [Chunk(url, end - begin, begin, end) for begin, end in ranges]
    if url.endswith(".txt"):
        return [Chunk(url, size, 0, size)]
    raise ValueError(
        f"--source file {url} must be .parquet, .jsonl (one object with a `text` field per line) or .txt. Convert it"
    )


def _split_row_group(url: str, row_group: int, rows: int, size: int) -> list[Chunk]:
    count = min(max(-(-size // ROW_GROUP_CHUNK), 1), rows)
    edges = [rows * i // count for i in range(count + 1)] if count else []
    return [Chunk(url, size // count, begin, end, row_group) for begin, end in itertools.pairwise(edges)]


@lru_cache(maxsize=1)  # the chunks of a file are read in order, and each opening reads the footer
def open_parquet(url: str) -> tuple[Any, int]:
    """A parquet file, and the index of its `text` column among the stored columns."""
    import fsspec
    import pyarrow.parquet as pq
    from pyarrow import ArrowInvalid

    try:
        # No read-ahead: a column chunk is one request, and other workers read the chunks that follow.
        fs, path = fsspec.core.url_to_fs(url)
        file = pq.ParquetFile(url if is_local(url) else fs.open(path, cache_type="none"), pre_buffer=False)
    except ArrowInvalid as error:
        raise ValueError(f"{url} is not a parquet file, or is cut short ({short_reason(error)}). Replace it") from None
    schema, stored = file.schema_arrow, file.metadata.schema
    if "text" not in schema.names:
        names = ", ".join(schema.names)[:200]
        raise ValueError(f"{url} has no `text` column: its columns are {names}. Rename the one with the text")
    kind = str(schema.field("text").type)
    if kind not in ("string", "large_string", "string_view"):
        raise ValueError(f"{url}: the `text` column holds {kind[:40]}, not strings. Convert it")
    return file, next(i for i in range(file.metadata.num_columns) if stored.column(i).path == "text")


def read_texts(chunk: Chunk) -> list[str | InvalidDocument | None]:
    """The documents of a chunk. Raises ValueError for a damaged file, OSError for a file that can't be reached."""
    readers = {"parquet": _read_parquet, "jsonl": _read_jsonl, "txt": _read_txt}
    return retry(lambda: readers[chunk.url.rsplit(".", 1)[-1]](chunk), chunk.url)


def _read_parquet(chunk: Chunk) -> list[str | InvalidDocument | None]:
    import pyarrow as pa

    file, _ = open_parquet(chunk.url)
    place = f"row group {chunk.row_group}"
    try:
        if chunk.end == file.metadata.row_group(chunk.row_group).num_rows and not chunk.begin:
            column = file.read_row_group(chunk.row_group, columns=["text"], use_threads=False)["text"]
        else:
            column = _read_rows(file, chunk)
    except (pa.ArrowException, OSError) as error:
        # pyarrow also raises OSError, without an errno, for damaged pages; over a network such an error is temporary.
        if isinstance(error, OSError) and (error.errno or not is_local(chunk.url)):
            raise
        raise ValueError(f"{chunk.url}, {place} is damaged ({short_reason(error)}). Replace the file") from None
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = [value.as_buffer() for value in column]
        return [
            None if bytes_ is None else _decode(bytes(bytes_), f"{place}, row {chunk.begin + row}")
            for row, bytes_ in enumerate(raw)
        ]


def _read_rows(file: Any, chunk: Chunk) -> Any:
    """The rows of a large row group that belong to the chunk. The rows before them are decoded and dropped."""
    import pyarrow as pa

    row, arrays = 0, []
    for batch in file.iter_batches(1000, row_groups=[chunk.row_group], columns=["text"], use_threads=False):
        begin, end = max(chunk.begin - row, 0), min(chunk.end - row, batch.num_rows)
        if begin < end:
            arrays.append(batch["text"].slice(begin, end - begin))
        row += batch.num_rows
        if row >= chunk.end:
            break
    return pa.chunked_array(arrays)


def _read_jsonl(chunk: Chunk) -> list[str | InvalidDocument | None]:
    import fsspec

    with fsspec.open(chunk.url).open() as file:
        return [_read_json_line(line, f"the line at byte {byte}") for byte, line in json_lines(file, chunk)]


def json_lines(file: Any, chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in the chunk's byte range, each with the position of its first byte."""
    file.seek(max(chunk.begin - 1, 0))
    if chunk.begin:
        file.readline()  # the rest of a line of the previous chunk, or that chunk's last newline
    while (byte := file.tell()) < chunk.end and (line := file.readline()):
        if line.strip():
            yield byte, line


def _read_json_line(line: bytes, place: str) -> str | InvalidDocument | None:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return InvalidDocument(place, f"not a JSON object with a `text` field ({short_reason(error)})")
    if text is not None and not isinstance(text, str):
        return InvalidDocument(place, f"`text` is {type(text).__name__}, not a string")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        return InvalidDocument(
            place, f"`text` holds half a surrogate pair, which is not a character (position {error.start})"
        )
    return text


def _read_txt(chunk: Chunk) -> list[str | InvalidDocument | None]:
    import fsspec

    with fsspec.open(chunk.url).open() as file:
        return [_decode(file.read(), "the whole file")]


def _decode(raw: bytes, place: str) -> str | InvalidDocument:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return InvalidDocument(place, f"not UTF-8 text (byte {error.start} of the document)")
