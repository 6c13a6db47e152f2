"""The Children's Book Test (Hill et al. 2016): choose which of ten words fills the blank.

`paper` is the GPT-2 paper's protocol: the 20 sentences, then the question with each candidate in the blank; the
highest sum of log-probabilities wins. `sentence` is the original project's: only the question, the highest mean wins.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from core import cli
from core.eval import task
from core.eval.scoring import Request, Score, highest
from core.eval.task import Encode, QuestionSet, Task, UnscorableError, Verdict
from core.files import sha256

PROTOCOLS = ("paper", "sentence")
TYPES = ("NE", "CN", "V", "P")
HUB = "cam-cst/cbt"
FILES = re.compile(r"cbtest_(NE|CN|V|P)_(?:valid_(2000)|test_(2500))ex\.txt")  # the data set's own names
BLANK = "XXXXX"
CANDIDATES = 10
LINES = 21  # per question


@dataclass
class CBTConfig:
    """Questions and scoring rules."""

    data: Annotated[tuple[str, ...], cli.DEFAULT_IN_HELP] = ()
    """Files in the data set's own format (21 numbered lines per question). Default: the hub's data set."""
    types: tuple[Literal[TYPES], ...] = ("NE", "CN")  # type: ignore[valid-type]
    """Word types of the hub's data set: named entities, common nouns, verbs, prepositions."""
    split: Literal["validation", "test"] = "validation"
    """Split of the hub's data set. The GPT-2 paper reports validation."""
    protocol: tuple[Literal[("all", *PROTOCOLS)], ...] = ("paper",)  # type: ignore[valid-type]
    """Scoring protocols: paper scores the question after its 20 sentences, sentence only the question; `all`: both."""


@dataclass(frozen=True)
class Cloze:
    """One question, tokenized as in the data set."""

    sentences: list[str]
    question: str  # contains the blank once
    answer: str
    candidates: list[str]  # as in the data, which has a few questions without ten distinct words

    @property
    def options(self) -> list[str]:
        """The candidates without empty and repeated ones."""
        return list(dict.fromkeys(candidate for candidate in self.candidates if candidate.strip()))

    @property
    def warnings(self) -> tuple[str, ...]:
        return task.candidate_warnings(self.candidates, CANDIDATES, "candidate")


def load(config: CBTConfig) -> list[QuestionSet]:
    """One set per file, or one per word type of the hub's. Raises ValueError for options that contradict each other."""
    protocols = task.select_protocols(config.protocol, PROTOCOLS)
    if config.data:
        if (config.types, config.split) != (CBTConfig.types, CBTConfig.split):
            raise ValueError(
                "--types and --split select questions of the hub and have no effect on --data. Remove them"
            )
        sets = [load_file(Path(name), protocols) for name in dict.fromkeys(config.data)]
        if len({questions.subset for questions in sets}) < len(sets):
            raise ValueError(
                f"--data {' '.join(config.data)} has two files of one name: results identify a file by name. Rename one"
            )
        return sets
    return [
        QuestionSet(
            questions=from_hub(kind, config.split),
            protocols=protocols,
            data=f"{HUB} {kind} {config.split}",
            sha256=None,
            subset=f"{kind} {config.split}",
        )
        for kind in dict.fromkeys(config.types)
    ]


def load_file(path: Path, protocols: list[str]) -> QuestionSet:
    """The questions of a file. Published figures apply to the data set's own files only, which must be complete."""
    clozes = read(path)
    name = FILES.fullmatch(path.name)
    expected = int(name[2] or name[3]) if name else len(clozes)
    if len(clozes) != expected:
        raise ValueError(f"{path} has {len(clozes):,} questions, expected {expected:,}. Download the file again")
    return QuestionSet(
        questions=clozes,
        protocols=protocols,
        data=path.name,
        sha256=sha256(path),
        subset=f"{name[1]} {'validation' if name[2] else 'test'}" if name else path.stem,
        has_published=name is not None,
    )


def read(path: Path) -> list[Cloze]:
    """Questions from a file in the data set's own format. Raises ValueError with file and line for other formats."""
    questions: list[Cloze] = []
    block: list[str] = []
    number = 0
    for number, line in enumerate(task.read_lines(path), 1):
        if line.strip():
            block.append(line)
        if block and (not line.strip() or len(block) > LINES):
            questions.append(_parse(block, f"{path}, line {number - len(block) + bool(line.strip())}"))
            block = []
    if block:
        questions.append(_parse(block, f"{path}, line {number - len(block) + 1}"))
        candidates = [candidate for candidate in questions[-1].candidates if candidate]
        if len(candidates) < CANDIDATES and task.ends_within_a_line(
            path
        ):  # in a complete file it is the data set's error
            raise ValueError(
                f"{path}, line {number}: the file ends after {len(candidates)} of {CANDIDATES} candidates. "
                f"Download the file again"
            )
    if not questions:
        raise ValueError(f"{path} contains no questions. Use a file of blocks of {LINES} numbered lines")
    return questions


def _parse(block: list[str], place: str) -> Cloze:
    texts = []
    for expected, line in enumerate(block, 1):
        number, _, text = line.partition(" ")
        if number != str(expected) or expected > LINES:
            raise ValueError(
                f"{place}: line {expected} of the question does not start with its number (1 to {LINES}): "
                f"{line[:40]!r}. Fix or remove the question"
            )
        texts.append(text)
    fields = texts[-1].split("\t")
    if len(texts) != LINES or len(fields) != 4:
        raise ValueError(
            f"{place}: a question has {LINES} lines, the last `question TAB answer TAB TAB candidates`; this one has "
            f"{len(texts)} lines and {len(fields)} fields. Download the file again"
        )
    return validate(Cloze(texts[:-1], fields[0], fields[1], fields[3].split("|")), place)


def validate(cloze: Cloze, place: str) -> Cloze:
    """The same question. Raises ValueError if it doesn't have exactly one blank."""
    if (count := cloze.question.count(BLANK)) != 1:
        raise ValueError(f"{place}: the question has {count} blanks ({BLANK}), expected 1. Fix or remove the question")
    return cloze


def from_hub(kind: str, split: str) -> list[Cloze]:
    """Questions of one type (NE, CN, V, P) and split (validation, test) from the Hugging Face hub."""
    clozes = []
    for i, row in enumerate(task.hub_rows(HUB, kind, split)):
        cloze = Cloze(row["sentences"], row["question"], row["answer"], row["options"])
        clozes.append(validate(cloze, f"{HUB} {kind} {split}, row {i}"))
    return clozes


PTB = {  # Penn Treebank's notation of other characters
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
NO_SPACE_AFTER = {"-LRB-", "-LSB-", "-LCB-", "(", "[", "{", "``", "`", "$", "#"}
NO_SPACE_BEFORE = re.compile(r"[.,!?;:%)\]}]+|-R[RSC]B-|''?|n't|N'T|'(?:s|m|d|re|ve|ll|S|M|D|RE|VE|LL)")


def detokenize(tokens: list[str]) -> str:
    """Penn Treebank tokens as ordinary text.

    Only two adjacent tokens decide whether a space separates them. The text of the first tokens is therefore a prefix
    of the text of all: the context before a blank is the same for every candidate.
    """
    text = ""
    for previous, token in zip(["", *tokens], tokens, strict=False):
        is_joined = not previous or previous in NO_SPACE_AFTER or NO_SPACE_BEFORE.fullmatch(token) is not None
        plain = PTB.get(token, token)
        if text.endswith("'") and plain.startswith("'"):  # '' would be a Treebank quote again
            is_joined = False
        text += ("" if is_joined else " ") + plain
    return text


def requests(protocol: str, cloze: Cloze, encode: Encode) -> list[Request]:
    """One request per candidate: after a common context (`paper`), or after its first token (`sentence`)."""
    if cloze.answer not in cloze.options:
        raise UnscorableError("the answer is not among the candidates")
    if len(cloze.options) < 2:
        raise UnscorableError("fewer than two candidates")
    before, after = cloze.question.split(BLANK)
    if protocol == "sentence":
        sequences = [encode(before + option + after) for option in cloze.options]
        if min(map(len, sequences)) < 2:
            raise UnscorableError("a question of one token, which nothing predicts")
        return [Request(ids[:1], ids[1:]) for ids in sequences]
    words, _, prefix = before.rpartition(" ")  # the prefix in a word like old-XXXXX is scored, not context
    context = [*" ".join(cloze.sentences).split(), *words.split()]
    if not context:
        raise UnscorableError("no context before the blank")
    context_ids = encode(detokenize(context))
    last = context[-1:]  # only the last word decides whether a space follows the context
    texts = [detokenize(last + (prefix + option + after).split()) for option in cloze.options]
    return [Request(context_ids, encode(text[len(detokenize(last)) :])) for text in texts]


def judge(protocol: str, cloze: Cloze, scores: list[Score]) -> Verdict:
    """The candidate with the highest sum of log-probabilities (`paper`) or the highest mean (`sentence`) wins."""
    values = [score.total / (len(score.logprobs) if protocol == "sentence" else 1) for score in scores]
    best, near_tie = highest(values)
    chosen = cloze.options[best]
    return Verdict(chosen == cloze.answer, near_tie, chosen=chosen, warnings=cloze.warnings)


def text(cloze: Cloze) -> str:
    """A question as one line of text."""
    return "\t".join([*cloze.sentences, cloze.question, cloze.answer, *cloze.candidates])


TASK = Task(name="cbt", title="CBT", protocols=PROTOCOLS, load=load, requests=requests, judge=judge, text=text)
