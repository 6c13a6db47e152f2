"""A source as one ordered stream of documents, cut into pieces that worker processes read independently."""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from core import cli
from core.data.shards import short_reason
from core.data.sources import Files, SourceFile, retry

FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
EXPANSION = 3  # bytes of text per compressed byte, approximately
PIECE_BYTES, PIECE_FILES = 16 * 2**20, 1000  # limits of a piece: of text, and of whole files
ROW_GROUP_BYTES = 64 * 2**20  # of text; reading a part of a row group also decodes the rows before that part
MAX_COUNTED_BYTES = 2**28  # read to name the line of an error
Lines = bytes  # within Piece, `bytes` is a field
Row = tuple[int, str | None]  # the place in the file, and the text or an InvalidDocument


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
    """In place of a document that can't be read as text: the reason."""


def format_of(file: SourceFile) -> tuple[str, str | None, str]:
    """The format and the compression, by the suffixes, and the unit of places. Raises ValueError for others."""
    stem, suffix = os.path.splitext(file.name)
    compression = COMPRESSIONS.get(suffix)
    kind = FORMATS.get(os.path.splitext(stem)[1] if compression else suffix)
    if kind is None or (compression and kind != "jsonl"):
        raise ValueError(
            f"--source file {file.url} must be .parquet, .txt, or .jsonl or .ndjson (one object with a `text` field "
            "per line), which may be compressed (.jsonl.gz, .jsonl.zst). Convert it"
        )
    return kind, compression, "line" if compression else "row" if kind == "parquet" else "byte"


def describe_place(file: SourceFile, place: int) -> str:
    """File and place of a document, with the line of a byte that can be found quickly."""
    kind, _, unit = format_of(file)
    if kind == "txt":  # the file is the document
        return file.url
    place_in_words = f"{unit} {place}"
    if unit == "byte" and place <= MAX_COUNTED_BYTES and "://" not in file.url:
        with contextlib.suppress(OSError), file.open() as stream:
            lines = stream.read(place).count(b"\n")
            place_in_words += f" (line {lines + 1})"
    return f"{file.url}, {place_in_words}"


def cut(files: Files, limit: int) -> list[Piece]:
    """Pieces of at most `limit` bytes of text, where the files can be split. Small files share a piece.

    Only metadata is read. Raises ValueError for a file whose content doesn't match its suffix.
    """
    with ThreadPoolExecutor(16) as pool:
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
    (kind, compression, _), size, parts = format_of(file), file.bytes, list[Piece]()
    if kind == "parquet":
        metadata, row, size = open_parquet(file).metadata, 0, 0
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
def open_parquet(file: SourceFile) -> Any:
    """A parquet file with a `text` column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # No read-ahead: a column chunk is one request, and other workers read the pieces that follow.
    parquet = pq.ParquetFile(file.open(cache_type="none"), pre_buffer=False)
    types = {field.name: field.type for field in parquet.schema_arrow}
    kinds = {name: str(t.value_type if isinstance(t, pa.DictionaryType) else t) for name, t in types.items()}
    if kinds.get("text") not in ("string", "large_string", "string_view", "null"):
        columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())[:200]
        raise ValueError(f"{file.url} has no `text` column of strings: its columns are {columns}. Convert it")
    return parquet


def read_piece(piece: Piece, files: Files) -> list[tuple[int, int, str | None]]:
    """The documents of a piece, each as the number of its file, its place in it, and its text.

    Raises ValueError for a damaged file, OSError for a file that can't be reached.
    """
    rows: list[tuple[int, int, str | None]] = []
    for number in range(piece.first, piece.last):
        found = retry(partial(_read_file, piece, files[number]), files[number].url)
        rows += [(number, place, text) for place, text in found]
    return rows


def _read_file(piece: Piece, file: SourceFile) -> list[Row]:
    kind, compression, _ = format_of(file)
    if kind == "parquet":
        return list(_read_parquet(piece, file))
    first, raw = _read_bytes(file, piece.begin, piece.end) if piece.lines is None else (piece.begin, piece.lines)
    return list(_split_lines(raw, first, compression)) if kind == "jsonl" else [(0, _decode(raw))]


def _read_parquet(piece: Piece, file: SourceFile) -> Iterator[Row]:
    """The rows of a piece. The rows before them in its row group are decoded and dropped."""
    parquet = open_parquet(file)
    groups = map(parquet.metadata.row_group, range(parquet.num_row_groups))
    edges = [*itertools.accumulate((group.num_rows for group in groups), initial=0)]
    end = piece.end or edges[-1]
    wanted = [i for i, (a, b) in enumerate(itertools.pairwise(edges)) if a < end and piece.begin < b]
    row = edges[wanted[0]] if wanted else 0
    for batch in parquet.iter_batches(1000, row_groups=wanted, columns=["text"], use_threads=False):
        first = max(piece.begin - row, 0)
        column = batch["text"][first : end - row]
        try:
            texts = column.to_pylist()
        except UnicodeDecodeError:
            texts = map(_decode, column.cast("large_binary").to_pylist())
        yield from enumerate(texts, row + first)
        row += len(batch)
        if row >= end:
            return


def _read_bytes(file: SourceFile, begin: int, end: int) -> tuple[int, bytes]:
    """The lines that begin in the bytes from `begin` to before `end`, and the place of the first.

    Without `end`, the whole file, decompressed.
    """
    with file.open() as stream:
        if compression := format_of(file)[1]:
            import pyarrow as pa

            with pa.input_stream(stream, compression) as decompressed:
                return 1, decompressed.read()
        if not end:
            return 0, stream.read()
        stream.seek(max(begin - 1, 0))
        first = begin and begin - 1 + len(stream.readline())  # after the line, or the newline, of the piece before
        return first, stream.read(end - 1 - first) + stream.readline() if first < end else b""


def divide(piece: Piece, files: Files) -> Iterator[Piece]:
    """The tasks of a piece: the piece, or blocks of lines of a large compressed file, which this process decompresses.

    There is at least one.
    """
    file, line, rest = files[piece.first], 1, b""
    compression = format_of(file)[1]
    if not piece.end or not compression:
        yield piece
        return
    import pyarrow as pa

    with pa.input_stream(retry(file.open, file.url), compression) as stream:
        while block := retry(lambda: stream.read(PIECE_BYTES), file.url, pauses=()):  # a repetition would lose bytes
            lines, newline, rest = (rest + block).rpartition(b"\n")
            if newline:
                yield Piece(piece.first, piece.last, len(lines), line, lines=lines)
                line += lines.count(b"\n") + 1
    yield Piece(piece.first, piece.last, len(rest), line, lines=rest)


def _split_lines(lines: bytes, place: int, compression: str | None) -> Iterator[Row]:
    """The documents of lines of JSON. The place of each is its number in a compressed file, else its first byte."""
    for line in lines.split(b"\n"):
        if line.strip():
            yield place, _read_json(line)
        place += 1 if compression else len(line) + 1


def _read_json(line: bytes) -> str | None:
    try:
        text = json.loads(line)["text"]
        if text is not None and not isinstance(text, str):
            raise TypeError(f"`text` is {type(text).__name__}, not a string")
        (text or "").encode()  # half a surrogate pair is not a character
    except json.JSONDecodeError as error:  # its text would count lines within this one
        return InvalidDocument(f"not a JSON object ({error.msg}: column {error.colno})")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return InvalidDocument(f"not a JSON object with a `text` field of characters ({short_reason(error)})")
    return text


def _decode(raw: bytes | None) -> str | None:
    try:
        return raw.decode() if raw else None
    except UnicodeDecodeError as error:
        return InvalidDocument(f"not UTF-8 text (byte {error.start} of the document)")
