"""A run that changes its GPUs on the way: what a stop and a start cost, and whether the loss goes on as it was.

    python benchmarks/relay.py --data data/corpus                                       # all GPUs, all again, then half
    python benchmarks/relay.py --data data/corpus --legs 8 8 4 --options='--tokens 300_000_000 --val-every 100'
    python benchmarks/relay.py --data data/demo --device cpu --legs 2 1 --options='--preset tiny --seq-len 64 --steps 60
        --batch-tokens 2048'

Each leg is the same train.py under torchrun on so many GPUs. All but the last are stopped, once their share of the
steps is done, by SIGTERM to torchrun, as a cluster stops a job; torchrun then ends with a traceback of its own. The run
lies in logs/ like any other.
"""

import sys

sys.path[0] = sys.path[0].rpartition("/")[0]  # the repo

import json
import math
import shlex
import signal
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.launch import torchrun
from core import checkpoint, cli
from core.distributed import pick_device
from core.files import METRICS, markdown_table, read_metrics

REPO = Path(sys.path[0])
OURS = ("--data", "--device", "--run", "--run-name")  # options of train.py that this script gives
AROUND = 10  # steps at a leg's beginning, and at its end, whose mean losses are shown


@dataclass
class Config:
    data: str
    """Folder of shards."""
    legs: tuple[int, ...] = ()
    """GPUs of each leg. Default: all there are, all again, half of them."""
    options: str = "--tokens 150_000_000 --val-every 100 --save-every 100"
    """train.py's other options, in one word: --options='--steps 60 --val-every 20'."""
    name: str = "relay"
    """The run, logs/NAME; relay.json in it is what comes out."""
    device: str = "auto"
    """auto, cuda or cpu."""


@dataclass
class Leg:
    """The steps that one call of train.py made."""

    gpus: int
    first: int  # steps before it
    last: int
    started_s: float  # from the call to the end of its first step
    stopped_s: float | None  # from the signal to the end of its processes; None: it ran to its end


def main(config: Config) -> None:
    folder = Path("logs") / config.name
    if folder.exists():
        raise ValueError(f"{folder} is there already, and a relay begins anew: take another --name, or remove it")
    on_cuda = pick_device(config.device).type == "cuda"
    most = torch.cuda.device_count() if on_cuda else 2
    plan = config.legs or (most, most, max(most // 2, 1))
    cli.check_between(1, most if on_cuda else 1024, legs=min(plan))
    cli.check_between(1, most if on_cuda else 1024, legs=max(plan))
    given_twice = [name for option in split(config.options) if (name := option.split("=")[0]) in OURS]
    if given_twice:
        raise ValueError(f"--options names {given_twice[0]}, which relay.py gives itself: leave it out there")
    legs: list[Leg] = []
    for number, gpus in enumerate(plan, 1):
        legs.append(run_leg(config, folder, gpus, number / len(plan), legs[-1].last if legs else 0))
    rows, facts = derived(legs, read_metrics(folder)), json.loads((folder / "run.json").read_text())
    print(f"\n{facts['preset']}, {facts['batch_tokens']:,} tokens a step, {facts['versions']}\n{page(rows)}")
    (folder / "relay.json").write_text(json.dumps({"config": asdict(config), "legs": rows}, indent=1) + "\n")
    print(f"wrote {folder / 'relay.json'}; the curve: python report.py --runs {config.name}")


def split(options: str) -> list[str]:
    """As a shell would. Raises ValueError for a quotation without an end."""
    try:
        return shlex.split(options)
    except ValueError as error:
        raise ValueError(f"--options {options}: {error}") from None


def run_leg(config: Config, folder: Path, gpus: int, share: float, behind: int) -> Leg:
    """Train on so many GPUs until that share of the run's steps is done, `behind` of which are.

    Raises ValueError where it ends in another way.
    """
    given = [f"--data={config.data}", f"--device={config.device}", f"--run-name={config.name}", *split(config.options)]
    print(f"\n{gpus} rank{'s' if gpus > 1 else ''}: train.py {shlex.join(given)}", flush=True)
    begin, started, asked, running = time.monotonic(), None, None, True
    with torchrun(gpus, str(REPO / "train.py"), *given) as process:
        while running:
            time.sleep(0.1)
            running = process.poll() is None
            done, steps = progress(folder)
            if started is None and done > behind:
                started = time.monotonic() - begin
            if running and share < 1 and asked is None and done >= share * steps > 0:
                process.send_signal(signal.SIGTERM)
                asked = time.monotonic()
    stopped = time.monotonic() - asked if asked else None
    saved = asked is not None and done in map(checkpoint.step_of, checkpoint.listed(folder))
    if done == behind or (done < steps and not saved):
        raise ValueError(f"{folder} ended with status {process.returncode} after step {done} of {steps}, see above")
    if share < 1 and done == steps:
        raise ValueError(f"{folder} was over before it could be stopped: give it more steps")
    assert started is not None
    return Leg(gpus, behind, done, started, stopped)


def progress(folder: Path) -> tuple[int, int]:
    """Steps that the run's metrics tell of, and all that it is to have; 0 and 0 before it has begun."""
    if not (folder / METRICS).is_file():
        return 0, 0
    steps = json.loads((folder / "run.json").read_text())["steps"]
    return max((line["step"] for line in read_metrics(folder)), default=0), steps


def derived(legs: list[Leg], lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each leg with its rate, and its losses."""
    rows = []
    for leg in legs:
        own = [line for line in lines if leg.first < line["step"] <= leg.last]
        train = [line for line in own if line["split"] == "train"]
        loss = [line["loss"] if line["loss"] is not None else math.nan for line in train]  # None: the step was skipped
        row = asdict(leg) | {"tokens_per_second": statistics.median(line["tokens_per_second"] for line in train)}
        row |= {"loss_begin": statistics.mean(loss[:AROUND]), "loss_end": statistics.mean(loss[-AROUND:])}
        rows.append(row | {"validation": {line["step"]: line["loss"] for line in own if line["split"] == "val"}})
    return rows


def page(rows: list[dict[str, Any]]) -> str:
    header = ["GPUs", "steps", "ktok/s (median)", "first step after", "ended after the signal"]
    header += [f"training loss, first {AROUND} steps", f"last {AROUND}", "validation loss (step)"]
    cells = []
    for row in rows:
        stopped = f"{row['stopped_s']:.1f} s" if row["stopped_s"] else ""
        validation = ", ".join(f"{loss:.4f} ({step})" for step, loss in row["validation"].items() if loss is not None)
        cells.append([f"{row['gpus']}", f"{row['first'] + 1} to {row['last']}"])
        cells[-1] += [f"{row['tokens_per_second'] / 1e3:,.1f}", f"{row['started_s']:.1f} s", stopped]
        cells[-1] += [f"{row['loss_begin']:.4f}", f"{row['loss_end']:.4f}", validation]
    return markdown_table(header, cells)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
