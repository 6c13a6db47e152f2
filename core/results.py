"""What an evaluation leaves behind: results.json, a line a question, and a table beside the published figures."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.shards import sha256, write_json
from core.stats import wilson

RESULTS = Path("logs/results")  # where report.py looks
SIZES = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}


@dataclass(frozen=True)
class Result:
    """One model on one set of questions by one protocol."""

    task: str
    protocol: str
    model: str
    data: str
    sha256: str | None  # of the data's file; None for the hub's
    correct: int
    total: int
    perplexity: float | None
    seconds: float
    has_published: bool  # whether published figures speak of questions of this kind
    near_ties: int  # questions whose outcome another batch size or device may turn

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


def short_name(source: str) -> str:
    """`demo/step_001000` for logs/demo/checkpoints/step_001000; a folder or hub name as it is."""
    path = Path(source).resolve()
    return f"{path.parts[-3]}/{path.name}" if path.parent.name == "checkpoints" else source.rstrip("/")


def data_facts(path: Path | None, hub_name: str) -> dict[str, str | None]:
    """How results name their questions."""
    if path is None:
        return {"data": hub_name, "sha256": None}
    return {"data": path.name, "sha256": sha256(path)}


def save(results: list[Result], out: str | None) -> Path:
    """Write results to the file `out`, or each to a file of its own in logs/results/; return where."""
    rows = [asdict(r) | {"accuracy": r.accuracy, "interval": wilson(r.correct, r.total)} for r in results]
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(out), rows)
        return Path(out)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for r, row in zip(results, rows, strict=True):
        name = re.sub(r"[^\w.-]+", "-", f"{r.task}-{r.protocol}-{r.model}-{r.data}")
        write_json(RESULTS / f"{name}.json", [row])
    return RESULTS


def save_items(items: list[dict[str, Any]], path: str) -> None:
    """One question a line."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(item) + "\n" for item in items))


def load_all() -> list[Result]:
    """Every result in logs/results/."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        try:
            for row in json.loads(path.read_text()):
                found.append(Result(**{name: row[name] for name in Result.__dataclass_fields__}))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} can't be read as results ({error!r}): remove it, or run its evaluation again"
            ) from None
    return found


def near_ties_line(results: list[Result]) -> str:
    """How many answers are too close to be sure of."""
    return (
        f"near ties, whose answer another batch size or device may turn: {sum(result.near_ties for result in results)}"
    )


def published(task: str) -> list[dict[str, Any]]:
    """All published figures of a task, each with its protocol and source."""
    return json.loads((Path(__file__).parent / "tasks" / "published.json").read_text())[task]


def results_table(results: list[Result]) -> str:
    rows = []
    for r in results:
        low, high = wilson(r.correct, r.total)
        interval = f"{100 * low:.2f} to {100 * high:.2f}"
        perplexity = f"{r.perplexity:.2f}" if r.perplexity else ""
        row = [r.model, r.task, r.protocol, r.data, f"{100 * r.accuracy:.2f}", interval]
        rows.append([*row, f"{r.correct:,} of {r.total:,}", perplexity])
    header = ["model", "task", "protocol", "questions", "accuracy %", "95 % interval", "correct", "perplexity"]
    return table(header, rows)


def published_table(task: str, protocols: list[str]) -> str:
    """The published figures of these protocols, a row a protocol and a column a size of GPT-2."""
    rows = []
    for figure in published(task):
        if figure["protocol"] in protocols:
            name = " ".join(figure[key] for key in ("type", "split") if key in figure)
            cells = [format_figure(figure.get(size)) for size in SIZES]
            rows.append([f"{name} `{figure['protocol']}`".strip(), *cells, figure["source"]])
    return table([f"{task}, published", *SIZES.values(), "source"], rows)


def format_figure(figure: list[float] | None) -> str:
    """Accuracy, with the perplexity in brackets where it was published."""
    if figure is None:
        return ""
    perplexity = f" ({figure[1]:.2f})" if len(figure) > 1 and figure[1] else ""
    return f"{figure[0]:.2f}{perplexity}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with its columns aligned, to be read on a terminal as it is."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])
