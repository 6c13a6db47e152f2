"""Text files, local or remote, cut into units that can be read apart: parquet, jsonl and txt."""

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

JSONL_RANGE = 16 * 2**20  # bytes of a jsonl file a unit: about as much text as a parquet row group
ROW_GROUP_PART = 64 * 2**20  # bytes of text; a larger row group is cut into several units
PAUSES = (1, 2, 4, 8, 16, 32, 64)  # seconds before a remote read is tried again
SAMPLES, SAMPLE_BYTES = 16, 16_384  # what of a local file goes into its fingerprint
LATER = (408, 425, 429)  # the HTTP statuses 4xx that may pass; all 5xx may

T = TypeVar("T")


@dataclass(frozen=True)
class SourceFile:
    """`fingerprint` tells one content from another: the hub's hash of the file, or a hash of samples of a local one."""

    url: str
    name: str
    bytes: int
    fingerprint: str


@dataclass(frozen=True)
class Source:
    name: str  # the glob; of a local one the last component, as the same files elsewhere are the same source
    revision: str | None  # the hub's commit
    files: tuple[SourceFile, ...]

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        files = [{key: value for key, value in asdict(file).items() if key != "url"} for file in self.files]
        return {"name": self.name, "revision": self.revision, "files": files}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Source":
        return cls(facts["name"], facts["revision"], tuple(SourceFile("", **file) for file in facts["files"]))


@dataclass(frozen=True)
class Unit:
    """What one task reads: rows of a parquet row group, a byte range of a jsonl file, or a txt file."""

    url: str
    bytes: int  # of text, about
    begin: int = 0  # first row of the row group, or first byte of the file
    end: int = 0
    row_group: int = 0


@dataclass(frozen=True)
class Broken:
    """A document that can't be read as text: where in its file and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith(("file://", "local://"))


def persist(read: Callable[[], T], url: str) -> T:
    """`read()`, again after growing pauses where a remote file fails for a reason that may pass.

    Raises ValueError for damaged content, OSError where the file stays out of reach.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except (ValueError, ImportError):
            raise
        except Exception as error:  # each protocol's library has its own errors
            status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", 500))
            refused = 400 <= status < 500 and status not in LATER
            final = refused or isinstance(error, FileNotFoundError | PermissionError)
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            if is_local(url) or final or pause is None:
                raise OSError(f"{url} can't be read: {reason}") from error
            tqdm.write(f"{url}: {reason}; trying again in {pause} s")
            open_parquet.cache_clear()
        time.sleep(pause)
    raise AssertionError("the last pause is None")


def pin_revision(pattern: str, revision: str | None) -> tuple[str, str | None]:
    """A hub address at a commit, the newest unless one is given, and that commit; other addresses as they are."""
    if not pattern.startswith("hf://"):
        return pattern, None
    if revision is None:
        from huggingface_hub import HfApi, HfFileSystem

        try:
            place: Any = HfFileSystem().resolve_path(pattern.split("*", 1)[0].rsplit("/", 1)[0])
            revision = HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision).sha
        except Exception as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ValueError(
                f"the hub could not be asked for {pattern} ({reason}): check the name and the network, or give "
                "local files with --source 'folder/*.parquet'"
            ) from None
    named = r"@(?:refs/(?:convert|pr)/[^/]+|[^/]+)"  # the two kinds of revision that hold slashes
    return re.sub(rf"^(hf://(?:datasets/)?[^/]+/[^/@]+)(?:{named})?", rf"\1@{revision}", pattern), revision


def source_name(pattern: str) -> str:
    return pattern.rsplit("/", 1)[-1] if is_local(pattern) else pattern


def find_source(pattern: str, revision: str | None) -> Source:
    """The files that a glob names, sorted; those of the hub at `revision`, or at its newest commit."""
    import fsspec

    pinned, revision = pin_revision(pattern, revision)
    try:
        fs, path = fsspec.core.url_to_fs(pinned)
    except ImportError as error:
        raise ValueError(f"--source {pattern}: {error}") from None
    found: dict[str, dict[str, Any]] = persist(lambda: fs.glob(path, detail=True), pinned)
    files = []
    for name, facts in sorted(found.items()):
        url = name if is_local(pinned) else fs.unstrip_protocol(name)
        if facts["type"] != "directory":  # a link to a file is a file
            files.append(SourceFile(url, name.rsplit("/", 1)[-1], facts["size"], fingerprint(fs, name, facts)))
    if not files:
        inside = f"{pattern.rstrip('/')}/*.parquet" if found else "folder/*.parquet"  # a folder matches itself
        raise ValueError(f"--source {pattern} matches no file: name files by a glob in quotes, as '{inside}'")
    return Source(source_name(pattern), revision, tuple(files))


def fingerprint(fs: Any, name: str, facts: dict[str, Any]) -> str:
    """The hash that the hub or another store keeps of a file; of a local one the sha256 of samples spread over it."""
    if "blob_id" in facts:
        return facts["lfs"].sha256 if facts.get("lfs") else facts["blob_id"]
    if (known := facts.get("ETag") or facts.get("etag")) or not is_local(fs.unstrip_protocol(name)):
        return str(known or "")
    digest = hashlib.sha256()
    step = max((facts["size"] - SAMPLE_BYTES) / (SAMPLES - 1), SAMPLE_BYTES)
    with open(name, "rb") as file:
        for sample in range(SAMPLES):
            file.seek(round(sample * step))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def cut(files: list[SourceFile]) -> list[list[Unit]]:
    """Each file's units in order. Raises ValueError for a file that can't be what its name says."""
    remote = not all(is_local(file.url) for file in files)
    with ThreadPoolExecutor(16 if remote else 1) as pool:
        tasks = pool.map(lambda file: persist(partial(list_units, file.url, file.bytes), file.url), files)
        units = list(cli.progress_bar(tasks, "looking at the files", len(files), leave=False, delay=1))
    open_parquet.cache_clear()  # a forked worker must not read through this process's open file
    return units


def list_units(url: str, size: int) -> list[Unit]:
    if url.endswith(".parquet"):
        file, column = open_parquet(url)
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        sizes = [group.column(column).total_uncompressed_size for group in groups]
        return [unit for i, group in enumerate(groups) for unit in _cut_row_group(url, i, group.num_rows, sizes[i])]
    if url.endswith(".jsonl"):
        starts = range(0, size, JSONL_RANGE)
        ranges = [(start, min(start + JSONL_RANGE, size)) for start in starts]
        return [Unit(url, end - begin, begin, end) for begin, end in ranges]
    if url.endswith(".txt"):
        return [Unit(url, size, 0, size)]
    raise ValueError(
        f"{url} is neither .parquet, .jsonl (a `text` field a line) nor .txt: narrow --source, or convert it"
    )


def _cut_row_group(url: str, row_group: int, rows: int, size: int) -> list[Unit]:
    parts = min(max(-(-size // ROW_GROUP_PART), 1), rows)
    edges = [rows * i // parts for i in range(parts + 1)] if parts else []
    return [Unit(url, size // parts, begin, end, row_group) for begin, end in itertools.pairwise(edges)]


@lru_cache(maxsize=1)  # the units of a file follow one another, and each opening reads the footer
def open_parquet(url: str) -> tuple[Any, int]:
    """A parquet file, and the index of its `text` column among the stored columns."""
    import fsspec
    import pyarrow.parquet as pq
    from pyarrow import ArrowInvalid

    try:
        # Without read-ahead: a column chunk comes in one request, and the units after it go to other workers.
        fs, path = fsspec.core.url_to_fs(url)
        file = pq.ParquetFile(url if is_local(url) else fs.open(path, cache_type="none"), pre_buffer=False)
    except ArrowInvalid as error:
        raise ValueError(f"{url} is no parquet file, or cut short: {error}") from None
    schema, stored = file.schema_arrow, file.metadata.schema
    if "text" not in schema.names:
        raise ValueError(f"{url} has no `text` column, but {', '.join(schema.names)}: rename the one that is text")
    kind = str(schema.field("text").type)
    if kind not in ("string", "large_string", "string_view"):
        raise ValueError(f"{url}: the `text` column holds {kind}, not strings")
    return file, next(i for i in range(file.metadata.num_columns) if stored.column(i).path == "text")


def read_texts(unit: Unit) -> list[str | Broken | None]:
    """A unit's documents. Raises ValueError for a damaged file, OSError for one that stays out of reach."""
    readers = {"parquet": _read_parquet, "jsonl": _read_jsonl, "txt": _read_txt}
    return persist(lambda: readers[unit.url.rsplit(".", 1)[-1]](unit), unit.url)


def _read_parquet(unit: Unit) -> list[str | Broken | None]:
    import pyarrow as pa

    file, _ = open_parquet(unit.url)
    place = f"row group {unit.row_group}"
    try:
        if unit.end == file.metadata.row_group(unit.row_group).num_rows and not unit.begin:
            column = file.read_row_group(unit.row_group, columns=["text"], use_threads=False)["text"]
        else:
            column = _read_rows(file, unit)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and not is_local(unit.url):
            raise
        raise ValueError(f"{unit.url}, {place} is damaged: {error}") from None
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = [value.as_buffer() for value in column]
        return [
            None if bytes_ is None else _decode(bytes(bytes_), f"{place}, row {unit.begin + row}")
            for row, bytes_ in enumerate(raw)
        ]


def _read_rows(file: Any, unit: Unit) -> Any:
    """The rows of a large row group that belong to the unit; those before them are decoded and dropped."""
    import pyarrow as pa

    row, chunks = 0, []
    for batch in file.iter_batches(1000, row_groups=[unit.row_group], columns=["text"], use_threads=False):
        begin, end = max(unit.begin - row, 0), min(unit.end - row, batch.num_rows)
        if begin < end:
            chunks.append(batch["text"].slice(begin, end - begin))
        row += batch.num_rows
        if row >= unit.end:
            break
    return pa.chunked_array(chunks)


def _read_jsonl(unit: Unit) -> list[str | Broken | None]:
    import fsspec

    with fsspec.open(unit.url).open() as file:
        return [_read_json_line(line, f"the line at byte {byte}") for byte, line in json_lines(file, unit)]


def json_lines(file: Any, unit: Unit) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in the unit's byte range, each with its first byte's place."""
    file.seek(max(unit.begin - 1, 0))
    if unit.begin:
        file.readline()  # the rest of a line that began in the range before, or that range's last newline
    while (byte := file.tell()) < unit.end and (line := file.readline()):
        if line.strip():
            yield byte, line


def _read_json_line(line: bytes, place: str) -> str | Broken | None:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        return Broken(place, f"no JSON object with a `text` field ({type(error).__name__}: {error})")
    if text is not None and not isinstance(text, str):
        return Broken(place, f"`text` is {type(text).__name__}, not a string")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        return Broken(place, f"`text` holds half a surrogate pair, which is no character ({error})")
    return text


def _read_txt(unit: Unit) -> list[str | Broken | None]:
    import fsspec

    with fsspec.open(unit.url).open() as file:
        return [_decode(file.read(), "the whole file")]


def _decode(raw: bytes, place: str) -> str | Broken:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return Broken(place, f"not UTF-8 text ({error})")
