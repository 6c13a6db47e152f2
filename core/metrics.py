"""metrics.jsonl, the truth about a run, a JSON object a line: reading it, and cutting back what a resume does again."""

import json
import os
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop what metrics.jsonl says of steps after `step`, and a last line that a kill cut short; return the rest."""
    kept: list[dict[str, Any]] = []
    if not path.is_file():
        return kept
    for line in path.read_text().splitlines():
        try:
            metrics = json.loads(line)
        except ValueError:
            break
        if metrics["step"] <= step:
            kept.append(metrics)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text("".join(json.dumps(metrics) + "\n" for metrics in kept))
    os.replace(unfinished, path)
    return kept


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """A run's metrics so far, also while it goes on. A last line that is being written is left out."""
    lines = (run / METRICS).read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]
