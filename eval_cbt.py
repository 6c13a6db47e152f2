"""Score a model on the Children's Book Test: which of ten words fills the blank, by protocol.

    python eval_cbt.py --ckpt logs/gpt2                              # a run; NE and CN, validation, from the hub
    python eval_cbt.py --ckpt gpt2 gpt2-medium --types NE CN V P --split test --protocol all
    python eval_cbt.py --ckpt logs/gpt2 --data cbtest_NE_valid_2000ex.txt cbtest_CN_valid_2000ex.txt
    torchrun --nproc_per_node=8 eval_cbt.py --ckpt gpt2-xl           # a share of the questions a GPU
    python eval_cbt.py --compare a.jsonl b.jsonl                     # is one better? (files of --items)

Results go to logs/results/, where report.py finds them.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core import cli
from core.eval import cbt, evaluate, results
from core.eval.task import QuestionSet

OFFICIAL = re.compile(r"cbtest_(NE|CN|V|P)_(?:valid_(2000)|test_(2500))ex\.txt")


@dataclass
class Questions:
    """What is asked, and by which rule."""

    data: tuple[str, ...] = ()
    """Files in the data set's own format (21 numbered lines a question). Default: the hub's data set."""
    types: tuple[Literal[cbt.TYPES], ...] = ("NE", "CN")  # type: ignore[valid-type]
    """Types of words, from the hub: named entities, common nouns, verbs, prepositions."""
    split: Literal["validation", "test"] = "validation"
    """Of the hub's data set. The GPT-2 paper reports validation."""
    protocol: tuple[Literal[("all", *cbt.PROTOCOLS)], ...] = ("paper",)  # type: ignore[valid-type]
    """How to score; README tells them apart."""


@dataclass
class Config(Questions, evaluate.Scoring):
    """Each of the dataclasses is a group of --help."""


def main(config: Config) -> None:
    if config.compare:
        return evaluate.compare(config)
    sources = evaluate.check(config, config.data)
    protocols = evaluate.chosen(config.protocol, cbt.PROTOCOLS)
    evaluate.run(cbt.TASK, config, sources, load_questions(config, protocols), published_figures(protocols))


def load_questions(config: Config, protocols: list[str]) -> list[QuestionSet]:
    if config.data:
        if (config.types, config.split) != (Questions.types, Questions.split):
            raise ValueError("--types and --split choose among the hub's questions: leave them out, or --data")
        sets = [load_file(Path(name), protocols) for name in dict.fromkeys(config.data)]
        if len({questions.subset for questions in sets}) < len(sets):
            raise ValueError(
                f"--data {' '.join(config.data)}: two files of one name; results name files, so rename one"
            )
        return sets
    return [
        QuestionSet(
            cbt.from_hub(kind, config.split),
            protocols,
            *evaluate.data_facts(None, f"{cbt.HUB} {kind} {config.split}"),
            subset=f"{kind} {config.split}",
        )
        for kind in dict.fromkeys(config.types)
    ]


def load_file(path: Path, protocols: list[str]) -> QuestionSet:
    """The questions of a file; published figures speak of the data set's own, which must be whole."""
    clozes, facts = cbt.read(path), evaluate.data_facts(path, "")
    name = OFFICIAL.fullmatch(path.name)
    if name is None:
        return QuestionSet(clozes, protocols, *facts, subset=path.stem, has_published=False)
    whole = int(name[2] or name[3])
    if len(clozes) != whole:
        raise ValueError(f"{path} holds {len(clozes):,} questions of {whole:,}: it was cut short; fetch it again")
    return QuestionSet(clozes, protocols, *facts, subset=f"{name[1]} {'validation' if name[2] else 'test'}")


def published_figures(protocols: list[str]) -> str:
    return (
        "Published, accuracy %; OpenAI's weights unless the source says otherwise:\n\n"
        f"{results.published_table('cbt', protocols)}"
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
