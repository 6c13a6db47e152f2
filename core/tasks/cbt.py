"""The Children's Book Test (Hill et al. 2016): reading its files, and both protocols by name.

`paper` is the GPT-2 paper's: the 20 sentences, then the question with each candidate in the blank; the likeliest
wins. `sentence` is the original project's: the question alone, the least mean loss wins.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from core.scoring import NEAR_TIE, Question, Score
from core.tasks import hub

PROTOCOLS = ("paper", "sentence")
TYPES = ("NE", "CN", "V", "P")
HUB = "cam-cst/cbt"
BLANK = "XXXXX"

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Cloze:
    """One question, tokenised as the data set has it."""

    sentences: list[str]
    question: str  # holds the blank
    answer: str
    options: list[str]


@dataclass(frozen=True)
class Verdict:
    """How one question came out."""

    correct: bool
    chosen: str
    near_tie: bool  # the two best were within NEAR_TIE


def read(path: Path) -> list[Cloze]:
    """Questions from a file in the data set's own format. Raises ValueError with file and line where it isn't."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    questions: list[Cloze] = []
    block: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            block.append(line)
        elif block:
            questions.append(_parse(block, f"{path}, line {number - len(block)}"))
            block = []
    if not questions:
        raise ValueError(f"{path} holds no question: it should have blocks of 21 numbered lines, a blank line between")
    return questions


def _parse(block: list[str], place: str) -> Cloze:
    texts = []
    for expected, line in enumerate(block, 1):
        number, _, text = line.partition(" ")
        if number != str(expected) or expected > 21:
            raise ValueError(
                f"{place}: line {expected} of the question should begin with its number, up to 21: {line[:40]!r}"
            )
        texts.append(text)
    fields = texts[-1].split("\t")
    if len(texts) != 21 or len(fields) != 4:
        raise ValueError(
            f"{place}: a question has 21 lines, the last `question TAB answer TAB TAB candidates`; this one has "
            f"{len(texts)} lines and {len(fields)} fields: the file was cut short, or has another format"
        )
    options = fields[3].split("|")
    if len(options) != 10:
        raise ValueError(f"{place}: a question has ten candidates, this one {len(options)}: the file was cut short?")
    return checked(Cloze(texts[:-1], fields[0], fields[1], options), place)


def checked(cloze: Cloze, place: str) -> Cloze:
    """The question without empty and repeated candidates. Raises ValueError where it can't be scored."""
    options = list(dict.fromkeys(option for option in cloze.options if option.strip()))
    if cloze.question.count(BLANK) != 1:
        raise ValueError(f"{place}: the question holds {BLANK} {cloze.question.count(BLANK)} times, not once")
    if cloze.answer not in options:
        raise ValueError(f"{place}: the answer {cloze.answer!r} is not among the candidates {'|'.join(options)!r}")
    return Cloze(cloze.sentences, cloze.question, cloze.answer, options)


def from_hub(kind: str, split: str) -> list[Cloze]:
    """Questions of one type (NE, CN, V, P) and split (validation, test) from the Hugging Face hub."""
    return [
        checked(
            Cloze(row["sentences"], row["question"], row["answer"], row["options"]), f"{HUB} {kind} {split}, row {i}"
        )
        for i, row in enumerate(hub.rows(HUB, kind, split))
    ]


# What stands for another character in Penn Treebank text.
PTB = {
    "-LRB-": "(",
    "-RRB-": ")",
    "-LSB-": "[",
    "-RSB-": "]",
    "-LCB-": "{",
    "-RCB-": "}",
    "``": '"',
    "''": '"',
    "`": "'",
}
OPENING = {"-LRB-", "-LSB-", "-LCB-", "(", "[", "{", "``", "`", "$", "#"}  # no space after
CLOSING = re.compile(  # no space before
    r"[.,!?;:%)\]}]+|-R[RSC]B-|''?|n't|N'T|'(?:s|m|d|re|ve|ll|S|M|D|RE|VE|LL)"
)


def detokenize(tokens: list[str]) -> str:
    """Penn Treebank tokens as ordinary text.

    Whether two neighbours are joined depends on them alone, so the text of a list's beginning is the beginning of its
    text: what stands before a blank is the same for all candidates.
    """
    text = ""
    for before, token in zip(["", *tokens], tokens, strict=False):
        joined = not before or before in OPENING or CLOSING.fullmatch(token)
        if before == token == "'":  # one quotation ends and another begins; '' would be a Treebank quote again
            joined = False
        text += ("" if joined else " ") + PTB.get(token, token)
    return text


def question(protocol: str, cloze: Cloze, encode: Encode) -> list[Question]:
    """What to score: for `paper` all candidates after one context, for `sentence` a question each."""
    before, after = cloze.question.split(BLANK)
    if protocol == "sentence":
        wholes = [encode(before + option + after) for option in cloze.options]
        return [Question(ids[:1], [ids[1:]]) for ids in wholes]
    context = (
        " ".join(cloze.sentences).split() + (before if before.endswith(" ") else before.rpartition(" ")[0]).split()
    )
    prefix = detokenize(context)
    told = " ".join(cloze.sentences) + " "
    texts = [detokenize((told + before + option + after).split()) for option in cloze.options]
    assert all(text.startswith(prefix) for text in texts)
    return [Question(encode(prefix), [encode(text.removeprefix(prefix)) for text in texts])]


def judge(protocol: str, cloze: Cloze, scores: list[list[Score]]) -> Verdict:
    """The candidate with the highest sum of log-probabilities (`paper`) or the highest mean (`sentence`)."""
    if protocol == "sentence":
        values = [score.total / len(score.logprobs) for (score,) in scores]
    else:
        values = [score.total for score in scores[0]]
    best = max(range(len(values)), key=values.__getitem__)
    ranked = sorted(values, reverse=True)
    near_tie = len(ranked) > 1 and ranked[0] - ranked[1] < NEAR_TIE
    return Verdict(cloze.options[best] == cloze.answer, cloze.options[best], near_tie)
