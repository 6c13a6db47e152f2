"""Convert text to token shards: FineWeb-Edu from the Hugging Face hub, or local parquet, jsonl or txt files.

    python fineweb.py                                                # the 10-billion-token sample: 20 GB of shards
    python fineweb.py --source 'my/*.parquet' --out data/mine        # column `text`; jsonl: field `text` of each line
    python fineweb.py --source 'books/*.txt' --out data/books        # one document per file
    torchrun --nnodes 4 --nproc_per_node 1 ... fineweb.py            # distribute the work over machines
    python fineweb.py --verify data/mine                             # check each shard against the manifest
    python fineweb.py --adopt edu_fineweb10B                         # describe shards of build-nanogpt or llm.c

By default it writes to the folder that train.py reads by default. After an interruption, rerun the same command to
resume after the last complete shard.
"""

import os
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from core import cli
from core.data import audit, encode, sources, tokenizer
from core.data.encode import EncoderMismatchError, EncoderPool
from core.data.prepare import Preparation
from core.data.settings import check_settings, clear, discard_empty, recorded_settings, records
from core.data.shards import DEFAULT_DATA, DEFAULT_VAL_TOKENS, MANIFEST
from core.files import ALL_ITEMS, FileLocks

VAL_TOKENS_HELP = tyro.conf.arg(
    help="Tokens held out for validation: complete documents from the start of the source. "
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
    """Source files, as a glob: .parquet with a `text` column, .jsonl or .ndjson (also .gz, .zst) with a `text` field,
    or .txt; local or any fsspec address. For a larger sample of FineWeb-Edu replace 10BT by 100BT or 350BT."""
    out: str = DEFAULT_DATA
    """Folder for the shards, the manifest and the tokenizer files."""
    encoding: str = "gpt2"
    """Encoding: a name that tiktoken knows, or a folder with a tokenizer.json. At most 65,536 ids."""
    shard_tokens: int = 100_000_000
    """Tokens per shard, approximately; a shard takes 2 bytes per token."""
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
    """Folder of another project's shards (.npy of build-nanogpt, .bin of llm.c or nanoGPT) to describe in a manifest
    for train.py. --encoding is their encoding; `val` as a word of a file name means validation. Default: no such
    folder."""
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
    if (out / MANIFEST).is_file():
        return print(f"{out} is already finished with the same source and settings. --overwrite writes it again")
    if config.max_tokens is not None:
        locks.acquire(0, count=ALL_ITEMS)
    tokenizer.save(encoding, out)
    try:
        with closing(EncoderPool(config.workers, encode.choose(config.encoder), config.encoding, out)) as pool:
            Preparation(out, source, header, locks, pool, config.skip_broken).run(rank, world_size)
    except EncoderMismatchError as error:
        overwrite = " --overwrite" if records(out) else ""
        raise ValueError(f"--encoder {config.encoder}: fastokens {error}. Use --encoder tiktoken{overwrite}") from None
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume after the last complete shard", flush=True)
        raise


def check(config: Config) -> tuple[int, int]:
    """Refuse invalid combinations of settings. Return this process's rank and the number of processes."""
    limits = {"val_tokens": config.val_tokens, "max_tokens": config.max_tokens}
    given = {name: value for name, value in limits.items() if value is not None}
    cli.check_positive(workers=config.workers, shard_tokens=config.shard_tokens, **given)
    encode.choose(config.encoder)
    rank, world_size = find_rank()
    if world_size > 1 and config.max_tokens is not None:
        raise ValueError(
            f"--max-tokens counts tokens through the source in order, not in {world_size} processes. Start one process"
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
        task, low, count = (int(env[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "COUNT"))
        return (task - low) % count, count
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


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
