"""Whole commands of this project vs. lm-evaluation-harness: LAMBADA, HellaSwag and WikiText, start-up included.

    python -m benchmarks.commands --ckpt logs/gpt2 --lambada lambada_test.jsonl --hellaswag hellaswag_val.jsonl \\
        --wikitext wiki.test.raw

Each measurement is a process of its own, from its start to its end: imports, model, data, requests, scores, result.
The harness runs without its bootstrap and its index of other tasks, at the fastest of several batch sizes. The table
shows the scores of both.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from benchmarks.common import ROOT, run_command
from core import cli
from core.eval import lambada, wikitext
from core.files import markdown_table, write_json

MEASURES = {"lambada": "acc", "hellaswag": "acc_norm", "wikitext": "word_perplexity"}
OPTIONS = {"hellaswag": ["--protocol", "harness-norm"], "wikitext": ["--protocol", "harness"]}
YAML = {"lambada": "lambada/lambada_openai.yaml", "hellaswag": "hellaswag/hellaswag.yaml"}
YAML |= {"wikitext": "wikitext/wikitext.yaml"}  # files of lm_eval
SPLITS = {"lambada": "test", "hellaswag": "validation", "wikitext": "test"}
# Arguments: folder of the model, rows of the task, lm_eval's task, split, dtype, batch size, device.
HARNESS = r"""
import json, os, pathlib, sys, tempfile
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
import lm_eval
from lm_eval import tasks
from lm_eval.models.huggingface import HFLM
folder, data, include, split, dtype, batch_size, device = sys.argv[1:]
with tempfile.TemporaryDirectory() as name:
    files = {"data_files": {split: data}, "cache_dir": f"{name}/cache"}
    config = {"include": str(pathlib.Path(tasks.__file__).parent / include), "task": "local", "dataset_path": "json"}
    config |= {"dataset_name": None, "dataset_kwargs": files}
    config |= {f"{other}_split": None for other in ("training", "validation", "test") if other != split}
    pathlib.Path(name, "local.yaml").write_text(json.dumps(config))
    manager = tasks.TaskManager(include_path=name, include_defaults=False)
    model = HFLM(pretrained=folder, dtype=dtype, batch_size=int(batch_size), device=device)
    found = lm_eval.simple_evaluate(model, tasks=["local"], task_manager=manager, bootstrap_iters=0)
print("\nscores " + json.dumps(found["results"]["local"]))
"""


@dataclass
class Config:
    ckpt: str
    """Model: a Hugging Face folder with tokenizer.json."""
    lambada: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of LAMBADA passages. Default: no LAMBADA."""
    hellaswag: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of HellaSwag questions. Default: no HellaSwag."""
    wikitext: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of raw WikiText. Default: no WikiText."""
    passages: Annotated[int | None, cli.DEFAULT_IN_HELP] = None
    """Number of passages of LAMBADA, from the start of the file. Default: all."""
    questions: int = 10_042
    """Number of questions of HellaSwag. A file with fewer is repeated, with other activity labels."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Precisions."""
    batch_sizes: tuple[int, ...] = (64, 256)
    """Batch sizes of the harness for LAMBADA and HellaSwag; for WikiText an eighth of them."""
    limit_minutes: float = 30.0
    """No measurement starts after this time."""
    device: str = "cuda"
    """Device: cuda or cpu."""
    out: str = "logs/benchmarks/commands.json"
    """File for all figures (JSON), written after each measurement; the table has the same name with .md."""
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


def main(config: Config) -> None:
    cli.check_positive(passages=config.passages, questions=config.questions, limit_minutes=config.limit_minutes)
    cli.check_positive(batch_sizes=min(config.batch_sizes, default=0))
    deadline = time.monotonic() + 60 * config.limit_minutes
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"settings": asdict(config), "measurements": []}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: files_of(config, name, Path(folder)) for name in MEASURES if getattr(config, name)}
        for plan in plans(config, list(files)):
            if time.monotonic() > deadline:
                print(f"--limit-minutes {config.limit_minutes:g} is over; not measured: {plan}")
                continue
            data, rows = files[plan["task"]]
            figures["measurements"].append(plan | measure(config, plan, data, rows, Path(folder)))
            print(figures["measurements"][-1], flush=True)
            write_json(out, figures)
    table = speed_table(figures["measurements"])
    out.with_suffix(".md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nsaved {out} and {out.with_suffix('.md')}")


def plans(config: Config, tasks: list[str]) -> Iterator[dict[str, Any]]:
    """The measurements: task, dtype, and the harness's batch size; 0: this project. The most important come first."""
    for number in range(len(config.batch_sizes)):
        for dtype in config.dtypes:
            for task in tasks:
                if number == 0:
                    yield {"task": task, "dtype": dtype, "batch_size": 0}
                size = config.batch_sizes[number] // (8 if task == "wikitext" else 1)
                yield {"task": task, "dtype": dtype, "batch_size": max(size, 1)}


def files_of(config: Config, task: str, folder: Path) -> tuple[Path, Path]:
    """The file of questions for this project, and that of the same questions for the harness."""
    source, rows = Path(getattr(config, task)), folder / f"{task}.jsonl"
    if task == "wikitext":
        content = [{"page": page} for page in wikitext.split_pages(wikitext.read(source))]
    elif task == "lambada":
        content = [{"text": passage} for passage in lambada.read(source)[: config.passages]]
    else:
        content = [*repeated([json.loads(line) for line in source.open(encoding="utf-8")], config.questions)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return source if task == "wikitext" else rows, rows  # some of LAMBADA's passages contain a line break


def repeated(questions: list[dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """`count` different questions with ctx_a and ctx_b, of which a file of contexts alone has none."""
    for i in range(count):
        turn, question = i // len(questions), dict(questions[i % len(questions)])
        if "ctx_a" not in question:
            before, stop, after = question["ctx"].rpartition(". ")
            question |= {"ctx_a": before + stop.strip(), "ctx_b": after}
        if turn:
            question["activity_label"] = f"{turn} {question['activity_label']}"
        yield question


def measure(config: Config, plan: dict[str, Any], data: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """Seconds of a whole command, and its score. Raises ValueError where it fails."""
    task, dtype, batch_size = plan["task"], plan["dtype"], plan["batch_size"]
    if batch_size:
        options = [config.ckpt, rows, YAML[task], SPLITS[task], dtype, batch_size, config.device]
        command = [sys.executable, "-c", HARNESS, *map(str, options)]
    else:
        out = folder / "own.json"
        text = lambada.known_text(Path(str(config.lambada))) or "other"  # its first protocol is that of the harness
        special = OPTIONS.get(task, ["--text", text])
        command = [sys.executable, str(ROOT / f"eval_{task}.py"), "--ckpt", config.ckpt, "--data", str(data), *special]
        command += ["--dtype", dtype, "--device", config.device, "--out", str(out), "--quiet"]
    start = time.perf_counter()
    printed = run_command(command, capture=True)
    seconds = time.perf_counter() - start
    if batch_size:
        score = json.loads(printed.rpartition("\nscores ")[2])[f"{MEASURES[task]},none"]
    else:
        (row,) = json.loads(out.read_text(encoding="utf-8"))
        score = row["perplexity"] if task == "wikitext" else row["accuracy"]
    return {"seconds": seconds, "score": score, "questions": sum(1 for _ in rows.open(encoding="utf-8"))}


def speed_table(measurements: list[dict[str, Any]]) -> str:
    """The harness at its best batch size and this project, for each task and dtype."""
    table = []
    for task, dtype in dict.fromkeys((m["task"], m["dtype"]) for m in measurements):
        found = [m for m in measurements if (m["task"], m["dtype"]) == (task, dtype)]
        harness, own = [m for m in found if m["batch_size"]], [m for m in found if not m["batch_size"]]
        if not harness or not own:
            continue
        best = min(harness, key=lambda m: m["seconds"])
        sizes = ", ".join(f"{m['batch_size']}: {m['seconds']:.1f} s" for m in harness)
        name = f"{task}, {best['questions']:,} {'pages' if task == 'wikitext' else 'questions'}"
        row = [name, dtype, sizes, f"{own[0]['seconds']:.1f} s", f"{best['seconds'] / own[0]['seconds']:.2f}"]
        table.append([*row, f"{best['score']:.6g}", f"{own[0]['score']:.6g}"])
    header = ["task", "dtype", "harness by batch size", "this project", "speedup", "harness's score", "own score"]
    return markdown_table(header, table)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
