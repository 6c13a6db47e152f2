"""The table of runs, and report.html: curves and tables in one file without other files, for a browser."""

import html
import re
from dataclasses import dataclass
from typing import Any

from core.curves import COLORS, GRAYS, Curves, longest, medians, time_unit, with_numbers
from core.files import markdown_table

POINTS = 1000  # per curve, at most
# A page that report.py doesn't write again is not reloaded for ever.
RELOAD = "<script>if (Date.now() < {until:.0f} * 1000) setTimeout(() => location.reload(), 60000)</script>"
ENTROPY = "entropy of the data (loss above it)"
STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 90rem; padding: 0 1rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.panels > div { min-width: 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; white-space: nowrap; }
th, td { border: 1px solid var(--line); padding: 0.25rem 0.6rem; text-align: left; }
"""


@dataclass(frozen=True)
class Panel:
    title: str
    splits: tuple[str, ...]
    value: str  # the key in metrics.jsonl
    axis: dict[str, Any]  # plotly's settings of the vertical axis
    x: str = "tokens"


ACCURACY = {"rangemode": "tozero", "tickformat": ".0%", "hoverformat": ".2%"}
LOSS = {"type": "log", "hoverformat": ".4f"}
PANELS = (
    Panel("loss, nats per token", ("train", "val"), "loss", LOSS),
    Panel("loss, nats per token", ("train", "val"), "loss", LOSS, x="seconds"),
    Panel("LAMBADA accuracy", ("lambada",), "accuracy", ACCURACY),
    Panel("HellaSwag accuracy", ("hellaswag",), "accuracy", ACCURACY),
    Panel("learning rate", ("train",), "lr", {"rangemode": "tozero", "tickformat": ".1e"}),
    Panel("tokens per second", ("train",), "tokens_per_second", {"rangemode": "tozero"}),
    Panel("gradient norm", ("train",), "grad_norm", {"type": "log", "tickformat": "~g", "hoverformat": ".3f"}),
)


def build_html(runs: list[Curves], references: list[Curves], markdown: str, reload_until: float) -> str:
    """The page: the panels, and the text and tables of the Markdown page.

    A browser reloads it every minute until the time `reload_until`, in seconds since 1970.
    """
    from plotly.offline import get_plotlyjs

    curves = [(curve, GRAYS[i % len(GRAYS)]) for i, curve in enumerate(references)]  # below the runs
    curves += [(run, COLORS[i % len(COLORS)]) for i, run in enumerate(runs)]
    # The references of long runs would compress the curves of a short run.
    end = 1.05 * longest(runs) if references else None
    panels = [shown for panel in PANELS if (shown := build_panel(panel, curves, time_unit(runs), end))]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += RELOAD.format(until=reload_until) if reload_until else ""
    return (
        f"<!doctype html><html lang=en><head>{head}<title>Runs</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><div class=panels>{''.join(panels)}</div>"
        f"{to_html(markdown)}<script>dispatchEvent(new Event('resize'))</script></body></html>"  # all have a place now
    )


def build_panel(panel: Panel, curves: list[tuple[Curves, str]], unit: tuple[str, int], end: float | None) -> str | None:
    """A plot that can be hovered over; a click on a name hides its curves. None if no curve has the value.

    `unit`: of time, and its seconds. `end`: of the axis of tokens; None for that of the data.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    names = set()
    for curve, color in curves:
        for x, y, style in build_traces(panel, curve, color, unit[1]):
            # One name per run: a click on it also hides its training loss and the values behind its medians.
            figure.add_scatter(x=x, y=y, **style, legendgroup=curve.name, showlegend=curve.name not in names)
            names.add(curve.name)
    if not figure.data:
        return None
    grid = {"gridcolor": "#8884", "zerolinecolor": "#8888"}
    is_time = panel.x == "seconds"
    figure.update_layout(
        title={"text": f"{panel.title}, by {unit[0] if is_time else 'tokens'} of training", "font": {"size": 15}},
        height=340 + 20 * len(names),  # the legend is below the plot; a narrow screen shows one name per line
        margin={"l": 55, "r": 10, "t": 40, "b": 30},
        font={"color": "#888"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": -0.15, "itemdoubleclick": "toggleothers"},
        showlegend=True,
        hoverlabel={"namelength": -1},
        xaxis=grid | ({"range": [0, end]} if end and not is_time else {"rangemode": "tozero"}),
        yaxis=grid | panel.axis,
    )
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True, "displayModeBar": False})


def build_traces(panel: Panel, curve: Curves, color: str, seconds: int) -> list[tuple[list[Any], list[Any], Any]]:
    """The curves of a run in a panel, the most visible first: x, y and style of each."""
    traces: list[tuple[list[Any], list[Any], Any]] = []
    for split in reversed(panel.splits):
        rows = with_numbers(curve.lines[split], panel.value, panel.x)
        if not rows:
            continue
        scale = seconds if panel.x == "seconds" else 1
        shown = rows[:: -(-len(rows) // POINTS)]
        x, y = [row[panel.x] / scale for row in shown], [row[panel.value] for row in shown]
        style: dict[str, Any] = {"name": html.escape(curve.name), "line": {"color": color, "width": 2}}
        faint = style | {"mode": "lines", "opacity": 0.35, "line": {"color": color, "width": 1}}
        if split != "train":
            if split == "val" and shown[0]["step"] == 0:  # a dot: a line would cross the steep part
                x.insert(1, None)
                y.insert(1, None)
            traces.append((x, y, style | {"mode": "lines+markers"}))
        elif panel.value == "loss":
            traces.append((x, y, faint | {"name": html.escape(f"{curve.name}, training")} if traces else faint))
        else:
            traces.append((*medians(rows, panel.value), style | {"mode": "lines"}))
            traces.append((x, y, faint | {"hoverinfo": "skip"}))
    return traces


def to_html(markdown: str) -> str:
    """Headings, paragraphs and tables of the Markdown page; its pictures are left out."""
    parts = []
    for block in re.split(r"\n{2,}", markdown.strip()):
        if block.startswith("# "):
            parts.append(f"<h2>{html.escape(block[2:])}</h2>")
        elif block.startswith("|"):
            rows = [[to_text(cell) for cell in re.split(r"(?<!\\)\|", row.strip()[1:-1])] for row in block.splitlines()]
            header = "".join(f"<th>{cell}</th>" for cell in rows[0])
            body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows[2:])
            parts.append(f"<div class=table><table><tr>{header}</tr>{body}</table></div>")
        elif not block.startswith("!["):
            parts.append(f"<p>{html.escape(block)}</p>")
    return "".join(parts)


def to_text(cell: str) -> str:
    """A cell of a Markdown table as HTML: `cell` and `markdown_table` undone."""
    text = re.sub(r"(?<!`)(`+)(?!`) ?(.+?) ?(?<!`)\1(?!`)", r"\2", cell.strip())
    return html.escape(text.replace("\\|", "|"))


def cell(text: str) -> str:
    """A name as a cell of a Markdown table, which shows it as it is."""
    if re.fullmatch(r"[\w./ -]+", text) and not re.search(r"(?<![^\W_])_|_(?![^\W_])", text):  # a_b has no emphasis
        return text
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def runs_table(runs: list[Curves]) -> str:
    """A row for each run or log file; without the column of the entropy where no run has one."""
    header = ["run", "model", "steps", "tokens", "validation loss", "bits per byte", ENTROPY]
    header += ["ktok/s", "minutes of training", "device", "state"]
    rows = [header, *map(run_row, runs)]
    if all(run.entropy is None for run in runs):
        rows = [row[:6] + row[7:] for row in rows]
    return markdown_table(rows[0], rows[1:])


def run_row(run: Curves) -> list[str]:
    """A row of the table: what is known of the run."""
    settings, last = run.settings, (run.train[-1] if run.train else None)
    seconds = last.get("seconds") if last else None  # a log file has no times
    tokens = max((line["tokens"] for lines in run.lines.values() for line in lines), default=0)
    val = run.val[-1] if run.val and run.val[-1]["loss"] is not None else None
    bits = val.get("bits_per_byte") if val else None
    parameters, steps, versions = (settings.get(key) for key in ("parameters", "steps", "versions"))
    size = f" ({parameters / 1e6:.1f}M)" if isinstance(parameters, int | float) else ""
    device = versions.get("device", "") if isinstance(versions, dict) else ""
    return [
        cell(run.name),
        f"{settings.get('preset', '')}{size}",
        f"{run.steps:,} of {steps:,}" if isinstance(steps, int) else f"{run.steps:,}",
        format_tokens(tokens) if tokens else "0",
        f"{val['loss']:.4f}" if val else "",
        f"{bits:.4f}" if bits else "",
        f"{run.entropy:.4f} (+{val['loss'] / run.entropy - 1:.1%})" if run.entropy and val else "",
        f"{last['tokens'] / seconds / 1e3:,.1f}" if last and seconds else "",
        f"{seconds / 60:,.1f}" if seconds is not None else "",
        f"{settings.get('world_size', '')} x {device}" if device else "",
        "; ".join([*run.problems, state(run)]),
    ]


def state(run: Curves) -> str:
    if run.is_log_file:
        return "log file"
    steps = run.settings.get("steps")
    if isinstance(steps, int) and run.steps >= steps:
        return "finished"
    return "not finished" if run.steps else "no step yet"


def format_tokens(tokens: float) -> str:
    """With a unit: 30k, 1.5M, 10.0B."""
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if tokens >= unit:
            return f"{tokens / unit:,.1f}{name}"
    return f"{tokens / 1e3:,.0f}k"
