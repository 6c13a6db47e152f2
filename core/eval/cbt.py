"""The Children's Book Test (Hill et al. 2016): reading its files, and both protocols by name.

`paper` is the GPT-2 paper's: the 20 sentences, then the question with each candidate in the blank; the likeliest
wins. `sentence` is the original project's: the question alone, the least mean loss wins.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from core.eval import task
from core.eval.scoring import NEAR_TIE, Request, Score
from core.eval.task import Encode, Task, UnscorableError, Verdict, ends_within_a_line, read_lines

PROTOCOLS = ("paper", "sentence")
TYPES = ("NE", "CN", "V", "P")
HUB = "cam-cst/cbt"
BLANK = "XXXXX"
CANDIDATES = 10
LINES = 21  # of a question


@dataclass(frozen=True)
class Cloze:
    """One question, tokenised as the data set has it."""

    sentences: list[str]
    question: str  # holds the blank once
    answer: str
    candidates: list[str]  # as they stand in the data: ten, but for faults of the data set

    @property
    def options(self) -> list[str]:
        """The candidates without empty and repeated ones."""
        return list(dict.fromkeys(candidate for candidate in self.candidates if candidate.strip()))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is odd about the candidates of a question that is scored all the same."""
        found = {
            f"not {CANDIDATES} candidates": len(self.candidates) != CANDIDATES,
            "an empty candidate": not all(candidate.strip() for candidate in self.candidates),
            "a repeated candidate": len(set(self.candidates)) < len(self.candidates),
        }
        return tuple(name for name, is_so in found.items() if is_so)


def read(path: Path) -> list[Cloze]:
    """Questions from a file in the data set's own format. Raises ValueError with file and line where it isn't."""
    questions: list[Cloze] = []
    block: list[str] = []
    number = 0
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            block.append(line)
        if block and (not line.strip() or len(block) > LINES):
            questions.append(_parse(block, f"{path}, line {number - len(block) + bool(line.strip())}"))
            block = []
    if block:
        questions.append(_parse(block, f"{path}, line {number - len(block) + 1}"))
        candidates = [candidate for candidate in questions[-1].candidates if candidate]
        if len(candidates) < CANDIDATES and ends_within_a_line(path):  # else it is a fault of the data set
            raise ValueError(
                f"{path}, line {number}: the file ends after {len(candidates)} of {CANDIDATES} candidates: it was cut "
                f"short; fetch it again"
            )
    if not questions:
        raise ValueError(f"{path} holds no question: it should have blocks of 21 numbered lines, a blank line between")
    return questions


def _parse(block: list[str], place: str) -> Cloze:
    texts = []
    for expected, line in enumerate(block, 1):
        number, _, text = line.partition(" ")
        if number != str(expected) or expected > LINES:
            raise ValueError(
                f"{place}: line {expected} of the question should begin with its number, up to {LINES}: {line[:40]!r}"
            )
        texts.append(text)
    fields = texts[-1].split("\t")
    if len(texts) != LINES or len(fields) != 4:
        raise ValueError(
            f"{place}: a question has {LINES} lines, the last `question TAB answer TAB TAB candidates`; this one has "
            f"{len(texts)} lines and {len(fields)} fields: the file was cut short, or has another format"
        )
    return checked(Cloze(texts[:-1], fields[0], fields[1], fields[3].split("|")), place)


def checked(cloze: Cloze, place: str) -> Cloze:
    """The question as it is. Raises ValueError where it has no single blank, and so is no question."""
    if cloze.question.count(BLANK) != 1:
        raise ValueError(f"{place}: the question holds {BLANK} {cloze.question.count(BLANK)} times, not once")
    return cloze


def from_hub(kind: str, split: str) -> list[Cloze]:
    """Questions of one type (NE, CN, V, P) and split (validation, test) from the Hugging Face hub."""
    return [
        checked(
            Cloze(row["sentences"], row["question"], row["answer"], row["options"]), f"{HUB} {kind} {split}, row {i}"
        )
        for i, row in enumerate(task.hub_rows(HUB, kind, split))
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
        joined = not before or before in OPENING or CLOSING.fullmatch(token) is not None
        written = PTB.get(token, token)
        if text.endswith("'") and written.startswith("'"):  # '' would be a Treebank quote again
            joined = False
        text += ("" if joined else " ") + written
    return text


def requests(protocol: str, cloze: Cloze, encode: Encode) -> list[Request]:
    """A request a candidate: `paper` puts the same context before all, `sentence` has none but the first token."""
    if cloze.answer not in cloze.options:
        raise UnscorableError("the answer is not among the candidates")
    if len(cloze.options) < 2:
        raise UnscorableError("fewer than two candidates")
    before, after = cloze.question.split(BLANK)
    if protocol == "sentence":
        wholes = [encode(before + option + after) for option in cloze.options]
        if min(map(len, wholes)) < 2:
            raise UnscorableError("a question of one token, which nothing predicts")
        return [Request(ids[:1], ids[1:]) for ids in wholes]
    stem, _, begun = before.rpartition(" ")  # a word that holds the blank, as old-XXXXX, is part of what is scored
    told = [*" ".join(cloze.sentences).split(), *stem.split()]
    if not told:
        raise UnscorableError("no context before the blank")
    context = encode(detokenize(told))
    last = told[-1:]  # whether the candidate is joined to the context depends on its last word alone
    texts = [detokenize(last + (begun + option + after).split()) for option in cloze.options]
    return [Request(context, encode(text[len(detokenize(last)) :])) for text in texts]


def judge(protocol: str, cloze: Cloze, scores: list[Score]) -> Verdict:
    """The candidate with the highest sum of log-probabilities (`paper`) or the highest mean (`sentence`)."""
    values = [score.total / (len(score.logprobs) if protocol == "sentence" else 1) for score in scores]
    best = max(range(len(values)), key=values.__getitem__)
    second, first = sorted(values)[-2:]
    chosen = cloze.options[best]
    return Verdict(chosen == cloze.answer, first - second < NEAR_TIE, chosen=chosen, remarks=cloze.remarks)


def text(cloze: Cloze) -> str:
    """A question as one line of text."""
    return "\t".join([*cloze.sentences, cloze.question, cloze.answer, *cloze.candidates])


TASK = Task("cbt", "CBT", PROTOCOLS, requests, judge, text)
