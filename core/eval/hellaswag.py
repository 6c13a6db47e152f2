"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830): choose which of four endings follows a description.

`harness` is lm-evaluation-harness's `acc`: the activity's name and the context, both without WikiHow's marks; the
ending with the highest sum of log-probabilities wins. `harness-norm` is its `acc_norm`: the sum per character.
`completion` and `completion-norm` are those of build-nanogpt and llm.c: the unchanged context and ending, the highest
sum, and the highest mean per token.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from core import cli
from core.eval import task
from core.eval.scoring import Request, Score, highest
from core.eval.task import Encode, QuestionSet, Task, UnscorableError, Verdict
from core.files import sha256

PROTOCOLS = ("harness", "harness-norm", "completion", "completion-norm")
HUB = "Rowan/hellaswag"
ENDINGS = 4
FILE, QUESTIONS = "hellaswag_val.jsonl", 10_042  # the authors' validation file, and its number of questions
NEEDED = {"harness": ("activity_label", "ctx_a", "ctx_b"), "completion": ("ctx",)}  # fields, by kind of protocol
TEXTS = ("activity_label", "ctx_a", "ctx_b", "ctx")


@dataclass
class HellaSwagConfig:
    """Questions and scoring rules."""

    data: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of questions, one JSON object per line: the authors' hellaswag_val.jsonl, rows of the hub, or other files
    with label and endings. harness also needs activity_label, ctx_a and ctx_b; completion needs ctx.
    Default: the hub's validation split."""
    protocol: tuple[Literal[("all", *PROTOCOLS)], ...] = ("harness", "harness-norm")  # type: ignore[valid-type]
    """Scoring protocols: harness like lm-evaluation-harness, completion like build-nanogpt; -norm divides by length;
    `all`: every one that the fields of the file allow."""


@dataclass(frozen=True)
class Question:
    """One question, with the field names of the data set. None: the file doesn't have the field."""

    activity_label: str | None
    ctx_a: str | None
    ctx_b: str | None
    ctx: str | None
    endings: list[str]
    label: int  # the index of the correct ending


def load(config: HellaSwagConfig) -> list[QuestionSet]:
    if config.data is not None:
        return [load_file(Path(config.data), config.protocol)]
    protocols = task.select_protocols(config.protocol, PROTOCOLS)
    return [QuestionSet(questions=from_hub(), protocols=protocols, data=HUB, sha256=None)]


def load_file(path: Path, protocols: Sequence[str]) -> QuestionSet:
    """The questions of a file; `all`: by each protocol whose fields they have. Published figures apply to the authors'
    validation file only.

    Raises ValueError where a question lacks a field that a protocol needs.
    """
    questions = read(path)
    absent = {name for name in TEXTS if any(getattr(question, name) is None for question in questions)}
    allowed = [protocol for protocol in PROTOCOLS if absent.isdisjoint(NEEDED[_kind(protocol)])]
    reason = f"{path.name} has no {', '.join(sorted(absent))}"
    protocols = task.select_protocols(tuple(protocols), PROTOCOLS, allowed or list(PROTOCOLS), reason=reason)
    for number, question in enumerate(questions, 1):
        check_fields(question, protocols, f"{path}, line {number}")
    return QuestionSet(
        questions=questions, protocols=protocols, data=path.name, sha256=sha256(path), has_published=path.name == FILE
    )


def check_fields(question: Question, protocols: list[str], place: str) -> None:
    """Raise ValueError, with a protocol that works, where the question lacks a field that a protocol needs."""
    lacks = {kind: [name for name in names if getattr(question, name) is None] for kind, names in NEEDED.items()}
    for protocol in protocols:
        if missing := lacks[_kind(protocol)]:
            other = next((kind for kind, names in lacks.items() if not names), None)
            remedy = f"Use --protocol {other} {other}-norm" if other else "Add the fields"
            raise ValueError(f"{place} has no {', '.join(missing)}, which --protocol {protocol} needs. {remedy}")


def _kind(protocol: str) -> str:
    return protocol.removesuffix("-norm")


def read(path: Path) -> list[Question]:
    """Questions from the authors' file or one in its format, one JSON object per line.

    Raises ValueError with file and line for a line that is not a question, and for an incomplete file of the authors.
    """
    questions = [parse(fields, place) for place, fields in task.read_json_lines(path)]
    if not questions:
        raise ValueError(f"{path} contains no questions. Use a file with one JSON object per line")
    if path.name == FILE and len(questions) != QUESTIONS:
        raise ValueError(f"{path} has {len(questions):,} questions, expected {QUESTIONS:,}. Download the file again")
    return questions


def from_hub() -> list[Question]:
    """The validation split from the Hugging Face hub; the labels of the test split are unpublished."""
    rows = task.hub_rows(HUB, "default", "validation")
    return [parse(row, f"{HUB}, row {i}") for i, row in enumerate(rows)]


def parse(fields: dict[str, Any], place: str) -> Question:
    """A question from its JSON fields. Raises ValueError with the place for missing or wrong ones."""
    endings, label = fields.get("endings"), fields.get("label")
    texts: dict[str, Any] = {name: fields.get(name) for name in TEXTS}
    given = [text for text in texts.values() if text is not None]
    if not isinstance(endings, list) or not all(isinstance(text, str) for text in [*given, *endings]) or not given:
        raise ValueError(
            f"{place} is not a question: it needs a list `endings`, and ctx or activity_label, ctx_a and ctx_b. Fix it"
        )
    if label is None or label == "":
        raise ValueError(f"{place} has no label: the test split's labels are unpublished. Use the validation split")
    if str(label) not in map(str, range(len(endings))):  # a number in the authors' file, a digit on the hub
        raise ValueError(f"{place} has label {str(label)[:40]}, but {len(endings)} endings. Fix or remove the line")
    return Question(endings=endings, label=int(label), **texts)


def clean(text: str) -> str:
    """The text without WikiHow's marks, cleaned as lm-evaluation-harness does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def context_and_endings(protocol: str, question: Question) -> tuple[str, list[str]]:
    """The texts of a protocol, of a question that has its fields."""
    if protocol.startswith("completion"):
        assert question.ctx is not None
        return question.ctx, question.endings
    assert question.ctx_b is not None
    context = f"{question.activity_label}: {question.ctx_a} {question.ctx_b.capitalize()}"
    return clean(context), [clean(ending) for ending in question.endings]


def requests(protocol: str, question: Question, encode: Encode) -> list[Request]:
    """One request per ending, all with the same context."""
    if len(question.endings) < 2:
        raise UnscorableError("fewer than two endings")
    context, endings = context_and_endings(protocol, question)
    context_ids = encode(context.rstrip() if protocol.startswith("harness") else context)
    if not context_ids:
        raise UnscorableError("no context before the endings")
    if protocol.startswith("completion"):
        return [Request(context_ids, encode(f" {ending}")) for ending in endings]
    # Context and ending are encoded together, as the harness does: an ending that starts with spaces differs.
    sequences = [encode(f"{context} {ending}") for ending in endings]
    if min(map(len, sequences)) <= len(context_ids):
        raise UnscorableError("an ending that adds no token")
    return [Request(context_ids, ids[len(context_ids) :]) for ids in sequences]


def judge(protocol: str, question: Question, scores: list[Score]) -> Verdict:
    """The ending with the highest sum of log-probabilities wins: the plain sum, or per character, or per token."""
    _, endings = context_and_endings(protocol, question)
    lengths = [1] * len(scores)
    if protocol == "harness-norm":
        lengths = [len(ending) for ending in endings]
    elif protocol == "completion-norm":
        lengths = [len(score.logprobs) for score in scores]
    # The harness divides by 0 for an ending that is empty after cleaning: -inf, never the best.
    values = [score.total / length if length else -math.inf for score, length in zip(scores, lengths, strict=True)]
    best, near_tie = highest(values)
    warnings = task.candidate_warnings(endings, ENDINGS, "ending")
    return Verdict(best == question.label, near_tie, chosen=endings[best], warnings=warnings)


def text(question: Question) -> str:
    """A question as one line of text."""
    texts = [getattr(question, name) or "" for name in TEXTS]
    return "\t".join([*texts, *question.endings, str(question.label)])


TASK = Task(
    name="hellaswag", title="HellaSwag", protocols=PROTOCOLS, load=load, requests=requests, judge=judge, text=text
)
