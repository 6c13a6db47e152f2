"""Score a model on HellaSwag: which of four endings follows a description, by protocol.

    python eval_hellaswag.py --ckpt logs/gpt2                        # a run; the validation split comes from the hub
    python eval_hellaswag.py --ckpt gpt2 gpt2-medium --protocol all  # OpenAI's weights, every protocol
    python eval_hellaswag.py --ckpt logs/gpt2 --data hellaswag_val.jsonl
    torchrun --nproc_per_node=8 eval_hellaswag.py --ckpt gpt2-xl     # a share of the questions a GPU
    python eval_hellaswag.py --compare a.jsonl b.jsonl               # is one better? (files of --items)

Results go to logs/results/, where report.py finds them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from core import cli
from core.eval import evaluate, hellaswag, results
from core.eval.task import QuestionSet


@dataclass
class Questions:
    """What is asked, and by which rule."""

    data: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of questions, a JSON object a line, as the authors' hellaswag_val.jsonl.
    Default: the hub's validation split."""
    protocol: tuple[Literal[("all", *hellaswag.PROTOCOLS)], ...] = ("harness", "harness-norm")  # type: ignore[valid-type]
    """How to score: as lm-evaluation-harness, or endings as completions, as build-nanogpt; -norm by their length."""


@dataclass
class Config(Questions, evaluate.Scoring):
    """Each of the dataclasses is a group of --help."""


def main(config: Config) -> None:
    if config.compare:
        return evaluate.compare(config)
    sources = evaluate.check(config, (config.data,) if config.data else ())
    protocols = evaluate.chosen(config.protocol, hellaswag.PROTOCOLS)
    questions = load_questions(config, protocols)
    figures = f"Published, accuracy %:\n\n{results.published_table('hellaswag', protocols)}"
    evaluate.run(hellaswag.TASK, config, sources, [questions], figures)


def load_questions(config: Config, protocols: list[str]) -> QuestionSet:
    if config.data is None:
        return QuestionSet(hellaswag.from_hub(), protocols, *evaluate.data_facts(None, hellaswag.HUB))
    path = Path(config.data)
    facts = evaluate.data_facts(path, "")
    return QuestionSet(hellaswag.read(path), protocols, *facts, has_published=path.name == hellaswag.FILE)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
