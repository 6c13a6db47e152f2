"""`--check`: scores of OpenAI's weights compared with the published figures of the same protocol and size."""

import json
import math
from dataclasses import dataclass
from typing import Any

from core.eval import results
from core.eval.results import Result
from core.eval.task import format_perplexity
from core.files import markdown_table

PASS, FAIL, REFERENCE, MISSING = "pass", "FAIL", "reference", "no figure"
HEADER = ["model", "task", "protocol", "questions", "measure", "found", "published", "tolerance", "verdict"]


@dataclass(frozen=True)
class Row:
    """One comparison; the texts are cells of the table."""

    model: str
    task: str
    protocol: str
    questions: str
    measure: str
    found: str
    published: str
    tolerance: str
    verdict: str  # PASS, FAIL, REFERENCE or MISSING
    note: str = ""


def compare(found: list[Result]) -> list[Row]:
    """A row for each published measure of each result, and one for a result without a published figure.

    Figures of a rule that isn't published in full, such as the paper's stop words, are references: no result can pass
    or fail them.
    """
    return [row for result in found for row in _compare_one(result)]


def _compare_one(result: Result) -> list[Row]:
    entry, figure = results.published_entry(result), results.published_figure(result)
    if entry is None or figure is None:
        is_accuracy = result.correct is not None
        value = f"{_accuracies(result, None)[0]:.2f}" if is_accuracy else format_perplexity(result.perplexity)
        return [_row(result, "accuracy %" if is_accuracy else "perplexity", value, verdict=MISSING)]
    tolerances = json.loads(results.PUBLISHED.read_text(encoding="utf-8"))["tolerances"]
    rows = []
    if figure[0] is not None:
        limit, total = tolerances["accuracy"], entry.get("scored")
        values = _accuracies(result, total)
        text = f"{values[0]:.2f}" + (f" ({values[1]:.2f} of {total:,})" if total else "")
        is_near = min(abs(value - figure[0]) for value in values) <= limit
        rows.append(_row(result, "accuracy %", text, figure[0], f"{limit:g} points", _verdict(is_near), entry))
    if len(figure) > 1 and figure[1] is not None:
        limit = tolerances["perplexity"]
        is_near = abs((result.perplexity or math.inf) / figure[1] - 1) <= limit
        percent = f"{100 * limit:g} %"
        found = format_perplexity(result.perplexity)
        rows.append(_row(result, "perplexity", found, figure[1], percent, _verdict(is_near), entry))
    return rows


def _row(
    result: Result,
    measure: str,
    found: str,
    published: float | None = None,
    tolerance: str = "",
    verdict: str = MISSING,
    entry: dict[str, Any] | None = None,
) -> Row:
    note = (entry or {}).get("reference", "")
    return Row(
        model=result.model,
        task=result.task,
        protocol=result.protocol_and_dtype,
        questions=result.subset or result.data,
        measure=measure,
        found=found,
        published="" if published is None else f"{published:.2f}",
        tolerance=tolerance,
        verdict=REFERENCE if note else verdict,
        note=note,
    )


def _verdict(is_near: bool) -> str:
    return PASS if is_near else FAIL


def _accuracies(result: Result, scored: int | None) -> list[float]:
    """The accuracy in %; and of the `scored` questions, where the published figure is of fewer than all."""
    assert result.correct is not None
    return [100 * result.correct / total for total in (result.total, scored) if total]


def table(rows: list[Row]) -> str:
    """The comparisons as a Markdown table, their notes, and a line with the counts."""
    cells = [
        [r.model, r.task, r.protocol, r.questions, r.measure, r.found, r.published, r.tolerance, r.verdict]
        for r in rows
    ]
    notes = {
        f"{r.task} {r.protocol} is a reference: {r.note}." if r.verdict == REFERENCE else f"{r.task}: {r.note}": None
        for r in rows
        if r.note
    }
    return "\n\n".join([markdown_table(HEADER, cells), *notes, summary(rows)])


def summary(rows: list[Row]) -> str:
    """The number of rows by verdict, in one line."""
    verdicts = [row.verdict for row in rows]
    counts = [f"{verdicts.count(name)} {name}" for name in (PASS, FAIL, REFERENCE, MISSING) if name in verdicts]
    return f"check: {', '.join(counts)}"


def status(rows: list[Row]) -> int:
    """The exit status: 1 where a comparison fails, 2 where a figure is missing or nothing was compared, else 0."""
    verdicts = {row.verdict for row in rows}
    return 1 if FAIL in verdicts else 2 if MISSING in verdicts or PASS not in verdicts else 0
