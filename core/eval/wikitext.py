"""WikiText (Merity et al. 2016): perplexity on Wikipedia articles. WikiText-2 and WikiText-103 have the same test text.

`harness` is lm-evaluation-harness's `wikitext`: each page without the data set's tokenization, in disjoint windows of
the context length; perplexity per word of the original text. `strided` is that of Hugging Face's guide to perplexity:
the unchanged text as one stream of tokens, in overlapping windows; perplexity per token.
"""

import hashlib
import math
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from core import cli
from core.data.tokenizer import end_of_text_id
from core.eval import task
from core.eval.scoring import Request, Score
from core.eval.task import Page, QuestionSet, Task, UnscorableError, Verdict
from core.files import sha256

PROTOCOLS = ("harness", "strided")
DEFAULT_STRIDE = 1024  # of published figures, and the context of every published GPT-2
HUB, CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"  # wiki.test.raw, 1,290,590 bytes


@dataclass
class WikiTextConfig:
    """Text and scoring rules."""

    data: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of raw WikiText, such as wiki.test.raw: one paragraph or ` = Title = ` per line. Any other UTF-8 text is one
    page. Default: the test split of Salesforce/wikitext, wikitext-2-raw-v1, on the Hugging Face hub."""
    protocol: tuple[Literal[("all", *PROTOCOLS)], ...] = ("harness",)  # type: ignore[valid-type]
    """Scoring protocols: harness like lm-evaluation-harness, per word; strided like Hugging Face's guide, per token;
    `all`: both."""
    stride: Annotated[tuple[int, ...], cli.DEFAULT_IN_HELP] = ()
    """Tokens between the windows of strided, at most the context length. Published figures use 1024 and 512.
    Default: 1024, or the context length of a model with a shorter one."""


@dataclass(frozen=True)
class Stream:
    """All pages as one text."""

    text: str
    stride: int
    is_default: bool = False  # a model with a shorter context takes its length


def load(config: WikiTextConfig) -> list[QuestionSet]:
    """One set of pages, and one stream for each stride. Raises ValueError for options that contradict each other."""
    protocols = task.select_protocols(config.protocol, PROTOCOLS)
    if "strided" not in protocols and config.stride:
        raise ValueError(
            f"--stride {' '.join(map(str, config.stride))} has no effect on --protocol harness. "
            f"Add --protocol strided, or remove --stride"
        )
    for stride in config.stride:
        cli.check_positive(stride=stride)
    if config.data is None:
        content, name, digest, is_test = from_hub(), f"{HUB} {CONFIG} test", None, True
    else:
        path = Path(config.data)
        content, name, digest = read(path), path.name, sha256(path)
        is_test = hashlib.sha256(content.encode()).hexdigest() == TEST_SHA256
    pages = QuestionSet(
        questions=split_pages(content), protocols=["harness"], data=name, sha256=digest, has_published=is_test
    )
    sets = []
    for protocol in protocols:
        if protocol == "harness":
            sets.append(pages)
        else:
            streams = [Stream(content, stride) for stride in dict.fromkeys(config.stride)]
            streams = streams or [Stream(content, DEFAULT_STRIDE, is_default=True)]
            sets += [with_stream(replace(pages, protocols=[protocol]), stream) for stream in streams]
    return sets


def with_stream(questions: QuestionSet, stream: Stream) -> QuestionSet:
    """The set with this one question, named by its stride."""
    subset = f"stride {stream.stride}"
    name = questions.data.removesuffix(f", {questions.subset}")
    return replace(questions, questions=[stream], data=f"{name}, {subset}", subset=subset)


def fit(questions: QuestionSet, n_positions: int) -> QuestionSet:
    """The set with a stride of at most the context. Raises ValueError for a given stride that exceeds it."""
    stream = questions.questions[0]
    if not isinstance(stream, Stream) or stream.stride <= n_positions:
        return questions
    if not stream.is_default:
        raise ValueError(
            f"--stride {stream.stride} exceeds the model's context of {n_positions} tokens. Use --stride {n_positions}"
        )
    return with_stream(questions, replace(stream, stride=n_positions))


def read(path: Path) -> str:
    """The text of a file with lines that end in a newline character alone. Raises ValueError for an empty file."""
    text = "\n".join(task.read_lines(path))
    if not text.strip():
        raise ValueError(f"{path} contains no text. Use a file such as wiki.test.raw")
    return text if task.ends_within_a_line(path) else text + "\n"


def from_hub() -> str:
    """The test split as in wiki.test.raw: the hub's rows are its lines, where a blank line is an empty row."""
    return "".join(row["text"] or " \n" for row in task.hub_rows(HUB, CONFIG, split="test"))


def split_pages(text: str) -> list[str]:
    """The pages of a text; each starts at a line ` = Title = `, with a single equals sign on either side.

    Lines are joined by newline characters, and the last line of a page has none, as in lm-evaluation-harness's data.
    """
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if re.fullmatch(r"= .* =", line.replace("= = =", "===").replace("= =", "==").strip()):
            pages.append([])
        pages[-1].append(line)
    return [page for lines in pages if (page := "\n".join(lines)).strip()]


# lm-evaluation-harness's rules in its order: plain replacements, patterns, and plain replacements again. Its rule for
# apostrophes before digits contains slashes and matches nothing in the text; it is part of the protocol.
JOINED = {"s '": "s'"}
DIGITS = (r"/' [0-9]/", r"/'[0-9]/")
SEPARATORS = {" @-@ ": "-", " @,@ ": ",", " @.@ ": "."} | {f" {mark} ": f"{mark} " for mark in ":;.!?,"}
PAIRS = (r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"), ('"', '"'), ("'", "'")
OTHERS = {"= = = =": "====", "= = =": "===", "= =": "==", " \u00b0 ": "\u00b0"}
OTHERS |= {" \n": "\n", "\n ": "\n", " N ": " 1 ", " 's": "'s"}


def detokenize(text: str) -> str:
    """A page without the data set's tokenization, exactly as lm-evaluation-harness does it."""
    text = re.sub(*DIGITS, _replace(text, JOINED))
    text = _replace(text, SEPARATORS)
    for start, end in PAIRS:  # no spaces inside of a pair
        left, right = start[-1], end[-1]
        text = re.sub(rf"{start}\s*([^{end}]*?)\s*{end}", rf"{left}\1{right}", text)
    return _replace(text, OTHERS)


def _replace(text: str, pairs: dict[str, str]) -> str:
    for old, new in pairs.items():
        text = text.replace(old, new)
    return text


def windows(protocol: str, question: str | Stream, encoding: Any, n_positions: int) -> list[Request]:
    """Requests that fit a context of n_positions tokens and predict each token of the text once."""
    if isinstance(question, Stream):
        ids = encoding.encode_ordinary(joined_lines(question.text))
        return strided_windows(ids, question.stride, n_positions)
    return disjoint_windows([end_of_text_id(encoding), *encoding.encode_ordinary(detokenize(question))], n_positions)


def disjoint_windows(ids: list[int], n_positions: int) -> list[Request]:
    """All ids but the first are predicted, n_positions per window.

    The context of a window is the one id before it; that of the last, shorter window fills the model's context.
    """
    requests = []
    for start in range(1, len(ids), n_positions):
        end = min(start + n_positions, len(ids))
        requests.append(Request(ids[max(end - 1 - n_positions, 0) : start], ids[start:end]))
    return requests


def strided_windows(ids: list[int], stride: int, n_positions: int) -> list[Request]:
    """Windows of n_positions ids, `stride` apart; each predicts the ids that no earlier window contains.

    The first id of a window is never predicted. With a stride of n_positions the windows are disjoint, and 1 of
    n_positions ids has no prediction.
    """
    requests, done = [], 0
    for begin in range(0, len(ids), stride):
        start, end = max(done, begin + 1), min(begin + n_positions, len(ids))
        if start < end:
            requests.append(Request(ids[begin:start], ids[start:end]))
        done = end
        if end == len(ids):
            break
    if not requests:
        raise UnscorableError("a text of one token, which nothing predicts")
    return requests


def joined_lines(text: str) -> str:
    """The rows of the hub's data set, which end in a newline character and are empty for blank lines, joined by two."""
    lines = text.split("\n")
    rows = [f"{line}\n" if line.strip() else "" for line in lines]
    if not lines[-1]:  # the text ends with a complete line
        rows.pop()
    return "\n\n".join(rows)


def judge(protocol: str, question: str | Stream, scores: list[Score]) -> Verdict:
    """The log-probability of each page, with its words and bytes, or its tokens."""
    if not isinstance(question, Stream):
        # Words as lm-evaluation-harness counts them: in the original text, with an empty one at either end.
        counts = len(re.split(r"\s+", question)), len(question.encode())
        return Verdict(correct=False, pages=(Page(math.fsum(score.total for score in scores), *counts),))
    logprobs = [logprob for score in scores for logprob in score.logprobs]
    sizes = [len(page.encode()) for page in split_pages(question.text)]
    # A page starts at its share of the bytes: a few tokens off, which affects the interval only.
    starts = [round(len(logprobs) * sum(sizes[:i]) / sum(sizes)) for i in range(len(sizes) + 1)]
    pages = [Page(math.fsum(logprobs[start:end]), end - start) for start, end in pairwise(starts) if start < end]
    return Verdict(correct=False, pages=tuple(pages))


def perplexity(protocol: str, verdicts: list[Verdict]) -> float | None:
    """Per word by `harness`, per token by `strided`."""
    pages = [page for verdict in verdicts for page in verdict.pages]
    return task.exp_mean([page.logprob for page in pages], sum(page.units for page in pages)) if pages else None


def text(question: str | Stream) -> str:
    """A page, or the whole text with the stride."""
    return f"{question.stride}\t{question.text}" if isinstance(question, Stream) else question


TASK = Task(
    name="wikitext",
    title="WikiText",
    protocols=PROTOCOLS,
    load=load,
    requests=None,
    fit=fit,
    windows=windows,
    judge=judge,
    text=text,
    perplexity=perplexity,
)
