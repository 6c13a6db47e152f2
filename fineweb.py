"""Convert text to token shards: FineWeb-Edu from the Hugging Face hub, or local parquet, jsonl or txt files.

    python fineweb.py                                                # the 10-billion-token sample: 20 GB of shards
    python fineweb.py --source 'my/*.parquet' --out data/mine        # column `text`; jsonl: field `text` of each line
    python fineweb.py --source 'books/*.txt' --out data/books        # one document per file
    torchrun --nnodes 4 --nproc_per_node 1 ... fineweb.py            # distribute the source files over machines
    python fineweb.py --verify data/mine                             # check each shard against the manifest
    python fineweb.py --adopt edu_fineweb10B                         # describe shards of build-nanogpt or llm.c

By default it writes to the folder that train.py reads by default. After an interruption, rerun the same command to
resume after the last complete shard.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from core import cli
from core.data import audit, encode, sources, tokenizer
from core.data.encode import Documents, Encoded, EncoderMismatchError, ProgressBar, encode_in_order
from core.data.prepare import (
    Counts,
    ShardWriter,
    SourceProgress,
    check_settings,
    clear,
    discard_empty,
    join,
    load_progress,
    recorded_settings,
)
from core.data.shards import DEFAULT_DATA, DEFAULT_VAL_TOKENS, MANIFEST, open_dataset
from core.files import FileLocks

SHARD_BYTES = 0.45  # bytes of shard per byte of English text: 2 bytes per token of about 4.45 bytes
MAX_INVALID = 1000  # documents that --skip-broken skips in a file; with more, the file itself counts as damaged
NO_LIMIT = 2**63
VAL_TOKENS_HELP = tyro.conf.arg(
    help="Tokens held out for validation: complete documents from the start of the first file. "
    f"Default: {DEFAULT_VAL_TOKENS:,}, or 1 % of a smaller source.",
    help_behavior_hint="",
)


def available_cores() -> int:
    """This process's share of the cores that it may use, as torchrun can start several processes on a machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


@dataclass
class Config:
    source: str = "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet"
    """Source files, as a glob: .parquet with a `text` column, .jsonl with a `text` field, or .txt; local or any fsspec
    address. For a larger sample of FineWeb-Edu replace 10BT by 100BT or 350BT."""
    out: str = DEFAULT_DATA
    """Folder for the shards, the manifest and the tokenizer files."""
    encoding: str = "gpt2"
    """Encoding: a name that tiktoken knows, or a folder with a tokenizer.json. At most 65,536 ids."""
    shard_tokens: int = 100_000_000
    """Tokens per shard; a shard takes 2 bytes per token. The last shard of a source file is smaller."""
    val_tokens: Annotated[int | None, VAL_TOKENS_HELP] = None
    max_tokens: Annotated[int | None, cli.DEFAULT_IN_HELP] = None
    """Maximum number of tokens: stop before the document that would exceed it. Default: the entire source."""
    workers: int = available_cores()
    """Processes that encode. The shards are the same for any number."""
    encoder: Literal["auto", "fastokens", "tiktoken"] = "auto"
    """Encoding library. tiktoken is the reference. fastokens is ten times faster; tiktoken checks one of 256 documents.
    `auto` uses fastokens if it is installed."""
    skip_broken: bool = False
    """Skip documents that are not valid text and list them in the manifest, instead of stopping at the first one."""
    overwrite: bool = False
    """Delete the shards in --out, finished or not, and restart."""
    verify: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """Folder to check instead of writing one: hash and counts of each shard against the manifest, and a sample of
    documents. Default: no check."""
    adopt: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """Folder of another project's shards (.npy of build-nanogpt, .bin of llm.c) to describe in a manifest for train.py.
    --encoding is their encoding; `val` in a file name means validation. Default: no such folder."""
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


def main(config: Config) -> None:
    if config.verify:
        return audit.verify(Path(config.verify))
    if config.adopt:
        return audit.adopt(Path(config.adopt), config.encoding, config.overwrite)
    rank, world_size = check(config)
    encoding = tokenizer.load(config.encoding)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    locks = FileLocks(out)
    if config.overwrite:
        clear(out, locks)
    with locks.exclusive():
        source, header = resolve_settings(config, out, encoding, locks)
        own_files = range(rank, len(source.files), world_size)
        for number in own_files:
            locks.acquire(number)
    if (out / MANIFEST).is_file():
        return print(f"{out} is already finished with the same source and settings. --overwrite writes it again")
    tokenizer.save(encoding, out)
    prepare(config, out, source, header, own_files)
    with locks.exclusive():
        finish(config, out, source, header)


def check(config: Config) -> tuple[int, int]:
    """Refuse invalid combinations of settings. Return this process's rank and the number of processes."""
    limits = {"val_tokens": config.val_tokens, "max_tokens": config.max_tokens}
    given = {name: value for name, value in limits.items() if value is not None}
    cli.check_positive(workers=config.workers, shard_tokens=config.shard_tokens, **given)
    encode.choose(config.encoder)
    rank, world_size = find_rank()
    if world_size > 1 and config.max_tokens is not None:
        raise ValueError(
            f"--max-tokens counts tokens through the files in order, not in {world_size} processes. Start one process"
        )
    if world_size > 1 and config.overwrite:
        raise ValueError(
            f"--overwrite would remove the shards of the other {world_size - 1} processes. Delete {config.out} first"
        )
    return rank, world_size


def find_rank() -> tuple[int, int]:
    """Rank and world size, from torchrun or a Slurm array; 0 and 1 for a single process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        if not 0 <= rank < world_size:
            raise ValueError(
                f"RANK {rank} with WORLD_SIZE {world_size}: ranks are 0 to {world_size - 1}. Start with torchrun"
            )
        return rank, world_size
    if "SLURM_ARRAY_TASK_ID" in env:
        task, low, high, count = (int(env[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT"))
        if (low, high) != (0, count - 1):
            raise ValueError(f"Slurm array of {count} tasks from {low} to {high} must start at 0. Use 0-{count - 1}")
        return task, count
    return 0, 1


def resolve_settings(
    config: Config, out: Path, encoding: Any, locks: FileLocks
) -> tuple[sources.Source, dict[str, Any]]:
    """The source, and the header of the manifest. Raises ValueError if `out` was begun with other settings."""
    recorded = recorded_settings(out)
    revision = recorded["source"]["revision"] if recorded.get("source", {}).get("name") == config.source else None
    if revision and (out / MANIFEST).is_file():  # a commit never changes, so no request to the hub is needed
        source = sources.Source.from_json(recorded["source"])
    else:
        source = sources.find_source(config.source, revision)
    header = {"source": source.to_json(), "encoding": encoding.name}
    header |= {"encoding_sha256": tokenizer.fingerprint(encoding), "vocab_size": encoding.n_vocab}
    header |= {"end_of_text_id": tokenizer.end_of_text_id(encoding)}
    header |= {key: getattr(config, key) for key in ("shard_tokens", "val_tokens", "max_tokens")}
    try:
        check_settings(out, header)
    except ValueError:
        if not discard_empty(out, locks):
            raise
        check_settings(out, header)
    return source, header


def prepare(config: Config, out: Path, source: sources.Source, header: dict[str, Any], own_files: range) -> None:
    """Write the remaining shards of this process's files."""
    opened = range(len(source.files)) if 0 in own_files else own_files  # validation is a share of all files
    chunks = dict(zip(opened, sources.split_files([source.files[i] for i in opened]), strict=True))
    val_bytes = sum(chunk.bytes for chunk in itertools.chain(*chunks.values())) // 100
    val_bytes = val_bytes if config.val_tokens is None else NO_LIMIT
    progress = {i: load_progress(out, i, header, val_bytes if i == 0 else 0) for i in own_files}
    remaining = {i: [] if p.complete else chunks[i][p.counts.chunks :] for i, p in progress.items()}
    check_disk(config, out, remaining)
    try:
        write_sources(config, progress, remaining)
    except EncoderMismatchError as error:
        all_progress = [load_progress(out, i, header) for i in range(len(source.files))]
        overwrite = " --overwrite" if any(p.shards and "fastokens" in p.encoders for p in all_progress) else ""
        raise ValueError(f"--encoder {config.encoder}: fastokens {error}. Use --encoder tiktoken{overwrite}") from None


def check_disk(config: Config, out: Path, remaining: dict[int, list[sources.Chunk]]) -> None:
    """Raise ValueError if the remaining shards clearly don't fit on the disk."""
    needed = int(sum(chunk.bytes for chunks in remaining.values() for chunk in chunks) * SHARD_BYTES)
    needed = min(needed, 2 * (config.max_tokens or NO_LIMIT))
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"--out {out} has {free / 1e9:,.3f} GB free, but the shards need about {needed / 1e9:,.3f} GB. Free disk "
            "space, or use another --out or a smaller --max-tokens"
        )


def write_sources(
    config: Config, progress: dict[int, SourceProgress], remaining: dict[int, list[sources.Chunk]]
) -> None:
    """Encode the remaining chunks of each file into shards."""
    done = sum(of_file.tokens for of_file in progress.values())
    if done:
        print(f"resuming after {done:,} tokens in {sum(len(p.shards) for p in progress.values())} shards")
    tokens_before, reached_limit = 0, False
    encoder, chunks = encode.choose(config.encoder), list(itertools.chain(*remaining.values()))
    stream = encode_in_order(chunks, config.workers, encoder, config.encoding, Path(config.out))
    writer = ShardWriter(config.shard_tokens, tokenizer.token_bytes(Path(config.out)))
    with ProgressBar(done, remaining) as bar, contextlib.closing(stream), contextlib.closing(writer):
        for i, of_file in progress.items():
            if reached_limit or (not of_file.complete and not remaining[i]):
                of_file.finish()
            elif not of_file.complete:
                of_file.encoders = sorted({*of_file.encoders, encoder})
                writer.progress = of_file
                write_source(config, writer, itertools.islice(stream, len(remaining[i])), tokens_before, bar)
            if i == 0:
                check_split(config, [of_file], "val")
            reached_limit = reached_limit or of_file.reached_limit
            tokens_before += of_file.tokens


def write_source(
    config: Config, writer: ShardWriter, stream: Iterator[Encoded], tokens_before: int, bar: ProgressBar
) -> None:
    """Write the remaining chunks of a source file as shards. The files before it have `tokens_before` tokens."""
    progress = writer.progress
    counts = progress.counts
    try:
        for encoded in stream:
            progress.counts = counts
            documents = replace(encoded.documents, rows=counts.rows + encoded.documents.rows)
            if config.max_tokens is not None and len(documents):
                room = config.max_tokens - tokens_before - counts.tokens
                documents = documents[: int(np.sum(documents.ends <= room))]
            progress.reached_limit = len(documents) < len(encoded.documents)
            n_val = count_held_out(config, documents, counts, progress.val_bytes)
            writer.add("val", documents[:n_val])
            writer.add("train", documents[n_val:])
            counts = add_chunk(config, counts, encoded, documents, n_val)
            bar.add(encoded.chunk, len(documents.ids))
            if progress.reached_limit:
                break
    except ValueError:
        writer.wait()
        progress.discard()
        raise
    writer.flush()
    writer.wait()
    progress.counts = counts
    progress.finish()
    bar.log(f"{progress.source['name']}: {progress.tokens:,} tokens in {len(progress.shards)} shards")


def count_held_out(config: Config, documents: Documents, counts: Counts, val_bytes: float) -> int:
    """How many of the next documents are for validation: complete documents from the first, until the target."""
    wanted = config.val_tokens or min(DEFAULT_VAL_TOKENS, (config.max_tokens or NO_LIMIT) // 100)
    if not len(documents) or counts.val_tokens >= wanted or counts.val_bytes >= val_bytes:
        return 0
    tokens = counts.val_tokens + documents.ends  # (d,)
    text_bytes = counts.val_bytes + np.cumsum(documents.text_bytes)  # (d,)
    enough = (tokens >= wanted) | (text_bytes >= val_bytes)
    return int(np.argmax(enough)) + 1 if enough.any() else len(documents)


def add_chunk(config: Config, counts: Counts, encoded: Encoded, kept: Documents, n_val: int) -> Counts:
    """The totals with this chunk. Raises ValueError for invalid documents, unless --skip-broken allows them."""
    if encoded.invalid and not config.skip_broken:
        raise ValueError(f"{encoded.chunk.url}, {encoded.invalid[0]}. Fix the document, or skip it with --skip-broken")
    name = encoded.chunk.url.rsplit("/", 1)[-1]
    invalid = counts.invalid + [f"{name}, {place}" for place in encoded.invalid]
    if len(invalid) > MAX_INVALID:
        raise ValueError(
            f"{encoded.chunk.url} has more than {MAX_INVALID} invalid documents. Fix the file; the last: {invalid[-1]}"
        )
    return Counts(
        chunks=counts.chunks + 1,
        rows=counts.rows + encoded.rows,
        empty=counts.empty + encoded.rows - len(encoded.documents) - len(encoded.invalid),
        invalid=invalid,
        tokens=counts.tokens + len(kept.ids),
        val_tokens=counts.val_tokens + len(kept[:n_val].ids),
        val_bytes=counts.val_bytes + int(kept[:n_val].text_bytes.sum()),
    )


def check_split(config: Config, progress: list[SourceProgress], split: str) -> None:
    """Raise ValueError if no shard of these source files belongs to `split`."""
    if any(shard["split"] == split for of_file in progress for shard in of_file.shards):
        return
    first = progress[0].source["name"]
    where = f"{first}, the first file," if split == "val" else f"--source {config.source}"
    given = {"--max-tokens": config.max_tokens, "--val-tokens": config.val_tokens}
    limits = " and ".join(f"{name} {value}" for name, value in given.items() if value is not None)
    if first.endswith(".txt"):
        remedy = "A .txt is one document: split it, e.g. split -C 50K --additional-suffix=.txt TEXT part-"
    else:
        remedy = "Use more text, a larger --max-tokens or a smaller --val-tokens"
    raise ValueError(f"{where} has no {split} document{f' with {limits}' if limits else ''}. {remedy}")


def finish(config: Config, out: Path, source: sources.Source, header: dict[str, Any]) -> None:
    """Join the shards if all source files are complete; else print how many files other processes work on."""
    if (out / MANIFEST).is_file():
        return  # another process has joined them
    progress = [load_progress(out, i, header) for i in range(len(source.files))]
    missing = [of_file.source["name"] for of_file in progress if not of_file.complete]
    if missing:
        return print(
            f"this process is done. {len(missing)} of {len(progress)} files are left to others, e.g. {missing[0]}. "
            "The last process joins all shards. If it fails, rerun the same command without torchrun or Slurm"
        )
    check_split(config, progress, "train")
    join(out, progress, header)
    audit.summarize(open_dataset(out))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
