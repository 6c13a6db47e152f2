"""How much sooner `--recipe speedrun` reaches the loss that a baseline ends with, both from scratch on the same card.

    python benchmarks/time_to_loss.py --data data/corpus --tokens 150_000_000 300_000_000
    python benchmarks/time_to_loss.py --data data/corpus --name time-to-loss-adamw --label adamw \\
        --baseline='--recipe speedrun --optimizer adamw --lr 1.2e-3 --embed-lr 2.2e-3 --warmup-steps 300'
    python benchmarks/time_to_loss.py --data data/demo --preset demo --seq-len 256 --tokens 1_000_000 \\
        --ours-tokens 100_000 500_000 --baseline='--batch-tokens 16384' \\
        --ours='--recipe speedrun --first-batch-tokens 2048 --batch-tokens 16384'

Each run has its whole schedule. Seconds are those of training steps alone. Runs lie in logs/: those that are finished
count as they are when a command is given again. The ratio at the very loss is read off the line between two of ours,
in log(seconds).
"""

import sys

sys.path[0] = sys.path[0].rpartition("/")[0]  # the repo

import hashlib
import json
import math
import shlex
import subprocess
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from core import cli
from core.files import markdown_table, read_metrics
from model import PRESETS
from report import COLOURS

REPO = Path(sys.path[0])
RUNS = "time-to-loss"  # begins their names
SMOOTHED = 60  # points of a drawn curve


@dataclass
class Config:
    data: str
    """Folder of shards."""
    tokens: tuple[int, ...] = (150_000_000,)
    """The baseline's tokens; several for several baselines."""
    ours_tokens: tuple[int, ...] = (20_000_000, 60_000_000, 150_000_000)
    """Our runs' tokens."""
    seeds: tuple[int, ...] = (1337,)
    """Each for all runs."""
    baseline: str = "--recipe original"
    """train.py's options of the baseline."""
    label: str = "original"
    """What the baseline is called."""
    ours: str = "--recipe speedrun"
    """train.py's options of ours."""
    preset: Literal[tuple(PRESETS)] = "gpt2"  # type: ignore[valid-type]
    """Size of the model."""
    seq_len: int = 1024
    """Tokens a sequence."""
    val_tokens: int = 10_485_760
    """Validation tokens at most."""
    lambada: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of LAMBADA passages in the standard text: each run is scored on them at its end, by protocol `standard`."""
    gpus: int = 1
    """More than one: each run under torchrun, on so many."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    name: str = "time-to-loss"
    """logs/NAME.json, logs/NAME.md and logs/NAME.png are what comes out."""
    also: tuple[str, ...] = ()
    """NAME.json of earlier calls, whose runs join the picture."""


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    name: str
    kind: str  # ours, or what the baseline is called
    label: str
    tokens: int
    seconds: float  # of training steps
    loss: float  # validation, after the last step
    lambada: str
    curve: list[tuple[int, float, float]]  # tokens, seconds, training loss
    versions: dict[str, Any]


def main(config: Config) -> None:
    cli.check_positive(tokens=min(config.tokens), ours_tokens=min(config.ours_tokens), gpus=config.gpus)
    rows: list[list[str]] = []
    facts: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    for seed in config.seeds:
        ours = [trained(config, "ours", config.ours, tokens, seed) for tokens in config.ours_tokens]
        baselines = [trained(config, config.label, config.baseline, tokens, seed) for tokens in config.tokens]
        outcomes += [*baselines, *ours]
        for baseline in baselines:
            sooner, bound = times_sooner(baseline, ours)
            rows += [row(run, baseline) for run in (baseline, *ours)]
            facts.append({"seed": seed, "tokens": baseline.tokens, "times_sooner": sooner, "at_least": bound})
            print(f"seed {seed}, {baseline.label}: loss {baseline.loss:.4f} is reached {said(sooner, bound)}\n")
    header = [
        "run",
        "tokens",
        "seconds",
        "ktok/s",
        "validation loss",
        "beside baseline",
        "times sooner",
        "LAMBADA",
    ]
    page = markdown_table(header, rows) + f"\n\n{outcomes[0].versions}\n"
    page += "".join(
        f"\nSeed {f['seed']}, {f['tokens']:,} tokens: the loss is reached {said(f['times_sooner'], f['at_least'])}.\n"
        for f in facts
    )
    print(page)
    stem = Path("logs") / config.name
    stem.with_suffix(".md").write_text(page)
    all_facts = {"config": asdict(config), "ratios": facts, "runs": [asdict(outcome) for outcome in outcomes]}
    stem.with_suffix(".json").write_text(json.dumps(all_facts, indent=1) + "\n")
    drawn = {run.name: run for run in [*(run for path in config.also for run in earlier(Path(path))), *outcomes]}
    draw(list(drawn.values()), stem.with_suffix(".png"))


def trained(config: Config, label: str, options: str, tokens: int, seed: int) -> Outcome:
    """The run of that label, made by train.py unless it is finished."""
    name, given = named(config, label, options, tokens, seed)
    folder, finished = Path("logs") / name, Path("logs") / name / "finished"
    if not finished.is_file():
        print(f"{name}: train.py {shlex.join(given)}", flush=True)
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={config.gpus}")
        call("train.py", *given, f"--run-name={name}", launcher=torchrun if config.gpus > 1 else ())
        finished.touch()
    scores = None
    if config.lambada:
        scores = folder / f"{Path(config.lambada).stem}.json"
        if not scores.is_file():
            scored = ("--ckpt", folder, "--data", config.lambada, "--device", config.device, "--out", scores)
            call("eval_lambada.py", *scored, "--text", "standard", "--protocol", "standard")
    return outcome(folder, scores, label, f"{label}, {tokens / 1e6:g}M tokens, seed {seed}")


def named(config: Config, label: str, options: str, tokens: int, seed: int) -> tuple[str, list[str]]:
    """A run's name, another for any other option, and train.py's options for it."""
    names = ("data", "preset", "seq_len", "val_tokens", "device")
    given = [f"--{option.replace('_', '-')}={getattr(config, option)}" for option in names]
    given += [f"--tokens={tokens}", f"--seed={seed}", "--val-every=1000000000", "--save-every=1000000000"]
    given += ["--log-every=100", *shlex.split(options)]
    digest = hashlib.sha256(shlex.join([*given, str(config.gpus)]).encode()).hexdigest()[:8]
    return f"{RUNS}-{label}-{tokens}-{seed}-{digest}", given


def call(script: str, *options: str | Path, launcher: tuple[str, ...] = ()) -> None:
    """Run one of the project's scripts. Raises ValueError where it fails, after it has said why."""
    command = [sys.executable, *launcher, str(REPO / script), *map(str, options)]
    if status := subprocess.run(command, check=False).returncode:
        raise ValueError(f"{shlex.join(command)} ended with status {status}, see above")


def outcome(run: Path, scores: Path | None, kind: str, label: str) -> Outcome:
    """What a finished run came to, with its LAMBADA `scores`. Raises ValueError where it ended without a loss."""
    facts, lines = json.loads((run / "run.json").read_text()), read_metrics(run)
    train = [line for line in lines if line["split"] == "train"]
    loss = [line["loss"] for line in lines if line["split"] == "val"][-1]
    if loss is None:
        raise ValueError(f"{run.name} diverged: take a lower --lr for it")
    lambada = ""
    if scores is not None:
        (result,) = json.loads(scores.read_text())
        lambada = f"{result['correct']:,} of {result['total']:,}, perplexity {result['perplexity']:,.0f}"
    curve = [(line["tokens"], line["seconds"], line["loss"]) for line in train if line["loss"] is not None]
    done = (train[-1]["tokens"], train[-1]["seconds"], loss)
    return Outcome(run.name, kind, label, *done, lambada, curve, facts["versions"])


def earlier(path: Path) -> list[Outcome]:
    """The runs of an earlier call. Raises ValueError where the file isn't one that this script wrote."""
    try:
        return [Outcome(**run) for run in json.loads(path.read_text())["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--also {path} is not what this script writes ({error!r}): give its call again") from None


def times_sooner(baseline: Outcome, ours: list[Outcome]) -> tuple[float | None, bool]:
    """The ratio of seconds at the baseline's final loss, and whether that is a lower bound; None: it wasn't reached.

    Between the two runs around that loss, loss is taken as a line in log(seconds). Where every one of ours is below it,
    the shortest gives the bound.
    """
    runs = sorted(ours, key=lambda run: run.tokens)
    if runs[0].loss <= baseline.loss:
        return baseline.seconds / runs[0].seconds, True
    for above, below in pairwise(runs):
        if above.loss > baseline.loss >= below.loss:
            part = (above.loss - baseline.loss) / (above.loss - below.loss)
            seconds = math.exp(math.log(above.seconds) + part * math.log(below.seconds / above.seconds))
            return baseline.seconds / seconds, False
    return None, False


def said(sooner: float | None, bound: bool) -> str:
    if sooner is None:
        return "by none of our runs"
    return f"{'at least ' if bound else ''}{sooner:.2f} times sooner"


def row(run: Outcome, baseline: Outcome) -> list[str]:
    ratio = f"{baseline.seconds / run.seconds:.2f}" if run.loss <= baseline.loss else ""
    rate = f"{run.tokens / run.seconds / 1000:,.1f}"
    beside = f"{run.loss - baseline.loss:+.4f}"
    return [run.label, f"{run.tokens:,}", f"{run.seconds:.1f}", rate, f"{run.loss:.4f}", beside, ratio, run.lambada]


def draw(outcomes: list[Outcome], path: Path) -> None:
    """Training loss (means of a sixtieth of a run) over seconds and tokens; final validation losses as dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    top = 2 + max(run.loss for run in outcomes)  # the first steps' fall from ln(vocabulary) says nothing
    colours = dict(zip(dict.fromkeys(run.kind for run in outcomes), COLOURS, strict=False))
    figure, panels = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for panel, column, label in ((panels[0], 1, "seconds of training"), (panels[1], 0, "tokens seen")):
        for run in outcomes:
            size = max(len(run.curve) // SMOOTHED, 1)
            chunks = [run.curve[i : i + size] for i in range(0, len(run.curve), size)]
            places = [chunk[-1][column] for chunk in chunks]
            look = {"color": colours[run.kind], "linewidth": 1.0, "alpha": 0.6}
            panel.plot(places, [sum(p[2] for p in chunk) / len(chunk) for chunk in chunks], **look)
            end = run.seconds if column == 1 else run.tokens
            panel.plot(end, run.loss, "o", color=colours[run.kind], markersize=6)
            below = run.kind == "ours"  # ours is the curve with nothing below it
            place = {"xytext": (-5, -12) if below else (6, 3), "ha": "right" if below else "left"}
            panel.annotate(f"{run.loss:.2f}", (end, run.loss), textcoords="offset points", fontsize=9, **place)
        shown = [point[column] for run in outcomes for point in run.curve if point[2] <= top]
        panel.set(xlabel=label, xscale="log", xlim=(0.7 * min(shown), 2 * max(shown)))
        panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="loss (nats a token): training, and validation (dots)", ylim=(None, top))
    for kind, colour in colours.items():
        panels[0].plot([], [], "o-", color=colour, label=kind)
    panels[0].legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
