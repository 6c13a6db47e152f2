"""Plot runs, and write one Markdown page about them and all evaluation results.

    python report.py                                                 # every run in logs/
    python report.py --runs gpt2 gpt2-medium --out logs/sizes        # two runs in one plot

It also works during a run. By default the page and the plots are written to logs/.
"""

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from core import cli
from core.data.shards import open_dataset
from core.eval import results
from core.eval.results import Result
from core.files import METRICS, markdown_table, read_metrics
from demo import stories

# The palette of Okabe and Ito, which is safe for color blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

SPLITS = ("train", "val", "lambada")


@dataclass
class Config:
    runs: Annotated[tuple[str, ...], cli.DEFAULT_IN_HELP] = ()
    """Names of the runs. Default: every run in logs/."""
    out: str = "logs"
    """Folder for report.md and, if there are several runs, loss.png with the newest six.
    The plot of each run is written to loss.png in its own folder."""
    floor: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """The demo's stories.jsonl: adds its entropy, the lowest possible loss. Default: no entropy."""
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


@dataclass
class RunRecord:
    """What a run has logged. `train`, `val` and `lambada` are the lines of metrics.jsonl by split."""

    name: str
    settings: dict[str, Any]  # run.json
    train: list[dict[str, Any]]
    val: list[dict[str, Any]]
    lambada: list[dict[str, Any]]
    entropy: float | None  # of the validation data, in nats per token


def main(config: Config) -> None:
    runs = [load_run(name, config.floor) for name in config.runs or find_runs()]
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    plots = [save_figure([run], Path("logs") / run.name / "loss.png") for run in runs]
    if len(runs) > 1:
        newest = sorted(runs, key=lambda run: (Path("logs") / run.name / METRICS).stat().st_mtime)[-len(COLORS) :]
        plots.append(save_figure(newest, out / "loss.png"))
    page = out / "report.md"
    found = results.load_all()
    if config.runs:
        found = [result for result in found if result.model.split("/")[0] in config.runs]
    text = build_page(runs, found, plots, out)
    page.write_text(text, encoding="utf-8")
    print(text)
    print(f"wrote {', '.join(str(path) for path in [page, *plots])}")


def find_runs() -> list[str]:
    names = sorted(path.parent.name for path in Path("logs").glob(f"*/{METRICS}"))
    if not names:
        raise ValueError("logs/ contains no runs. Start one with train.py, or change to the folder that contains logs/")
    return names


def load_run(name: str, stories_file: str | None) -> RunRecord:
    """Read a run. Raises ValueError if logs/ has no run of that name, or if `stories_file` isn't the run's data."""
    folder = Path("logs") / name
    if not (folder / METRICS).is_file():
        raise ValueError(f"--runs {name}: {folder} contains no run. Choose from {', '.join(find_runs())}")
    settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    metrics = read_metrics(folder)
    train, val, lambada = ([line for line in metrics if line["split"] == split] for split in SPLITS)
    entropy = load_entropy(settings, Path(stories_file)) if stories_file else None
    return RunRecord(name, settings, train, val, lambada, entropy)


def load_entropy(settings: dict[str, Any], stories_file: Path) -> float | None:
    """The entropy of the run's validation stories in nats per token; None for a run on other data."""
    dataset = open_dataset(settings["data"])
    if not any(file["name"] == stories_file.name for file in dataset.manifest["source"]["files"]):
        return None
    documents = sum(shard["documents"] for shard in dataset.shards("val"))
    return stories.entropy(stories_file, documents, dataset.tokens("val"))


def save_figure(runs: list[RunRecord], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = build_figure(runs)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def build_figure(runs: list[RunRecord]) -> Any:
    """A figure of all runs: loss by tokens and by time, LAMBADA accuracy, and metrics per step."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    has_lambada = any(run.lambada for run in runs)
    top = ["tokens", "tokens", "time", "time", "lambada", "lambada"] if has_lambada else ["tokens"] * 3 + ["time"] * 3
    rows: list[Any] = [top, ["lr", "lr", "speed", "speed", "norm", "norm"]]
    figure, panels = plt.subplot_mosaic(rows, figsize=(15, 8), height_ratios=(3, 2), layout="constrained")
    unit, seconds = time_unit(runs)
    for run, color in zip(runs, COLORS, strict=False):
        plot_losses(panels["tokens"], run, color, lambda line: line["tokens"])
        plot_losses(panels["time"], run, color, lambda line: line["seconds"] / seconds)
        if run.lambada:
            plot_lambada(panels["lambada"], run, color)
        plot_steps(panels["lr"], run, color, "lr", 1)
        plot_steps(panels["speed"], run, color, "tokens_per_second", 1000)
        plot_steps(panels["norm"], run, color, "grad_norm", 1)
    for name, axes in panels.items():
        axes.grid(alpha=0.3)
        axes.set(xlabel=f"{unit} of training" if name == "time" else "training tokens", xlim=(0, None))
        if name != "time":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    label_panels(panels, runs)
    handles, labels = panels["tokens"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 3), frameon=False)
    return figure


def time_unit(runs: list[RunRecord]) -> tuple[str, int]:
    """The largest unit in which the longest run takes two or more, and its length in seconds."""
    longest = max((line["seconds"] for run in runs for line in run.train[-1:]), default=0)
    return next((unit for unit in (("hours", 3600), ("minutes", 60)) if longest >= 2 * unit[1]), ("seconds", 1))


def plot_losses(axes: Any, run: RunRecord, color: str, x: Callable[[dict[str, Any]], float]) -> None:
    """Training loss faint, validation loss with markers, entropy of the data dashed; `x` of each line is its place."""
    train = [line for line in run.train if line["loss"] is not None]
    axes.plot(list(map(x, train)), [line["loss"] for line in train], color=color, alpha=0.35, linewidth=0.8)
    # Without step 0: a line from there would cross the steep part, which has no validation.
    val = [line for line in run.val if line["step"] > 0 and line["loss"] is not None]
    label = run.name + (f": validation loss {val[-1]['loss']:.3f}" if val else "")
    losses = [line["loss"] for line in val]
    axes.plot(list(map(x, val)), losses, color=color, marker="o", markersize=4, linewidth=1.8, label=label)
    if run.entropy is not None:
        label = f"entropy of the data, the lowest possible loss: {run.entropy:.3f}"
        axes.axhline(run.entropy, color="black", linestyle="--", linewidth=1, label=label)


def plot_lambada(axes: Any, run: RunRecord, color: str) -> None:
    percent = [100 * line["accuracy"] for line in run.lambada]
    axes.plot([line["tokens"] for line in run.lambada], percent, color=color, marker="o", markersize=4)


def plot_steps(axes: Any, run: RunRecord, color: str, name: str, unit: float) -> None:
    """A metric of every step, faint, and its medians over each hundredth of the run."""
    lines = [line for line in run.train if line[name] is not None]
    values = [line[name] / unit for line in lines]
    axes.plot([line["tokens"] for line in lines], values, color=color, alpha=0.3, linewidth=0.6)
    size = max(len(lines) // 100, 1)
    starts = range(0, len(lines), size)
    medians = [statistics.median(values[i : i + size]) for i in starts]
    axes.plot([lines[min(i + size // 2, len(lines) - 1)]["tokens"] for i in starts], medians, color=color)


def label_panels(panels: dict[str, Any], runs: list[RunRecord]) -> None:
    from matplotlib.ticker import FormatStrFormatter

    losses = [line["loss"] for run in runs for line in [*run.train, *run.val] if line["loss"] is not None]
    for name in ("tokens", "time"):
        panels[name].set(ylabel="loss (nats per token): training faint, validation with markers")
        if losses and max(losses) > 3 * min(losses):
            panels[name].set_yscale("log")
            panels[name].yaxis.set_major_formatter(FormatStrFormatter("%g"))
            panels[name].yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    panels["lr"].set(ylabel="learning rate", ylim=(0, None))
    panels["speed"].set(ylabel="thousand tokens per second", ylim=(0, None))
    panels["norm"].set(ylabel="gradient norm", yscale="log")
    if "lambada" in panels:
        protocols = {line["protocol"] for run in runs for line in run.lambada}
        panels["lambada"].set(ylabel=f"LAMBADA accuracy (%), {', '.join(sorted(protocols))}", ylim=(0, None))


def build_page(runs: list[RunRecord], found: list[Result], plots: list[Path], out: Path) -> str:
    """The Markdown page, whose links are relative to the folder `out`."""
    sections = ["# Runs", runs_table(runs)]
    sections += [f"![loss curves]({os.path.relpath(path, out)})" for path in plots]
    if found:
        sections += ["# Results", results.results_table(found)]
    for task in sorted({result.task for result in found if result.has_published}):
        sections.append("Published figures, accuracy % (perplexity):")
        sections.append(results.published_table(task, [result.protocol for result in found if result.task == task]))
    return "\n\n".join(sections) + "\n"


def runs_table(runs: list[RunRecord]) -> str:
    rows = []
    for run in runs:
        last, settings = (run.train[-1] if run.train else None), run.settings
        val = run.val[-1] if run.val and run.val[-1]["loss"] is not None else None
        rows.append(
            [
                run.name,
                f"{settings['preset']} ({settings['parameters'] / 1e6:.1f}M)",
                f"{last['step'] if last else 0:,} of {settings['steps']:,}",
                f"{last['tokens'] / 1e6:,.1f}M" if last else "0",
                f"{val['loss']:.4f}" if val else "",
                f"{val['bits_per_byte']:.4f}" if val and val["bits_per_byte"] else "",
                f"{run.entropy:.4f} (+{val['loss'] / run.entropy - 1:.1%})" if run.entropy and val else "",
                f"{last['tokens'] / last['seconds'] / 1e3:,.1f}" if last else "",
                f"{last['seconds'] / 60:,.1f}" if last else "",
                f"{settings['world_size']} x {settings['versions']['device']}",
            ]
        )
    header = ["run", "model", "steps", "tokens", "validation loss", "bits per byte"]
    header += ["entropy of the data (loss above it)", "ktok/s", "minutes of training", "device"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
