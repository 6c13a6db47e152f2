"""What an evaluation is made of. A new one is a file here with its TASK, a script with its command line, and a test."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # report.py shows results without torch
    from core.eval.scoring import Request, Score

Encode = Callable[[str], list[int]]


class UnscorableError(Exception):
    """A question that no model can be asked. It is counted by this reason, and as wrong."""


@dataclass(frozen=True)
class Verdict:
    """How one question came out."""

    correct: bool
    near_tie: bool = False  # another batch size or device may turn the answer
    logprob: float | None = None  # of the one target, where there is one
    chosen: str | None = None  # of the candidates, where there are some
    unscored: str | None = None  # why it couldn't be asked, or its answer not be read
    remarks: tuple[str, ...] = ()  # what was odd about a question that was scored all the same


@dataclass(frozen=True)
class Task:
    """A kind of question and its protocols. `Any` is the task's own type of question."""

    name: str
    title: str
    protocols: tuple[str, ...]
    requests: Callable[[str, Any, Encode], "list[Request]"]  # by protocol; raises UnscorableError
    judge: Callable[[str, Any, "list[Score]"], Verdict]  # by protocol; the scores of those requests
    text: Callable[[Any], str]  # all that makes a question this question and no other
    perplexity: Callable[[str, list[Verdict]], float | None] = lambda protocol, verdicts: None
    banned: Callable[[list[str], Any, int], Any] = lambda protocols, encoding, vocab_size: None
    """Ids that these protocols' allowed_margins leave out, a (vocab_size,) bool tensor, or None."""


@dataclass(frozen=True)
class QuestionSet:
    """Questions from one place, and the protocols to ask them by."""

    questions: list[Any]
    protocols: list[str]
    data: str  # how results name the place
    sha256: str | None  # of the file; None for the hub's
    subset: str = ""  # such as `NE validation`, as published figures name it
    has_published: bool = True  # whether published figures speak of these very questions


LONGEST_LINE = 1 << 20  # bytes; the longest of LAMBADA's and the Children's Book Test's has a few thousand


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends. Raises ValueError where one is too long or isn't text."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{path}, line {number}: more than {LONGEST_LINE:,} bytes: this is no question file")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number} is not UTF-8 text: {error}") from None
            if "\0" in text:
                raise ValueError(f"{path}, line {number} holds a zero byte: this is no text file")
            if number == 1:
                text = text.removeprefix("\ufeff")  # the byte order mark that some editors write
            yield text.removesuffix("\n").removesuffix("\r")


def is_text(text: str) -> bool:
    """Whether it can be encoded: JSON can say half a surrogate pair, which no UTF-8 has."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def ends_within_a_line(path: Path) -> bool:
    """Whether a file that isn't empty ends without the end of its last line, as one that was cut short does."""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def hub_rows(name: str, config: str, split: str) -> list[dict[str, Any]]:
    """All rows of a split. Raises ValueError, with what to do, where the hub can't be reached."""
    import logging

    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a hub out of reach is said below
    try:
        return list(load_dataset(name, config, split=split))
    except Exception as error:  # the hub's client raises what its transport raised
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the hub gave no {name} ({reason}): check the network, or give a local file with --data"
        ) from None
