"""LAMBADA (Paperno et al. 2016): predict the last word of a passage.

`openai` and `standard` are one rule on two texts (lm-evaluation-harness's `lambada_openai` and `lambada_standard`).
`last-token` is OpenAI's own count, of the last BPE token; `last-token-norm` normalizes quotation marks first.
`stop-filter` follows the GPT-2 paper's description. It is approximate: the paper's word list and rule are unpublished.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from core import cli
from core.eval import task
from core.eval.scoring import NEAR_TIE, Request, Score
from core.eval.task import Encode, QuestionSet, Task, UnscorableError, Verdict
from core.files import sha256

PROTOCOLS = {  # the text that each protocol is defined on: OpenAI's (not tokenized) or the standard one (tokenized)
    "openai": "openai",
    "standard": "standard",
    "last-token": "openai",
    "last-token-norm": "openai",
    "stop-filter": "openai",
}
ProtocolName = Literal[("all", *PROTOCOLS)]  # type: ignore[valid-type]
PER_WORD = ("openai", "standard", "stop-filter")  # the targets of the other protocols are tokens, not words
HUB = {"openai": ("EleutherAI/lambada_openai", "default"), "standard": ("cimec/lambada", "plain_text")}
TEST_PASSAGES = 5153
FILES = {  # LAMBADA's own files: the text and the number of passages of each
    "lambada_development_plain_text.txt": ("standard", 4869),
    "lambada_test_plain_text.txt": ("standard", TEST_PASSAGES),
    "lambada_test.jsonl": ("openai", TEST_PASSAGES),
}


@dataclass
class LambadaConfig:
    """Passages and scoring rules."""

    data: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of passages: .txt with one passage per line, or .jsonl with a `text` field. Default: the hub's test set."""
    text: Annotated[Literal["openai", "standard", "other"] | None, cli.DEFAULT_IN_HELP] = None
    """Text in --data: OpenAI's, the standard (tokenized) one, or other passages.
    Default: known for LAMBADA's own file names, required for any other name."""
    protocol: Annotated[tuple[ProtocolName, ...], cli.DEFAULT_IN_HELP] = ()
    """Scoring protocols; `all`: every one that the text allows. Default: openai; for the standard text, standard."""


def load(config: LambadaConfig) -> list[QuestionSet]:
    """The passages of each text that the protocols need. Raises ValueError for options that contradict each other."""
    text = resolve_text(config)
    allowed = list(PROTOCOLS) if text is None else allowed_protocols(text)
    reason = f"not defined on text {text}"
    protocols = task.select_protocols(config.protocol, PROTOCOLS, allowed, reason=reason) or allowed[:1]
    for protocol in protocols:
        if protocol not in allowed:
            raise ValueError(
                f"--protocol {protocol} is not defined on text {text}. Use --protocol {' or '.join(allowed)}"
            )
    if config.data is not None:
        return [load_file(Path(config.data), text, protocols)]
    by_text: dict[str, list[str]] = {}
    for protocol in protocols:
        by_text.setdefault(PROTOCOLS[protocol], []).append(protocol)
    return [
        QuestionSet(questions=from_hub(name), protocols=group, data=HUB[name][0], sha256=None)
        for name, group in by_text.items()
    ]


def resolve_text(config: LambadaConfig) -> str | None:
    """The text in --data; None for the hub's. Raises ValueError if neither --text nor the file name determines it,
    and OSError for a file that can't be read."""
    if config.data is None:
        if config.text is not None:
            raise ValueError(f"--text {config.text} has no effect without --data. Set --data or remove --text")
        return None
    open(config.data, "rb").close()  # a missing file is the more important error
    known = known_text(Path(config.data))
    if config.text is None and known is None:
        raise ValueError(
            f"--data {config.data} is not one of LAMBADA's own file names: its text is unknown. Add --text openai "
            f"(like lambada_test.jsonl), --text standard (tokenized) or --text other (other passages)"
        )
    if known is not None and config.text not in (None, known, "other"):
        raise ValueError(
            f"--text {config.text} contradicts --data {config.data}: this file name means text {known}. Remove --text"
        )
    return config.text or known


def known_text(path: Path) -> str | None:
    """The text of a file with one of LAMBADA's own names; None for other names. The lines don't show it."""
    return FILES.get(path.name, (None, 0))[0]


def allowed_protocols(text: str) -> list[str]:
    """The protocols that are defined on a text. Other passages (`other`) are scored by the rule of `openai`."""
    return [name for name, needed in PROTOCOLS.items() if needed == text] if text != "other" else ["openai"]


def load_file(path: Path, text: str | None = None, protocols: list[str] | None = None) -> QuestionSet:
    """The passages of a file. Default text: by the file's name, else `other`. Default protocol: the text's first."""
    if text is None and known_text(path) is None:
        cli.print_note(f"{path} has none of LAMBADA's own file names: its passages are scored by protocol openai")
    text = text or known_text(path) or "other"
    passages = read(path)
    return QuestionSet(
        questions=passages,
        protocols=protocols or allowed_protocols(text)[:1],
        data=path.name,
        sha256=sha256(path),
        has_published=text != "other" and len(passages) == TEST_PASSAGES,
    )


def read(path: Path) -> list[str]:
    """Passages from a file: one per line, or one JSON object per line with a `text` field (.jsonl).

    Raises ValueError with file and line for a line that is not a passage, and for an incomplete file of LAMBADA's own.
    """
    if path.suffix.lower() in (".jsonl", ".json"):
        lines = ((place, fields.get("text")) for place, fields in task.read_json_lines(path))
    else:
        lines = ((f"{path}, line {number}", line) for number, line in enumerate(task.read_lines(path), 1))
    passages = []
    for place, passage in lines:
        if not isinstance(passage, str):
            raise ValueError(f"{place} has no string `text`. Fix or remove the line")
        if len(passage.split()) < 2:
            raise ValueError(f"{place} has fewer than two words: {passage[:40]!r}. Remove the line")
        passages.append(passage)
    if not passages:
        raise ValueError(f"{path} contains no passages. Use a file with one passage per line")
    _, expected = FILES.get(path.name, (None, len(passages)))
    if len(passages) != expected:
        raise ValueError(f"{path} has {len(passages):,} passages, expected {expected:,}. Download the file again")
    return passages


def from_hub(text: str) -> list[str]:
    """The passages of the test set from the Hugging Face hub."""
    name, config = HUB[text]
    return [row["text"] for row in task.hub_rows(name, config, split="test")]


def requests(protocol: str, passage: str, encode: Encode) -> list[Request]:
    """One request: the context and target of a passage by this protocol."""
    if protocol in ("last-token-norm", "stop-filter"):
        passage = "\n" + normalize_quotes(passage)
    if protocol in ("last-token", "last-token-norm"):
        ids = encode(passage)
        request = Request(ids[:-1], ids[-1:])
    else:
        # split(" "), not split(): seven of OpenAI's passages have a newline within the last "word".
        context, _, target = passage.rpartition(" ")
        if not target.strip():
            raise UnscorableError("ends with a space, so that its last word is empty")
        # The harness predicts all whitespace before the last word with it.
        end = len(context) if protocol == "stop-filter" else len(context.rstrip())
        request = Request(encode(context[:end]), encode(f"{context[end:]} {target}"))
    if not request.context:
        raise UnscorableError("no context before the last word")
    return [request]


def normalize_quotes(text: str) -> str:
    """Curly quotes and LaTeX's `` and '' as straight quotes."""
    pairs = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "``": '"', "''": '"'}
    for old, new in pairs.items():
        text = text.replace(old, new)
    return text


def judge(protocol: str, passage: str, scores: list[Score]) -> Verdict:
    """Correct if every token of the target is the most likely one, given the true tokens before it."""
    (score,) = scores
    margins = list(score.margins)
    if protocol == "stop-filter":  # the mask excludes stop words at the first token only
        margins[0] = score.allowed_margins[0]
    return Verdict(min(margins) > 0, near_tie=abs(min(margins)) < NEAR_TIE, logprob=score.total)


def perplexity(protocol: str, verdicts: list[Verdict]) -> float | None:
    """exp of the mean negative log-probability per word; None for protocols with single-token targets."""
    logprobs = [verdict.logprob for verdict in verdicts if verdict.logprob is not None]
    if protocol not in PER_WORD or not logprobs:
        return None
    return task.exp_mean(logprobs, len(logprobs))


def stop_word_mask(encoding: Any, vocab_size: int) -> Any:
    """(vocab_size,) bool: ids whose text is a stop word of stop_words.txt."""
    import torch

    lines = (Path(__file__).parent / "stop_words.txt").read_text(encoding="utf-8").splitlines()
    stop_words = {word for line in lines if not line.startswith("#") for word in line.split()}
    known = min(vocab_size, encoding.n_vocab)  # a padded vocabulary has more ids than the encoding
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[:known] = torch.tensor([encoding.decode([i]).strip().lower() in stop_words for i in range(known)])
    return mask


def masked_ids(protocols: list[str], encoding: Any, vocab_size: int) -> Any:
    """The ids that `stop-filter` excludes, (vocab_size,) bool; None if it is not among the protocols."""
    return stop_word_mask(encoding, vocab_size) if "stop-filter" in protocols else None


TASK = Task(
    name="lambada",
    title="LAMBADA",
    protocols=tuple(PROTOCOLS),
    load=load,
    requests=requests,
    judge=judge,
    text=str,
    perplexity=perplexity,
    masked_ids=masked_ids,
)
