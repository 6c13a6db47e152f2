"""What an evaluation leaves behind: results.json, a line a question, and a table beside the published figures."""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

from core.eval.task import read_lines
from core.files import markdown_table, write_json

RESULTS = Path("logs/results")  # where report.py looks
ITEM = {"task": str, "protocol": str, "model": str, "subset": str, "index": int, "question": str, "correct": bool}
SIZES = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}


@dataclass(frozen=True)
class Result:
    """One model on one set of questions by one protocol."""

    task: str
    protocol: str
    model: str
    size: str | None  # the GPT-2 of this shape, a key of SIZES
    dtype: str
    data: str
    sha256: str | None  # of the data's file; None for the hub's
    subset: str  # as published figures name it, such as `NE validation`
    correct: int
    total: int  # every question of the data: those left unscored count as wrong
    unscored: dict[str, int]  # how many, by reason
    remarks: dict[str, int]  # what was odd about questions that were scored
    perplexity: float | None
    seconds: float  # of the pass that scored it; protocols of one pass share it
    has_published: bool  # whether published figures speak of these very questions
    near_ties: int  # questions whose outcome another batch size or device may turn

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def protocol_and_dtype(self) -> str:
        return self.protocol if self.dtype == "float32" else f"{self.protocol} ({self.dtype})"


def short_names(sources: list[str]) -> list[str]:
    """`demo/step_001000` for logs/demo/checkpoints/step_001000, unless another has that name; else as it is."""
    paths = [Path(source).resolve() for source in sources]
    short = [f"{p.parts[-3]}/{p.name}" if p.parent.name == "checkpoints" else "" for p in paths]
    return [s if s and short.count(s) == 1 else source.rstrip("/") for s, source in zip(short, sources, strict=True)]


def save(results: list[Result], out: str | None) -> Path:
    """Write results to the file `out`, or each to a file of its own in logs/results/; return where."""
    rows = [asdict(r) | {"accuracy": r.accuracy, "interval": wilson(r.correct, r.total)} for r in results]
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(out), rows)
        return Path(out)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for r, row in zip(results, rows, strict=True):
        name = re.sub(r"[^\w.-]+", "-", f"{r.task}-{r.protocol_and_dtype}-{r.model}-{r.data}")
        whole = "\0".join([r.task, r.protocol_and_dtype, r.model, r.data, str(r.sha256)])  # a/b and a-b have one name
        write_json(RESULTS / f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}.json", [row])
    return RESULTS


def save_items(items: list[dict[str, Any]], path: str) -> None:
    """One question a line."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(item) + "\n" for item in items))


def load_items(path: str) -> list[dict[str, Any]]:
    """What `save_items` wrote. Raises ValueError with file and line where it isn't that."""
    items = []
    for number, line in enumerate(read_lines(Path(path)), 1):
        try:
            item = json.loads(line)
            odd = [name for name, kind in ITEM.items() if type(item[name]) is not kind]
            if odd:
                raise TypeError(f"{odd[0]} is {item[odd[0]]!r}")
            items.append(item)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not what --items writes ({error!r})") from None
    if not items:
        raise ValueError(f"{path} is empty: write it with --items {path}")
    return items


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


def footnotes(results: list[Result]) -> str:
    """What an accuracy doesn't say: questions left unscored, odd ones, and those too close to be sure of."""
    lines = []
    for r in results:
        name = f"{r.model}, {r.data}, {r.protocol_and_dtype}"
        lines += [f"{name}: {n} not scored, counted as wrong: {reason}" for reason, n in r.unscored.items()]
        lines += [f"{name}: {n} scored all the same: {reason}" for reason, n in r.remarks.items()]
    if ties := sum(r.near_ties for r in results):
        lines.append(f"near ties, whose answer another batch size or device may turn: {ties}")
    return "\n".join(lines)


def published(task: str) -> list[dict[str, Any]]:
    """All published figures of a task, each with its protocol and source."""
    return json.loads((Path(__file__).parent / "published.json").read_text())[task]


def published_figure(result: Result) -> list[Any] | None:
    """Accuracy % and perplexity published for OpenAI's weights of this size, by this protocol on these questions."""
    if result.has_published and result.size is not None:
        for figure in published(result.task):
            subset = " ".join(figure[key] for key in ("type", "split") if key in figure)
            is_openai = "model" not in figure
            if is_openai and (figure["protocol"], subset) == (result.protocol, result.subset):
                return figure.get(result.size)
    return None


def results_table(results: list[Result]) -> str:
    """A row a result; beside it, where there is one, the figure published for OpenAI's weights of the same size."""
    header = ["model", "task", "protocol", "questions", "accuracy %", "95 % interval", "correct", "perplexity"]
    compared = any(published_figure(r) for r in results)
    rows = []
    for r in results:
        low, high = (100 * bound for bound in wilson(r.correct, r.total))
        perplexity = f"{r.perplexity:,.2f}" if r.perplexity else ""
        row = [r.model, r.task, r.protocol_and_dtype, r.data, f"{100 * r.accuracy:.2f}", f"{low:.2f} to {high:.2f}"]
        row += [f"{r.correct:,} of {r.total:,}", perplexity]
        if compared:
            figure = published_figure(r)
            row += [format_figure(figure), f"{100 * r.accuracy - figure[0]:+.2f}" if figure else ""]
        rows.append(row)
    return markdown_table(header + ["published, same size", "difference"] * compared, rows)


def comparison_table(items_a: list[dict[str, Any]], items_b: list[dict[str, Any]] | None = None) -> str | None:
    """McNemar's exact test of each model of A against each of B, or of A's among themselves; None if nothing pairs.

    Raises ValueError where two models weren't asked the same questions.
    """
    a = answers(items_a)
    pairs = combinations(a.items(), 2) if items_b is None else product(a.items(), answers(items_b).items())
    rows = []
    for ((*kind, model_a), answers_a), ((*kind_b, model_b), answers_b) in pairs:
        if kind != kind_b:
            continue
        task, protocol, subset = kind
        if answers_a.keys() != answers_b.keys():
            raise ValueError(
                f"{task} {protocol} {subset}: {model_a} answered {len(answers_a):,} questions, {model_b} "
                f"{len(answers_b):,}, {len(answers_a.keys() & answers_b.keys()):,} of them the same: score both on one "
                f"set of questions"
            )
        outcomes = [(answers_a[key], answers_b[key]) for key in answers_a]
        only_a, only_b = outcomes.count((True, False)), outcomes.count((False, True))
        right = [f"{100 * sum(side) / len(outcomes):.2f}" for side in zip(*outcomes, strict=True)]
        row = [task, protocol, subset, model_a, model_b, *right, f"{only_a:,}", f"{only_b:,}"]
        rows.append([*row, format_p(mcnemar(only_a, only_b))])
    header = ["task", "protocol", "questions", "A", "B", "A %", "B %", "only A right", "only B right", "p (McNemar)"]
    return markdown_table(header, rows) if rows else None


def answers(items: list[dict[str, Any]]) -> dict[tuple[str, ...], dict[tuple[int, str], bool]]:
    """(task, protocol, subset, model) -> (index, question) -> whether it was answered right."""
    found: dict[tuple[str, ...], dict[tuple[int, str], bool]] = {}
    for item in items:
        key = (item["task"], item["protocol"], item["subset"], item["model"])
        found.setdefault(key, {})[item["index"], item["question"]] = item["correct"]
    return found


def format_p(p: float) -> str:
    return f"{p:.4f}" if p >= 1e-4 else f"{p:.1e}" if p else "< 1e-300"


def published_table(task: str, protocols: list[str]) -> str:
    """The published figures of these protocols, a row a protocol and a column a size of GPT-2."""
    rows = []
    for figure in published(task):
        if figure["protocol"] in protocols:
            name = " ".join(figure[key] for key in ("type", "split") if key in figure)
            cells = [format_figure(figure.get(size)) for size in SIZES]
            rows.append([f"{name} `{figure['protocol']}`".strip(), *cells, figure["source"]])
    return markdown_table([f"{task}, published", *SIZES.values(), "source"], rows)


def format_figure(figure: list[float | None] | None) -> str:
    """Accuracy, with the perplexity in brackets where it was published."""
    if figure is None:
        return ""
    perplexity = f" ({figure[1]:.2f})" if len(figure) > 1 and figure[1] else ""
    return f"{figure[0]:.2f}{perplexity}"


Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927): it stays within [0, 1] and holds for small counts."""
    p, z2 = correct / total, Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value that two models are equally good (McNemar 1947), by the binomial distribution.

    only_a, only_b: questions that A alone and B alone answers right; those where both agree say nothing.
    """
    n = only_a + only_b
    ways = tail = 1  # n over k, and their sum; each from the one before, as math.comb anew took seconds for n = 9,000
    for k in range(min(only_a, only_b)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(2 * tail / 2**n, 1.0)
