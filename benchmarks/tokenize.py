"""How fast fineweb.py is: its whole process against the plain loop that peers use, in turn, in one run.

    python benchmarks/tokenize.py --source 'corpus/*.parquet'          # table, and logs/benchmarks/tokenize.json

The plain loop streams the source through `datasets`, gives each document to a pool of tiktoken processes and moves a
progress bar by one a document. Both write shards of 100M tokens from the same files with as many processes, start
to finish; the pages of the source are in memory after a first reading. Peak memory is the sum over a run's processes
of their proportional shares (PSS), read ten times a second.
"""

import sys

sys.path[0] = sys.path[0].rpartition("/")[0]  # the repo: in its own folder this file would hide Python's `tokenize`

import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from core import cli
from core.data import encode, prepare, sources, tokenizer

ROOT = Path(__file__).parent.parent


@dataclass
class Config:
    source: str
    """Parquet files by glob, quoted."""
    rounds: int = 5
    """How often each command runs, in turn."""
    workers: int = os.cpu_count() or 1
    """Processes that tokenise, of each command."""
    out: str = "logs/benchmarks/tokenize.json"
    """Where the figures go."""
    plain_loop: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """What the benchmark starts itself: run the plain loop, writing to this folder."""


def main(config: Config) -> None:
    if config.plain_loop:
        return plain_loop(config)
    files = sources.find_source(config.source, None).files
    text = sum(unit.bytes for units in sources.cut(list(files)) for unit in units)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(config.out).parent) as folder:
        results = measure(config, Path(folder))
        four = write_four_times(files, Path(folder))
        memory = {name: peak_memory(config, Path(folder), glob) for name, glob in (("1x", config.source), ("4x", four))}
        shares = stage_shares(files, Path(folder))
    report(config, text, results, memory, shares)


def commands(config: Config, source: str, out: Path) -> dict[str, list[str]]:
    """The command lines that are compared, by name."""
    common = ["--source", source, "--workers", str(config.workers)]
    fineweb = [sys.executable, str(ROOT / "fineweb.py"), *common, "--out", str(out), "--encoder"]
    return {
        "plain loop": [sys.executable, __file__, *common, "--plain-loop", str(out)],
        "fineweb.py, tiktoken": [*fineweb, "tiktoken"],
        "fineweb.py, fastokens": [*fineweb, "fastokens"],
    }


def measure(config: Config, folder: Path) -> dict[str, list[float]]:
    """Seconds of each command, whole processes, round by round."""
    seconds = defaultdict(list)
    for number in range(config.rounds + 1):
        for name, command in commands(config, config.source, folder / "out").items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            os.sync()  # what the run before left to write is not this one's
            begin = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if number:  # the first round only warms the page cache
                seconds[name].append(time.perf_counter() - begin)
                print(f"{name:24} {seconds[name][-1]:6.2f} s", flush=True)
    return seconds


def plain_loop(config: Config) -> None:
    """What peers do: datasets streaming, a document a task, a tick a document."""
    from datasets import load_dataset
    from tqdm import tqdm

    out, size = Path(str(config.plain_loop)), 100_000_000
    out.mkdir(parents=True)
    documents = load_dataset("parquet", data_files=config.source, split="train", streaming=True)
    buffer, filled, number = np.empty(size, dtype=np.uint16), 0, 0
    with multiprocessing.Pool(config.workers) as pool, tqdm() as bar:
        for ids in pool.imap(plain_encode, documents, chunksize=128):
            bar.update(1)
            room = size - filled
            buffer[filled : filled + len(ids)] = ids[:room]
            filled += len(ids)
            if filled >= size:
                np.save(out / f"{number:06d}.npy", buffer)
                number, filled = number + 1, filled - size
                buffer[:filled] = ids[room:]
    np.save(out / f"{number:06d}.npy", buffer[:filled])


def plain_encode(document: dict[str, Any]) -> np.ndarray:
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")
    ids = np.array([encoding.eot_token, *encoding.encode_ordinary(document["text"])])
    assert (ids < 2**16).all()
    return ids.astype(np.uint16)


def write_four_times(files: tuple[sources.SourceFile, ...], folder: Path) -> str:
    (folder / "four").mkdir()
    for copy in range(4):
        for file in files:
            (folder / "four" / f"{copy}_{file.name}").symlink_to(Path(file.url).resolve())
    return str((folder / "four").resolve() / "*.parquet")


def peak_memory(config: Config, folder: Path, source: str) -> dict[str, int]:
    """Peak bytes of all processes together and of the largest, of fineweb.py with fastokens."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    run = subprocess.Popen(commands(config, source, folder / "out")["fineweb.py, fastokens"], stdout=subprocess.PIPE)
    peak = {"all": 0, "largest": 0}
    assert run.stdout is not None  # it is a pipe
    threading.Thread(target=run.stdout.read, daemon=True).start()
    while run.poll() is None:
        shares = [proportional_share(pid) for pid in family(run.pid)]
        peak = {"all": max(peak["all"], sum(shares)), "largest": max(peak["largest"], *shares, 0)}
        time.sleep(0.1)
    return peak


def family(pid: int) -> list[int]:
    """A process and its children."""
    try:
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    except OSError:
        return [pid]


def proportional_share(pid: int) -> int:
    """Bytes of memory of a process, pages that others share counted by their share."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def stage_shares(files: tuple[sources.SourceFile, ...], folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of each stage of the work on the whole source, one after another in this process, by encoder."""
    encoding = tokenizer.load("gpt2")
    tokenizer.save(encoding, folder)
    sizes, result = tokenizer.token_bytes(folder), {}
    for name in ("fastokens", "tiktoken"):
        seconds: dict[str, float] = defaultdict(float)
        encoder = encode.Encoder(name, "gpt2", folder)
        for number, file in enumerate(files):
            writer = prepare.PartWriter(100_000_000, sizes)
            writer.part = prepare.Part(folder / name / str(number), {}, [], 0)
            row = 0
            for unit in sources.list_units(file.url, file.bytes):
                begin = time.perf_counter()
                texts = [text for text in sources.read_texts(unit) if isinstance(text, str) and text]
                read = time.perf_counter()
                ids, starts = encoder.encode(texts, number)
                encoded = time.perf_counter()
                lengths = np.array([len(text.encode()) for text in texts])
                writer.add("train", prepare.Documents(ids, starts, row + np.arange(len(texts)), lengths))
                row += len(texts)
                joined = time.perf_counter()
                for stage, spent in (("read", read - begin), ("encode", encoded - read), ("join", joined - encoded)):
                    seconds[stage] += spent
            begin = time.perf_counter()
            writer.flush()
            writer.wait()
            seconds["write, sync, hash"] += time.perf_counter() - begin
        result[name] = dict(seconds)
    return result


def report(
    config: Config,
    text: int,
    results: dict[str, list[float]],
    memory: dict[str, dict[str, int]],
    shares: dict[str, dict[str, float]],
) -> None:
    plain = results["plain loop"]
    rows = {}
    print(f"\n{text / 1e6:.0f} MB of text, {config.workers} processes, {config.rounds} rounds, {platform.processor()}")
    print(f"{'':24} {'median s':>9} {'min':>6} {'max':>6} {'MB/s':>6} {'times the plain loop (median, min, max)':>42}")
    for name, seconds in results.items():
        ratios = sorted(p / s for p, s in zip(plain, seconds, strict=True))
        median = statistics.median(seconds)
        rows[name] = {"seconds": seconds, "ratios": ratios, "megabytes_per_second": text / median / 1e6}
        print(
            f"{name:24} {median:9.2f} {min(seconds):6.2f} {max(seconds):6.2f} {text / median / 1e6:6.1f} "
            f"{statistics.median(ratios):26.2f} {ratios[0]:7.2f} {ratios[-1]:7.2f}"
        )
    for name, stages in shares.items():
        total = sum(stages.values())
        print(f"{name}: " + ", ".join(f"{stage} {100 * spent / total:.0f} %" for stage, spent in stages.items()))
    for size, peak in memory.items():
        print(
            f"memory, {size} the source: {peak['all'] / 1e6:.0f} MB in all, {peak['largest'] / 1e6:.0f} MB the largest"
        )
    facts = {"text_bytes": text, "workers": config.workers, "python": platform.python_version(), "results": rows}
    Path(config.out).write_text(json.dumps(facts | {"memory": memory, "stages": shares}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
