"""Draw how runs went and gather all results in one Markdown page; also while a run goes on.

    python report.py                                                 # every run in logs/
    python report.py --runs gpt2 gpt2-medium --out logs/sizes        # these runs over one another

The page and the pictures go to logs/.
"""

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from core import cli
from core.data.shards import open_dataset
from core.eval import results
from core.eval.results import Result
from core.files import METRICS, markdown_table, read_metrics
from demo import stories

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

SPLITS = ("train", "val", "lambada")


@dataclass
class Config:
    runs: tuple[str, ...] = ()
    """Runs to show, by name. Default: every run in logs/."""
    out: str = "logs"
    """Folder for report.md and, of several runs, loss.png with the newest six of them.
    Each run's own loss.png goes into its folder."""
    floor: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """The demo's stories.jsonl: draws the least loss that any model can reach on them."""


@dataclass
class RunFacts:
    name: str
    facts: dict[str, Any]  # run.json
    train: list[dict[str, Any]]
    val: list[dict[str, Any]]
    lambada: list[dict[str, Any]]
    floor: float | None


def main(config: Config) -> None:
    runs = [load_run(name, config.floor) for name in config.runs or find_runs()]
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = [draw([run], Path("logs") / run.name / "loss.png") for run in runs]
    if len(runs) > 1:
        newest = sorted(runs, key=lambda run: (Path("logs") / run.name / METRICS).stat().st_mtime)[-len(COLOURS) :]
        pictures.append(draw(newest, out / "loss.png"))
    page = out / "report.md"
    found = results.load_all()
    if config.runs:
        found = [result for result in found if result.model.split("/")[0] in config.runs]
    page.write_text(write_page(runs, found, pictures, out))
    print(page.read_text())
    print(f"wrote {', '.join(str(path) for path in [page, *pictures])}")


def find_runs() -> list[str]:
    names = sorted(path.parent.name for path in Path("logs").glob(f"*/{METRICS}"))
    if not names:
        raise ValueError("logs/ holds no run: train one with train.py, or stand in the folder that holds logs/")
    return names


def load_run(name: str, floor: str | None) -> RunFacts:
    folder = Path("logs") / name
    if not (folder / METRICS).is_file():
        raise ValueError(f"{folder} holds no run; runs here: {', '.join(find_runs())}")
    facts = json.loads((folder / "run.json").read_text())
    metrics = read_metrics(folder)
    train, val, lambada = ([line for line in metrics if line["split"] == split] for split in SPLITS)
    return RunFacts(name, facts, train, val, lambada, load_floor(facts, floor) if floor else None)


def load_floor(facts: dict[str, Any], floor: str) -> float | None:
    """The generator's loss on the run's validation stories; None for a run on other data."""
    dataset = open_dataset(facts["data"])
    if not any(file["name"] == Path(floor).name for file in dataset.manifest["source"]["files"]):
        return None
    documents = sum(shard["documents"] for shard in dataset.shards("val"))
    return stories.floor(Path(floor), documents, dataset.tokens("val"))


def draw(runs: list[RunFacts], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = picture(runs)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def picture(runs: list[RunFacts]) -> Any:
    """A figure of the runs over one another: loss over tokens and over time, LAMBADA, and how each step went."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    top = ["tokens", "tokens", "time", "time", "lambada", "lambada"] if any(run.lambada for run in runs) else None
    rows: list[Any] = [top or ["tokens"] * 3 + ["time"] * 3, ["lr", "lr", "rate", "rate", "norm", "norm"]]
    figure, panels = plt.subplot_mosaic(rows, figsize=(15, 8), height_ratios=(3, 2), layout="constrained")
    unit, seconds = time_unit(runs)
    for run, colour in zip(runs, COLOURS, strict=False):
        draw_losses(panels["tokens"], run, colour, lambda line: line["tokens"])
        draw_losses(panels["time"], run, colour, lambda line: line["seconds"] / seconds)
        draw_lambada(panels.get("lambada"), run, colour)
        draw_steps(panels["lr"], run, colour, "lr", 1)
        draw_steps(panels["rate"], run, colour, "tokens_per_second", 1000)
        draw_steps(panels["norm"], run, colour, "grad_norm", 1)
    for name, axes in panels.items():
        axes.grid(alpha=0.3)
        axes.set(xlabel=f"{unit} of training" if name == "time" else "tokens seen", xlim=(0, None))
        if name != "time":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    label_panels(panels, runs)
    handles, labels = panels["tokens"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 3), frameon=False)
    return figure


def time_unit(runs: list[RunFacts]) -> tuple[str, int]:
    """The unit in which the longest run takes at least two, and its seconds."""
    longest = max((line["seconds"] for run in runs for line in run.train[-1:]), default=0)
    return next((unit for unit in (("hours", 3600), ("minutes", 60)) if longest >= 2 * unit[1]), ("seconds", 1))


def draw_losses(axes: Any, run: RunFacts, colour: str, place: Callable[[dict[str, Any]], float]) -> None:
    """Training faint, validation as marked lines, the floor dashed."""
    train = [line for line in run.train if line["loss"] is not None]
    axes.plot(list(map(place, train)), [line["loss"] for line in train], color=colour, alpha=0.35, linewidth=0.8)
    # No line from step 0: it would cut across the steep part, where there was no validation.
    later = [line for line in run.val if line["step"] > 0 and line["loss"] is not None]
    last = f": validation loss {later[-1]['loss']:.3f}" if later else ""
    marks = (list(map(place, later)), [line["loss"] for line in later])
    axes.plot(*marks, color=colour, marker="o", markersize=4, linewidth=1.8, label=f"{run.name}{last}")
    if run.floor is not None:
        label = f"the least possible: {run.floor:.3f} (the stories' entropy)"
        axes.axhline(run.floor, color="black", linestyle="--", linewidth=1, label=label)


def draw_lambada(axes: Any, run: RunFacts, colour: str) -> None:
    if run.lambada:
        percent = [100 * line["accuracy"] for line in run.lambada]
        axes.plot([line["tokens"] for line in run.lambada], percent, color=colour, marker="o", markersize=4)


def draw_steps(axes: Any, run: RunFacts, colour: str, name: str, unit: float) -> None:
    """A value of each step, faint where steps differ, and the medians of a hundredth of the run."""
    lines = [line for line in run.train if line[name] is not None]
    values = [line[name] / unit for line in lines]
    axes.plot([line["tokens"] for line in lines], values, color=colour, alpha=0.3, linewidth=0.6)
    size = max(len(lines) // 100, 1)
    parts = range(0, len(lines), size)
    medians = [statistics.median(values[i : i + size]) for i in parts]
    axes.plot([lines[min(i + size // 2, len(lines) - 1)]["tokens"] for i in parts], medians, color=colour)


def label_panels(panels: dict[str, Any], runs: list[RunFacts]) -> None:
    from matplotlib.ticker import FormatStrFormatter

    losses = [line["loss"] for run in runs for line in [*run.train, *run.val] if line["loss"] is not None]
    for name in ("tokens", "time"):
        panels[name].set(ylabel="loss (nats a token): training faint, validation dotted")
        if losses and max(losses) > 3 * min(losses):
            panels[name].set_yscale("log")
            panels[name].yaxis.set_major_formatter(FormatStrFormatter("%g"))
            panels[name].yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    panels["lr"].set(ylabel="learning rate", ylim=(0, None))
    panels["rate"].set(ylabel="thousand tokens a second", ylim=(0, None))
    panels["norm"].set(ylabel="gradient norm", yscale="log")
    if "lambada" in panels:
        protocols = {line["protocol"] for run in runs for line in run.lambada}
        panels["lambada"].set(ylabel=f"LAMBADA accuracy (%), {', '.join(sorted(protocols))}", ylim=(0, None))


def write_page(runs: list[RunFacts], found: list[Result], pictures: list[Path], out: Path) -> str:
    parts = ["# Runs", runs_table(runs)]
    parts += [f"![how it went]({os.path.relpath(path, out)})" for path in pictures]
    if found:
        parts += ["# Results", results.results_table(found)]
    for task in sorted({result.task for result in found if result.has_published}):
        parts.append("Published figures, accuracy % (perplexity):")
        parts.append(results.published_table(task, [result.protocol for result in found if result.task == task]))
    return "\n\n".join(parts) + "\n"


def runs_table(runs: list[RunFacts]) -> str:
    rows = []
    for run in runs:
        done, facts = (run.train[-1] if run.train else None), run.facts
        val = run.val[-1] if run.val and run.val[-1]["loss"] is not None else None
        rows.append(
            [
                run.name,
                f"{facts['preset']} ({facts['parameters'] / 1e6:.1f}M)",
                f"{done['step'] if done else 0:,} of {facts['steps']:,}",
                f"{done['tokens'] / 1e6:,.1f}M" if done else "0",
                f"{val['loss']:.4f}" if val else "",
                f"{val['bits_per_byte']:.4f}" if val and val["bits_per_byte"] else "",
                f"{run.floor:.4f} (+{val['loss'] / run.floor - 1:.1%})" if run.floor and val else "",
                f"{done['tokens'] / done['seconds'] / 1e3:,.1f}" if done else "",
                f"{done['seconds'] / 60:,.1f}" if done else "",
                f"{facts['world_size']} x {facts['versions']['device']}",
            ]
        )
    header = ["run", "model", "steps", "tokens", "validation loss", "bits per byte", "floor (loss above it)"]
    return markdown_table([*header, "ktok/s", "minutes of training", "device"], rows)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
