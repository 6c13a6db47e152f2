"""The documents of a source as one stream, in pieces that worker processes read independently.

Pieces are cut from metadata: row groups of parquet files, byte ranges of jsonl files, sizes of small files.
"""

import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from core import cli
from core.data.shards import short_reason
from core.data.sources import SourceFile, is_local, retry

PIECE_BYTES = 16 * 2**20  # of text, for files that can be split or grouped: about as much as a parquet row group
PIECE_FILES = 2000
ROW_GROUP_BYTES = 64 * 2**20  # of text; a larger row group is split into several pieces
COMPRESSION = 3  # bytes of text per byte of a compressed file, approximately
KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt"}
KINDS |= {f".{name}.{suffix}": suffix for name in ("jsonl", "ndjson") for suffix in ("gz", "zst")}


@dataclass(frozen=True)
class Span:
    """What is read at once: rows of a parquet row group, lines that begin in a byte range, or a complete file."""

    file: int  # its number in the source
    url: str
    kind: str  # one of KINDS
    bytes: int  # of text, approximately
    begin: int = 0  # first row of the row group, or first byte of the file
    end: int = 0
    row_group: int = 0
    first: int = 0  # row in the file of the span's first row

    @property
    def place(self) -> dict[str, int]:
        """Where the span begins, for the manifest."""
        return {"row": self.first} if self.kind == "parquet" else {"byte": self.begin}


@dataclass(frozen=True)
class Piece:
    """Consecutive spans: the documents of one task."""

    spans: tuple[Span, ...]

    @property
    def bytes(self) -> int:
        return sum(span.bytes for span in self.spans)

    def tasks(self) -> "Iterator[Piece | Lines]":
        """The piece itself, or blocks of lines where a compressed file can only be read from its start."""
        if self.spans[0].kind in ("gz", "zst"):
            return compressed_lines(self.spans[0])
        return iter([self])


@dataclass(frozen=True)
class Lines:
    """Lines of a compressed jsonl file, as bytes. `first`: position of the first byte in the text of the file."""

    url: str
    first: int
    text: bytes

    @property
    def bytes(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class InvalidDocument:
    """A document that can't be read as text: its file, its place there, and the reason."""

    url: str
    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.url}, {self.place}: {self.reason}"

    @property
    def listed(self) -> str:
        """For the manifest, which doesn't depend on the folder of the source."""
        return f"{self.url.rsplit('/', 1)[-1]}, {self.place}: {self.reason}"


def file_path(url: str) -> str:
    """The part of an address that names the file: `zip://a.jsonl` of `zip://a.jsonl::b.zip`."""
    first, _, rest = url.partition("::")
    return first if "://" in first or not rest else rest


def kind_of(url: str) -> str | None:
    return next((kind for suffix, kind in KINDS.items() if file_path(url).endswith(suffix)), None)


def split(files: tuple[SourceFile, ...], piece_bytes: int) -> list[Piece]:
    """The pieces of the stream, of about `piece_bytes` of text. Raises ValueError for an unknown kind of file."""
    for file in files:
        if kind_of(file.url) is None:
            raise ValueError(
                f"--source file {file.url} must end in {', '.join(KINDS)}. Convert it, or use another glob"
            )
    remote = not all(is_local(file.url) for file in files)
    with ThreadPoolExecutor(16 if remote else 1) as pool:
        numbered = enumerate(files)
        tasks = pool.map(lambda item: retry(lambda: spans_of(item[0], item[1], piece_bytes), item[1].url), numbered)
        bar = cli.progress_bar(tasks, "opening files", len(files), leave=False, delay=1)
        pieces = list(grouped(itertools.chain.from_iterable(bar), piece_bytes))
    open_parquet.cache_clear()  # a forked worker must not read through this process's open file
    return pieces


def spans_of(number: int, file: SourceFile, piece_bytes: int) -> list[Span]:
    """The spans of a file, from its metadata."""
    url, size, kind = file.url, file.bytes, str(kind_of(file.url))
    if kind == "parquet":
        parquet, column = open_parquet(url)
        spans, first = [], 0
        for i in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(i)
            text_bytes, rows = group.column(column).total_uncompressed_size, group.num_rows
            count = min(max(-(-text_bytes // ROW_GROUP_BYTES), 1), rows)
            for begin, end in itertools.pairwise(rows * j // count for j in range(count + 1) if count):
                spans.append(Span(number, url, kind, text_bytes // count, begin, end, i, first + begin))
            first += rows
        return spans
    if kind == "jsonl":
        edges = [*range(0, size, piece_bytes), size]
        return [Span(number, url, kind, end - begin, begin, end) for begin, end in itertools.pairwise(edges)]
    return [Span(number, url, kind, size * (COMPRESSION if kind in ("gz", "zst") else 1), 0, size)] if size else []


def grouped(spans: Iterator[Span], piece_bytes: int) -> Iterator[Piece]:
    """Pieces of consecutive spans, as many as have `piece_bytes` together; a compressed file is a piece of its own."""
    group: list[Span] = []
    size = 0
    for span in spans:
        alone = span.kind in ("gz", "zst")
        if group and (alone or size + span.bytes > piece_bytes or len(group) == PIECE_FILES):
            yield Piece(tuple(group))
            group, size = [], 0
        group.append(span)
        size += span.bytes
        if alone:
            yield Piece(tuple(group))
            group, size = [], 0
    if group:
        yield Piece(tuple(group))


@lru_cache(maxsize=1)  # the spans of a file are read in order, and each opening reads the footer
def open_parquet(url: str) -> tuple[Any, int]:
    """A parquet file, and the index of its `text` column among the stored columns."""
    import fsspec
    import pyarrow.parquet as pq
    from pyarrow import ArrowInvalid

    try:
        # No read-ahead: a row group is one request, and other workers read the ones that follow.
        fs, path = fsspec.core.url_to_fs(url)
        file = pq.ParquetFile(fs.open(path, cache_type="none") if "://" in url else url, pre_buffer=False)
    except ArrowInvalid as error:
        raise ValueError(f"{url} is not a parquet file, or is cut short ({short_reason(error)}). Replace it") from None
    schema, stored = file.schema_arrow, file.metadata.schema
    if "text" not in schema.names:
        names = ", ".join(schema.names)[:200]
        raise ValueError(f"{url} has no `text` column: its columns are {names}. Rename the one with the text")
    kind = str(schema.field("text").type)
    if not re.fullmatch(r"(?:dictionary<values=)?(?:string|large_string|string_view|null)\b.*", kind):
        raise ValueError(f"{url}: the `text` column holds {kind[:40]}, not strings. Convert it")
    return file, next(i for i in range(file.metadata.num_columns) if stored.column(i).path == "text")


def open_binary(url: str) -> Any:
    if "://" not in url:
        return open(url, "rb")
    import fsspec

    fs, path = fsspec.core.url_to_fs(url)
    file = fs.open(path)
    file.archive = fs  # a zip file is closed with the last reference to it
    return file


def compressed_lines(span: Span) -> Iterator[Lines]:
    """Blocks of complete lines of a compressed file, which can only be read from its start; at least one block.

    A remote file is downloaded first. Raises as `read_texts` does.
    """
    position = 0
    try:
        with retry(lambda: _decompressed(span), span.url) as file:
            while (text := file.read(PIECE_BYTES) + file.readline()) or not position:
                yield Lines(span.url, position, text)
                position += max(len(text), 1)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{span.url} is damaged, or is cut short ({short_reason(error)}). Replace the file") from None


def _decompressed(span: Span) -> Any:
    import pyarrow as pa

    raw = open_binary(span.url if is_local(span.url) else f"simplecache::{span.url}")
    if span.kind == "gz":
        return gzip.open(raw)
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"), 2**20)


def read_texts(task: Piece | Lines) -> list[str | InvalidDocument | None]:
    """The documents of a task, in order; None for one without text.

    Raises ValueError for a damaged file, OSError for a file that can't be reached.
    """
    if isinstance(task, Lines):
        lines = list(io.BytesIO(task.text))
        starts = itertools.accumulate((len(line) for line in lines[:-1]), initial=task.first)
        return [
            _read_json_line(line, task.url, start)
            for start, line in zip(starts, lines, strict=bool(lines))
            if line.strip()
        ]
    readers = {"parquet": _read_parquet, "jsonl": _read_jsonl, "txt": _read_txt}
    texts: list[str | InvalidDocument | None] = []
    for span in task.spans:
        texts += retry(partial(readers[span.kind], span), span.url)
    return texts


def _read_parquet(span: Span) -> list[str | InvalidDocument | None]:
    import pyarrow as pa

    file, _ = open_parquet(span.url)
    place = f"row group {span.row_group}"
    try:
        if span.end == file.metadata.row_group(span.row_group).num_rows and not span.begin:
            column = file.read_row_group(span.row_group, columns=["text"], use_threads=False)["text"]
        else:
            column = _read_rows(file, span)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
    except (pa.ArrowException, OSError) as error:
        # pyarrow also raises OSError, without an errno, for damaged pages; over a network such an error is temporary.
        if isinstance(error, OSError) and (error.errno or not is_local(span.url)):
            raise
        raise ValueError(f"{span.url}, {place} is damaged ({short_reason(error)}). Replace the file") from None
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = [value.as_buffer() for value in column]
        return [
            None if bytes_ is None else _decode(bytes(bytes_), span.url, f"{place}, row {span.begin + row}")
            for row, bytes_ in enumerate(raw)
        ]


def _read_rows(file: Any, span: Span) -> Any:
    """The rows of a large row group that belong to the span. The rows before them are decoded and dropped."""
    import pyarrow as pa

    row, arrays = 0, []
    for batch in file.iter_batches(1000, row_groups=[span.row_group], columns=["text"], use_threads=False):
        begin, end = max(span.begin - row, 0), min(span.end - row, batch.num_rows)
        if begin < end:
            arrays.append(batch["text"].slice(begin, end - begin))
        row += batch.num_rows
        if row >= span.end:
            break
    return pa.chunked_array(arrays)


def _read_jsonl(span: Span) -> list[str | InvalidDocument | None]:
    """The documents of the lines that begin in the span."""
    texts = []
    with open_binary(span.url) as file:
        file.seek(max(span.begin - 1, 0))
        if span.begin:
            file.readline()  # the rest of a line of the previous span, or its last newline
        while (byte := file.tell()) < span.end and (line := file.readline()):
            if line.strip():
                texts.append(_read_json_line(line, span.url, byte))
    return texts


def _read_json_line(line: bytes, url: str, byte: int) -> str | InvalidDocument | None:
    invalid = partial(InvalidDocument, url, f"the line at byte {byte}")
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return invalid(f"not a JSON object with a `text` field ({short_reason(error)})")
    if text is not None and not isinstance(text, str):
        return invalid(f"`text` is {type(text).__name__}, not a string")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        return invalid(f"`text` holds half a surrogate pair, which is not a character (position {error.start})")
    return text


def _read_txt(span: Span) -> list[str | InvalidDocument | None]:
    with open_binary(span.url) as file:
        return [_decode(file.read(), span.url, "the whole file")]


def _decode(raw: bytes, url: str, place: str) -> str | InvalidDocument:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return InvalidDocument(url, place, f"not UTF-8 text (byte {error.start} of the document)")
