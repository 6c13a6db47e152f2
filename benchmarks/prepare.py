"""Speed of fineweb.py: the complete process vs. the common loop of datasets and a pool of tiktoken processes.

    python -m benchmarks.prepare --source 'corpus/*.parquet'          # table, and logs/benchmarks/prepare.json

The plain loop streams the source through `datasets`, sends each document to a pool of tiktoken processes, and updates a
progress bar per document. The commands write shards of 100M tokens from the same files with the same number of
processes, and alternate; a first round fills the page cache. Peak memory is the sum of the proportional set sizes (PSS)
of all processes, sampled ten times per second.
"""

import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from core import cli
from core.data import pieces, sources
from core.files import markdown_table

ROOT = Path(__file__).parent.parent  # not from benchmarks.common, whose import of torch would delay the plain loop
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
SHARD_TOKENS = 100_000_000


@dataclass
class Config:
    source: str
    """Local parquet files, as a glob in quotes."""
    rounds: int = 5
    """Number of timed runs of each command."""
    workers: int = os.cpu_count() or 1
    """Processes that encode, in each command."""
    out: str = "logs/benchmarks/prepare.json"
    """File for all figures (JSON)."""
    plain_loop: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """Internal: run the plain loop and write to this folder."""
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


def main(config: Config) -> None:
    if config.plain_loop:
        return plain_loop(config, Path(config.plain_loop))
    cli.check_positive(rounds=config.rounds, workers=config.workers)
    files, _ = sources.find_source(config.source, None)
    text_bytes = sum(piece.bytes for piece in pieces.cut(files, pieces.PIECE_BYTES))
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(config.out).parent) as name:
        folder = Path(name)
        seconds = time_commands(config, folder)
        memory = {"1x": peak_memory(config, folder, config.source)}
        memory["4x"] = peak_memory(config, folder, link_copies(files, folder, 4))
    facts = {"text_bytes": text_bytes, "workers": config.workers, "python": platform.python_version()}
    rows = {name: summarize(seconds["plain loop"], each, text_bytes) for name, each in seconds.items()}
    print_report(facts, rows, memory)
    figures = facts | {"results": rows, "memory": memory}
    Path(config.out).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def commands(config: Config, source: str, out: Path) -> dict[str, list[str]]:
    """The command lines by name."""
    common = ["--source", source, "--workers", str(config.workers)]
    fineweb = [sys.executable, str(ROOT / "fineweb.py"), *common, "--out", str(out), "--encoder"]
    return {
        "plain loop": [sys.executable, "-m", "benchmarks.prepare", *common, "--plain-loop", str(out)],
        "fineweb.py, tiktoken": [*fineweb, "tiktoken"],
        "fineweb.py, fastokens": [*fineweb, "fastokens"],
    }


def time_commands(config: Config, folder: Path) -> dict[str, list[float]]:
    """Seconds of each command, from start to end of its process, in rounds."""
    seconds = defaultdict(list)
    for number in range(config.rounds + 1):
        for name, command in commands(config, config.source, folder / "out").items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            os.sync()  # writes of the previous command must not slow down this one
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
            if number:  # the first round fills the page cache
                seconds[name].append(time.perf_counter() - start)
                print(f"{name:24} {seconds[name][-1]:6.2f} s", flush=True)
    return seconds


def plain_loop(config: Config, out: Path) -> None:
    """The baseline: datasets streaming, one task and one progress update per document."""
    from datasets import load_dataset
    from tqdm import tqdm

    out.mkdir(parents=True)
    documents = load_dataset("parquet", data_files=config.source, split="train", streaming=True)
    buffer, filled, number = np.empty(SHARD_TOKENS, dtype=np.uint16), 0, 0
    with multiprocessing.Pool(config.workers) as pool, tqdm() as bar:
        for ids in pool.imap(plain_encode, documents, chunksize=128):
            bar.update(1)
            space = SHARD_TOKENS - filled
            buffer[filled : filled + len(ids)] = ids[:space]
            filled += len(ids)
            if filled >= SHARD_TOKENS:
                np.save(out / f"{number:06d}.npy", buffer)
                number, filled = number + 1, filled - SHARD_TOKENS
                buffer[:filled] = ids[space:]
    np.save(out / f"{number:06d}.npy", buffer[:filled])


def plain_encode(document: dict[str, Any]) -> np.ndarray:
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    ids = np.array([encoding.eot_token, *encoding.encode_ordinary(document["text"])])
    assert (ids < 2**16).all()
    return ids.astype(np.uint16)


def link_copies(files: tuple[sources.SourceFile, ...], folder: Path, count: int) -> str:
    """A glob of a source that consists of `count` copies of the files, as links."""
    copies = folder.resolve() / "copies"
    copies.mkdir()
    for copy in range(count):
        for file in files:
            (copies / f"{copy}_{file.name}").symlink_to(Path(file.url).resolve())
    return str(copies / "*.parquet")


def peak_memory(config: Config, folder: Path, source: str) -> dict[str, int]:
    """Peak bytes of all processes together and of the largest, of fineweb.py with fastokens."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = commands(config, source, folder / "out")["fineweb.py, fastokens"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT)
    peak = {"all": 0, "largest": 0}
    assert process.stdout is not None  # it is a pipe
    threading.Thread(target=process.stdout.read, daemon=True).start()
    while process.poll() is None:
        sizes = [proportional_set_size(pid) for pid in process_tree(process.pid)]
        peak = {"all": max(peak["all"], sum(sizes)), "largest": max(peak["largest"], *sizes, 0)}
        time.sleep(0.1)
    return peak


def process_tree(pid: int) -> list[int]:
    """A process and its children."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
    except OSError:  # it has ended
        return [pid]
    return [pid, *map(int, children.split())]


def proportional_set_size(pid: int) -> int:
    """Bytes of memory of a process, in which a page that n processes share counts as 1/n."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def summarize(plain: list[float], seconds: list[float], text_bytes: int) -> dict[str, Any]:
    """Seconds, speed, and speedup over the plain loop in each round, sorted."""
    ratios = sorted(baseline / own for baseline, own in zip(plain, seconds, strict=True))
    speed = text_bytes / statistics.median(seconds) / 1e6
    return {"seconds": seconds, "ratios": ratios, "megabytes_per_second": speed}


def print_report(facts: dict[str, Any], rows: dict[str, dict[str, Any]], memory: dict[str, dict[str, int]]) -> None:
    cells = []
    for name, row in rows.items():
        seconds, ratios = row["seconds"], row["ratios"]
        spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        speedup = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        cells.append([name, spread, f"{row['megabytes_per_second']:.1f}", speedup])
    print(f"\n{facts['text_bytes'] / 1e6:.0f} MB of text, {facts['workers']} processes, {platform.processor()}\n")
    print(markdown_table(["command", "seconds (min to max)", "MB/s", "speedup over the plain loop"], cells) + "\n")
    for size, peak in memory.items():
        print(
            f"{size} the source: peak memory {peak['all'] / 1e6:.0f} MB, {peak['largest'] / 1e6:.0f} MB in one process"
        )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
