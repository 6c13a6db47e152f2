"""The parts of an evaluation.

A new evaluation is three files: core/eval/<task>.py with its options, questions, scoring rules and TASK; a script with
the command line; and a test.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from core import cli

if TYPE_CHECKING:  # report.py shows results without torch
    from core.eval.scoring import Request, Score

Encode = Callable[[str], list[int]]


class UnscorableError(Exception):
    """No model can be scored on this question. It is counted under this reason, and as wrong."""


class Page(NamedTuple):
    """The log-probability of one page of text, and what it is divided by."""

    logprob: float
    units: int  # words or tokens, by protocol
    bytes: int = 0  # 0: the protocol has no measure per byte


@dataclass(frozen=True)
class Verdict:
    """The outcome of one question."""

    correct: bool
    near_tie: bool = False  # another batch size or device may change `correct`
    logprob: float | None = None  # of the target, for tasks with one target per question
    chosen: str | None = None  # the candidate with the highest score, for tasks with candidates
    unscored: str | None = None  # the reason, where the question has no score
    warnings: tuple[str, ...] = ()  # irregularities of a question that has a score
    pages: tuple[Page, ...] = ()  # for tasks that measure perplexity and have no right answers


@dataclass(frozen=True)
class QuestionSet:
    """Questions from one source, and the protocols to score them by."""

    questions: list[Any]
    protocols: list[str]
    data: str  # the name of the source in results
    sha256: str | None  # of the file; None for a data set of the hub
    subset: str = ""  # such as `NE validation`, as in published.json
    has_published: bool = True  # whether published figures are for exactly these questions


class TaskConfig(Protocol):
    """The options of a task: a dataclass, shown as one group of `--help`."""

    data: Any  # one file, several files, or None


@dataclass(frozen=True)
class Task:
    """A kind of question and its protocols. `Any` is the task's own type of question or options."""

    name: str
    title: str
    protocols: tuple[str, ...]
    load: Callable[[Any], list[QuestionSet]]  # from the task's options; raises ValueError
    requests: Callable[[str, Any, Encode], "list[Request]"] | None  # by protocol; raises UnscorableError
    judge: Callable[[str, Any, "list[Score]"], Verdict]  # by protocol; the scores of those requests
    text: Callable[[Any], str]  # the complete content of a question; two questions are the same if their texts are
    fit: Callable[[QuestionSet, int], QuestionSet] = lambda questions, n_positions: questions
    """The set for a model with this context length; raises ValueError where it can't be scored."""
    windows: Callable[[str, Any, Any, int], "list[Request]"] | None = None
    """Replaces `requests` in a task of texts, whose verdicts have pages and are neither right nor wrong: independent
    requests that fit a model, from protocol, text, encoding and context length."""
    perplexity: Callable[[str, list[Verdict]], float | None] = lambda protocol, verdicts: None
    masked_ids: Callable[[list[str], Any, int], Any] = lambda protocols, encoding, vocab_size: None
    """From protocols, encoding and vocabulary size: ids to exclude from `Score.allowed_margins`, as a (vocab_size,)
    bool tensor, or None."""


LARGEST_EXPONENT = 700  # of a float; only a diverged model reaches it


def exp_mean(logprobs: list[float], count: int) -> float | None:
    """exp of the negative sum of log-probabilities per item; None where it is too large for a float."""
    nats = -math.fsum(logprobs) / count
    return math.exp(nats) if nats < LARGEST_EXPONENT else None


def format_perplexity(value: float | None) -> str:
    """1,234.56; above 100,000 as 1.23e+05; `not finite` for None and NaN."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:,.2f}" if value <= 100_000 else f"{value:.2e}"


def select_protocols(
    chosen: tuple[str, ...], protocols: Iterable[str], allowed: list[str] | None = None, *, reason: str = ""
) -> list[str]:
    """The protocols of --protocol without repetitions. `all` selects every one of `protocols` that is `allowed`.

    It names those that it leaves out, with the `reason`.
    """
    if "all" not in chosen:
        return list(dict.fromkeys(chosen))
    allowed = list(protocols) if allowed is None else allowed
    if omitted := [protocol for protocol in protocols if protocol not in allowed]:
        cli.print_note(f"--protocol all omits {', '.join(omitted)}: {reason}")
    return allowed


def candidate_warnings(candidates: list[str], expected: int, noun: str) -> tuple[str, ...]:
    """Irregularities of the candidates of a question that don't prevent a score."""
    conditions = {
        f"not {expected} {noun}s": len(candidates) != expected,
        f"an empty {noun}": not all(candidate.strip() for candidate in candidates),
        f"a repeated {noun}": len(set(candidates)) < len(candidates),
    }
    return tuple(name for name, holds in conditions.items() if holds)


LONGEST_LINE = 1 << 20  # bytes; the longest lines of LAMBADA and the Children's Book Test have a few thousand


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without line ends. Raises ValueError for a line that is too long or not text."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise ValueError(
                    f"{path}, line {number} has more than {LONGEST_LINE:,} bytes: this is not a question file. "
                    f"Use a file with one question per line"
                )
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not UTF-8 text (byte {error.start}). Convert the file to UTF-8"
                ) from None
            if "\0" in text:
                raise ValueError(
                    f"{path}, line {number} contains a zero byte: this is not a text file. Use a text file"
                )
            if number == 1:
                text = text.removeprefix("\ufeff")  # the byte order mark that some editors write
            yield text.removesuffix("\n").removesuffix("\r")


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON object of each line, with its place for error messages. Raises ValueError for any other line."""
    for number, line in enumerate(read_lines(path), 1):
        place = f"{path}, line {number}"
        try:
            fields = json.loads(line)
            json.dumps(fields, ensure_ascii=False).encode()  # fails on half of a surrogate pair, which JSON allows
        except UnicodeEncodeError:
            raise ValueError(f"{place} contains half of a surrogate pair. Remove the character") from None
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise ValueError(f"{place} is not a JSON object. Fix or remove the line")
        yield place, fields


def ends_within_a_line(path: Path) -> bool:
    """Whether a non-empty file ends without a line end, as a truncated file does."""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def hub_rows(name: str, config: str, split: str) -> list[dict[str, Any]]:
    """All rows of a split of a hub data set. Raises ValueError if the hub can't be reached."""
    import logging

    from datasets import load_dataset

    from core.data.shards import short_reason

    cli.print_note(f"loading {name} from the Hugging Face hub")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the error below reports an unreachable hub
    try:
        return list(load_dataset(name, config, split=split))
    except Exception as error:  # the client raises errors of several libraries
        is_network = isinstance(error, (ConnectionError, TimeoutError))
        if isinstance(error, OSError) and error.errno is not None and not is_network:
            raise  # of this machine, such as a full disk
        raise ValueError(
            f"data set {name} can't be loaded from the Hugging Face hub ({short_reason(error)}). "
            f"Check the network, or use a local file with --data"
        ) from None
