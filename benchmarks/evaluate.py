"""Speed of the evaluations: LAMBADA vs. lm-evaluation-harness, and CBT vs. plain scoring, in one run.

    python -m benchmarks.evaluate --ckpt logs/gpt2 --lambada lambada_test.jsonl --cbt cbtest_NE_valid_2000ex.txt

LAMBADA is timed from passages in memory to verdicts, including the tokenizer, with a loaded model. The time of the
harness is that of its `loglikelihood` call, which also includes the tokenizer, at its best batch size. CBT is timed by
protocol `paper` from questions to verdicts; plain scoring is one forward pass per candidate. Results that differ from
those of the baseline are an error.
"""

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from benchmarks.harness import harness
from core import checkpoint, cli
from core.distributed import Ranks, pick_device
from core.eval import cbt, evaluate, lambada
from core.eval.task import QuestionSet, Task, Verdict
from core.files import markdown_table
from core.train.logging import versions
from model import GPT

MAX_DIFFERENCE = 1e-4  # of two log-probabilities of a passage
Dtype = Literal["float32", "bfloat16"]


@dataclass
class Config:
    ckpt: str
    """Model: a run, a checkpoint, or a Hugging Face folder with tokenizer.json."""
    lambada: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of LAMBADA passages. Default: no LAMBADA."""
    cbt: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of Children's Book Test questions. Default: no CBT."""
    passages: Annotated[int | None, cli.DEFAULT_IN_HELP] = None
    """Number of passages, from the start of the file. Default: all."""
    plain_questions: int = 20
    """Number of CBT questions for plain scoring, from the start of the file."""
    batch_sizes: tuple[int, ...] = (16, 64, 256)
    """Batch sizes of the harness; the fastest one counts."""
    rounds: int = 3
    """Number of repetitions, for the harness at its best batch size."""
    device: str = "auto"
    """Device: auto, cuda, mps or cpu."""
    out: str = "logs/benchmarks/evaluate.json"
    """File for all figures (JSON)."""
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


def main(config: Config) -> None:
    cli.check_positive(passages=config.passages, plain_questions=config.plain_questions, rounds=config.rounds)
    cli.check_positive(batch_sizes=min(config.batch_sizes, default=0))
    device = pick_device(config.device)
    source = checkpoint.resolve(config.ckpt)
    model = checkpoint.load_model(source).to(device)
    figures: dict[str, Any] = {"settings": asdict(config), "versions": versions(device), "model": asdict(model.config)}
    if config.lambada:
        figures["lambada"] = compare_with_harness(config, source, model)
    if config.cbt:
        figures["cbt"] = compare_with_plain(config, source, model)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    Path(config.out).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"\n{speed_table(figures)}\n\n{time.strftime('%Y-%m-%d')}, {figures['versions']}; saved {config.out}")
    check_agreement(figures)  # last: the figures took minutes


def time_evaluation(
    task: Task, model: GPT, source: str, questions: QuestionSet, dtype: Dtype
) -> tuple[float, list[Verdict]]:
    """Seconds from questions to verdicts, and the verdicts, which are Python numbers: the device has finished."""
    encoding = checkpoint.load_encoding(source, model.config.vocab_size)
    options, ranks = evaluate.ScoringConfig(dtype=dtype), Ranks(0, 1, model.device)
    start = time.perf_counter()
    (verdicts,) = evaluate.evaluate(task, model, encoding, questions, options, ranks).values()
    return time.perf_counter() - start, verdicts


def compare_with_harness(config: Config, source: str, model: GPT) -> dict[str, Any]:
    path, device = Path(str(config.lambada)), str(model.device)
    protocol = lambada.allowed_protocols(lambada.known_text(path) or "other")[0]
    passages = lambada.read(path)[: config.passages]
    questions = QuestionSet(passages, [protocol], path.name, None)
    time_evaluation(lambada.TASK, model, source, questions, "float32")  # warm-up: the first use selects kernels
    by_size = {size: [harness(source, passages, size, device)[1]] for size in config.batch_sizes}
    best = min(by_size, key=by_size.__getitem__)
    for _ in range(config.rounds - 2):
        by_size[best].append(harness(source, passages, best, device)[1])
    answers, last, total = harness(source, passages, best, device)
    seconds = {"harness": [*by_size[best], last]}
    seconds["harness bfloat16"] = [harness(source, passages, best, device, "bfloat16")[1]]
    outcomes = {}
    dtypes: dict[str, Dtype] = {"this project": "float32", "this project bfloat16": "bfloat16"}
    for name, dtype in dtypes.items():
        runs = [time_evaluation(lambada.TASK, model, source, questions, dtype) for _ in range(config.rounds)]
        seconds[name], outcomes[name] = [run[0] for run in runs], runs[-1][1]
    verdicts, rounded = outcomes["this project"], outcomes["this project bfloat16"]
    logprobs = [-math.inf if v.logprob is None else v.logprob for v in verdicts]  # None: not scored
    return {
        "questions": len(passages),
        "protocol": protocol,
        "harness's seconds by batch size": by_size,
        "harness's seconds in total": total,
        "seconds": seconds,
        "max difference": max(abs(own - other) for own, (other, _) in zip(logprobs, answers, strict=True)),
        "different answers": sum(v.correct != greedy for v, (_, greedy) in zip(verdicts, answers, strict=True)),
        "near ties": sum(v.near_tie for v in verdicts),
        "correct": sum(v.correct for v in verdicts),
        "correct in bfloat16": sum(v.correct for v in rounded),
        "different answers in bfloat16": sum(v.correct != r.correct for v, r in zip(verdicts, rounded, strict=True)),
    }


def compare_with_plain(config: Config, source: str, model: GPT) -> dict[str, Any]:
    path = Path(str(config.cbt))
    clozes = cbt.read(path)
    questions = QuestionSet(clozes[: config.plain_questions], ["paper"], path.name, None)
    time_evaluation(cbt.TASK, model, source, questions, "float32")  # warm-up
    encode = checkpoint.load_encoding(source, model.config.vocab_size).encode_ordinary
    start = time.perf_counter()
    chosen = [plain_choice(model, cloze, encode) for cloze in questions.questions]
    seconds: dict[str, list[float]] = {"plain": [time.perf_counter() - start], "this project": []}
    for _ in range(config.rounds):
        spent, verdicts = time_evaluation(cbt.TASK, model, source, questions, "float32")
        seconds["this project"].append(spent)
    found: dict[str, Any] = {
        "questions": len(chosen),
        "seconds": seconds,
        "different answers": sum(v.chosen != choice for v, choice in zip(verdicts, chosen, strict=True)),
        "near ties": sum(v.near_tie for v in verdicts),
    }
    if model.device.type == "cuda":
        complete = QuestionSet(clozes, ["paper"], path.name, None)
        dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
        for dtype in dtypes:
            spent, verdicts = time_evaluation(cbt.TASK, model, source, complete, dtype)
            correct = sum(v.correct for v in verdicts)
            found[f"complete file, {dtype}"] = {"questions": len(verdicts), "seconds": spent, "correct": correct}
    return found


@torch.no_grad()
def plain_choice(model: GPT, cloze: cbt.Cloze, encode: Any) -> str:
    """The most likely candidate, by one forward pass of a complete sequence for each."""
    totals = []
    for request in cbt.requests("paper", cloze, encode):
        sequence = (request.context + request.continuation)[-model.config.n_positions - 1 :]
        ids, n = torch.tensor([sequence], device=model.device), len(request.continuation)
        logprobs = model(ids[:, :-1])[0, -n:].log_softmax(-1)  # (n, V)
        totals.append(logprobs.gather(1, ids[0, -n:, None]).sum().item())
    return cloze.options[totals.index(max(totals))]


def check_agreement(figures: dict[str, Any]) -> None:
    """Raise ValueError if the scores differ from those of a baseline by more than rounding."""
    for task, baseline in (("lambada", "the harness"), ("cbt", "plain scoring")):
        found = figures.get(task, {})
        if not found:
            continue
        difference, answers = found.get("max difference", 0.0), found["different answers"]
        if difference > MAX_DIFFERENCE or answers > found["near ties"]:
            raise ValueError(
                f"--{task}: {baseline} has {answers} different answers, and log-probabilities that differ by "
                f"{difference:.2g}. Fix the scoring before you use these times"
            )


def speed_table(figures: dict[str, Any]) -> str:
    """The medians of baseline and this project, and their ratio."""
    pairs = (
        ("lambada", "harness", "this project"),
        ("lambada", "harness bfloat16", "this project bfloat16"),
        ("cbt", "plain", "this project"),
    )
    rows = []
    for task, baseline, own in pairs:
        if task in figures:
            found = figures[task]
            seconds, own_seconds = (statistics.median(found["seconds"][name]) for name in (baseline, own))
            row = [f"{task}, {found['questions']:,} questions", baseline, f"{seconds:.2f}", f"{own_seconds:.2f}"]
            rows.append([*row, f"{seconds / own_seconds:.2f}"])
    return markdown_table(["task", "baseline", "baseline, s", "this project, s", "speedup"], rows)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
