"""Convert text to token shards: FineWeb-Edu from the Hugging Face hub, or any parquet, jsonl or txt files.

    python fineweb.py                                                # the 10-billion-token sample: 20 GB of shards
    python fineweb.py --source 'my/*.parquet' --out data/mine        # column `text`; jsonl: field `text` of each line
    python fineweb.py --source 'books/*.txt' --out data/books        # one document per file
    torchrun --nnodes 4 --nproc_per_node 1 ... fineweb.py            # distribute the shards over machines
    python fineweb.py --verify data/mine                             # check each shard against the manifest
    python fineweb.py --adopt edu_fineweb10B                         # describe shards of build-nanogpt, nanoGPT, llm.c

By default it writes to the folder that train.py reads by default. After an interruption, rerun the same command to
resume after the last complete shard. The same command in a second terminal shares the work.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from core import cli
from core.data import audit, encode, prepare, tokenizer
from core.data.shards import DEFAULT_DATA, DEFAULT_VAL_TOKENS, MANIFEST, open_dataset
from core.data.sources import Files, find_source
from core.files import PRESENCE, FileLocks

VAL_TOKENS_HELP = tyro.conf.arg(
    help="Tokens held out for validation: complete documents from the start of the source. "
    f"Default: {DEFAULT_VAL_TOKENS:,}, or 1 % of a smaller source.",
    help_behavior_hint="",
)
WORKERS_HINT = tyro.conf.arg(help_behavior_hint="(default: one per core)")


def available_cores() -> int:
    """This process's share of the cores that it may use, as torchrun can start several processes on a machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def parse_glob(values: list[str]) -> str:
    """Raises ValueError for several names: those that a shell puts in place of a glob."""
    if not values:
        raise ValueError("a value is missing. Use a glob in quotes, as --source 'my/*.txt'")
    if len(values) > 1:
        raise ValueError(f"{len(values)} names in place of one glob. Put it in quotes, as --source 'my/*.txt'")
    return values[0]


GLOB = PrimitiveConstructorSpec[str](
    nargs="*",
    metavar="GLOB",
    instance_from_str=parse_glob,
    is_instance=lambda value: isinstance(value, str),
    str_from_instance=lambda value: [value],
)


@dataclass
class Config:
    source: Annotated[str, GLOB] = "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet"
    """Source files, as a glob in quotes: .parquet with a `text` column, .jsonl or .ndjson with a `text` field (also .gz
    or .zst), or .txt; local or any fsspec address. Larger samples of FineWeb-Edu: 100BT or 350BT for 10BT."""
    out: str = DEFAULT_DATA
    """Folder for the shards, the manifest and the tokenizer files."""
    encoding: str = "gpt2"
    """Encoding: gpt2, or r50k_base, which has the same ids; or a folder with a tokenizer.json of at most 65,536 ids."""
    shard_tokens: int = 100_000_000
    """Tokens per shard, approximately: a document is not divided, nor is a compressed file, whatever its size. A token
    takes 2 bytes."""
    val_tokens: Annotated[int | None, VAL_TOKENS_HELP] = None
    max_tokens: Annotated[int | None, cli.DEFAULT_IN_HELP] = None
    """Maximum number of tokens: stop before the document that would exceed it. Default: the entire source."""
    workers: Annotated[int, WORKERS_HINT] = available_cores()
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
    for train.py. --encoding is their encoding; the word `val` in a name means validation. Default: no such folder."""
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


def main(config: Config) -> None:
    if config.verify:
        return audit.verify(Path(config.verify))
    if config.adopt:
        return audit.adopt(Path(config.adopt), config.encoding, config.overwrite)
    rank, world_size = check(config)
    out, encoding = Path(config.out), tokenizer.load(config.encoding)
    out.mkdir(parents=True, exist_ok=True)
    locks = FileLocks(out)
    locks.acquire(PRESENCE, shared=not (config.max_tokens or config.overwrite))
    if config.overwrite:
        prepare.clear(out)
    with locks.exclusive():
        files, header = resolve_settings(config, out, encoding)
        prepare.check_settings(out, header)
    if files is None:
        return print(f"{out} is already finished with the same source and settings. --overwrite writes it again")
    job = prepare.Preparation(out, files, header, locks, rank, world_size)
    settings = config.skip_broken, config.encoder, config.encoding, out
    with encode.Workers(config.workers, job.pieces, job.files, *settings) as workers:
        convert(job, workers, encoding)


def check(config: Config) -> tuple[int, int]:
    """Refuse invalid combinations of settings. Return this process's rank and the number of processes."""
    numbers = {name: getattr(config, name) for name in ("workers", "shard_tokens", "val_tokens", "max_tokens")}
    cli.check_positive(**{name: value for name, value in numbers.items() if value is not None})
    rank, world_size = find_rank()
    for option in ("max_tokens", "overwrite"):  # the one counts tokens in order, the other removes shards
        if getattr(config, option) and world_size > 1:
            raise ValueError(
                f"{cli.option_name(option)} needs one process, but {world_size} are started. Start one process"
            )
    return rank, world_size


def find_rank() -> tuple[int, int]:
    """Rank and world size, from torchrun or a Slurm array; 0 and 1 for a single process."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"])
    if "SLURM_ARRAY_TASK_ID" in env:
        task, low, high, count = (int(env[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT"))
        if (low, high) != (0, count - 1):
            raise ValueError(f"Slurm array of {count} tasks from {low} to {high} must start at 0. Use 0-{count - 1}")
        return task, count
    return 0, 1


def resolve_settings(config: Config, out: Path, encoding: Any) -> tuple[Files | None, dict[str, Any]]:
    """The source files, or None if the folder is finished, and the header of the manifest."""
    source, files = prepare.recorded_settings(out).get("source"), None
    source = source if isinstance(source, dict) else {}  # another program can write another manifest
    revision = source.get("revision") if source.get("name") == config.source else None
    finished = (out / MANIFEST).is_file()
    if not (revision and finished):  # a commit never changes, so that a finished folder needs no request to the hub
        files, source = find_source(config.source, revision)
    header = {"source": source, "encoding": encoding.name}
    header |= {"encoding_sha256": tokenizer.fingerprint(encoding), "vocab_size": encoding.n_vocab}
    header |= {"end_of_text_id": tokenizer.end_of_text_id(encoding)}
    header |= {key: getattr(config, key) for key in ("shard_tokens", "val_tokens", "max_tokens")}
    return (None if finished else files), header


def convert(job: prepare.Preparation, workers: encode.Workers, encoding: Any) -> None:
    """Write the shards that are left, and the manifest if this process is the last."""
    with job.locks.exclusive():
        if (job.out / MANIFEST).is_file():
            return print(f"another process has finished {job.out}")
        prepare.check_settings(job.out, job.header)
        tokenizer.save(encoding, job.out)
        validation = job.write_validation(workers)
    chunks = job.plan(validation)
    remaining = [chunk for chunk in chunks if not job.record(chunk)]
    tokens = min(sum(chunk.tokens for chunk in remaining), job.max_tokens)
    check_disk(job.out, 2 * tokens)
    if 0 < len(remaining) < len(chunks):
        print(f"resuming after {len(chunks) - len(remaining)} of {len(chunks)} shards", flush=True)
    with cli.progress_bar(desc="tokens", unit="tok", unit_scale=True, total=tokens) as bar:
        try:
            job.write_chunks(chunks, workers, validation["tokens"], bar)
        except KeyboardInterrupt:
            bar.write("interrupted; rerun the same command to resume after the last complete shard")
            raise
    with job.locks.exclusive():
        if job.finish(validation):
            audit.summarize(open_dataset(job.out))


def check_disk(out: Path, needed: int) -> None:
    """Raise ValueError if `needed` bytes exceed the free space of the disk."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"--out {out} has {free / 1e9:,.3f} GB free, but the shards need about {needed / 1e9:,.3f} GB. Free disk "
            "space, or use another --out or a smaller --max-tokens"
        )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
