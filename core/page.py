"""report.html: the curves and tables of report.py in one file without other files, for a browser."""

import html
import re
from typing import Any

from core.curves import Curves

POINTS = 1000  # per curve, at most
PANELS = (  # title, splits, value, horizontal axis, scale of the vertical axis
    ("loss by tokens", ("train", "val"), "loss", "tokens", "log"),
    ("loss by seconds of training", ("train", "val"), "loss", "seconds", "log"),
    ("LAMBADA accuracy", ("lambada",), "accuracy", "tokens", "linear"),
    ("HellaSwag accuracy", ("hellaswag",), "accuracy", "tokens", "linear"),
    ("learning rate", ("train",), "lr", "tokens", "linear"),
    ("tokens per second", ("train",), "tokens_per_second", "tokens", "linear"),
    ("gradient norm", ("train",), "grad_norm", "tokens", "log"),
)
STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 90rem; padding: 0 1rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.panels > div { min-width: 0; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; white-space: nowrap; }
th, td { border: 1px solid var(--line); padding: 0.25rem 0.6rem; text-align: left; }
"""


def build_html(runs: list[Curves], references: list[Curves], markdown: str, colors: list[str], refresh: bool) -> str:
    """The page: the panels, and the text and tables of the Markdown page. `refresh`: reload it every minute."""
    from plotly.offline import get_plotlyjs

    curves = [*runs, *references]
    panels = [panel for spec in PANELS if (panel := build_panel(spec, curves, colors))]
    reload_tag = '<meta http-equiv="refresh" content="60">' if refresh else ""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">{reload_tag}'
    return (
        f"<!doctype html><html lang=en><head>{head}<title>Runs</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><div class=panels>{''.join(panels)}</div>"
        f"{to_html(markdown)}<script>dispatchEvent(new Event('resize'))</script></body></html>"  # all have a place now
    )


def build_panel(spec: tuple[Any, ...], curves: list[Curves], colors: list[str]) -> str | None:
    """A plot that can be hovered over; a click on a name hides its curve. None if no curve has the value."""
    import plotly.graph_objects as go

    title, splits, value, axis, scale = spec
    figure = go.Figure()
    for curve, color in zip(curves, colors, strict=False):
        for split in splits:
            rows = [row for row in curve.lines[split] if row.get(value) is not None and row.get(axis) is not None]
            rows = rows[:: -(-len(rows) // POINTS) or 1]
            if rows:
                is_faint = split == "train" and len(splits) > 1
                figure.add_scatter(
                    x=[row[axis] for row in rows],
                    y=[row[value] for row in rows],
                    name=html.escape(curve.name + (", training" if is_faint else "")),
                    mode="lines" if split == "train" else "lines+markers",
                    opacity=0.5 if is_faint else 1,
                    line={"color": color, "width": 1 if is_faint else 2},
                )
    if not figure.data:
        return None
    grid = {"gridcolor": "#8884", "zerolinecolor": "#8888"}
    figure.update_layout(
        title={"text": title, "font": {"size": 15}},
        height=380,
        margin={"l": 50, "r": 10, "t": 40, "b": 30},
        font={"color": "#888"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": -0.15},
        showlegend=True,
        xaxis=grid,
        yaxis=grid | {"type": scale},
    )
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"responsive": True, "displayModeBar": False})


def to_html(markdown: str) -> str:
    """Headings, paragraphs and tables of the Markdown page; its pictures are left out."""
    parts = []
    for block in re.split(r"\n{2,}", markdown.strip()):
        if block.startswith("# "):
            parts.append(f"<h2>{html.escape(block[2:])}</h2>")
        elif block.startswith("|"):
            rows = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in block.splitlines()]
            cells = [[html.escape(cell.strip().strip("`").replace("\\|", "|")) for cell in row] for row in rows]
            header = "".join(f"<th>{cell}</th>" for cell in cells[0])
            body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells[2:])
            parts.append(f"<div class=table><table><tr>{header}</tr>{body}</table></div>")
        elif not block.startswith("!["):
            parts.append(f"<p>{html.escape(block)}</p>")
    return "".join(parts)
