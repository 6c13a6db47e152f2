"""What checkpoints cost a run: the same steps with and without saves, in turn, in one process.

    python benchmarks/saves.py --data data/corpus --micro-batch 64 --batch-tokens 65536     # GPT-2 124M on one GPU
    python benchmarks/saves.py --data data/demo --preset demo --seq-len 256 --batch-tokens 2048 --micro-batch 8

The ratio is of wall times, from the step after the warm-up to the last one: saves, their writing beside the training
and the deletion of old checkpoints count in full. The last save, for which a run waits, isn't among them.
"""

import sys

sys.path[0] = sys.path[0].rpartition("/")[0]  # the repo

import contextlib
import io
import json
import re
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

import train
from core import cli
from core.distributed import pick_device
from core.train.logging import versions

WARM_UP = 10  # steps that don't count
SAVED = re.compile(r"training stood still for (\d+) ms, written in ([\d.]+) s")


@dataclass
class Config:
    data: str
    """Folder of shards."""
    preset: str = "gpt2"
    """Size of the model."""
    batch_tokens: int = 65_536
    """Tokens a step; small, so that saves come often beside the work."""
    micro_batch: int = 64
    """Sequences at once."""
    seq_len: int = 1024
    """Tokens a sequence."""
    steps: int = 501
    """Steps of each run."""
    save_every: int = 250
    """Steps between saves of the run that has them."""
    rounds: int = 2
    """Runs of each kind."""
    device: str = "auto"
    """auto, cuda or cpu."""
    out: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File for the figures as JSON."""


def main(config: Config) -> None:
    rounds = [(timed(config, 10**9), timed(config, config.save_every)) for _ in range(config.rounds)]
    ratios = [saved["seconds"] / plain["seconds"] for plain, saved in rounds]
    stalls = [stall for _, saved in rounds for stall in saved["stalls_ms"]]
    written = [seconds for _, saved in rounds for seconds in saved["written_s"]]
    for i, (plain, saved) in enumerate(rounds):
        print(f"round {i + 1}: {plain['seconds']:.2f} s without, {saved['seconds']:.2f} s with: {ratios[i]:.4f} times")
    print(f"a save every {config.save_every} steps: {statistics.median(ratios):.4f} times the time")
    print(f"stalls: median {statistics.median(stalls):.0f} ms, most {max(stalls):.0f} ms of {len(stalls)} saves")
    print(f"written in {statistics.median(written):.1f} s (median), at most {max(written):.1f} s")
    if config.out:
        facts = {"config": asdict(config), "versions": versions(pick_device(config.device)), "rounds": rounds}
        Path(config.out).write_text(json.dumps(facts, indent=1) + "\n")


def timed(config: Config, save_every: int) -> dict[str, Any]:
    """Seconds of the steps after the warm-up, and what was said of the saves among them."""
    starts: list[float] = []
    step = train.train_step

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        starts.append(time.perf_counter())
        return step(*args, **kwargs)

    names = ("data", "preset", "batch_tokens", "micro_batch", "seq_len", "steps", "device")
    settings = {name: getattr(config, name) for name in names} | {"run": "saves-benchmark", "save_every": save_every}
    shutil.rmtree("logs/saves-benchmark", ignore_errors=True)
    said = io.StringIO()
    train.train_step = noted
    try:
        with contextlib.redirect_stdout(said):
            train.main(train.Config(**settings, val_every=10**9, val_tokens=config.seq_len, log_every=10**9))
    finally:
        train.train_step = step
        shutil.rmtree("logs/saves-benchmark", ignore_errors=True)
    saves = SAVED.findall(said.getvalue())[:-1]  # the last step's is waited for
    print(said.getvalue(), file=sys.stderr)
    facts = {"seconds": starts[-1] - starts[WARM_UP], "stalls_ms": [float(stall) for stall, _ in saves]}
    return facts | {"written_s": [float(seconds) for _, seconds in saves]}


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
