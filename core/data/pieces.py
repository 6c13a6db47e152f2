"""A source as one ordered stream of documents, cut into pieces that worker processes read independently."""

import contextlib
import io
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from core import cli
from core.data.shards import prefetched, short_reason
from core.data.sources import SourceFile, is_local, open_file, retry

FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
EXPANSION = 3  # bytes of text per compressed byte, approximately
PIECE_BYTES, PIECE_FILES = 16 * 2**20, 1000  # limits of a piece: of text, and of whole files
ROW_GROUP_BYTES = 64 * 2**20  # of text; reading a part of a row group also decodes the rows before that part
Lines = bytes  # of a .jsonl file
Row = tuple[int, str | None]  # the place in the file, which is a row, byte or line; the text or an InvalidDocument


@dataclass(frozen=True)
class Piece:
    """The input of one task: whole files from `first` to before `last`, or a part of one.

    A part is the rows of a .parquet file, or the lines of a .jsonl file that begin in the bytes, from `begin` to before
    `end`. A large compressed file can't be split from metadata: it is one part, of which `divide` makes many tasks.
    """

    first: int
    last: int
    bytes: int  # of text, approximately
    begin: int = 0
    end: int = 0  # 0 for whole files
    lines: Lines | None = None  # of a compressed file, from line `begin` on


class InvalidDocument(str):
    """In place of a document that can't be read as text: its place in the file and the reason."""


def format_of(url: str) -> tuple[str, str | None]:
    """The format and the compression, by the suffixes. Raises ValueError for others."""
    stem, suffix = os.path.splitext(next((link for link in url.split("::") if "://" in link), url))
    compression = COMPRESSIONS.get(suffix)
    kind = FORMATS.get(os.path.splitext(stem)[1] if compression else suffix)
    if kind is None or (compression and kind != "jsonl"):
        raise ValueError(
            f"--source file {url} must be .parquet, .txt, or .jsonl or .ndjson (one object with a `text` field per "
            "line), which may be compressed (.jsonl.gz, .jsonl.zst). Convert it"
        )
    return kind, compression


def cut(files: tuple[SourceFile, ...], limit: int) -> list[Piece]:
    """Pieces of at most `limit` bytes of text, where the files can be split. Small files share a piece.

    Only metadata is read. Raises ValueError for a file whose content doesn't match its suffix.
    """
    remote = not all(is_local(file.url) for file in files)
    with ThreadPoolExecutor(16 if remote else 1) as pool:
        tasks = pool.map(lambda i: retry(partial(_cut_file, i, files[i], limit), files[i].url), range(len(files)))
        cut_files = list(cli.progress_bar(tasks, "opening files", len(files), unit="files", leave=False, delay=1))
    open_parquet.cache_clear()  # a forked worker must not read through this process's open file
    pieces: list[Piece] = []
    for piece in itertools.chain(*cut_files):
        last = pieces[-1] if pieces else piece
        joined = Piece(last.first, piece.last, last.bytes + piece.bytes)
        whole = bool(pieces) and not (last.end or piece.end)
        if whole and joined.bytes <= limit and joined.last - joined.first <= PIECE_FILES:
            pieces[-1] = joined
        else:
            pieces.append(piece)
    return pieces


def _cut_file(number: int, file: SourceFile, limit: int) -> list[Piece]:
    """The pieces of a file: one of the whole file if it has at most `limit` bytes of text or can't be split."""
    (kind, compression), size, parts = format_of(file.url), file.bytes, list[Piece]()
    if kind == "parquet":
        metadata, row, size = open_parquet(file.url).metadata, 0, 0
        column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == "text")
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            text_bytes = group.column(column).total_uncompressed_size
            count = min(-(-text_bytes // min(limit * 4, ROW_GROUP_BYTES)), group.num_rows)
            edges = [row + group.num_rows * part // max(count, 1) for part in range(count + 1)]
            parts += [Piece(number, number + 1, text_bytes // count, *span) for span in itertools.pairwise(edges)]
            row, size = row + group.num_rows, size + text_bytes
    elif kind == "jsonl":
        size *= EXPANSION if compression else 1
        edges = [*range(0, size, size if compression else limit), size] if size else []
        parts = [Piece(number, number + 1, b - a, a, b) for a, b in itertools.pairwise(edges)]
    return parts if parts and size > limit else [Piece(number, number + 1, size)]


@lru_cache(maxsize=1)  # the pieces of a file are read in order, and each opening reads the footer
def open_parquet(url: str) -> Any:
    """A parquet file with a `text` column."""
    import pyarrow.parquet as pq

    with refuse_damage(url):
        # No read-ahead: a column chunk is one request, and other workers read the pieces that follow.
        file = pq.ParquetFile(open_file(url, cache_type="none"), pre_buffer=False)
    if "text" not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)[:200]
        raise ValueError(f"{url} has no `text` column: its columns are {names}. Rename the one with the text")
    kind = file.schema_arrow.field("text").type
    kind = str(getattr(kind, "value_type", kind))  # of a dictionary
    if kind not in ("string", "large_string", "string_view", "null"):
        raise ValueError(f"{url}: the `text` column holds {kind[:40]}, not strings. Convert it")
    return file


def read_piece(piece: Piece, files: tuple[SourceFile, ...]) -> list[tuple[int, int, str | None]]:
    """The documents of a piece, each as the number of its file, its place in it, and its text.

    Raises ValueError for a damaged file, OSError for a file that can't be reached.
    """
    rows: list[tuple[int, int, str | None]] = []
    for number in range(piece.first, piece.last):
        url = files[number].url
        rows += [(number, place, text) for place, text in retry(partial(_read_file, piece, url), url)]
    return rows


def _read_file(piece: Piece, url: str) -> list[Row]:
    readers = {"parquet": _read_parquet, "jsonl": _read_jsonl, "txt": _read_txt}
    return list(readers[format_of(url)[0]](piece, url))


def _read_parquet(piece: Piece, url: str) -> Iterator[Row]:
    """The rows of a piece. The rows before them in its row group are decoded and dropped."""
    file, start = open_parquet(url), 0
    for group in range(file.num_row_groups):
        row, following = start, start + file.metadata.row_group(group).num_rows
        if piece.begin < following:
            with refuse_damage(url, f", row group {group}"):
                for batch in file.iter_batches(1000, row_groups=[group], columns=["text"], use_threads=False):
                    first = max(piece.begin - row, 0)
                    texts = batch["text"][first : piece.end - row if piece.end else None]
                    yield from enumerate(_to_strings(texts, group, row + first - start), row + first)
                    row += len(batch)
                    if piece.end and row >= piece.end:
                        return
        start = following


def _to_strings(texts: Any, group: int, row: int) -> list[str | None]:
    """The values of an array, of which the first is row `row` of the row group."""
    texts = texts.dictionary_decode() if hasattr(texts, "dictionary_decode") else texts
    try:
        return texts.to_pylist()
    except UnicodeDecodeError:
        raw = (text.as_buffer() for text in texts)
        return [b and _decode(bytes(b), f"row group {group}, row {i}") for i, b in enumerate(raw, row)]


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
        raise ValueError(f"{url}{place} is damaged or cut short ({short_reason(error)}). Replace the file") from None


def _read_jsonl(piece: Piece, url: str) -> Iterator[Row]:
    if piece.lines is not None or format_of(url)[1]:
        for first, lines in line_blocks(url) if piece.lines is None else [(piece.begin, piece.lines)]:
            for number, line in enumerate(lines.split(b"\n"), first):
                if line.strip():
                    yield number, _read_json_line(line, f"line {number}")
        return
    with open_file(url) as file:
        file.seek(max(piece.begin - 1, 0))
        if piece.begin:
            file.readline()  # the rest of a line of the piece before, or the last newline of that piece
        byte = file.tell()
        while (not piece.end or byte < piece.end) and (line := file.readline()):
            if line.strip():
                yield byte, _read_json_line(line, f"the line at byte {byte}")
            byte += len(line)


class _RetryingFile(io.RawIOBase):
    """A file whose reads are retried."""

    def __init__(self, url: str) -> None:
        self._url, self._file = url, retry(lambda: open_file(url), url)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return retry(lambda: self._file.read(size), self._url)


def line_blocks(url: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a compressed file in blocks, each with the number of its first line, from 1. At least one block."""
    import pyarrow as pa

    line, rest, block = 1, b"", b"more"
    with pa.input_stream(_RetryingFile(url), compression=format_of(url)[1]) as stream:
        while block:
            with refuse_damage(url):
                block = stream.read(PIECE_BYTES)
            rest += block
            end = rest.rfind(b"\n") + 1 if block else len(rest)
            if end or not block:
                yield line, rest[:end]
            line, rest = line + rest.count(b"\n", 0, end), rest[end:]


def divide(piece: Piece, files: tuple[SourceFile, ...]) -> Iterator[Piece]:
    """The tasks of a piece: the piece, or blocks of lines of a large compressed file, which this process decompresses.

    There is at least one.
    """
    url = files[piece.first].url
    if not piece.end or not format_of(url)[1]:
        yield piece
        return
    for line, lines in prefetched(line_blocks(url), ahead=2, begin=lambda: None):
        yield Piece(piece.first, piece.last, len(lines), line, lines=lines)


def _read_json_line(line: bytes, place: str) -> str | None:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return InvalidDocument(f"{place}: not a JSON object with a `text` field ({short_reason(error)})")
    if text is not None and not isinstance(text, str):
        return InvalidDocument(f"{place}: `text` is {type(text).__name__}, not a string")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        reason = f"`text` holds half a surrogate pair, which is not a character (position {error.start})"
        return InvalidDocument(f"{place}: {reason}")
    return text


def _read_txt(_: Piece, url: str) -> Iterator[Row]:
    with open_file(url) as file:
        yield 0, _decode(file.read(), "the whole file")


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return InvalidDocument(f"{place}: not UTF-8 text (byte {error.start} of the document)")
