"""LAMBADA (Paperno et al. 2016): reading its files, and each protocol by name. PROTOCOLS are what README describes.

The passage's last word is to be predicted. `openai` and `standard` are one rule on two texts (lm-evaluation-harness's
`lambada_openai` and `lambada_standard`); `last-token` is OpenAI's own count, by the last BPE token; `stop-filter` is
the paper's description, approximate because its list and exact rule are unpublished.
"""

import json
import math
from pathlib import Path
from typing import Any

from core.eval import task
from core.eval.scoring import NEAR_TIE, Request, Score
from core.eval.task import Encode, Task, UnscorableError, Verdict, is_text, read_lines

# Which text a protocol is defined on: OpenAI's (untokenised) or the tokenised standard one.
PROTOCOLS = {"openai": "openai", "standard": "standard", "last-token": "openai", "last-token-norm": "openai"}
PROTOCOLS["stop-filter"] = "openai"
HUB = {"openai": ("EleutherAI/lambada_openai", "default"), "standard": ("cimec/lambada", "plain_text")}
PER_WORD = ("openai", "standard", "stop-filter")  # the others' targets are tokens, and their perplexities no word's
TEST_PASSAGES = 5153
LARGEST_EXPONENT = 700  # of a float; only a model that diverged comes there, and its perplexity says nothing
FILES = {  # LAMBADA's own files: the text each holds, and how many passages
    "lambada_development_plain_text.txt": ("standard", 4869),
    "lambada_test_plain_text.txt": ("standard", TEST_PASSAGES),
    "lambada_test.jsonl": ("openai", TEST_PASSAGES),
}


def text_of(path: Path) -> str | None:
    """Which text a file of passages holds, where its name is one of LAMBADA's own: lines can't tell."""
    return FILES.get(path.name, (None, 0))[0]


def allowed(text: str) -> list[str]:
    """The protocols that a text allows. A corpus of the user's own (`other`) is scored by the rule of `openai`."""
    return [name for name, needs in PROTOCOLS.items() if needs == text] if text != "other" else ["openai"]


def read(path: Path) -> list[str]:
    """Passages from a file: one a line, or a JSON object a line with a `text` field (.jsonl).

    Raises ValueError with file and line where one isn't a passage, or a known file lacks some.
    """
    passages = []
    for number, line in enumerate(read_lines(path), 1):
        passage = _json_text(path, number, line) if path.suffix.lower() in (".jsonl", ".json") else line
        if len(passage.split()) < 2:
            raise ValueError(f"{path}, line {number}: a passage has at least two words, this is {passage[:40]!r}")
        passages.append(passage)
    if not passages:
        raise ValueError(f"{path} holds no passage: it should have one a line")
    _, whole = FILES.get(path.name, (None, len(passages)))
    if len(passages) != whole:
        raise ValueError(f"{path} holds {len(passages)} passages of {whole}: it was cut short; fetch it again")
    return passages


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}, line {number}: no JSON object with a `text` field ({reason})") from None
    if not isinstance(text, str):
        raise ValueError(f"{path}, line {number}: `text` is {type(text).__name__}, not a string")
    if not is_text(text):
        raise ValueError(f"{path}, line {number}: `text` holds half a surrogate pair, which is no text")
    return text


def from_hub(text: str) -> list[str]:
    """The test set's passages from the Hugging Face hub."""
    return [row["text"] for row in task.hub_rows(*HUB[text], split="test")]


def requests(protocol: str, passage: str, encode: Encode) -> list[Request]:
    """Context and target of a passage, as the protocol cuts and encodes them."""
    if protocol in ("last-token-norm", "stop-filter"):
        passage = "\n" + straighten(passage)
    if protocol in ("last-token", "last-token-norm"):
        ids = encode(passage)
        request = Request(ids[:-1], ids[-1:])
    else:
        # split(" "), not split(): seven of OpenAI's passages have a newline within the last "word".
        context, _, target = passage.rpartition(" ")
        if not target.strip():
            raise UnscorableError("ends with a space, so that its last word is empty")
        request = Request(encode(context), encode(" " + target))
    if not request.context:
        raise UnscorableError("no context before the last word")
    return [request]


def straighten(text: str) -> str:
    """Curly quotes and LaTeX's `` and '' as plain ones."""
    pairs = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "``": '"', "''": '"'}
    for fancy, plain in pairs.items():
        text = text.replace(fancy, plain)
    return text


def judge(protocol: str, passage: str, scores: list[Score]) -> Verdict:
    """Correct where every token of the target is the likeliest, given the true tokens before it."""
    (score,) = scores
    margins = list(score.margins)
    if protocol == "stop-filter":  # the first token is chosen with the stop words masked, the rest without
        margins[0] = score.allowed_margins[0]
    return Verdict(min(margins) > 0, near_tie=abs(min(margins)) < NEAR_TIE, logprob=score.total)


def perplexity(protocol: str, verdicts: list[Verdict]) -> float | None:
    """exp of the mean negative log-probability of a word; None for a protocol whose targets are single tokens."""
    logprobs = [verdict.logprob for verdict in verdicts if verdict.logprob is not None]
    if protocol not in PER_WORD or not logprobs:
        return None
    nats = -math.fsum(logprobs) / len(logprobs)
    return math.exp(nats) if nats < LARGEST_EXPONENT else None


def stop_word_mask(encoding: Any, vocab_size: int) -> Any:
    """(vocab_size,) bool: ids that write a stop word, by the list in stop_words.txt."""
    import torch

    lines = (Path(__file__).parent / "stop_words.txt").read_text().splitlines()
    stop_words = {word for line in lines if not line.startswith("#") for word in line.split()}
    known = min(vocab_size, encoding.n_vocab)  # a vocabulary that was saved with its padding has more ids than words
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[:known] = torch.tensor([encoding.decode([i]).strip().lower() in stop_words for i in range(known)])
    return mask


def banned(protocols: list[str], encoding: Any, vocab_size: int) -> Any:
    """The ids that `stop-filter` masks; None where it isn't among the protocols."""
    return stop_word_mask(encoding, vocab_size) if "stop-filter" in protocols else None


TASK = Task("lambada", "LAMBADA", tuple(PROTOCOLS), requests, judge, str, perplexity, banned)
