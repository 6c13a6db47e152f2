"""Draw the loss curves of runs and gather all results in one Markdown page; also while a run goes on.

    python report.py                                                 # every run in logs/
    python report.py --runs gpt2 gpt2-medium --out logs/sizes        # these runs over one another

The page and the pictures go to logs/.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import cli, results, stories
from core.results import Result
from core.runlog import METRICS, read_metrics
from core.shards import open_dataset

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

SPLITS = ("train", "val", "lambada")


@dataclass
class Config:
    runs: tuple[str, ...] = ()
    """Runs to show, by name. Default: every run in logs/."""
    out: str = "logs"
    """Folder for report.md and, of several runs, loss.png. Each run's own loss.png goes into its folder."""
    floor: str | None = None
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
        pictures.append(draw(runs, out / "loss.png"))
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
    """Loss against tokens, and below it LAMBADA's accuracy where a run has scored it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scored = any(run.lambada for run in runs)
    rows = {"nrows": 2, "height_ratios": (2, 1), "sharex": True, "figsize": (8, 7)} if scored else {"figsize": (8, 5)}
    figure, panels = plt.subplots(squeeze=False, layout="constrained", **rows)
    draw_losses(panels[0, 0], runs)
    if scored:
        draw_lambada(panels[1, 0], runs)
    for axes in panels[:, 0]:
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    panels[-1, 0].set(xlabel="tokens seen", xlim=(0, None))
    panels[-1, 0].xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def draw_losses(axes: Any, runs: list[RunFacts]) -> None:
    """Training faint, validation as marked lines, the floor dashed."""
    from matplotlib.ticker import FormatStrFormatter

    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        train = [line for line in run.train if line["loss"] is not None]
        axes.plot(*columns(train, "loss"), color=colour, alpha=0.35, linewidth=0.8, label=f"{run.name}, training")
        # No line from step 0: it would cut across the steep part, where there was no validation.
        later = [line for line in run.val if line["step"] > 0 and line["loss"] is not None]
        last = f": {later[-1]['loss']:.3f} at the end" if later else ""
        draw_marked(axes, columns(later, "loss"), colour, f"{run.name}, validation{last}")
        if run.floor is not None:
            label = f"the least possible: {run.floor:.3f} (the stories' entropy)"
            axes.axhline(run.floor, color="black", linestyle="--", linewidth=1, label=label)
    shown = [line["loss"] for run in runs for line in [*run.train, *run.val] if line["loss"] is not None]
    axes.set(ylabel="loss (nats a token)")
    if shown and max(shown) > 3 * min(shown):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(FormatStrFormatter("%g"))


def draw_lambada(axes: Any, runs: list[RunFacts]) -> None:
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        if run.lambada:
            last = run.lambada[-1]
            tokens, accuracies = columns(run.lambada, "accuracy")
            label = f"{run.name}, {last['protocol']}: {last['correct']:,} of {last['total']:,} at the end"
            draw_marked(axes, (tokens, [100 * accuracy for accuracy in accuracies]), colour, label)
    axes.set(ylabel="LAMBADA accuracy (%)", ylim=(0, None))


def draw_marked(axes: Any, points: tuple[list[int], list[float]], colour: str, label: str) -> None:
    axes.plot(*points, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)


def columns(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    return [line["tokens"] for line in lines], [line[name] for line in lines]


def write_page(runs: list[RunFacts], found: list[Result], pictures: list[Path], out: Path) -> str:
    parts = ["# Runs", runs_table(runs)]
    parts += [f"![loss curve]({os.path.relpath(path, out)})" for path in pictures]
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
    return results.table([*header, "ktok/s", "minutes of training", "device"], rows)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
