"""Time to the final loss of a baseline: how many times faster `--recipe speedrun` reaches it on the same GPU.

    python -m benchmarks.time_to_loss --data data/corpus --tokens 150_000_000 300_000_000
    python -m benchmarks.time_to_loss --data data/corpus --name time-to-loss-adamw --label adamw \\
        --baseline='--recipe speedrun --optimizer adamw --lr 1.2e-3 --embed-lr 2.2e-3 --warmup-steps 300
        --softmax full --shallow-fraction 0'
    python -m benchmarks.time_to_loss --data data/demo --preset demo --seq-len 256 --tokens 1_000_000 \\
        --ours-tokens 100_000 500_000 --baseline='--batch-tokens 16384' \\
        --ours='--recipe speedrun --first-batch-tokens 2048 --batch-tokens 16384'

Every run starts from random weights and has a complete schedule. Seconds are those of training steps only. The runs are
in logs/; a rerun of the command trains only those that are not finished. The time at exactly the baseline's loss is
interpolated between two runs, linearly in log(seconds).
"""

import hashlib
import json
import math
import shlex
import sys
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from benchmarks.common import ROOT, run_command, torchrun_command
from core import cli
from core.data.shards import DEFAULT_VAL_TOKENS
from core.eval.task import format_perplexity
from core.files import markdown_table, read_metrics
from core.train.recipe import RECIPES
from model import PRESETS

RUNS = "time-to-loss"  # the names of the runs start with it
OURS = "ours"  # this project's kind, in the names of its runs and in NAME.json
SMOOTHED_POINTS = 60  # of a plotted curve
RISE_STEPS = 32  # steps whose mean loss is compared; a multiple of speedrun's long_every


@dataclass
class Config:
    data: str
    """Folder of shards."""
    tokens: tuple[int, ...] = (150_000_000,)
    """Training tokens of each baseline."""
    ours_tokens: tuple[int, ...] = (20_000_000, 60_000_000, 150_000_000)
    """Training tokens of each run of this project."""
    seeds: tuple[int, ...] = (1337,)
    """Random seeds; every run is repeated with each."""
    baseline: str = "--recipe original"
    """train.py's options of the baseline."""
    label: str = "original"
    """Name of the baseline."""
    ours: str = "--recipe speedrun"
    """train.py's options of this project's runs."""
    preset: Literal[tuple(PRESETS)] = "gpt2"  # type: ignore[valid-type]
    """Model size."""
    seq_len: int = 1024
    """Tokens per sequence."""
    val_tokens: int = DEFAULT_VAL_TOKENS
    """Maximum validation tokens."""
    lambada: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of LAMBADA passages in the standard text, to score each run by protocol `standard`. Default: no LAMBADA."""
    gpus: int = 1
    """Number of GPUs per run; with more than one, torchrun starts train.py."""
    device: str = "auto"
    """Device: auto, cuda, mps or cpu."""
    name: str = "time-to-loss"
    """Name of the output files logs/NAME.json, logs/NAME.md and logs/NAME.png."""
    also: Annotated[tuple[str, ...], cli.DEFAULT_IN_HELP] = ()
    """NAME.json files of earlier calls, whose runs are added to the plot. Default: none."""
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    name: str
    kind: str  # OURS, or the name of the baseline
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
    ratios: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    for seed in config.seeds:
        own_runs = [train(config, OURS, config.ours, tokens, seed) for tokens in config.ours_tokens]
        baselines = [train(config, config.label, config.baseline, tokens, seed) for tokens in config.tokens]
        outcomes += [*baselines, *own_runs]
        for baseline in baselines:
            ratio, is_bound = times_faster(baseline, own_runs)
            rows += [table_row(run, baseline) for run in (baseline, *own_runs)]
            ratios.append({"seed": seed, "tokens": baseline.tokens, "times_faster": ratio, "at_least": is_bound})
    page = build_page(rows, ratios, outcomes[0].versions)
    print(page)
    stem = Path("logs") / config.name
    stem.with_suffix(".md").write_text(page, encoding="utf-8")
    found = {"config": asdict(config), "ratios": ratios, "runs": [asdict(outcome) for outcome in outcomes]}
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plotted = {run.name: run for run in [*(run for path in config.also for run in load(Path(path))), *outcomes]}
    plot(list(plotted.values()), stem.with_suffix(".png"))


def build_page(rows: list[list[str]], ratios: list[dict[str, Any]], versions: dict[str, Any]) -> str:
    header = ["run", "tokens", "seconds", "ktok/s", "validation loss", "vs. baseline"]
    header += ["times faster than baseline", f"largest rise of the mean of {RISE_STEPS} steps", "LAMBADA"]
    lines = [
        f"Seed {r['seed']}, {r['tokens']:,} baseline tokens: {describe_ratio(r['times_faster'], r['at_least'])}.\n"
        for r in ratios
    ]
    return "\n".join([markdown_table(header, rows), "", f"{versions}\n", *lines])


def train(config: Config, kind: str, options: str, tokens: int, seed: int) -> Outcome:
    """The outcome of a run, which train.py makes unless it is finished. Raises ValueError if a script fails."""
    name, arguments = run_name(config, kind, options, tokens, seed)
    folder = Path("logs") / name
    if not (folder / "finished").is_file():
        print(f"{name}: train.py {shlex.join(arguments)}", flush=True)
        launcher = torchrun_command(config.gpus) if config.gpus > 1 else [sys.executable]
        run_command([*launcher, str(ROOT / "train.py"), *arguments, f"--run-name={name}"])
        check_complete(folder)
        (folder / "finished").touch()
    scores = None
    if config.lambada:
        scores = folder / f"{Path(config.lambada).stem}.json"
        if not scores.is_file():
            command = [sys.executable, str(ROOT / "eval_lambada.py"), "--ckpt", str(folder), "--data", config.lambada]
            command += ["--text", "standard", "--protocol", "standard", "--device", config.device]
            run_command([*command, "--out", str(scores)])
    return load_outcome(folder, scores, kind, f"{display_name(kind)}, {tokens / 1e6:g}M tokens, seed {seed}")


def check_complete(run_folder: Path) -> None:
    """Raise ValueError where a signal stopped train.py, which then ends with status 0 too."""
    steps = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))["steps"]
    done = max((line["step"] for line in read_metrics(run_folder)), default=0)
    if done < steps:
        raise ValueError(f"{run_folder} was stopped after step {done} of {steps}. Rerun the same command to resume it")


def display_name(kind: str) -> str:
    return "this project" if kind == OURS else kind


def run_name(config: Config, kind: str, options: str, tokens: int, seed: int) -> tuple[str, list[str]]:
    """A name that is different for different options and values of the recipes, and train.py's arguments."""
    names = ("data", "preset", "seq_len", "val_tokens", "device")
    arguments = [f"{cli.option_name(name)}={getattr(config, name)}" for name in names]
    arguments += [f"--tokens={tokens}", f"--seed={seed}", "--val-every=1000000000", "--save-every=1000000000"]
    arguments += ["--log-every=100", *shlex.split(options)]
    digest = hashlib.sha256(shlex.join([*arguments, str(config.gpus), str(RECIPES)]).encode()).hexdigest()[:8]
    return f"{RUNS}-{kind}-{tokens}-{seed}-{digest}", arguments


def load_outcome(run_folder: Path, scores: Path | None, kind: str, label: str) -> Outcome:
    """The outcome of a finished run, with its LAMBADA `scores`. Raises ValueError if it has no final loss."""
    settings, lines = json.loads((run_folder / "run.json").read_text(encoding="utf-8")), read_metrics(run_folder)
    steps = [line for line in lines if line["split"] == "train"]
    loss = [line["loss"] for line in lines if line["split"] == "val"][-1]
    if loss is None:
        raise ValueError(f"{run_folder.name} diverged: its last validation loss is not finite. Use a lower --lr for it")
    lambada = ""
    if scores is not None:
        (result,) = json.loads(scores.read_text(encoding="utf-8"))
        lambada = f"{result['correct']:,} of {result['total']:,}, perplexity {format_perplexity(result['perplexity'])}"
    return Outcome(
        name=run_folder.name,
        kind=kind,
        label=label,
        tokens=steps[-1]["tokens"],
        seconds=steps[-1]["seconds"],
        loss=loss,
        lambada=lambada,
        curve=[(line["tokens"], line["seconds"], line["loss"]) for line in steps if line["loss"] is not None],
        versions=settings["versions"],
    )


def load(path: Path) -> list[Outcome]:
    """The runs of an earlier call. Raises ValueError if this script didn't write the file."""
    try:
        return [Outcome(**run) for run in json.loads(path.read_text(encoding="utf-8"))["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        reason = type(error).__name__
        raise ValueError(f"--also {path} was not written by this script ({reason}). Rerun its command") from None


def times_faster(baseline: Outcome, own_runs: list[Outcome]) -> tuple[float | None, bool]:
    """Seconds of the baseline per second of this project at the baseline's final loss, and whether it is a lower bound.

    Between the two runs around that loss, loss is linear in log(seconds). If all runs end below that loss, the shortest
    one gives a lower bound. None: no run reaches it.
    """
    runs = sorted(own_runs, key=lambda run: run.tokens)
    if runs[0].loss <= baseline.loss:
        return baseline.seconds / runs[0].seconds, True
    for above, below in pairwise(runs):
        if above.loss > baseline.loss >= below.loss:
            fraction = (above.loss - baseline.loss) / (above.loss - below.loss)
            seconds = math.exp(math.log(above.seconds) + fraction * math.log(below.seconds / above.seconds))
            return baseline.seconds / seconds, False
    return None, False


def describe_ratio(ratio: float | None, is_bound: bool) -> str:
    if ratio is None:
        return "no run of this project reaches the loss of the baseline"
    return f"{'at least ' if is_bound else ''}{ratio:.2f} times faster to the same loss"


def largest_rise(losses: list[float]) -> float:
    """The largest rise of the mean of RISE_STEPS losses above its lowest value before; 0 for shorter runs."""
    totals = np.cumsum([0.0, *losses])
    means = (totals[RISE_STEPS:] - totals[:-RISE_STEPS]) / RISE_STEPS
    return float(np.max(means - np.minimum.accumulate(means), initial=0.0))


def table_row(run: Outcome, baseline: Outcome) -> list[str]:
    ratio = f"{baseline.seconds / run.seconds:.2f}" if run.loss <= baseline.loss else ""
    speed, difference = f"{run.tokens / run.seconds / 1000:,.1f}", f"{run.loss - baseline.loss:+.4f}"
    return [
        run.label,
        f"{run.tokens:,}",
        f"{run.seconds:.1f}",
        speed,
        f"{run.loss:.4f}",
        difference,
        ratio,
        f"{largest_rise([loss for _, _, loss in run.curve]):.3f}",
        run.lambada,
    ]


def plot(outcomes: list[Outcome], path: Path) -> None:
    """Plot smoothed training losses by seconds and by tokens, and final validation losses as dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    top = 2 + max(run.loss for run in outcomes)  # without the steep start from ln(vocabulary)
    colors = {kind: f"C{i}" for i, kind in enumerate(dict.fromkeys(run.kind for run in outcomes))}
    figure, panels = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for panel, column, label in ((panels[0], 1, "seconds of training"), (panels[1], 0, "training tokens")):
        for run in outcomes:
            plot_run(panel, run, column, colors[run.kind])
        shown = [point[column] for run in outcomes for point in run.curve if point[2] <= top]
        panel.set(xlabel=label, xscale="log", xlim=(0.7 * min(shown), 2 * max(shown)))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="loss (nats per token): training, and validation (dots)", ylim=(None, top))
    for kind, color in colors.items():
        panels[0].plot([], [], "o-", color=color, label=display_name(kind))
    panels[0].legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_run(panel: Any, run: Outcome, column: int, color: str) -> None:
    """`column`: the index, in a point of the curve, of its place on the x axis."""
    size = max(len(run.curve) // SMOOTHED_POINTS, 1)
    chunks = [run.curve[i : i + size] for i in range(0, len(run.curve), size)]
    losses = [sum(point[2] for point in chunk) / len(chunk) for chunk in chunks]
    panel.plot([chunk[-1][column] for chunk in chunks], losses, color=color, linewidth=1.0, alpha=0.6)
    end = (run.seconds if column == 1 else run.tokens, run.loss)
    panel.plot(*end, "o", color=color, markersize=6)
    is_lowest = run.kind == OURS  # no curve is below it: there is space for the number
    offset, align = ((-5, -12), "right") if is_lowest else ((6, 3), "left")
    panel.annotate(f"{run.loss:.2f}", end, xytext=offset, textcoords="offset points", fontsize=9, ha=align)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
