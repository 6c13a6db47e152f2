"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830): which of four endings follows. Reading it, and each protocol.

`harness` is lm-evaluation-harness's `acc`: the activity's name before the context, both without WikiHow's marks, the
ending of the highest sum of log-probabilities; `harness-norm` its `acc_norm`, that sum a character of the ending.
`completion` and `completion-norm` are those of build-nanogpt and llm.c: context and ending as they stand, the highest
sum, and the highest mean a token.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.eval import task
from core.eval.scoring import NEAR_TIE, Request, Score
from core.eval.task import Encode, Task, UnscorableError, Verdict, is_text, read_lines

PROTOCOLS = ("harness", "harness-norm", "completion", "completion-norm")
HUB = "Rowan/hellaswag"
ENDINGS = 4
FILE, QUESTIONS = "hellaswag_val.jsonl", 10_042  # the authors' own, and how many it holds
TEXTS = ("activity_label", "ctx_a", "ctx_b", "ctx")


@dataclass(frozen=True)
class Story:
    """One question, as the data set has it."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: list[str]
    label: int  # of the ending that is right


def read(path: Path) -> list[Story]:
    """Questions from the authors' file or one like it, a JSON object a line.

    Raises ValueError with file and line where one is no question, or the authors' own file lacks some.
    """
    stories = []
    for number, line in enumerate(read_lines(path), 1):
        place = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: no JSON object ({error})") from None
        stories.append(checked(fields, place))
    if not stories:
        raise ValueError(f"{path} holds no question: it should have a JSON object a line")
    if path.name == FILE and len(stories) != QUESTIONS:
        raise ValueError(f"{path} holds {len(stories):,} questions of {QUESTIONS:,}: it was cut short; fetch it again")
    return stories


def from_hub() -> list[Story]:
    """The validation split from the Hugging Face hub; the test split's answers are unpublished."""
    rows = task.hub_rows(HUB, "default", "validation")
    return [checked(row, f"{HUB}, row {i}") for i, row in enumerate(rows)]


def checked(fields: Any, place: str) -> Story:
    """A question's fields as a Story. Raises ValueError, with the place, for those that are none."""
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: no JSON object")
    endings, label = fields.get("endings"), fields.get("label")
    texts: dict[str, Any] = {name: fields.get(name) for name in TEXTS}
    if not isinstance(endings, list) or not all(isinstance(text, str) for text in [*texts.values(), *endings]):
        raise ValueError(f"{place}: a question has {', '.join(TEXTS)} and a list of endings, all of them texts")
    if not all(map(is_text, [*texts.values(), *endings])):
        raise ValueError(f"{place} holds half a surrogate pair, which is no text")
    if label is None or label == "":
        raise ValueError(f"{place}: no label: the test split's answers are unpublished, take the validation split")
    if str(label) not in map(str, range(len(endings))):  # a number in the authors' file, a digit on the hub
        raise ValueError(f"{place}: label {label} is none of the {len(endings)} endings")
    return Story(endings=endings, label=int(label), **texts)


def cleaned(text: str) -> str:
    """Without the marks of WikiHow's articles, as lm-evaluation-harness cleans it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def context_and_endings(protocol: str, story: Story) -> tuple[str, list[str]]:
    if protocol.startswith("completion"):
        return story.ctx, story.endings
    context = f"{story.activity_label}: {story.ctx_a} {story.ctx_b.capitalize()}"
    return cleaned(context), [cleaned(ending) for ending in story.endings]


def requests(protocol: str, story: Story, encode: Encode) -> list[Request]:
    """A request an ending, all after the same context."""
    if len(story.endings) < 2:
        raise UnscorableError("fewer than two endings")
    context, endings = context_and_endings(protocol, story)
    stem = context.rstrip() if protocol.startswith("harness") else context
    before = encode(stem)
    if not before:
        raise UnscorableError("no context before the endings")
    if protocol.startswith("completion"):
        return [Request(before, encode(f" {ending}")) for ending in endings]
    # Encoded together, as the harness does: where the ending begins with spaces its first token differs.
    wholes = [encode(f"{context} {ending}") for ending in endings]
    if min(map(len, wholes)) <= len(before):
        raise UnscorableError("an ending that adds no token")
    return [Request(before, ids[len(before) :]) for ids in wholes]


def judge(protocol: str, story: Story, scores: list[Score]) -> Verdict:
    """The ending of the highest sum of log-probabilities: as such, a character of it, or a token."""
    _, endings = context_and_endings(protocol, story)
    sizes = [1] * len(scores)
    if protocol == "harness-norm":
        sizes = [len(ending) for ending in endings]
    elif protocol == "completion-norm":
        sizes = [len(score.logprobs) for score in scores]
    # The harness divides by 0 where cleaning leaves nothing of an ending: -inf, never the best.
    values = [score.total / size if size else -math.inf for score, size in zip(scores, sizes, strict=True)]
    best = max(range(len(values)), key=values.__getitem__)
    second, first = sorted(values)[-2:]
    odd = {
        f"not {ENDINGS} endings": len(endings) != ENDINGS,
        "an empty ending": not all(ending.strip() for ending in endings),
        "a repeated ending": len(set(endings)) < len(endings),
    }
    remarks = tuple(name for name, is_so in odd.items() if is_so)
    return Verdict(best == story.label, first - second < NEAR_TIE, chosen=endings[best], remarks=remarks)


def text(story: Story) -> str:
    """A question as one line of text."""
    return "\t".join([story.activity_label, story.ctx_a, story.ctx_b, story.ctx, *story.endings, str(story.label)])


TASK = Task("hellaswag", "HellaSwag", PROTOCOLS, requests, judge, text)
