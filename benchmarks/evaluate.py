"""How fast the evaluations are: LAMBADA against lm-evaluation-harness, CBT against plain scoring, in one run.

    python benchmarks/evaluate.py --ckpt logs/gpt2 --lambada lambada_test.jsonl --cbt cbtest_NE_valid_2000ex.txt

LAMBADA: from passages in memory to verdicts, encoding included, the model loaded; the harness's time is its
`loglikelihood` call's, which encodes too, at each batch size. CBT: `paper`, from questions to verdicts, against a
batch of one full sequence a candidate. Both must agree with their baseline, question by question, or this fails.
"""

import sys

sys.path[0] = sys.path[0].rpartition("/")[0]  # the repo

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
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

LARGEST_DIFFERENCE = 1e-4  # of two log-probabilities of one passage
Dtype = Literal["float32", "bfloat16"]


@dataclass
class Config:
    ckpt: str
    """A run, a checkpoint, or a Hugging Face folder with tokenizer.json."""
    lambada: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of LAMBADA passages."""
    cbt: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of Children's Book Test questions."""
    passages: Annotated[int | None, cli.DEFAULT_IN_HELP] = None
    """Take only the first so many passages. Default: all."""
    plain_questions: int = 20
    """Questions for the plain scoring of CBT, which takes a forward a candidate."""
    batch_sizes: tuple[int, ...] = (16, 64, 256)
    """The harness's; its best counts."""
    rounds: int = 3
    """How often everything is timed; the harness at its best batch size."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    out: str = "logs/benchmarks/evaluate.json"
    """Where the figures go."""


def main(config: Config) -> None:
    device = pick_device(config.device)
    source = checkpoint.resolve(config.ckpt)
    model = checkpoint.load_model(source).to(device)
    figures: dict[str, Any] = {"settings": asdict(config), "versions": versions(device), "model": asdict(model.config)}
    problems: list[str] = []  # said after the figures are saved: they cost minutes
    if config.lambada:
        figures["lambada"] = compare_with_harness(config, source, model, problems)
    if config.cbt:
        figures["cbt"] = compare_with_plain(config, source, model, problems)
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    Path(config.out).write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\n{report(figures)}\n\n{time.strftime('%Y-%m-%d')}, {figures['versions']}; saved {config.out}")
    if problems:
        raise ValueError("; ".join(problems))


def timed(task: Task, model: GPT, source: str, questions: QuestionSet, dtype: Dtype) -> tuple[float, list[Verdict]]:
    """Seconds from questions to verdicts."""
    encoding = checkpoint.load_encoding(source, model.config.vocab_size)
    options = evaluate.Scoring(dtype=dtype)
    begin = time.perf_counter()
    (verdicts,) = evaluate.evaluate(
        task, model, encoding, questions, options, Ranks(0, 1, model.device)
    ).values()  # ends in Python's floats: nothing is left running on the device
    return time.perf_counter() - begin, verdicts


def compare_with_harness(config: Config, source: str, model: GPT, problems: list[str]) -> dict[str, Any]:
    path = Path(str(config.lambada))
    protocol = lambada.allowed(lambada.text_of(path) or "other")[0]
    passages = lambada.read(path)[: config.passages]
    questions = QuestionSet(passages, [protocol], path.name, None)
    timed(lambada.TASK, model, source, questions, "float32")  # warm: kernels are chosen at their first use
    device = str(model.device)
    seconds = {size: [harness(source, passages, size, device)[1]] for size in config.batch_sizes}
    best = min(seconds, key=seconds.__getitem__)
    for _ in range(config.rounds - 1):
        seconds[best].append(harness(source, passages, best, device)[1])
    answers, last, whole = harness(source, passages, best, device)
    rows = {"harness": [*seconds[best], last], "harness bf16": [harness(source, passages, best, device, "bfloat16")[1]]}
    outcomes = {}
    dtypes: dict[str, Dtype] = {"ours": "float32", "ours bf16": "bfloat16"}
    for name, dtype in dtypes.items():
        runs = [timed(lambada.TASK, model, source, questions, dtype) for _ in range(config.rounds)]
        rows[name], outcomes[name] = [run[0] for run in runs], runs[-1][1]
    verdicts, rounded = outcomes["ours"], outcomes["ours bf16"]
    logprobs = [-math.inf if v.logprob is None else v.logprob for v in verdicts]  # None: it couldn't be asked
    difference = max(abs(ours - theirs) for ours, (theirs, _) in zip(logprobs, answers, strict=True))
    disagreements = sum(v.correct != greedy for v, (_, greedy) in zip(verdicts, answers, strict=True))
    if difference > LARGEST_DIFFERENCE or disagreements > sum(v.near_tie for v in verdicts):
        problems.append(f"the harness differs by {difference} in log-probability, and in {disagreements} answers")
    found = {"passages": len(passages), "protocol": protocol, "harness's seconds by batch size": seconds}
    found |= {"seconds": rows, "seconds of all that the harness does": whole}
    found |= {"largest difference of log-probability": difference, "answers that differ": disagreements}
    found["correct"] = sum(v.correct for v in verdicts)
    found["correct in bf16"] = sum(v.correct for v in rounded)
    found["answers that bf16 turns"] = sum(v.correct != r.correct for v, r in zip(verdicts, rounded, strict=True))
    return found


def compare_with_plain(config: Config, source: str, model: GPT, problems: list[str]) -> dict[str, Any]:
    path = Path(str(config.cbt))
    clozes = cbt.read(path)
    questions = QuestionSet(clozes[: config.plain_questions], ["paper"], path.name, None)
    whole = QuestionSet(clozes, ["paper"], path.name, None)
    timed(cbt.TASK, model, source, questions, "float32")  # warm
    encode = checkpoint.load_encoding(source, model.config.vocab_size).encode_ordinary
    begin = time.perf_counter()
    chosen = [plain_choice(model, cloze, encode) for cloze in questions.questions]
    rows: dict[str, list[float]] = {"plain": [time.perf_counter() - begin], "ours": []}
    for _ in range(config.rounds):
        seconds, verdicts = timed(cbt.TASK, model, source, questions, "float32")
        rows["ours"].append(seconds)
    disagreements = sum(v.chosen != c for v, c in zip(verdicts, chosen, strict=True))
    if disagreements > sum(v.near_tie for v in verdicts):
        problems.append(f"plain scoring chooses another candidate in {disagreements} questions")
    found = {"questions": len(chosen), "seconds": rows, "answers that differ": disagreements}
    if model.device.type == "cuda":
        for dtype in ("float32", "bfloat16"):
            seconds, verdicts = timed(cbt.TASK, model, source, whole, dtype)
            correct = sum(v.correct for v in verdicts)
            found[f"whole file, {dtype}"] = {"questions": len(verdicts), "seconds": seconds, "correct": correct}
    return found


@torch.no_grad()
def plain_choice(model: GPT, cloze: cbt.Cloze, encode: Any) -> str:
    """The likeliest candidate by a forward of one whole sequence each, as a first script would do it."""
    totals = []
    for request in cbt.requests("paper", cloze, encode):
        sequence = (request.context + request.continuation)[-model.config.n_positions - 1 :]
        ids, n = torch.tensor([sequence], device=model.device), len(request.continuation)
        logprobs = model(ids[:, :-1])[0, -n:].log_softmax(-1)  # (n, V)
        totals.append(logprobs.gather(1, ids[0, -n:, None]).sum().item())
    return cloze.options[totals.index(max(totals))]


def report(figures: dict[str, Any]) -> str:
    """One table: what was compared, the medians of both, their ratio, and how far the answers agree."""
    rows = []
    for name, ours, baseline in (
        ("lambada", "ours", "harness"),
        ("lambada", "ours bf16", "harness bf16"),
        ("cbt", "ours", "plain"),
    ):
        if name not in figures:
            continue
        found = figures[name]
        a, b = (statistics.median(found["seconds"][key]) for key in (ours, baseline))
        n = found.get("passages") or found["questions"]
        rows.append([f"{name}, {n:,} questions", baseline, f"{b:.2f} s", f"{ours} {a:.2f} s", f"{b / a:.2f}"])
    return markdown_table(["what", "baseline", "its time", "our time", "ratio"], rows)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
