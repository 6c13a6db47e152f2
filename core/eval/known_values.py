"""What OpenAI's GPT-2 124M is known to give on a few short texts, from the tests of other projects. Takes seconds."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core import generation
from core.data.tokenizer import end_of_text_id
from core.eval.check import FAIL, PASS, Row
from core.eval.scoring import Request, Score, score
from core.eval.wikitext import disjoint_windows
from model import GPT

KNOWN_VALUES = Path(__file__).parent / "known_values.json"


def load() -> dict[str, Any]:
    """The values by name, each with its source and tolerance; `size`: the GPT-2 that they belong to."""
    return json.loads(KNOWN_VALUES.read_text(encoding="utf-8"))


def check(model: GPT, encoding: Any, name: str) -> list[Row]:
    """A row per value. The model `name` has the shape of GPT-2 124M, and the encoding is GPT-2's."""
    known = load()
    encode = encoding.encode_ordinary
    rows = []
    for each in known["log_likelihoods"]:
        found = score_text(model, encode, each["context"], each["continuation"]).total
        label = f"log P({each['continuation'][:24]!r} after {each['context']!r})"
        rows.append(compare(name, label, [found], [each["value"]], known))
    for each in known["greedy_continuations"]:
        is_greedy = min(score_text(model, encode, each["context"], each["continuation"]).margins) > 0
        label = f"{each['continuation'][:24]!r} is greedy after {each['context'][-10:]!r}"
        rows.append(row(name, label, str(is_greedy), str(each["greedy"]), "", is_greedy == each["greedy"]))
    text = known["token_log_likelihoods"]["text"]
    ids = [end_of_text_id(encoding), *encode(text)]
    for context, expected in known["token_log_likelihoods"]["by_context"].items():
        windows = disjoint_windows(ids, int(context))
        values = [logprob for (each,) in score(model, [[window] for window in windows]) for logprob in each.logprobs]
        rows.append(compare(name, f"log P of 17 tokens, context {context}", values, expected, known))
    text = known["mean_loss"]["text"]
    (scores,) = score(model, [[Request([end_of_text_id(encoding)], encode(text))]])
    values = [-scores[0].total / len(scores[0].logprobs)]
    rows.append(compare(name, f"loss of {text!r}", values, [known["mean_loss"]["value"]], known))
    prompt, output = known["greedy"]["prompt"], known["greedy"]["output"]
    new = generation.generate(model, prompt, len(output) - len(prompt), temperature=0)[0]
    label = f"{len(output)} greedy ids after {encoding.decode(prompt)!r}"
    matches = sum(a == b for a, b in zip(prompt + new, output, strict=True))
    return [*rows, row(name, label, f"{matches} equal", f"{len(output)} equal", "", prompt + new == output)]


def score_text(model: GPT, encode: Callable[[str], list[int]], context: str, continuation: str) -> Score:
    """The score of a continuation, encoded together with its context as lm-evaluation-harness does."""
    before, both = encode(context), encode(context + continuation)
    ((found,),) = score(model, [[Request(before, both[len(before) :])]])
    return found


def compare(name: str, label: str, values: list[float], expected: list[float], known: dict[str, Any]) -> Row:
    """One row for a value or a list of values, of which the one that is furthest off is shown."""
    limit = known["tolerance"]

    def excess(pair: tuple[float, float]) -> float:
        return abs(pair[0] - pair[1]) / abs(pair[1]) if math.isfinite(pair[0]) else math.inf

    worst = max(zip(values, expected, strict=True), key=excess)
    return row(name, label, f"{worst[0]:.6f}", f"{worst[1]:.6f}", f"{100 * limit:g} %", excess(worst) <= limit)


def row(name: str, label: str, found: str, published: str, tolerance: str, is_equal: bool) -> Row:
    """A row of the table of `--check`."""
    return Row(
        model=name,
        task="known values",
        protocol="fp32",
        questions=label,
        measure="",
        found=found,
        published=published,
        tolerance=tolerance,
        verdict=PASS if is_equal else FAIL,
    )
