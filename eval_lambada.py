"""Score a model on LAMBADA: how often it knows a passage's last word, by protocol.

    python eval_lambada.py --ckpt logs/gpt2                          # a run; the test set comes from the hub
    python eval_lambada.py --ckpt gpt2 gpt2-medium --protocol all    # OpenAI's weights, every protocol
    python eval_lambada.py --ckpt logs/gpt2 --data lambada_test_plain_text.txt
    torchrun --nproc_per_node=8 eval_lambada.py --ckpt gpt2-xl       # a share of the passages a GPU
    python eval_lambada.py --compare a.jsonl b.jsonl                 # is one better? (files of --items)

Results go to logs/results/, where report.py finds them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from core import cli
from core.eval import evaluate, lambada, results
from core.eval.task import QuestionSet


@dataclass
class Questions:
    """What is asked, and by which rule."""

    data: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of passages: .txt, one a line, or .jsonl with a `text` field. Default: the hub's test set."""
    text: Annotated[Literal["openai", "standard", "other"] | None, cli.DEFAULT_IN_HELP] = None
    """Which text --data holds: OpenAI's, the tokenised standard one, or one of your own.
    Known from LAMBADA's own file names; lines can't tell."""
    protocol: tuple[Literal[("all", *lambada.PROTOCOLS)], ...] = ()  # type: ignore[valid-type]
    """How to score; `all` that the data allow. Default: openai, on a standard text standard."""


@dataclass
class Config(Questions, evaluate.Scoring):
    """Each of the dataclasses is a group of --help."""


def main(config: Config) -> None:
    if config.compare:
        return evaluate.compare(config)
    sources = evaluate.check(config, (config.data,) if config.data else ())
    text = which_text(config)
    protocols = which_protocols(config, text)
    questions = load_questions(config, protocols, text)
    evaluate.run(lambada.TASK, config, sources, questions, published_figures(protocols))


def which_text(config: Config) -> str | None:
    """The text that --data holds, None for the hub's. Raises ValueError where nothing tells."""
    if config.data is None:
        if config.text is not None:
            raise ValueError(f"--text {config.text} says what --data holds: give --data, or choose by --protocol")
        return None
    known = lambada.text_of(Path(config.data))
    if config.text is None and known is None:
        raise ValueError(
            f"--data {config.data}: lines can't tell which text they are; add --text openai (as OpenAI's "
            f"lambada_test.jsonl), --text standard (tokenised), or --text other (your own passages)"
        )
    if known is not None and config.text not in (None, known, "other"):
        raise ValueError(
            f"--text {config.text}, but {Path(config.data).name} is the name of the text {known}: leave it out"
        )
    return config.text or known


def which_protocols(config: Config, text: str | None) -> list[str]:
    """The protocols to run. Raises ValueError for one that the text doesn't allow."""
    possible = list(lambada.PROTOCOLS) if text is None else lambada.allowed(text)
    chosen = evaluate.chosen(config.protocol, tuple(possible)) or possible[:1]
    for protocol in chosen:
        if protocol not in possible:
            raise ValueError(
                f"--protocol {protocol} needs another text than {text}, which allows {', '.join(possible)}"
            )
    return chosen


def load_questions(config: Config, protocols: list[str], text: str | None) -> list[QuestionSet]:
    """The passages of each text that the protocols need, with the protocols that it is scored by."""
    if config.data is not None:
        path = Path(config.data)
        facts = evaluate.data_facts(path, "")
        passages = lambada.read(path)
        is_test_set = text != "other" and len(passages) == lambada.TEST_PASSAGES
        return [QuestionSet(passages, protocols, *facts, has_published=is_test_set)]
    by_text: dict[str, list[str]] = {}
    for protocol in protocols:
        by_text.setdefault(lambada.PROTOCOLS[protocol], []).append(protocol)
    return [
        QuestionSet(lambada.from_hub(text), chosen, *evaluate.data_facts(None, lambada.HUB[text][0]))
        for text, chosen in by_text.items()
    ]


def published_figures(protocols: list[str]) -> str:
    return (
        f"On the test set of {lambada.TEST_PASSAGES:,} passages, accuracy % (perplexity); OpenAI's weights unless\n"
        f"the source says otherwise:\n\n{results.published_table('lambada', protocols)}"
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
