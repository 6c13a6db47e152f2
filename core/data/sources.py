"""Text files, local or remote, as one ordered stream of documents, cut into pieces that can be read independently."""

import contextlib
import glob
import hashlib
import io
import itertools
import json
import os
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

FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
EXPANSION = 3  # bytes of text per compressed byte, approximately
PIECE_BYTES, PIECE_FILES = 16 * 2**20, 1000  # limits of a piece: of text, and of whole files
ROW_GROUP_BYTES = 64 * 2**20  # of text; reading a part of a row group also decodes the rows before that part
PAUSES = (1, 2, 4, 8, 16, 32, 64)  # seconds between the attempts of a remote read
SAMPLES, SAMPLE_BYTES = 16, 16_384  # of a local file, for its fingerprint
RETRYABLE = (408, 425, 429)  # the temporary errors among the HTTP statuses 4xx; all 5xx are retried
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # not retried

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


@dataclass(frozen=True)
class Piece:
    """The input of one task: rows of a row group, a byte range of a .jsonl, or whole files. They can be split no more.

    A large compressed file is one piece, but many tasks (`line_blocks`).
    """

    first: int  # number of its first source file
    bytes: int  # of text, approximately
    last: int = -1  # number after its last source file, if it is whole files
    begin: int = 0  # first row of the file, or first byte
    end: int = 0
    row_group: int = -1

    def key(self, files: tuple[SourceFile, ...]) -> str:
        """Identifies the content."""
        names = [
            f"{file.name} {file.bytes} {file.fingerprint}"
            for file in files[self.first : max(self.last, self.first + 1)]
        ]
        return f"{names} {self.begin} {self.end} {self.row_group}"


@dataclass(frozen=True)
class InvalidDocument:
    """A document that can't be read as text: its place in the file and the reason."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


Row = tuple[int, str | InvalidDocument | None]  # the place, a row, byte or line of the file; and the text


def is_local(url: str) -> bool:
    """Whether a file is on this machine. In a chain such as zip://a.txt::b.zip the last address counts."""
    last = url.rsplit("::", 1)[-1]
    return "://" not in last or last.startswith(("file://", "local://"))


def format_of(url: str) -> tuple[str, str | None]:
    """The format and the compression, by the suffixes. Raises ValueError for others."""
    path = next((link for link in url.split("::") if "://" in link), url)
    stem, suffix = os.path.splitext(path)
    compression = COMPRESSIONS.get(suffix)
    kind = FORMATS.get(os.path.splitext(stem)[1] if compression else suffix)
    if kind is None or (compression and kind != "jsonl"):
        raise ValueError(
            f"--source file {url} must be .parquet, .txt, or .jsonl or .ndjson (one object with a `text` field per "
            "line), which may be compressed (.jsonl.gz, .jsonl.zst). Convert it"
        )
    return kind, compression


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
            final = isinstance(error, FINAL) or (400 <= status < 500 and status not in RETRYABLE)
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
    digest = hashlib.sha256()
    with open(url, "rb") as file:
        if details["size"] <= SAMPLES * SAMPLE_BYTES:
            return hashlib.sha256(file.read(SAMPLES * SAMPLE_BYTES)).hexdigest()
        for sample in range(SAMPLES):
            file.seek(round(sample * (details["size"] - SAMPLE_BYTES) / (SAMPLES - 1)))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def cut(files: tuple[SourceFile, ...], limit: int) -> list[Piece]:
    """The source as pieces of at most `limit` bytes of text, where its files can be split. Small files share a piece.

    Only metadata is read. Raises ValueError for a file whose content doesn't match its suffix.
    """
    remote = not all(is_local(file.url) for file in files)
    with ThreadPoolExecutor(16 if remote else 1) as pool:
        tasks = pool.map(lambda i: retry(partial(_cut_file, i, files[i], limit), files[i].url), range(len(files)))
        cut_files = list(cli.progress_bar(tasks, "opening files", len(files), leave=False, delay=1))
    open_parquet.cache_clear()  # a forked worker must not read through this process's open file
    pieces: list[Piece] = []
    for piece in itertools.chain(*cut_files):
        previous = pieces[-1] if pieces else piece
        joined = previous.bytes + piece.bytes
        whole = previous.last == piece.first and piece.last > 0
        if whole and joined <= limit and piece.last - previous.first <= PIECE_FILES:
            pieces[-1] = Piece(previous.first, joined, piece.last)
        else:
            pieces.append(piece)
    return pieces


def _cut_file(number: int, file: SourceFile, limit: int) -> list[Piece]:
    """The pieces of a file. A file of at most `limit` bytes of text is one piece of whole files."""
    kind, compression = format_of(file.url)
    size, edges = file.bytes * (EXPANSION if compression else 1), list[Piece]()
    if kind == "parquet":
        parquet, column = open_parquet(file.url)
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        sizes = [group.column(column).total_uncompressed_size for group in groups]
        size, row = sum(sizes), 0
        for i, group in enumerate(groups):
            count = max(min(-(-sizes[i] // min(limit * 4, ROW_GROUP_BYTES)), group.num_rows), 1)
            rows = [row + group.num_rows * part // count for part in range(count + 1)]
            edges += [Piece(number, sizes[i] // count, 0, a, b, i) for a, b in itertools.pairwise(rows)]
            row += group.num_rows
    elif kind == "jsonl" and not compression:
        edges = [Piece(number, min(limit, size - a), 0, a, min(a + limit, size)) for a in range(0, size, limit)]
    if size <= limit or kind == "txt":
        return [Piece(number, size, number + 1)]
    return edges or [Piece(number, size)]


@lru_cache(maxsize=1)  # the pieces of a file are read in order, and each opening reads the footer
def open_parquet(url: str) -> tuple[Any, int]:
    """A parquet file, and the index of its `text` column among the stored columns."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowInvalid

    try:
        # No read-ahead: a column chunk is one request, and other workers read the pieces that follow.
        file = pq.ParquetFile(open_file(url, cache_type="none"), pre_buffer=False)
    except ArrowInvalid as error:
        raise ValueError(f"{url} is not a parquet file, or is cut short ({short_reason(error)}). Replace it") from None
    schema, stored = file.schema_arrow, file.metadata.schema
    if "text" not in schema.names:
        names = ", ".join(schema.names)[:200]
        raise ValueError(f"{url} has no `text` column: its columns are {names}. Rename the one with the text")
    kind = schema.field("text").type
    kind = str(getattr(kind, "value_type", kind))  # of a dictionary
    if kind not in ("string", "large_string", "string_view", "null"):
        raise ValueError(f"{url}: the `text` column holds {kind[:40]}, not strings. Convert it")
    return file, next(i for i in range(file.metadata.num_columns) if stored.column(i).path == "text")


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


@lru_cache(maxsize=1)  # fsspec reads an archive's directory at each opening, and closes it with the last reference
def _open_archive(chain: str, _: int) -> Any:
    """The file system of an archive. A forked process opens its own, as it must not share a position in the file."""
    import fsspec

    return fsspec.core.url_to_fs(chain)[0]


def read_piece(piece: Piece, files: tuple[SourceFile, ...]) -> list[tuple[int, int, str | InvalidDocument | None]]:
    """The documents of a piece, each as the number of its file, its place in it, a row, byte or line, and its text.

    Raises ValueError for a damaged file, OSError for a file that can't be reached.
    """
    readers = {"parquet": _read_parquet, "jsonl": _read_jsonl, "txt": _read_txt}
    documents = []
    for number in range(piece.first, max(piece.last, piece.first + 1)):
        file = files[number]
        rows = retry(partial(readers[format_of(file.url)[0]], piece, file), file.url)
        documents += [(number, place, text) for place, text in rows]
    return documents


def _read_parquet(piece: Piece, source: SourceFile) -> list[Row]:
    file, _ = open_parquet(source.url)
    rows, row = [], 0
    for i in range(file.num_row_groups):
        size = file.metadata.row_group(i).num_rows
        if piece.row_group in (i, -1):
            begin, end = (0, size) if piece.last > 0 else (piece.begin - row, piece.end - row)
            with refuse_damage(source.url, f", row group {i}"):
                column = _read_rows(file, i, begin, end)
            rows += [(row + begin + j, text) for j, text in enumerate(_decode_column(column, i, begin))]
        row += size
    return rows


def _read_rows(file: Any, row_group: int, begin: int, end: int) -> Any:
    """The texts of rows of a row group. The rows before them are decoded and dropped."""
    import pyarrow as pa

    if not begin and end == file.metadata.row_group(row_group).num_rows:
        column = file.read_row_group(row_group, columns=["text"], use_threads=False)["text"]
    else:
        row, arrays = 0, []
        for batch in file.iter_batches(1000, row_groups=[row_group], columns=["text"], use_threads=False):
            arrays.append(batch["text"][max(begin - row, 0) : max(end - row, 0)])
            row += batch.num_rows
            if row >= end:
                break
        column = pa.chunked_array(arrays)
    if pa.types.is_dictionary(column.type):
        column = pa.chunked_array([array.dictionary_decode() for array in column.chunks], column.type.value_type)
    return column


def _decode_column(column: Any, row_group: int, begin: int) -> list[str | InvalidDocument | None]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = [value.as_buffer() for value in column]
        return [
            None if bytes_ is None else _decode(bytes(bytes_), f"row group {row_group}, row {begin + row}")
            for row, bytes_ in enumerate(raw)
        ]


@contextlib.contextmanager
def refuse_damage(url: str, place: str = "") -> Iterator[None]:
    """Raise ValueError where pyarrow finds damaged content.

    It also raises OSError for that, without an errno. For a parquet file on a network such an error is temporary.
    """
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and (error.errno or not is_local(url))):
            raise
        raise ValueError(f"{url}{place} is damaged ({short_reason(error)}). Replace the file") from None


def _read_jsonl(piece: Piece, source: SourceFile) -> list[Row]:
    if format_of(source.url)[1]:
        return [row for first, lines in line_blocks(source.url) for row in read_lines(first, lines)]
    with open_file(source.url) as file:
        lines = json_lines(file, piece.begin, source.bytes if piece.last > 0 else piece.end)
        return [(byte, _read_json_line(line, f"the line at byte {byte}")) for byte, line in lines]


def json_lines(file: Any, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in a byte range, each with the position of its first byte."""
    file.seek(max(begin - 1, 0))
    if begin:
        file.readline()  # the rest of a line of the previous range, or that range's last newline
    byte = file.tell()
    while byte < end and (line := file.readline()):
        if line.strip():
            yield byte, line
        byte += len(line)


class _RetryingFile(io.RawIOBase):
    """A file whose reads are retried."""

    def __init__(self, url: str) -> None:
        self._url, self._file = url, retry(lambda: open_file(url), url)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return retry(lambda: self._file.read(size), self._url)

    def close(self) -> None:
        self._file.close()
        super().close()


def line_blocks(url: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a compressed file in blocks, each with the number of its first line, from 1. At least one block."""
    import pyarrow as pa

    line, rest = 1, b""
    with _RetryingFile(url) as file, pa.input_stream(file, compression=format_of(url)[1]) as stream:
        while True:
            with refuse_damage(url):
                block = stream.read(PIECE_BYTES)
            end = (rest + block).rfind(b"\n") + 1 if block else len(rest)
            lines, rest = (rest + block)[:end], (rest + block)[end:]
            if lines or not block:
                yield line, lines
            if not block:
                return
            line += lines.count(b"\n")


def read_lines(first: int, lines: bytes) -> list[Row]:
    """The documents of lines of a .jsonl file, of which the first has the number `first`."""
    numbered = enumerate(lines.split(b"\n"), first)
    return [(number, _read_json_line(line, f"line {number}")) for number, line in numbered if line.strip()]


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


def _read_txt(piece: Piece, source: SourceFile) -> list[Row]:
    with open_file(source.url) as file:
        return [(0, _decode(file.read(), "the whole file"))]


def _decode(raw: bytes, place: str) -> str | InvalidDocument:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return InvalidDocument(place, f"not UTF-8 text (byte {error.start} of the document)")
