"""The main function of every evaluation: models x questions x protocols -> verdicts, tables and files."""

import hashlib
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from core import checkpoint, cli
from core.distributed import Ranks, is_out_of_memory, process_group
from core.eval import check, results
from core.eval.interruption import INTERRUPTED, Output, interruptible
from core.eval.results import Result
from core.eval.scoring import Interrupted, Request, Score, default_batch_tokens, score, tokens_to_truncate
from core.eval.task import QuestionSet, Task, TaskConfig, UnscorableError, Verdict
from model import GPT, PRESETS


@dataclass
class ScoringConfig:
    """Models, precision and output files."""

    ckpt: Annotated[tuple[str, ...], cli.DEFAULT_IN_HELP] = ()
    """Models: run or checkpoint folders, Hugging Face folders, checkpoint files of nanoGPT, build-nanogpt or llm.c, or
    hub names (gpt2, gpt2-medium, ...).
    Several models give one table, and McNemar's test for each pair. Required without --compare."""
    compare: Annotated[tuple[str, str] | None, cli.DEFAULT_IN_HELP] = None
    """Two files that --items wrote: print McNemar's exact test of their models. Scores nothing. Default: no test."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the matrix products in the blocks. bfloat16 is faster on a GPU and can change close outcomes."""
    batch_tokens: Annotated[int | None, cli.DEFAULT_IN_HELP] = None
    """Tokens per forward pass. Reduce it if memory runs out; it changes results by rounding only.
    Default: 32,768 on a GPU, 1,024 on a CPU."""
    device: str = "auto"
    """Device: auto, cuda, mps or cpu. With torchrun, each rank scores a share of the questions."""
    out: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File for the results (JSON). Default: one file per result in logs/results/, where report.py reads them."""
    items: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File for the outcome of each question, one JSON object per line, for --compare. Default: not written."""
    check: bool = False
    """Compare each score of OpenAI's weights with the published figure of its protocol and size, within 0.3 points of
    accuracy and 1 % of perplexity. Exit status: 0 all pass, 1 one fails, 2 a figure is missing; torchrun itself exits
    with 1 for both."""


def run(task: Task, questions: TaskConfig, options: ScoringConfig) -> None:
    """Score all models on all question sets, print one table, and save results and items; or only compare."""
    data = [questions.data] if isinstance(questions.data, str) else list(questions.data or ())
    if options.compare and task.windows:
        raise ValueError(
            f"--compare counts right answers, which {task.title} has none of. Compare the intervals of --out"
        )
    if options.compare:
        return compare(options, data)
    sources = check_options(options, data)
    sets = task.load(questions)
    status = 0
    with process_group(options.device) as ranks, interruptible(is_main=ranks.is_main):
        sources = ranks.broadcast(sources)  # ranks may have found different newest checkpoints of a run in training
        output = Output(options.out, options.items) if ranks.is_main else None
        try:
            score_models(task, sources, sets, options, ranks, add=output.add if output else None)
        except KeyboardInterrupt:
            if output:
                print(output.interruption(results.short_names(sources), sets), file=sys.stderr)
            raise
        if output:
            print_tables(output)
            if options.check:
                rows = check.compare(output.results)
                print(f"\n{check.table(rows)}")
                status = check.status(rows)
    if status:
        sys.exit(status)


def check_options(options: ScoringConfig, data: list[str]) -> list[str]:
    """The models to score, resolved. Raises ValueError for options that can't work, before anything is loaded."""
    if options.batch_tokens is not None:
        cli.check_positive(batch_tokens=options.batch_tokens)
    used = {Path(file).resolve(): f"--data {file}" for file in data}
    for name, file in (("out", options.out), ("items", options.items)):
        if file is None:
            continue
        if Path(file).is_dir():
            raise ValueError(f"--{name} {file} is a folder. Use a file name")
        if other := used.get(Path(file).resolve()):
            raise ValueError(f"--{name} {file} would overwrite {other}. Use another file name")
        used[Path(file).resolve()] = f"--{name} {file}"
        Path(file).parent.mkdir(parents=True, exist_ok=True)  # an impossible path fails here, not after the scoring
    return list(dict.fromkeys(checkpoint.resolve_all(options.ckpt)))


def compare(options: ScoringConfig, data: list[str]) -> None:
    """Print McNemar's test of the models in the two files of --compare."""
    given: dict[str, Any] = {"--ckpt": options.ckpt, "--data": data, "--out": options.out, "--items": options.items}
    given["--check"] = options.check
    if excluded := " and ".join(name for name, value in given.items() if value):
        raise ValueError(f"--compare reads two files of --items and scores nothing. Remove {excluded}")
    a, b = options.compare or ("", "")
    items_a, items_b = results.load_items(a), results.load_items(b)
    table = results.comparison_table(items_a, items_b)
    if table is None:
        raise ValueError(f"--compare {a} {b}: the files have no protocol in common. Score both models by the same one")
    print(table)
    for file, items in ((a, items_a), (b, items_b)):
        if any(INTERRUPTED in item for item in items):
            print(f"\n{file} is not complete: its evaluation was interrupted")


def score_models(
    task: Task,
    sources: list[str],
    sets: list[QuestionSet],
    options: ScoringConfig,
    ranks: Ranks,
    add: Callable[[list[Result], list[dict[str, Any]]], None] | None = None,
) -> list[Result]:
    """Results of every model on every set. All ranks must call it, with the same sources.

    `add` gets the results and items of a set as soon as it is complete, and the items of a set that Ctrl-C ended.
    """
    found: list[Result] = []
    add = add or (lambda found, items: None)
    for source, name in zip(sources, results.short_names(sources), strict=True):
        model = load_model(source, ranks)
        encoding = checkpoint.load_encoding(source, model.config.vocab_size)
        label = name if options.dtype == "float32" else f"{name} ({options.dtype})"
        for questions in [task.fit(each, model.config.n_positions) for each in sets]:
            start = time.perf_counter()
            try:
                by_protocol = evaluate(task, model, encoding, questions, options, ranks)
            except Interrupted as interrupted:
                for protocol, some in split_verdicts(questions, interrupted.verdicts).items():
                    partial = build_items(task, label, protocol, questions, some)
                    add([], [item | {INTERRUPTED: True} for item in partial])
                raise
            seconds = time.perf_counter() - start
            new, items = [], []
            for protocol, verdicts in by_protocol.items():
                new.append(summarize(task, model, name, protocol, questions, verdicts, options.dtype, seconds))
                items += build_items(task, label, protocol, questions, verdicts)
            found += new
            add(new, items)
        del model  # frees its memory before the next one is loaded
    return found


def load_model(source: str, ranks: Ranks) -> GPT:
    model = checkpoint.load_model(source)
    try:
        return model.to(ranks.device)
    except torch.OutOfMemoryError:
        raise ValueError(f"--ckpt {source} does not fit in the free memory of the GPU. Use --device cpu") from None


def evaluate(
    task: Task, model: GPT, encoding: Any, questions: QuestionSet, options: ScoringConfig, ranks: Ranks
) -> dict[str, list[Verdict]]:
    """Verdicts by protocol, in the order of the questions. All ranks must call it."""
    instances = build_requests(task, questions, encoding, model.config.n_positions)
    try:
        verdicts = score_requests(
            task,
            model,
            instances,
            ranks=ranks,
            dtype=options.dtype,
            batch_tokens=options.batch_tokens,
            masked_ids=task.masked_ids(questions.protocols, encoding, model.config.vocab_size),
            label=" ".join([task.title, questions.subset, *questions.protocols]),
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        tokens = options.batch_tokens or default_batch_tokens(ranks.device)
        raise ValueError(f"--batch-tokens {tokens} is too large: out of memory. Use a smaller value") from None
    return split_verdicts(questions, verdicts)


def split_verdicts(questions: QuestionSet, verdicts: list[Any]) -> dict[str, list[Any]]:
    """The verdicts on all questions by the first protocol, then by the next, as lists by protocol."""
    n = len(questions.questions)
    return {protocol: verdicts[i * n : (i + 1) * n] for i, protocol in enumerate(questions.protocols)}


@dataclass(frozen=True)
class Instance:
    """A question by a protocol, as requests to the model; without requests if it can't be scored."""

    protocol: str
    question: Any
    groups: list[list[Request]]  # as for scoring.score: one of all requests, or one for each window
    unscored: str | None = None  # the reason
    warnings: tuple[str, ...] = ()


def build_requests(task: Task, questions: QuestionSet, encoding: Any, n_positions: int) -> list[Instance]:
    """All questions by the first protocol, then all by the next, for a model with a context of n_positions tokens."""
    return [
        _build_instance(task, protocol, question, encoding, n_positions)
        for protocol in questions.protocols
        for question in questions.questions
    ]


def _build_instance(task: Task, protocol: str, question: Any, encoding: Any, n_positions: int) -> Instance:
    try:
        if task.windows:
            windows = task.windows(protocol, question, encoding, n_positions)
            return Instance(protocol, question, [[request] for request in windows])
        assert task.requests is not None
        requests = task.requests(protocol, question, encoding.encode_ordinary)
    except UnscorableError as reason:
        return Instance(protocol, question, [], unscored=str(reason))
    cut = tokens_to_truncate(requests, n_positions)
    if cut >= min(len(request.context) for request in requests):
        return Instance(protocol, question, [], unscored=f"longer than the model's context of {n_positions} tokens")
    warnings = (f"context cut to the model's {n_positions} tokens",) if cut else ()
    return Instance(protocol, question, [requests], warnings=warnings)


def score_requests(
    task: Task,
    model: GPT,
    instances: list[Instance],
    *,
    ranks: Ranks | None = None,
    dtype: str = "float32",
    batch_tokens: int | None = None,
    masked_ids: Tensor | None = None,
    label: str = "scoring",
) -> list[Verdict]:
    """A verdict per instance; the settings are those of scoring.score. All ranks must call it."""
    groups = [group for instance in instances for group in instance.groups]
    try:
        scores = score(
            model, groups, ranks=ranks, dtype=dtype, batch_tokens=batch_tokens, masked_ids=masked_ids, label=label
        )
    except Interrupted as interrupted:
        interrupted.verdicts = _judge_all(task, instances, interrupted.scores)
        raise
    verdicts = _judge_all(task, instances, [*scores])
    return [verdict for verdict in verdicts if verdict is not None]


def _judge_all(task: Task, instances: list[Instance], scores: list[list[Score] | None]) -> list[Verdict | None]:
    """A verdict per instance, from the scores of all groups; None where those of a group are missing."""
    remaining = iter(scores)
    verdicts: list[Verdict | None] = []
    for instance in instances:
        own = [next(remaining) for _ in instance.groups]
        is_complete = None not in own
        verdicts.append(_judge(task, instance, [*chain(*filter(None, own))]) if is_complete else None)
    return verdicts


def _judge(task: Task, instance: Instance, scores: list[Score]) -> Verdict:
    if instance.unscored is not None:
        return Verdict(correct=False, unscored=instance.unscored)
    if not all(math.isfinite(score.total) for score in scores):
        return Verdict(correct=False, unscored="the model's log-probabilities are not finite")
    verdict = task.judge(instance.protocol, instance.question, scores)
    return replace(verdict, warnings=verdict.warnings + instance.warnings)


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
    """The result of one model on one set by one protocol."""
    pages = [page for verdict in verdicts for page in verdict.pages]
    return Result(
        task=task.name,
        protocol=protocol,
        model=name,
        size=size_of(model),
        dtype=dtype,
        data=questions.data,
        sha256=questions.sha256,
        subset=questions.subset,
        correct=None if task.windows else sum(verdict.correct for verdict in verdicts),
        total=len(verdicts),
        unscored=dict(Counter(verdict.unscored for verdict in verdicts if verdict.unscored)),
        warnings=dict(Counter(warning for verdict in verdicts for warning in verdict.warnings)),
        perplexity=task.perplexity(protocol, verdicts),
        seconds=seconds,
        has_published=questions.has_published,
        near_ties=sum(verdict.near_tie for verdict in verdicts),
        perplexity_interval=results.bootstrap(pages),
        bits_per_byte=results.bits_per_byte(pages),
    )


def size_of(model: GPT) -> str | None:
    """The GPT-2 with published figures that has the shape of this model; None: there is none."""
    shape = (model.config.n_layer, model.config.n_embd)
    sizes = [size for size in results.published_sizes() if (PRESETS[size].n_layer, PRESETS[size].n_embd) == shape]
    return sizes[0] if sizes else None


def build_items(
    task: Task, model: str, protocol: str, questions: QuestionSet, verdicts: list[Verdict | None] | list[Verdict]
) -> list[dict[str, Any]]:
    """The lines of an items file, one per question that has a verdict.

    `question` is a hash of the question's text, so that --compare never pairs answers to different questions.
    """
    common = {"task": task.name, "protocol": protocol, "model": model, "subset": questions.subset}
    items = []
    for index, (question, verdict) in enumerate(zip(questions.questions, verdicts, strict=True)):
        if verdict is None:
            continue
        digest = hashlib.sha256(task.text(question).encode()).hexdigest()[:16]
        fields = {name: value for name, value in results.to_json(verdict).items() if value is not None and value != ()}
        if task.windows:
            del fields["correct"]
        items.append(common | {"index": index, "question": digest} | fields)
    return items


def print_tables(output: Output) -> None:
    """Print results, comparisons and published figures, after all is saved: a closed terminal loses nothing."""
    found = output.results
    parts = [results.results_table(found), results.comparison_table(output.items)]
    if any(result.has_published for result in found):
        parts.append("Published figures, accuracy % (perplexity). OpenAI's weights, unless the source names others:")
        parts.append(results.published_table(found[0].task, [result.protocol for result in found]))
    parts += [results.footnotes(found), f"saved {output.place}"]
    print("\n" + "\n\n".join(part for part in parts if part))
