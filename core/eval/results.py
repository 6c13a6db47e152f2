"""Files and tables of evaluations: results.json, items files, published figures, intervals and tests."""

import hashlib
import json
import math
import re
from dataclasses import MISSING, asdict, dataclass, fields
from itertools import combinations, product
from pathlib import Path
from typing import Any

from core.eval.task import LARGEST_EXPONENT, Page, Verdict, exp_mean, format_perplexity, read_json_lines
from core.files import markdown_table, write_json, write_text

RESULTS = Path("logs/results")  # where report.py reads them
PUBLISHED = Path(__file__).parent / "published.json"
ITEM = {"task": str, "protocol": str, "model": str, "subset": str, "index": int, "question": str, "correct": bool}
NAME_BYTES = 200  # a file's name has at most 255, and a temporary name is longer
JSON_NAMES = {"warnings": "remarks"}  # fields with another name in results.json and items files


@dataclass(frozen=True)
class Result:
    """The result of one model on one set of questions by one protocol."""

    task: str
    protocol: str
    model: str
    size: str | None  # the GPT-2 of this shape, a key of published_sizes
    dtype: str
    data: str
    sha256: str | None  # of the data file; None for a data set of the hub
    subset: str  # as in published.json, such as `NE validation`
    correct: int | None  # None for a task that measures perplexity alone
    total: int  # all questions; those without a score count as wrong
    unscored: dict[str, int]  # the number of questions without a score, by reason
    warnings: dict[str, int]  # the number of irregular questions with a score, by irregularity
    perplexity: float | None
    seconds: float  # of the scoring pass, which several protocols can share
    has_published: bool  # whether published figures are for exactly these questions
    near_ties: int  # questions whose outcome can depend on batch size or device
    perplexity_interval: list[float] | None = None  # 95 %, for tasks of texts
    bits_per_byte: float | None = None

    @property
    def accuracy(self) -> float | None:
        return None if self.correct is None else self.correct / self.total

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the accuracy."""
        return None if self.correct is None else wilson(self.correct, self.total)

    @property
    def protocol_and_dtype(self) -> str:
        return self.protocol if self.dtype == "float32" else f"{self.protocol} ({self.dtype})"


def short_names(sources: list[str]) -> list[str]:
    """`demo/step_001000` for logs/demo/checkpoints/step_001000 if no other source has that name; else unchanged."""
    paths = [Path(source).resolve() for source in sources]
    short = [f"{p.parts[-3]}/{p.name}" if p.parent.name == "checkpoints" else "" for p in paths]
    return [s if s and short.count(s) == 1 else source.rstrip("/") for s, source in zip(short, sources, strict=True)]


def to_json(value: Result | Verdict) -> dict[str, Any]:
    """The fields as results.json and items files name them."""
    return {JSON_NAMES.get(name, name): field for name, field in asdict(value).items()}


def save(results: list[Result], out: str | None) -> Path:
    """Write all results to the file `out`, or each to its own file in logs/results/. Returns the path."""
    rows = [
        to_json(r)
        | {"accuracy": r.accuracy, "interval": r.interval}
        | {"byte_perplexity": None if r.bits_per_byte is None else exp_mean([-math.log(2) * r.bits_per_byte], 1)}
        for r in results
    ]
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(out), rows)
        return Path(out)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for r, row in zip(results, rows, strict=True):
        name = re.sub(r"[^\w.-]+", "-", f"{r.task}-{r.protocol_and_dtype}-{r.model}-{r.data}")
        name = name.encode()[:NAME_BYTES].decode(errors="ignore")  # a model can be a long path
        key = "\0".join([r.task, r.protocol_and_dtype, r.model, r.data, str(r.sha256)])  # a/b and a-b share a name
        write_json(RESULTS / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json", [row])
    return RESULTS


def save_items(items: list[dict[str, Any]], path: str) -> None:
    """Write an items file, one question per line."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(path), "".join(json.dumps(item) + "\n" for item in items))


def load_items(path: str) -> list[dict[str, Any]]:
    """Read an items file. Raises ValueError with file and line for anything else."""
    items = []
    for place, item in read_json_lines(Path(path)):
        if item.get("task") == "wikitext":
            raise ValueError(
                f"{place}: WikiText has no right answers to compare. Compare intervals of the perplexities"
            )
        if any(type(item.get(name)) is not kind for name, kind in ITEM.items()):
            raise ValueError(f"{place} was not written by --items. Score the model again with --items {path}")
        items.append(item)
    if not items:
        raise ValueError(f"{path} is empty. Score a model with --items {path}")
    return items


def load_all() -> tuple[list[Result], list[str]]:
    """Every result in logs/results/, and a line about each damaged file.

    Files of earlier versions lack the fields that have a default.
    """
    found, problems = [], []
    names = {name: JSON_NAMES.get(name, name) for name in Result.__dataclass_fields__}
    required = {f.name for f in fields(Result) if f.default is MISSING}
    for path in sorted(RESULTS.glob("*.json")):
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            known = [[name for name, key in names.items() if name in required or key in row] for row in rows]
            loaded = [Result(**{n: row[names[n]] for n in own}) for row, own in zip(rows, known, strict=True)]
            for result in loaded:  # values of other types fail here
                results_table([result])
                published_table(result.task, []) if result.has_published else ""
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            reason = type(error).__name__
            problems.append(f"{path} is not a results file ({reason}). Remove it, or rerun its evaluation")
        else:
            found += loaded
    return found, problems


def footnotes(results: list[Result]) -> str:
    """Lines on questions without a score, irregular questions, and near ties; empty if there are none."""
    lines = []
    for r in results:
        name = f"{r.model}, {r.data}, {r.protocol_and_dtype}"
        lines += [f"{name}: {n} not scored, counted as wrong: {reason}" for reason, n in r.unscored.items()]
        lines += [f"{name}: {n} scored with a warning: {warning}" for warning, n in r.warnings.items()]
    if ties := sum(r.near_ties for r in results):
        lines.append(f"near ties, whose outcome can depend on batch size or device: {ties}")
    return "\n".join(lines)


def published_sizes() -> dict[str, str]:
    """The GPT-2 sizes with published figures: preset name -> label, such as 124M."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))["sizes"]


def published(task: str) -> list[dict[str, Any]]:
    """All published figures of a task, each with its protocol and source."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))[task]


def published_entry(result: Result) -> dict[str, Any] | None:
    """The published figures of OpenAI's weights for the protocol and questions of a result, by size."""
    if result.has_published and result.size is not None:
        for figure in published(result.task):
            is_openai = "model" not in figure
            if is_openai and (figure["protocol"], subset_of(figure)) == (result.protocol, result.subset):
                return figure
    return None


def published_figure(result: Result) -> list[Any] | None:
    """Published accuracy % and perplexity of OpenAI's weights: same size, protocol and questions. None if unknown."""
    entry = published_entry(result)
    return entry.get(result.size or "") if entry else None


def subset_of(figure: dict[str, Any]) -> str:
    """The questions of a published figure: `NE validation`, `stride 512`; empty for a task with one set."""
    return (
        f"stride {figure['stride']}"
        if "stride" in figure
        else " ".join(figure[key] for key in ("type", "split") if key in figure)
    )


def results_table(results: list[Result]) -> str:
    """One row per result, with the published figure of OpenAI's weights of the same size where there is one."""
    columns = ["model", "task", "protocol", "questions"]
    if any(r.correct is not None for r in results):
        columns += ["accuracy %", "95 % interval", "correct"]
    columns.append("perplexity")
    columns += ["95 % of perplexity"] * any(r.perplexity_interval for r in results)
    columns += ["bits per byte"] * any(r.bits_per_byte for r in results)
    columns += ["published, same size", "difference"] * any(published_figure(r) for r in results)
    return markdown_table(columns, [[_cells(r).get(column, "") for column in columns] for r in results])


def _cells(r: Result) -> dict[str, str]:
    """The cells of a result by column; a cell that doesn't apply is missing."""
    cells = {"model": r.model, "task": r.task, "protocol": r.protocol_and_dtype, "questions": r.data}
    figure = published_figure(r)
    if r.correct is not None:
        low, high = (100 * bound for bound in wilson(r.correct, r.total))
        percent = 100 * r.correct / r.total
        cells |= {"accuracy %": f"{percent:.2f}", "95 % interval": f"{low:.2f} to {high:.2f}"}
        cells |= {"correct": f"{r.correct:,} of {r.total:,}"}
        cells |= {"difference": f"{percent - figure[0]:+.2f}"} if figure else {}
    elif figure and r.perplexity:
        cells["difference"] = f"{r.perplexity / figure[1] - 1:+.2%}".replace("%", " %")
    if figure:
        cells["published, same size"] = format_figure(figure)
    if r.perplexity:
        cells["perplexity"] = format_perplexity(r.perplexity)
    if r.perplexity_interval:
        cells["95 % of perplexity"] = " to ".join(map(format_perplexity, r.perplexity_interval))
    if r.bits_per_byte:
        cells["bits per byte"] = f"{r.bits_per_byte:.4f}"
    return cells


def comparison_table(items_a: list[dict[str, Any]], items_b: list[dict[str, Any]] | None = None) -> str | None:
    """McNemar's exact test of each model of A against each of B, or of the models of A. None if there is no pair.

    Raises ValueError if two models answered different questions.
    """
    a = correct_by_question(items_a)
    pairs = combinations(a.items(), 2) if items_b is None else product(a.items(), correct_by_question(items_b).items())
    rows = []
    for ((*kind, model_a), correct_a), ((*kind_b, model_b), correct_b) in pairs:
        if kind != kind_b:
            continue
        task, protocol, subset = kind
        if correct_a.keys() != correct_b.keys():
            common = len(correct_a.keys() & correct_b.keys())
            raise ValueError(
                f"{task} {protocol} {subset}: {model_a} answered {len(correct_a):,} questions, {model_b} "
                f"{len(correct_b):,}, with {common:,} in common. Score both models on the same questions"
            )
        outcomes = [(correct_a[key], correct_b[key]) for key in correct_a]
        only_a, only_b = outcomes.count((True, False)), outcomes.count((False, True))
        accuracies = [f"{100 * sum(side) / len(outcomes):.2f}" for side in zip(*outcomes, strict=True)]
        row = [task, protocol, subset, model_a, model_b, *accuracies, f"{only_a:,}", f"{only_b:,}"]
        rows.append([*row, format_p(mcnemar(only_a, only_b))])
    header = ["task", "protocol", "questions", "A", "B", "A %", "B %", "only A right", "only B right", "p (McNemar)"]
    return markdown_table(header, rows) if rows else None


def correct_by_question(items: list[dict[str, Any]]) -> dict[tuple[str, ...], dict[tuple[int, str], bool]]:
    """(task, protocol, subset, model) -> (index, question) -> correct."""
    found: dict[tuple[str, ...], dict[tuple[int, str], bool]] = {}
    for item in items:
        if "correct" not in item:  # of a task of texts
            continue
        key = (item["task"], item["protocol"], item["subset"], item["model"])
        found.setdefault(key, {})[item["index"], item["question"]] = item["correct"]
    return found


def format_p(p: float) -> str:
    return f"{p:.4f}" if p >= 1e-4 else f"{p:.1e}" if p else "< 1e-300"


def published_table(task: str, protocols: list[str]) -> str:
    """The published figures of these protocols: one row per figure, one column per size of GPT-2."""
    sizes = published_sizes()
    rows = []
    for figure in published(task):
        if figure["protocol"] in protocols or figure.get("shown_with") in protocols:
            cells = [format_figure(figure.get(size)) for size in sizes]
            rows.append([f"{subset_of(figure)} `{figure['protocol']}`".strip(), *cells, figure["source"]])
    return markdown_table([f"{task}, published", *sizes.values(), "source"], rows)


def format_figure(figure: list[float | None] | None) -> str:
    """Accuracy, with the perplexity in parentheses if it was published."""
    if figure is None:
        return ""
    accuracy = f"{figure[0]:.2f}" if figure[0] is not None else ""
    perplexity = f"({figure[1]:.2f})" if len(figure) > 1 and figure[1] else ""
    return f"{accuracy} {perplexity}".strip()


Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927). It stays within [0, 1] and is accurate for small counts."""
    p, z2 = correct / total, Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


BOOTSTRAP_SAMPLES = 10_000


def bootstrap(pages: list[Page]) -> list[float] | None:
    """The 95 % interval of a perplexity, by the percentile bootstrap over pages (Efron 1979); None for one page."""
    import numpy as np

    if len(pages) < 2:
        return None
    logprobs, counts = (np.array([page[i] for page in pages]) for i in (0, 1))
    drawn = np.random.default_rng(0).integers(len(pages), size=(BOOTSTRAP_SAMPLES, len(pages)))
    nats = -logprobs[drawn].sum(axis=1) / counts[drawn].sum(axis=1)  # (samples,)
    low, high = np.quantile(nats, (0.025, 0.975))
    return [math.exp(low), math.exp(high)] if high < LARGEST_EXPONENT else None


def bits_per_byte(pages: list[Page]) -> float | None:
    """Bits of information per byte of the original text; None for a protocol without that measure."""
    size = sum(page.bytes for page in pages)
    return -math.fsum(page.logprob for page in pages) / math.log(2) / size if size else None


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value of "both models are equally good" (McNemar 1947), by the binomial distribution.

    only_a, only_b: the number of questions that only A and only B answers correctly.
    """
    n = only_a + only_b
    ways = tail = 1  # the binomial coefficient and the sum of all so far; calls of math.comb took seconds for n = 9,000
    for k in range(min(only_a, only_b)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(2 * tail / 2**n, 1.0)
