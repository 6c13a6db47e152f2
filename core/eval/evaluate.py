"""What every evaluation does: models x questions x protocols -> verdicts, tables and files."""

import hashlib
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from core import checkpoint, cli
from core.distributed import Ranks, process_group
from core.eval import results
from core.eval.results import Result
from core.eval.scoring import Request, Score, default_batch_tokens, excess, score
from core.eval.task import Encode, QuestionSet, Task, UnscorableError, Verdict
from model import GPT, PRESETS


@dataclass
class Scoring:
    """Which models, and how they are scored."""

    ckpt: tuple[str, ...] = ()
    """Models: a run or checkpoint folder, a Hugging Face folder, or a hub name (gpt2, gpt2-medium, ...).
    Several give one table, and McNemar's test of each pair."""
    compare: Annotated[tuple[str, str] | None, cli.DEFAULT_IN_HELP] = None
    """Two files that --items wrote: McNemar's exact test of the models in them. Nothing is scored."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the blocks' matrix products. bfloat16 is faster on a GPU, turns near-ties, and is named in the results."""
    batch_tokens: Annotated[int | None, cli.DEFAULT_IN_HELP] = None
    """Tokens a forward; fewer when memory runs out. Changes the result by rounding alone.
    Default: 32,768 on a GPU, 1,024 on a CPU, what its caches hold."""
    device: str = "auto"
    """auto, cuda, mps or cpu. Under torchrun each rank scores its share."""
    out: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File for the results. Default: one each in logs/results/, where report.py finds them."""
    items: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File for the outcome of each question, a JSON object a line; --compare reads it."""


def check(options: Scoring, data: tuple[str, ...]) -> list[str]:
    """The models to score, resolved. Refuses what can't be meant, before anything is loaded."""
    if options.batch_tokens is not None:
        cli.check_positive(batch_tokens=options.batch_tokens)
    taken = {Path(file).resolve(): f"--data {file}" for file in data}
    for name, file in (("out", options.out), ("items", options.items)):
        if file is None:
            continue
        if Path(file).is_dir():
            raise ValueError(f"--{name} {file} is a folder: name a file")
        if other := taken.get(Path(file).resolve()):
            raise ValueError(f"--{name} {file} would overwrite {other}: name another file")
        taken[Path(file).resolve()] = f"--{name} {file}"
        Path(file).parent.mkdir(parents=True, exist_ok=True)  # fails now where it can't be, not after the scoring
    return list(dict.fromkeys(checkpoint.resolve_all(options.ckpt)))


def chosen(protocols: tuple[str, ...], possible: tuple[str, ...]) -> list[str]:
    """What --protocol names, each once; `all` names every possible one."""
    return list(possible) if "all" in protocols else list(dict.fromkeys(protocols))


def compare(options: Scoring) -> None:
    """McNemar's test of the models in the two files of --compare."""
    if useless := [f"--{name}" for name in ("ckpt", "data", "out", "items") if getattr(options, name, None)]:
        raise ValueError(f"--compare reads what --items wrote and scores nothing: leave {' and '.join(useless)} out")
    a, b = options.compare or ("", "")
    table = results.comparison_table(results.load_items(a), results.load_items(b))
    if table is None:
        raise ValueError(f"{a} and {b} have no protocol in common: score both models by the same one")
    print(table)


def run(task: Task, options: Scoring, sources: list[str], sets: list[QuestionSet], reference: str) -> None:
    """Score all models on all sets, print one table and, below it, `reference`; save results and items."""
    with process_group(options.device) as ranks:
        found: list[Result] = []
        items: list[dict[str, Any]] = []
        sources = ranks.broadcast(sources)  # a run that still trains may have shown each rank another newest checkpoint
        for source, name in zip(sources, results.short_names(sources), strict=True):
            model = load(source, ranks)
            encoding = checkpoint.load_encoding(source, model.config.vocab_size)
            for questions in sets:
                begin = time.perf_counter()
                verdicts = evaluate(task, model, encoding, questions, options, ranks)
                seconds = time.perf_counter() - begin
                for protocol, outcome in verdicts.items():
                    found.append(summarize(task, model, name, protocol, questions, outcome, options.dtype, seconds))
                    items += itemize(task, found[-1], questions, outcome)
            del model  # before the next one is loaded beside it
        if ranks.is_main:
            report(options, found, items, reference)


def load(source: str, ranks: Ranks) -> GPT:
    model = checkpoint.load_model(source)
    try:
        return model.to(ranks.device)
    except torch.OutOfMemoryError:
        raise ValueError(f"{source} doesn't fit on the GPU beside what else runs there: take --device cpu") from None


def evaluate(
    task: Task, model: GPT, encoding: Any, questions: QuestionSet, options: Scoring, ranks: Ranks
) -> dict[str, list[Verdict]]:
    """A verdict on each question by each of the set's protocols. All ranks must call it."""
    asked = ask(task, questions, encoding.encode_ordinary, model.config.n_positions)
    banned = task.banned(questions.protocols, encoding, model.config.vocab_size)
    label = " ".join([task.title, questions.subset, *questions.protocols])
    try:
        verdicts = answer(
            task,
            model,
            asked,
            ranks=ranks,
            banned=banned,
            label=label,
            batch_tokens=options.batch_tokens,
            dtype=options.dtype,
        )
    except torch.OutOfMemoryError:
        tokens = options.batch_tokens or default_batch_tokens(ranks.device)
        raise ValueError(f"out of memory at --batch-tokens {tokens}: take fewer") from None
    n = len(questions.questions)
    return {protocol: verdicts[i * n : (i + 1) * n] for i, protocol in enumerate(questions.protocols)}


@dataclass(frozen=True)
class Asked:
    """A question by a protocol, as the model is asked it; without requests where it can't be."""

    protocol: str
    question: Any
    requests: list[Request]
    unscored: str | None
    remarks: tuple[str, ...]


def ask(task: Task, questions: QuestionSet, encode: Encode, n_positions: int) -> list[Asked]:
    """All questions by the first protocol, then all by the next, for a model of this context."""
    return [
        _ask(task, protocol, question, encode, n_positions)
        for protocol in questions.protocols
        for question in questions.questions
    ]


def _ask(task: Task, protocol: str, question: Any, encode: Encode, n_positions: int) -> Asked:
    try:
        requests = task.requests(protocol, question, encode)
    except UnscorableError as reason:
        return Asked(protocol, question, [], str(reason), ())
    cut = excess(requests, n_positions)
    if cut >= min(len(request.context) for request in requests):
        return Asked(protocol, question, [], f"longer than the model's context of {n_positions} tokens", ())
    remarks = (f"context cut to the model's {n_positions} tokens",) if cut else ()
    return Asked(protocol, question, requests, None, remarks)


def answer(task: Task, model: GPT, asked: list[Asked], **how: Any) -> list[Verdict]:
    """A verdict on each; `how` are the settings of scoring.score. All ranks must call it."""
    scores = iter(score(model, [each.requests for each in asked if each.requests], **how))
    return [
        _judge(task, each, next(scores)) if each.requests else Verdict(correct=False, unscored=each.unscored)
        for each in asked
    ]


def _judge(task: Task, asked: Asked, scores: list[Score]) -> Verdict:
    if not all(math.isfinite(score.total) for score in scores):
        return Verdict(correct=False, unscored="the model's log-probabilities are not finite")
    verdict = task.judge(asked.protocol, asked.question, scores)
    return Verdict(**vars(verdict) | {"remarks": verdict.remarks + asked.remarks})


def summarize(
    task: Task,
    model: GPT,
    name: str,
    protocol: str,
    questions: QuestionSet,
    verdicts: list[Verdict],
    dtype: str,
    seconds: float,
) -> Result:
    shape = (model.config.n_layer, model.config.n_embd)
    return Result(
        task=task.name,
        protocol=protocol,
        model=name,
        size=next((s for s in results.SIZES if (PRESETS[s].n_layer, PRESETS[s].n_embd) == shape), None),
        dtype=dtype,
        data=questions.data,
        sha256=questions.sha256,
        subset=questions.subset,
        correct=sum(verdict.correct for verdict in verdicts),
        total=len(verdicts),
        unscored=dict(Counter(verdict.unscored for verdict in verdicts if verdict.unscored)),
        remarks=dict(Counter(remark for verdict in verdicts for remark in verdict.remarks)),
        perplexity=task.perplexity(protocol, verdicts),
        seconds=seconds,
        has_published=questions.has_published,
        near_ties=sum(verdict.near_tie for verdict in verdicts),
    )


def itemize(task: Task, result: Result, questions: QuestionSet, verdicts: list[Verdict]) -> list[dict[str, Any]]:
    """A line a question. `question` is a hash of its text, so that answers to other questions are never compared."""
    model = result.model if result.dtype == "float32" else f"{result.model} ({result.dtype})"
    facts = {"task": task.name, "protocol": result.protocol, "model": model, "subset": questions.subset}
    items = []
    for index, (question, verdict) in enumerate(zip(questions.questions, verdicts, strict=True)):
        digest = hashlib.sha256(task.text(question).encode()).hexdigest()[:16]
        said = {name: value for name, value in asdict(verdict).items() if value is not None and value != ()}
        items.append(facts | {"index": index, "question": digest} | said)
    return items


def report(options: Scoring, found: list[Result], items: list[dict[str, Any]], reference: str) -> None:
    saved = results.save(found, options.out)
    if options.items:
        results.save_items(items, options.items)
    print(f"\n{results.results_table(found)}\n")
    if pairs := results.comparison_table(items):
        print(f"{pairs}\n")
    if any(result.has_published for result in found):
        print(f"{reference}\n")
    if notes := results.footnotes(found):
        print(f"{notes}\n")
    print(f"saved {saved}")


def data_facts(path: Path | None, hub_name: str) -> tuple[str, str | None]:
    """How a question set names where it is from: its `data` and `sha256`."""
    from core.files import sha256

    return (hub_name, None) if path is None else (path.name, sha256(path))
