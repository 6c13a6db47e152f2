"""Score a model on the Children's Book Test: which of ten words fills the blank, by protocol.

    python eval_cbt.py --ckpt logs/gpt2                              # a run; NE and CN, validation, from the hub
    python eval_cbt.py --ckpt gpt2 gpt2-medium --types NE CN V P --split test --protocol all
    python eval_cbt.py --ckpt logs/gpt2 --data cbtest_NE_valid_2000ex.txt cbtest_CN_valid_2000ex.txt

Results go to logs/results/, where report.py finds them.
"""

import re
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from core import checkpoint, cli, results
from core.distributed import pick_device
from core.results import Result
from core.scoring import score
from core.tasks import cbt


@dataclass
class Config:
    ckpt: tuple[str, ...]
    """Models: a run or checkpoint folder, a Hugging Face folder, or a hub name (gpt2, gpt2-medium, ...)."""
    data: tuple[str, ...] = ()
    """Files in the data set's own format (21 numbered lines a question). Default: the hub's data set."""
    types: tuple[Literal[cbt.TYPES], ...] = ("NE", "CN")
    """Types of words, from the hub: named entities, common nouns, verbs, prepositions."""
    split: Literal["validation", "test"] = "validation"
    """Of the hub's data set. The GPT-2 paper reports validation."""
    protocol: tuple[Literal[("all", *cbt.PROTOCOLS)], ...] = ("paper",)
    """How to score; README tells them apart."""
    batch_size: int = 32
    """Sequences a forward. Changes the result by rounding alone."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    out: str | None = None
    """File for the results. Default: one in logs/results/, where report.py looks."""
    items: str | None = None
    """File for the outcome of each question, a JSON object a line."""


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one type from one place."""

    name: str  # such as "NE validation"
    official: bool  # whether published figures speak of these very questions
    clozes: list[cbt.Cloze]
    facts: dict[str, Any]


def main(config: Config) -> None:
    cli.check_positive(batch_size=config.batch_size)
    sources = checkpoint.resolve_all(config.ckpt)
    protocols = list(cbt.PROTOCOLS) if "all" in config.protocol else list(dict.fromkeys(config.protocol))
    sets = load_questions(config)
    device = pick_device(config.device)
    found: list[Result] = []
    items: list[dict[str, Any]] = []
    for source in sources:
        model = checkpoint.load_model(source).to(device)
        encoding = checkpoint.load_encoding(source, model.config.vocab_size)
        for questions in sets:
            for protocol in protocols:
                result, verdicts = evaluate(model, encoding, source, protocol, questions, config)
                found.append(result)
                facts = {"model": result.model, "protocol": protocol, "data": questions.name}
                for i, (v, cloze) in enumerate(zip(verdicts, questions.clozes, strict=True)):
                    items.append(facts | {"index": i, "correct": v.correct, "chosen": v.chosen, "answer": cloze.answer})
    print(f"\n{results.results_table(found)}\n")
    if any(questions.official for questions in sets):
        print("Published, accuracy %; OpenAI's weights unless the source says otherwise:\n")
        print(results.published_table("cbt", protocols))
    reduced = sum(len(cloze.options) < 10 for questions in sets for cloze in questions.clozes)
    print(f"questions with fewer than ten different candidates: {reduced}")
    print(results.near_ties_line(found))
    if config.items:
        results.save_items(items, config.items)
    print(f"\nsaved {results.save(found, config.out)}")


def load_questions(config: Config) -> list[QuestionSet]:
    if not config.data:
        return [
            QuestionSet(
                f"{kind} {config.split}",
                True,
                cbt.from_hub(kind, config.split),
                results.data_facts(None, f"{cbt.HUB} {kind} {config.split}"),
            )
            for kind in config.types
        ]
    sets = []
    for name in config.data:
        path = Path(name)
        clozes = cbt.read(path)
        whole = re.fullmatch(r"cbtest_(?:NE|CN|V|P)_(?:valid_(2000)|test_(2500))ex\.txt", path.name)
        official = whole is not None and len(clozes) == int(whole[1] or whole[2])
        sets.append(QuestionSet(path.stem, official, clozes, results.data_facts(path, "")))
    return sets


def evaluate(
    model: Any, encoding: Any, source: str, protocol: str, questions: QuestionSet, config: Config
) -> tuple[Result, list[cbt.Verdict]]:
    begin = time.perf_counter()
    asked = [cbt.question(protocol, cloze, encoding.encode_ordinary) for cloze in questions.clozes]
    label = f"CBT {questions.name} {protocol}"
    scores = iter(score(model, [q for group in asked for q in group], config.batch_size, label=label))
    verdicts = [
        cbt.judge(protocol, cloze, list(islice(scores, len(group))))
        for cloze, group in zip(questions.clozes, asked, strict=True)
    ]
    result = Result(
        task="cbt",
        protocol=protocol,
        model=results.short_name(source),
        correct=sum(verdict.correct for verdict in verdicts),
        total=len(verdicts),
        perplexity=None,
        seconds=time.perf_counter() - begin,
        has_published=questions.official,
        near_ties=sum(verdict.near_tie for verdict in verdicts),
        **questions.facts,
    )
    return result, verdicts


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
