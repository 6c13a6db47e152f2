"""Plot runs, and write a page about them and all evaluation results, in Markdown and for a browser.

    python report.py                                                 # every run in logs/
    python report.py --runs gpt2 gpt2-medium --out logs/sizes        # two runs in one plot
    python report.py --runs gpt2 --reference build-nanogpt           # with the published curve of another project

It also works during a run. By default report.md, report.html and the plots are written to logs/.
"""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from core import cli
from core.curves import (
    COLORS,
    GRAYS,
    STEP_TOKENS,
    Curves,
    find_runs,
    load_log,
    load_reference,
    load_run,
    longest,
    medians,
    reference_names,
    time_unit,
    with_numbers,
)
from core.data.shards import open_dataset
from core.eval import results
from core.eval.results import Result
from core.files import write_text
from core.page import build_html, cell, runs_table, state
from demo import stories

TASKS = {"lambada": "LAMBADA", "hellaswag": "HellaSwag"}  # scored during training
RELOAD_SECONDS = 3600  # after the last metric of an unfinished run, the page in a browser is still reloaded
# Fonts for letters that matplotlib's own font lacks, as far as they are installed.
FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "Malgun Gothic")


@dataclass
class Config:
    runs: Annotated[tuple[str, ...], cli.DEFAULT_IN_HELP] = ()
    """Names of the runs. Default: every run in logs/."""
    reference: Annotated[tuple[Literal[tuple(reference_names())], ...], cli.DEFAULT_IN_HELP] = ()  # type: ignore[valid-type]
    """Published 124M runs of other projects, drawn in gray: build-nanogpt (FineWeb-Edu), llm.c (FineWeb).
    Default: none."""
    log_files: Annotated[tuple[str, ...], cli.DEFAULT_IN_HELP] = ()
    """Log files of other projects, drawn in gray: main.log of llm.c, log.txt of build-nanogpt. Default: none."""
    log_step_tokens: int = STEP_TOKENS
    """Tokens per step in --log-files."""
    out: str = "logs"
    """Folder for report.md, report.html and, if there are several runs, loss.png with the newest six.
    The plot of each run is written to loss.png in its own folder."""
    floor: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """The demo's stories.jsonl: adds its entropy, the lowest possible loss. Default: no entropy."""
    watch: int = 0
    """Seconds between updates, until Ctrl-C, while a browser reloads report.html; 0: write the report once."""
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


def main(config: Config) -> None:
    cli.check_positive(log_step_tokens=config.log_step_tokens)
    cli.check_between(0, 86_400, watch=config.watch)
    write_report(config)
    while config.watch:
        time.sleep(config.watch)
        write_report(config)


def write_report(config: Config) -> None:
    references, problems = load_references(config)
    runs = [load_run(name) for name in config.runs or find_runs()]
    if not (runs or references):
        nothing = "logs/ contains no runs. Start one with train.py, or change to the folder that contains logs/"
        raise ValueError(problems[0] if problems else nothing)
    if config.floor:
        problems += load_entropies(runs, Path(config.floor))
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    plots = save_figures(runs, references, out, problems)
    found, damaged = results.load_all()
    if config.runs:
        found = [result for result in found if result.model.split("/")[0] in config.runs]
    text = build_page(runs, references, found, plots, problems + damaged, out)
    running = [run.updated for run in runs if state(run) != "finished"]
    reload_until = max(running) + max(RELOAD_SECONDS, 2 * config.watch) if running else 0.0
    pages = {out / "report.md": text, out / "report.html": build_html(runs, references, text, reload_until)}
    for path, content in pages.items():
        write_text(path, content)
    print(text)
    print(f"wrote {', '.join(str(path) for path in [*pages, *plots])}")


def load_references(config: Config) -> tuple[list[Curves], list[str]]:
    """The curves of other projects, and a line about each file that can't be read."""
    curves, problems = [load_reference(name) for name in config.reference], []
    for file in config.log_files:
        try:
            curves.append(load_log(Path(file), config.log_step_tokens))
        except (OSError, ValueError) as error:
            problems.append(f"--log-files: {cli.message(error)}")
    return curves, problems


def load_entropies(runs: list[Curves], stories_file: Path) -> list[str]:
    """Set the entropy of each run on these stories; return a line if there is none. Raises ValueError for no file."""
    if not stories_file.is_file():
        raise ValueError(f"--floor {stories_file} is not a file. Name the demo's stories.jsonl, or omit --floor")
    for run in runs:
        run.entropy = load_entropy(run, stories_file)
    if all(run.entropy is None for run in runs):
        return [f"--floor {stories_file}: no run was trained on a file of this name"]
    return []


def load_entropy(run: Curves, stories_file: Path) -> float | None:
    """The entropy of the run's validation stories in nats per token; None for a run on other data."""
    try:
        dataset = open_dataset(run.settings["data"])
        names = [file["name"] for file in dataset.manifest["source"]["files"]]
        documents = sum(shard["documents"] for shard in dataset.shards("val"))
    except (OSError, ValueError, KeyError, TypeError):
        run.problems.append("its data can't be read, so their entropy is unknown")
        return None
    if stories_file.name not in names:
        return None
    return stories.entropy(stories_file, documents, dataset.tokens("val"))


def save_figures(runs: list[Curves], references: list[Curves], out: Path, problems: list[str]) -> list[Path]:
    """A plot of each run in its folder, and one of the newest runs in `out`; `problems` names what can't be written."""
    drawn = [run for run in runs if run.train or run.val]
    figures = [([run], Path("logs") / run.name / "loss.png") for run in drawn]
    if len(drawn) > 1 or (references and not drawn):
        figures.append((newest(drawn), out / "loss.png"))
    plots = []
    for shown, path in figures:
        try:
            plots.append(save_figure(shown, references, path))
        except OSError as error:
            problems.append(cli.message(error))
    return plots


def newest(runs: list[Curves]) -> list[Curves]:
    """As many as there are colors, by the time of their last metric."""
    return sorted(runs, key=lambda run: run.updated)[-len(COLORS) :]


def save_figure(runs: list[Curves], references: list[Curves], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import font_manager

    fonts = [name for name in FONTS if name in font_manager.get_font_names()]
    with matplotlib.rc_context({"font.family": ["DejaVu Sans", *fonts]}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a letter that no installed font has
        figure = build_figure(runs, references)
        figure.savefig(path, dpi=100)
        plt.close(figure)
    return path


def build_figure(runs: list[Curves], references: list[Curves]) -> Any:
    """A figure of all runs: loss by tokens and by time, accuracies, and metrics per step; references by tokens."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    tasks = [task for task in TASKS if any(run.lines[task] for run in [*runs, *references])]
    names = ["tokens", *(["time"] if runs else []), *tasks]
    rows: list[Any] = [[name for name in names for _ in range(12 // len(names))]]
    if runs:  # log files have none of these
        rows.append([name for name in ("lr", "speed", "norm") for _ in range(4)])
    heights = (3, 2)[: len(rows)]
    figure, panels = plt.subplot_mosaic(rows, figsize=(15, 8), height_ratios=heights, layout="constrained")
    unit, seconds = time_unit(runs)
    for curves, color in zip(references, GRAYS * len(references), strict=False):
        plot_losses(panels["tokens"], curves, color, lambda line: line["tokens"])
        plot_accuracies(panels, tasks, curves, color)
    for run, color in zip(runs, COLORS, strict=False):
        plot_losses(panels["tokens"], run, color, lambda line: line["tokens"])
        plot_losses(panels["time"], run, color, lambda line: line["seconds"] / seconds)
        plot_accuracies(panels, tasks, run, color)
        plot_steps(panels["lr"], run, color, "lr", 1)
        plot_steps(panels["speed"], run, color, "tokens_per_second", 1000)
        plot_steps(panels["norm"], run, color, "grad_norm", 1)
    for name, axes in panels.items():
        axes.grid(alpha=0.3)
        axes.set(xlabel=f"{unit} of training" if name == "time" else "training tokens", xlim=(0, None))
        if references and name in ("tokens", *tasks) and (end := longest(runs)):
            axes.set(xlim=(0, 1.05 * end))
        if name != "time":
            axes.xaxis.set_major_formatter(lambda tokens, _: EngFormatter(sep="")(tokens).replace("G", "B"))
    label_panels(panels, [*runs, *references])
    legend(figure, panels["tokens"])
    return figure


def legend(figure: Any, axes: Any) -> None:
    """The labels of the lines as they are: matplotlib would hide a leading underscore, and read $ as mathematics."""
    handles = [line for line in axes.lines if line.get_gid()]
    labels = [line.get_gid() for line in handles]
    if handles:
        box = figure.legend(handles, [" "] * len(handles), loc="outside upper left", ncols=min(len(labels), 3))
        box.set_frame_on(False)
        for text, label in zip(box.get_texts(), labels, strict=True):
            text.set_parse_math(False)
            text.set_text(label)


def plot_losses(axes: Any, run: Curves, color: str, x: Callable[[dict[str, Any]], float]) -> None:
    """Training loss faint, validation loss with markers, entropy of the data dashed; `x` of each line is its place."""
    train = [line for line in run.train if line["loss"] is not None]
    axes.plot(list(map(x, train)), [line["loss"] for line in train], color=color, alpha=0.35, linewidth=0.8)
    val = [line for line in run.val if line["loss"] is not None]
    # Step 0 is a dot: a line from there would cross the steep part, which has no validation.
    start, later = ([line for line in val if (line["step"] == 0) == is_start] for is_start in (True, False))
    axes.plot(list(map(x, start)), [line["loss"] for line in start], "o", color=color, markersize=4)
    label = run.name + (f": validation loss {val[-1]['loss']:.3f}" if val else "")
    losses = [line["loss"] for line in later]
    axes.plot(list(map(x, later)), losses, color=color, marker="o", markersize=4, linewidth=1.8, gid=label)
    if run.entropy is not None:
        label = f"entropy of the data, the lowest possible loss: {run.entropy:.3f}"
        axes.axhline(run.entropy, color="black", linestyle="--", linewidth=1, gid=label)


def plot_accuracies(panels: dict[str, Any], tasks: list[str], run: Curves, color: str) -> None:
    for task in tasks:
        lines = [line for line in run.lines[task] if line["accuracy"] is not None]
        if lines:
            percent = [100 * line["accuracy"] for line in lines]
            panels[task].plot([line["tokens"] for line in lines], percent, color=color, marker="o", markersize=4)


def plot_steps(axes: Any, run: Curves, color: str, name: str, unit: float) -> None:
    """A metric of every step, faint, and its medians over each hundredth of the run."""
    lines = with_numbers(run.train, name)
    values = [line[name] / unit for line in lines]
    axes.plot([line["tokens"] for line in lines], values, color=color, alpha=0.3, linewidth=0.6)
    tokens, middles = medians(lines, name)
    axes.plot(tokens, [middle / unit for middle in middles], color=color)


def label_panels(panels: dict[str, Any], runs: list[Curves]) -> None:
    from matplotlib.ticker import FormatStrFormatter

    losses = [line["loss"] for run in runs for line in [*run.train, *run.val] if line["loss"] is not None]
    for name in [name for name in ("tokens", "time") if name in panels]:
        panels[name].set(ylabel="loss (nats per token), validation dotted")
        if losses and max(losses) > 3 * min(losses):
            panels[name].set_yscale("log")
            panels[name].yaxis.set_major_formatter(FormatStrFormatter("%g"))
            panels[name].yaxis.set_minor_formatter(FormatStrFormatter("%g"))
    if "lr" in panels:
        panels["lr"].set(ylabel="learning rate", ylim=(0, None))
        panels["speed"].set(ylabel="thousand tokens per second", ylim=(0, None))
        panels["norm"].set(ylabel="gradient norm")
    if "norm" in panels and any(line["grad_norm"] > 0 for run in runs for line in with_numbers(run.train, "grad_norm")):
        panels["norm"].set_yscale("log")
    for task, title in TASKS.items():
        if task in panels:
            protocols = {str(line.get("protocol", "")) for run in runs for line in run.lines[task]}
            panels[task].set(ylabel=f"{title} accuracy (%), {', '.join(sorted(protocols))}", ylim=(0, None))


def build_page(
    runs: list[Curves],
    references: list[Curves],
    found: list[Result],
    plots: list[Path],
    problems: list[str],
    out: Path,
) -> str:
    """The Markdown page, whose links are relative to the folder `out`."""
    log_files = [curves for curves in references if curves.is_log_file]
    sections = ["# Runs", runs_table([*runs, *log_files]), *(curves.note for curves in references if curves.note)]
    sections += [f"not shown: {problem}" for problem in problems]
    sections += [f"![loss curves]({link(path, out)})" for path in plots]
    if found:
        shown = [replace(result, model=cell(result.model), data=cell(result.data)) for result in found]
        sections += ["# Results", results.results_table(shown)]
    for task in sorted({result.task for result in found if result.has_published}):
        sections.append("Published figures, accuracy % (perplexity):")
        sections.append(results.published_table(task, [result.protocol for result in found if result.task == task]))
    return "\n\n".join(sections) + "\n"


def link(path: Path, out: Path) -> str:
    """The relative address of a file, in which no character has a meaning in Markdown."""
    return quote(os.path.relpath(path, out))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
