"""Turn text into token shards: FineWeb-Edu from the Hugging Face hub, or local parquet, jsonl or txt files.

    python fineweb.py                                                # the 10-billion-token sample: 20 GB of shards
    python fineweb.py --source 'my/*.parquet' --out data/mine        # a `text` column; jsonl: a `text` field a line
    python fineweb.py --source 'books/*.txt' --out data/books        # one document a file
    torchrun --nnodes 4 --nproc_per_node 1 ... fineweb.py            # the source files shared among machines
    python fineweb.py --verify data/mine                             # check every shard against the manifest
    python fineweb.py --adopt edu_fineweb10B                         # describe shards of build-nanogpt or llm.c

The defaults write what train.py reads by default. Interrupted, the same command goes on after the last whole shard.
"""

import contextlib
import itertools
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tqdm import tqdm

from core import cli
from core.data import audit, encode, sources, tokenizer
from core.data.encode import Encoded, encode_in_order
from core.data.prepare import (
    Counts,
    Documents,
    Part,
    PartWriter,
    clear,
    distrust,
    distrusted,
    forget_barren,
    join,
    load_part,
    recorded,
    settle,
)
from core.data.shards import DEFAULT_DATA, MANIFEST, open_dataset
from core.files import FileLocks

DEFAULT_VAL_TOKENS = 10_485_760
SHARD_BYTES = 0.45  # of shards for a byte of English text: 2 bytes a token of about 4.45 bytes
MAX_BROKEN = 1000  # documents of a file that --skip-broken leaves out before the file itself is taken for broken
FEW_FILES = 20  # each of which has its line of progress
NO_LIMIT = 2**63


def available_cores() -> int:
    """Of those that this process may use, its share where torchrun starts several on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


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
    val_tokens: Annotated[int | None, cli.DEFAULT_IN_HELP] = None
    """Tokens held out for validation, whole documents from the start of the first file.
    Default: 10,485,760, or 1 % of the source where that is less."""
    max_tokens: Annotated[int | None, cli.DEFAULT_IN_HELP] = None
    """Stop before the document that would pass this many tokens. Default: all of the source."""
    workers: int = available_cores()
    """Processes that tokenise; the shards are the same for any number."""
    encoder: Literal["auto", "fastokens", "tiktoken"] = "auto"
    """What encodes. tiktoken is the reference; fastokens is ten times faster, and `auto` takes it where it is there.
    It is checked against tiktoken on one document of 256; the shards are the same."""
    skip_broken: bool = False
    """Leave out documents that are no valid text, listed in the manifest, instead of stopping at the first."""
    overwrite: bool = False
    """Start anew where --out holds shards, finished or not."""
    verify: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """Only check this folder: every shard's hash and counts against its manifest, and a sample of documents."""
    adopt: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """Only describe this folder's shards (build-nanogpt's .npy, llm.c's .bin) in a manifest, for train.py to read.
    Their encoding is --encoding, and `val` in a file's name makes it validation."""


def main(config: Config) -> None:
    if config.verify:
        return audit.verify(Path(config.verify))
    if config.adopt:
        return audit.adopt(Path(config.adopt), config.encoding, config.overwrite)
    rank, ranks = check(config)
    encoding = tokenizer.load(config.encoding)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    claims = FileLocks(out)
    if config.overwrite:
        clear(out, claims)
    with claims.alone():
        source, head = agree(config, out, encoding, claims)
        mine = range(rank, len(source.files), ranks)
        for number in mine:
            claims.take(number)
    if (out / MANIFEST).is_file():
        return print(f"{out} is finished already: the same source and settings. --overwrite writes it again")
    tokenizer.save(encoding, out)
    prepare(config, out, source, head, mine)
    with claims.alone():
        finish(config, out, source, head)


def check(config: Config) -> tuple[int, int]:
    """Refuse settings that can't be meant; return this process's rank and how many there are."""
    limits = {"val_tokens": config.val_tokens, "max_tokens": config.max_tokens}
    given = {name: value for name, value in limits.items() if value is not None}
    cli.check_positive(workers=config.workers, shard_tokens=config.shard_tokens, **given)
    encode.choose(config.encoder)
    rank, ranks = place_among_ranks()
    if ranks > 1 and config.max_tokens is not None:
        raise ValueError(f"--max-tokens counts through the files in order: start one process, not {ranks}")
    if ranks > 1 and config.overwrite:
        raise ValueError(
            f"--overwrite would remove what the other {ranks - 1} processes write: delete {config.out} first"
        )
    return rank, ranks


def place_among_ranks() -> tuple[int, int]:
    """Rank and number of ranks, from torchrun or a Slurm array; 0 and 1 without."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, ranks = int(env["RANK"]), int(env["WORLD_SIZE"])
        if not 0 <= rank < ranks:
            raise ValueError(f"RANK {rank} of WORLD_SIZE {ranks}: ranks count from 0 to {ranks - 1}")
        return rank, ranks
    if "SLURM_ARRAY_TASK_ID" in env:
        task, low, high, count = (int(env[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT"))
        if (low, high) != (0, count - 1):
            raise ValueError(f"Slurm array {low} to {high} of {count} tasks: give 0-{count - 1}, also to do some again")
        return task, count
    return 0, 1


def agree(config: Config, out: Path, encoding: Any, claims: FileLocks) -> tuple[sources.Source, dict[str, Any]]:
    """The source, and the settings that the manifest begins with. Raises ValueError where `out` has others."""
    known = recorded(out)
    revision = known["source"]["revision"] if known.get("source", {}).get("name") == config.source else None
    if revision and (out / MANIFEST).is_file():  # a commit never changes, so the hub needn't be asked again
        source = sources.Source.from_facts(known["source"])
    else:
        source = sources.find_source(config.source, revision)
    head = {"source": source.facts(), "encoding": encoding.name, "encoding_sha256": tokenizer.fingerprint(encoding)}
    head |= {"vocab_size": encoding.n_vocab, "end_of_text_id": tokenizer.end_of_text_id(encoding)}
    head |= {key: getattr(config, key) for key in ("shard_tokens", "val_tokens", "max_tokens")}
    try:
        settle(out, head)
    except ValueError:
        if not forget_barren(out, claims):
            raise
        settle(out, head)
    return source, head


def prepare(config: Config, out: Path, source: sources.Source, head: dict[str, Any], mine: range) -> None:
    """Make the shards of the files `mine`, by tiktoken alone once fastokens has given another id."""
    chosen = range(len(source.files)) if 0 in mine else mine  # validation is a share of all
    units = dict(zip(chosen, sources.cut([source.files[i] for i in chosen]), strict=True))
    val_bytes = sum(unit.bytes for unit in itertools.chain(*units.values())) // 100
    val_bytes = val_bytes if config.val_tokens is None else NO_LIMIT
    while True:
        parts = {i: load_part(out, i, head, val_bytes if i == 0 else 0) for i in mine}
        left = {i: [] if part.complete else units[i][part.before.units :] for i, part in parts.items()}
        check_disk(config, out, left)
        encoder = "tiktoken" if distrusted(out) else encode.choose(config.encoder)
        try:
            return write_parts(config, encoder, parts, left)
        except encode.EncodersDifferError as difference:
            distrust(out, str(difference))
            print(
                f"FASTOKENS DIFFERS FROM TIKTOKEN {difference}: its shards are dropped, tiktoken makes them", flush=True
            )


def check_disk(config: Config, out: Path, left: dict[int, list[sources.Unit]]) -> None:
    """Raise ValueError where the shards to come clearly don't fit."""
    needed = int(sum(unit.bytes for units in left.values() for unit in units) * SHARD_BYTES)
    needed = min(needed, 2 * (config.max_tokens or NO_LIMIT))
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"the shards will need about {needed / 1e9:,.3f} GB and {out} has {free / 1e9:,.3f} GB free: make room, or "
            "take another --out or fewer --max-tokens"
        )


def write_parts(config: Config, encoder: str, parts: dict[int, Part], left: dict[int, list[sources.Unit]]) -> None:
    """Tokenise what is left of each file into its part."""
    done = sum(part.tokens for part in parts.values())
    if done:
        print(f"going on after {done:,} tokens in {sum(len(part.shards) for part in parts.values())} shards")
    earlier, ended = 0, False
    units = list(itertools.chain(*left.values()))
    stream = encode_in_order(units, config.workers, encoder, config.encoding, Path(config.out))
    writer = PartWriter(config.shard_tokens, tokenizer.token_bytes(Path(config.out)))
    with Progress(done, left) as progress, contextlib.closing(stream), contextlib.closing(writer):
        for i, part in parts.items():
            if ended or (not part.complete and not left[i]):
                part.close()
            elif not part.complete:
                part.encoders = sorted({*part.encoders, encoder})
                writer.part = part
                write_part(config, writer, itertools.islice(stream, len(left[i])), earlier, progress)
            if i == 0:
                check_split(config, [part], "val")
            ended = ended or part.last
            earlier += part.tokens


def write_part(
    config: Config, writer: PartWriter, stream: Iterator[Encoded], earlier: int, progress: "Progress"
) -> None:
    """Put what is left of a source file into shards; `earlier` are the tokens of the files before it."""
    part = writer.part
    after = part.before
    try:
        for encoded in stream:
            part.before = before = after
            documents = encoded.documents
            documents = replace(documents, rows=before.rows + documents.rows)
            if config.max_tokens is not None and len(documents):
                room = config.max_tokens - earlier - before.tokens
                documents = documents[: int(np.sum(documents.ends <= room))]
            part.last = len(documents) < len(encoded.documents)
            n_val = held_out(config, documents, before, part.val_bytes)
            writer.add("val", documents[:n_val])
            writer.add("train", documents[n_val:])
            after = count(config, before, encoded, documents, n_val)
            progress.add(encoded.unit, len(documents.ids))
            if part.last:
                break
    except ValueError:
        writer.wait()
        part.drop()
        raise
    writer.flush()
    writer.wait()
    part.before = after
    part.close()
    progress.say(f"{part.source['name']}: {part.tokens:,} tokens in {len(part.shards)} shards")


def held_out(config: Config, documents: Documents, before: Counts, val_bytes: float) -> int:
    """How many of the next documents, from the first, are for validation: whole ones, until enough."""
    wanted = config.val_tokens or min(DEFAULT_VAL_TOKENS, (config.max_tokens or NO_LIMIT) // 100)
    if not len(documents) or before.val_tokens >= wanted or before.val_bytes >= val_bytes:
        return 0
    tokens = before.val_tokens + documents.ends  # (d,)
    text_bytes = before.val_bytes + np.cumsum(documents.text_bytes)  # (d,)
    enough = (tokens >= wanted) | (text_bytes >= val_bytes)
    return int(np.argmax(enough)) + 1 if enough.any() else len(documents)


def count(config: Config, before: Counts, encoded: Encoded, kept: Documents, n_val: int) -> Counts:
    """What the units up to this one held. Raises ValueError for broken documents, unless they may be skipped."""
    if encoded.broken and not config.skip_broken:
        where = f"{encoded.unit.url}, {encoded.broken[0]}"
        raise ValueError(f"{where}; --skip-broken leaves such documents out and lists them in the manifest")
    name = encoded.unit.url.rsplit("/", 1)[-1]
    broken = before.broken + [f"{name}, {place}" for place in encoded.broken]
    if len(broken) > MAX_BROKEN:
        raise ValueError(f"{encoded.unit.url} has more than {MAX_BROKEN} broken documents; the last: {broken[-1]}")
    return Counts(
        before.units + 1,
        before.rows + encoded.rows,
        before.empty + encoded.rows - len(encoded.documents) - len(encoded.broken),
        broken,
        before.tokens + len(kept.ids),
        before.val_tokens + len(kept[:n_val].ids),
        before.val_bytes + int(kept[:n_val].text_bytes.sum()),
    )


class Progress:
    """A bar on a terminal, and a line a source file, where those are many one in ten seconds."""

    def __init__(self, done: int, left: dict[int, list[sources.Unit]]) -> None:
        self._bytes_left = sum(unit.bytes for units in left.values() for unit in units)
        self._bytes = self._tokens = 0
        self._bar = cli.progress_bar(unit="tok", unit_scale=True, initial=done)
        self._done, self._few, self._said = done, len(left) <= FEW_FILES, -math.inf

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if kind is KeyboardInterrupt:
            print("stopped: the same command goes on after the last whole shard", flush=True)

    def add(self, unit: sources.Unit, tokens: int) -> None:
        self._bytes += unit.bytes
        self._tokens += tokens
        self._bar.total = self._done + round(self._tokens * self._bytes_left / max(self._bytes, 1))
        self._bar.update(tokens)

    def say(self, text: str) -> None:
        if self._few or time.monotonic() > self._said + 10:
            tqdm.write(text)
            self._said = time.monotonic()


def check_split(config: Config, parts: list[Part], split: str) -> None:
    if not any(shard["split"] == split for part in parts for shard in part.shards):
        where = f"{parts[0].source['name']}, the first file," if split == "val" else f"--source {config.source}"
        given = {"--max-tokens": config.max_tokens, "--val-tokens": config.val_tokens}
        limits = " and ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        if parts[0].source["name"].endswith(".txt"):
            remedy = "a .txt is one document: cut it, as by split -C 50K --additional-suffix=.txt TEXT part-"
        else:
            remedy = "give more text, more --max-tokens or fewer --val-tokens"
        raise ValueError(f"{where} leaves no {split} document{f' with {limits}' if limits else ''}: {remedy}")


def finish(config: Config, out: Path, source: sources.Source, head: dict[str, Any]) -> None:
    """Join the parts if all are complete; else say which other processes are at work on."""
    if (out / MANIFEST).is_file():
        return  # another process has joined them
    parts = [load_part(out, i, head) for i in range(len(source.files))]
    missing = [part.source["name"] for part in parts if not part.complete]
    if missing:
        return print(
            f"done here. {len(missing)} of {len(parts)} files, {missing[0]} the first, are left to the other processes "
            "and the last to end joins all. Should it not, the same command without torchrun or Slurm does"
        )
    check_split(config, parts, "train")
    join(out, parts, head)
    audit.summarize(open_dataset(out))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
