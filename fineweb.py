"""Turn text into token shards: FineWeb-Edu from the Hugging Face hub, or local parquet, jsonl or txt files.

    python fineweb.py                                                # the 10-billion-token sample: 20 GB of shards
    python fineweb.py --source 'my/*.parquet' --out data/mine        # a `text` column; jsonl: a `text` field a line
    python fineweb.py --source 'books/*.txt' --out data/books        # one document a file

The defaults write what train.py reads by default.
"""

import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from core import cli, tokenizer
from core.shards import DEFAULT_DATA, MANIFEST, Documents, ShardWriter, open_dataset, write_json

DEFAULT_VAL_TOKENS = 10_485_760
JSONL_RANGE = 16 * 2**20  # bytes of a jsonl file that one task reads: about as much text as a parquet row group


@dataclass
class Config:
    source: str = "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet"
    """Files by glob: .parquet with a `text` column, .jsonl with a `text` field, .txt; local or any fsspec address.
    For another FineWeb-Edu sample put 100BT or 350BT in the place of 10BT."""
    out: str = DEFAULT_DATA
    """Folder for the shards, the manifest and the tokenizer's files."""
    encoding: str = "gpt2"
    """tiktoken's name of the encoding, or a folder with a tokenizer.json (at most 65,536 ids)."""
    shard_tokens: int = 100_000_000
    """Tokens a shard: 200 MB each at the default. A source file's last shard is shorter."""
    val_tokens: int | None = None
    """Tokens held out for validation, whole documents from the start of the first file.
    Default: 10,485,760, or 1 % of the source where that is less."""
    max_tokens: int | None = None
    """Stop before the document that would pass this many tokens. Default: all of the source."""
    workers: int = os.cpu_count() or 1
    """Processes that tokenise; the shards are the same for any number."""
    overwrite: bool = False
    """Replace finished shards that other settings or another source made."""


@dataclass(frozen=True)
class Unit:
    """What one task tokenises: a parquet row group, a byte range of a jsonl file, or a txt file."""

    url: str
    source_file: int
    part: int
    bytes: int  # of text, about


class Validation:
    """Decides which of the first file's documents are held out: whole ones from its start, until enough."""

    def __init__(self, config: Config, source_bytes: int) -> None:
        self.tokens_wanted = config.val_tokens or min(DEFAULT_VAL_TOKENS, (config.max_tokens or 2**63) // 100)
        self.bytes_wanted = source_bytes / 100 if config.val_tokens is None else float("inf")
        self.tokens = self.bytes = 0

    def take(self, documents: Documents, token_bytes: np.ndarray) -> int:
        """How many of the next documents, from the first, belong to validation."""
        if not len(documents) or self.tokens >= self.tokens_wanted or self.bytes >= self.bytes_wanted:
            return 0
        tokens = self.tokens + documents.ends  # (d,)
        text_bytes = self.bytes + np.cumsum(token_bytes[documents.ids])[documents.ends - 1]  # (d,)
        enough = (tokens >= self.tokens_wanted) | (text_bytes >= self.bytes_wanted)
        last = int(np.argmax(enough)) if enough.any() else len(documents) - 1
        self.tokens, self.bytes = int(tokens[last]), int(text_bytes[last])
        return last + 1


def main(config: Config) -> None:
    limits = {"val_tokens": config.val_tokens, "max_tokens": config.max_tokens}
    limits = {name: value for name, value in limits.items() if value is not None}
    cli.check_positive(workers=config.workers, shard_tokens=config.shard_tokens, **limits)
    encoding = tokenizer.load(config.encoding)
    source, units = list_source(config.source)
    settings = {"source": source, "encoding": encoding.name, "vocab_size": encoding.n_vocab}
    settings |= {key: getattr(config, key) for key in ("shard_tokens", "val_tokens", "max_tokens")}
    out = Path(config.out)
    if (out / MANIFEST).is_file() and not config.overwrite:
        refuse_other_settings(out, settings)
        print(f"{out} is finished already: same files by name and size, same settings. --overwrite writes it again")
        return
    clear(out)
    tokenizer.save(encoding, out)
    end_of_text_id = tokenizer.end_of_text_id(encoding)
    writer = ShardWriter(out, config.shard_tokens, tokenizer.token_bytes(out), end_of_text_id)
    empty = write_shards(config, units, writer)
    check_not_empty(config, writer)
    manifest = settings | {"end_of_text_id": end_of_text_id, "empty_documents": empty, "shards": writer.shards}
    write_json(out / MANIFEST, manifest)
    summarize(out, writer.shards)


def refuse_other_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError where the finished shards in `out` are not what these settings would make."""
    manifest = open_dataset(out).manifest
    for shard in manifest["shards"]:
        if not (out / shard["file"]).is_file():
            raise ValueError(
                f"{out / shard['file']} is missing, the manifest lists it: write all again with --overwrite"
            )
    for key, value in settings.items():
        if manifest.get(key) != value:
            raise ValueError(
                f"{out} was made with {key} {manifest.get(key)}, now it is {value}: take another --out, or --overwrite"
            )


def clear(out: Path) -> None:
    """Make the folder; remove what an earlier or interrupted call left of shards, the manifest first."""
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    for path in out.iterdir():
        if re.fullmatch(r"(?:val|train)_\d{6}\.npy|\..*\.npy\.unfinished", path.name):
            path.unlink()


def check_not_empty(config: Config, writer: ShardWriter) -> None:
    for split in ("val", "train"):
        if not any(shard["split"] == split for shard in writer.shards):
            raise ValueError(
                f"--source {config.source} leaves no {split} document with --max-tokens {config.max_tokens} and "
                f"--val-tokens {config.val_tokens}: give more text, more --max-tokens or fewer --val-tokens"
            )


def summarize(out: Path, shards: list[dict[str, Any]]) -> None:
    print(f"{out}:")
    for split in ("val", "train"):
        chosen = [shard for shard in shards if shard["split"] == split]
        tokens, documents, text = (sum(shard[key] for shard in chosen) for key in ("tokens", "documents", "bytes"))
        print(
            f"  {split:5} {tokens:>14,} tokens {documents:>10,} documents {text / 1e6:>10,.1f} MB of text "
            f"{len(chosen):>5} shards"
        )


def list_source(pattern: str) -> tuple[dict[str, Any], list[Unit]]:
    """The source as the manifest records it, and its units in order. Raises ValueError where nothing fits."""
    import fsspec

    pattern, revision = pin_revision(pattern)
    fs, path = fsspec.core.url_to_fs(pattern)
    files = sorted(fs.glob(path))
    if not files:
        raise ValueError(f"--source {pattern} matches no file; quote the glob, as in --source 'folder/*.parquet'")
    units: list[Unit] = []
    for source_file, name in enumerate(files):
        units += list_units(fs.unstrip_protocol(name), source_file, fs.size(name))
    # Of local files only the names: the same files in another folder are the same source.
    source = {"name": pattern if revision else Path(path).name, "revision": revision}
    source["files"] = [{"name": name.rsplit("/", 1)[-1], "bytes": fs.size(name)} for name in files]
    return source, units


def pin_revision(pattern: str) -> tuple[str, str | None]:
    """A hub address at its newest commit, and that commit; any other address as it is, and None."""
    if not pattern.startswith("hf://"):
        return pattern, None
    from huggingface_hub import HfApi, HfFileSystem

    try:
        place = HfFileSystem().resolve_path(pattern.split("*", 1)[0].rsplit("/", 1)[0])
        commit = HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision).sha
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the hub could not be asked for {pattern} ({reason}): check the name and the network, or give "
            "local files with --source 'folder/*.parquet'"
        ) from None
    return re.sub(r"^(hf://(?:datasets/)?[^/]+/[^/@]+)(?:@[^/]+)?", rf"\1@{commit}", pattern), commit


def list_units(url: str, source_file: int, size: int) -> list[Unit]:
    """Cut one source file into units."""
    if url.endswith(".parquet"):
        with open_parquet(url) as file:
            column = text_column(url, file)
            groups = [file.metadata.row_group(i).column(column) for i in range(file.num_row_groups)]
            return [Unit(url, source_file, i, group.total_uncompressed_size) for i, group in enumerate(groups)]
    if url.endswith(".jsonl"):
        starts = range(0, size, JSONL_RANGE)
        return [Unit(url, source_file, i, min(JSONL_RANGE, size - start)) for i, start in enumerate(starts)]
    if url.endswith(".txt"):
        return [Unit(url, source_file, 0, size)]
    raise ValueError(f"{url} is neither .parquet, .jsonl nor .txt")


def open_parquet(url: str) -> Any:
    import fsspec
    import pyarrow.parquet as pq
    from pyarrow import ArrowInvalid

    try:
        return pq.ParquetFile(fsspec.open(url).open())
    except ArrowInvalid as error:
        raise ValueError(f"{url} is no parquet file, or cut short: {error}") from None


def text_column(url: str, file: Any) -> int:
    """The index of the `text` column among the stored columns of a parquet file."""
    schema = file.schema_arrow
    if "text" not in schema.names:
        raise ValueError(f"{url} has no `text` column; it has {', '.join(schema.names)}")
    kind = str(schema.field("text").type)
    if kind not in ("string", "large_string", "string_view"):
        raise ValueError(f"{url}: the `text` column holds {kind}, not strings")
    stored = file.metadata.schema
    return next(i for i in range(file.metadata.num_columns) if stored.column(i).path == "text")


def read_texts(unit: Unit) -> list[str | None]:
    """A unit's documents as text."""
    import fsspec

    if unit.url.endswith(".parquet"):
        with open_parquet(unit.url) as file:
            return file.read_row_group(unit.part, columns=["text"])["text"].to_pylist()
    with fsspec.open(unit.url).open() as file:
        if unit.url.endswith(".txt"):
            return [decode(file.read(), unit.url)]
        return [read_json_line(line, place) for place, line in json_lines(file, unit)]


def json_lines(file: Any, unit: Unit) -> Iterator[tuple[str, bytes]]:
    """The lines that begin in the unit's byte range, each with its place for an error message."""
    begin = unit.part * JSONL_RANGE
    end = begin + unit.bytes
    file.seek(max(begin - 1, 0))
    if begin:
        file.readline()  # the rest of a line that began in the range before, or that range's last newline
    while (place := file.tell()) < end and (line := file.readline()):
        if line.strip():
            yield f"{unit.url}, the line at byte {place}", line


def read_json_line(line: bytes, place: str) -> str | None:
    import json

    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place}: no JSON object with a `text` field ({error!r})") from None
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{place}: `text` is {type(text).__name__}, not a string")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: `text` holds half a surrogate pair, which is no character: {error}") from None
    return text


def decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 text: {error}") from None


def start_worker(encoding_name: str) -> None:
    global ENCODING  # each worker loads it once
    ENCODING = tokenizer.load(encoding_name)


def encode_unit(unit: Unit) -> tuple[Unit, Documents, int]:
    """Tokenise a unit, in a worker: its documents, their rows counted from the unit's first, and its rows in all."""
    end_of_text = np.array([tokenizer.end_of_text_id(ENCODING)], dtype=np.uint16)
    texts = read_texts(unit)
    rows = np.array([row for row, text in enumerate(texts) if text], dtype=np.int64)
    parts = [np.empty(0, dtype=np.uint16)]
    for row in rows:  # "<|endoftext|>" within a text stays text
        parts += [end_of_text, ENCODING.encode_to_numpy(texts[row], disallowed_special=()).astype(np.uint16)]
    lengths = np.array([1 + len(ids) for ids in parts[2::2]], dtype=np.int64)
    return unit, Documents(np.concatenate(parts), np.cumsum(lengths) - lengths, rows), len(texts)


def encode_in_order(config: Config, units: list[Unit]) -> Iterator[tuple[Unit, Documents, int]]:
    """Every unit tokenised, in the source's order; two a worker are in flight, so that memory stays flat."""
    in_flight: deque[Future] = deque()
    with ProcessPoolExecutor(config.workers, initializer=start_worker, initargs=(config.encoding,)) as pool:
        try:
            for unit in units:
                in_flight.append(pool.submit(encode_unit, unit))
                if len(in_flight) >= 2 * config.workers:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def write_shards(config: Config, units: list[Unit], writer: ShardWriter) -> int:
    """Tokenise the units into shards; return how many documents were empty."""
    source_bytes = sum(unit.bytes for unit in units)
    validation = Validation(config, source_bytes)
    empty = tokens = bytes_read = first_row = source_file = 0
    with tqdm(unit="tok", unit_scale=True, disable=None) as bar:
        for unit, encoded, n_rows in encode_in_order(config, units):
            if unit.source_file != source_file:
                source_file, first_row = unit.source_file, 0
            documents = replace(encoded, rows=first_row + encoded.rows)
            first_row += n_rows
            empty += n_rows - len(documents)
            kept = documents
            if config.max_tokens is not None:
                kept = (
                    documents[: int(np.sum(tokens + documents.ends <= config.max_tokens))] if len(documents) else kept
                )
            n_val = validation.take(kept, writer.token_bytes) if source_file == 0 else 0
            writer.add("val", source_file, kept[:n_val])
            writer.add("train", source_file, kept[n_val:])
            tokens += len(kept.ids)
            bytes_read += unit.bytes
            bar.total = config.max_tokens or round(tokens * source_bytes / max(bytes_read, 1))
            bar.update(len(kept.ids))
            if len(kept) < len(documents):
                break
    writer.flush()
    return empty


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
