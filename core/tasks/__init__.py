"""What an evaluation is made of. A new one is a file here with its TASK, a script with its command line, and a test."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # report.py shows results without torch
    from core.scoring import Request, Score

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
