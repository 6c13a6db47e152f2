"""The loss curves that report.py draws: runs in logs/, also unfinished or damaged ones, and logs of other projects."""

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.files import METRICS

# The palette of Okabe and Ito, which is safe for color blindness; references are gray.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GRAYS = ("#777777", "#BBBBBB")
SETTINGS = "run.json"
REFERENCES = Path(__file__).parent / "reference_curves.json"
LARGEST = 1e30  # larger numbers are errors; plots fail on them
# The value of each split in metrics.jsonl: a number, or null for one that isn't finite.
VALUES = {"train": "loss", "val": "loss", "lambada": "accuracy", "hellaswag": "accuracy"}
STEP_TOKENS = 524_288  # tokens per step of llm.c's and build-nanogpt's 124M runs
PATTERNS = (  # of llm.c and build-nanogpt: step, kind, value
    re.compile(r"s:(?P<step>\d+) (?P<kind>tel|eval|trl):(?P<value>\S+)"),
    re.compile(r"(?P<step>\d+) (?P<kind>val|hella|train) (?P<value>\S+)"),
)
SPLITS = {"tel": "val", "val": "val", "eval": "hellaswag", "hella": "hellaswag", "trl": "train", "train": "train"}


@dataclass
class Curves:
    """What a run or a log file has recorded: lines by split, in the form of metrics.jsonl."""

    name: str
    lines: dict[str, list[dict[str, Any]]]
    settings: dict[str, Any] = field(default_factory=dict)  # run.json; empty for a log file
    problems: list[str] = field(default_factory=list)
    entropy: float | None = None  # of the validation data, in nats per token
    note: str = ""  # what differs from a run of this project
    is_log_file: bool = False
    updated: float = 0.0  # when its last metric was written, in seconds since 1970

    @property
    def train(self) -> list[dict[str, Any]]:
        return self.lines["train"]

    @property
    def val(self) -> list[dict[str, Any]]:
        return self.lines["val"]

    @property
    def steps(self) -> int:
        """Completed steps."""
        return max((line["step"] for lines in self.lines.values() for line in lines), default=0)


def find_runs() -> list[str]:
    """The names of all runs in logs/."""
    return sorted({path.parent.name for name in (METRICS, SETTINGS) for path in Path("logs").glob(f"*/{name}")})


def load_run(name: str) -> Curves:
    """A run, as far as its files can be read; `problems` names what can't. Raises ValueError for an unknown name."""
    folder = Path("logs") / name
    if not any((folder / file).exists() for file in (METRICS, SETTINGS)):
        raise ValueError(f"--runs {name}: {folder} contains no run. Choose from {', '.join(find_runs()) or 'none'}")
    problems: list[str] = []
    settings = _read(folder / SETTINGS, problems, _parse_settings) or {}
    rows, damaged = _read(folder / METRICS, problems, _parse_metrics) or ([], 0)
    if damaged:
        problems.append(f"{damaged} damaged line{'s' if damaged > 1 else ''} in {METRICS}")
    lines = {split: [row for row in rows if row["split"] == split] for split in VALUES}
    updated = (folder / METRICS).stat().st_mtime if (folder / METRICS).exists() else 0.0
    return Curves(name, lines, settings, problems, updated=updated)


def _read(path: Path, problems: list[str], parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_bytes().decode("utf-8", errors="replace"))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
    except (ValueError, RecursionError):
        problems.append(f"{path.name} is damaged")
    return None


def _parse_json(text: str) -> Any:
    """JSON in which each number is finite and at most LARGEST; all others are null."""

    def limited(number: float) -> float | None:
        return number if abs(number) <= LARGEST else None

    return json.loads(
        text,
        parse_int=lambda digits: limited(int(digits)),
        parse_float=lambda digits: limited(float(digits)),
        parse_constant=lambda _: None,
    )


def _parse_settings(text: str) -> dict[str, Any]:
    settings = _parse_json(text)
    if not isinstance(settings, dict):
        raise ValueError("not an object")
    return settings


def _parse_metrics(text: str) -> tuple[list[dict[str, Any]], int]:
    """The lines that can be drawn, and the number of damaged ones. An incomplete last line is that of a running run."""
    rows, damaged = [], 0
    for line in text.split("\n")[:-1]:
        try:
            row = _parse_json(line)
        except (ValueError, RecursionError):
            row = None
        if _is_usable(row):
            rows.append(row)
        elif not isinstance(row, dict) or row.get("split") in [*VALUES]:  # lines of other splits are not drawn
            damaged += 1
    return rows, damaged


def _is_usable(row: Any) -> bool:
    if not isinstance(row, dict) or row.get("split") not in [*VALUES]:
        return False
    split = row["split"]
    required = ("step", "tokens", "seconds") if split in ("train", "val") else ("step", "tokens")
    value = row.get(VALUES[split], "")
    return with_numbers([row], *required) == [row] and (value is None or isinstance(value, int | float))


def with_numbers(lines: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The lines in which each of these is a number."""
    return [line for line in lines if all(isinstance(line.get(name), int | float) for name in names)]


def medians(lines: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Tokens, and the median of a metric around them: one point for each hundredth of the lines."""
    size = max(len(lines) // 100, 1)
    parts = [lines[i : i + size] for i in range(0, len(lines), size)]
    tokens = [part[len(part) // 2]["tokens"] for part in parts]
    return tokens, [statistics.median(line[name] for line in part) for part in parts]


def time_unit(runs: list[Curves]) -> tuple[str, int]:
    """The largest unit in which the longest run takes two or more, and its length in seconds."""
    seconds = max((line["seconds"] for run in runs for line in run.train[-1:]), default=0)
    return next((unit for unit in (("hours", 3600), ("minutes", 60)) if seconds >= 2 * unit[1]), ("seconds", 1))


def longest(runs: list[Curves]) -> float:
    """The planned tokens of the longest run, or those it has seen."""
    planned = [tokens for run in runs if isinstance(tokens := run.settings.get("tokens"), int)]
    return max([*planned, *(line["tokens"] for run in runs for line in run.train[-1:])], default=0)


def load_log(path: Path, step_tokens: int = STEP_TOKENS) -> Curves:
    """A main.log of llm.c or a log.txt of build-nanogpt. Raises ValueError, with the line, for another file."""
    lines: dict[str, list[dict[str, Any]]] = {split: [] for split in VALUES}
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(texts, 1):
        match = next((m for pattern in PATTERNS if (m := pattern.match(text))), None)
        try:
            step, split, value = int(match["step"]), SPLITS[match["kind"]], float(match["value"])  # type: ignore[index]
        except (TypeError, ValueError):
            is_incomplete = number == len(texts) > 1  # the other project is writing it
            if text.strip() and not is_incomplete:
                raise ValueError(
                    f"{path}, line {number} is not of a log of llm.c or build-nanogpt. Use main.log or log.txt"
                ) from None
            continue
        row = {"step": step, "tokens": step * step_tokens, "loss": value}
        lines[split].append(row if split != "hellaswag" else row | {"accuracy": value, "protocol": "completion-norm"})
    if not any(lines.values()):
        raise ValueError(f"{path} has no loss. Use main.log of llm.c or log.txt of build-nanogpt")
    name = f"{path.parent.name}/{path.name}" if path.parent.name else path.name
    return Curves(name, lines, is_log_file=True)


def reference_names() -> list[str]:
    return list(json.loads(REFERENCES.read_text(encoding="utf-8")))


def load_reference(name: str) -> Curves:
    """A published run of another project, by a name of `reference_names`."""
    facts = json.loads(REFERENCES.read_text(encoding="utf-8"))[name]
    lines: dict[str, list[dict[str, Any]]] = {split: [] for split in VALUES}
    for split, key in (("val", "loss"), ("hellaswag", "accuracy")):
        for step, value in facts[split]:
            row = {"step": step, "tokens": step * facts["step_tokens"], key: value, "protocol": "completion-norm"}
            lines[split].append(row)
    return Curves(f"{name} ({facts['data']})", lines, note=f"{name}: {facts['source']}. {facts['differences']}")
