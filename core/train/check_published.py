"""Confirm every published figure of OpenAI's GPT-2: known values first, then all evaluations, from the hub.

    python -m core.train.check_published                             # gpt2
    python -m core.train.check_published --ckpt gpt2 gpt2-xl

`make check-published` runs it. Exit status: 0 all figures are met, 1 one is not, 2 a figure is missing.
"""

import sys
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch

from core import checkpoint, cli
from core.data.shards import open_shard, short_reason
from core.distributed import Ranks, device_name, process_group
from core.eval import cbt, check, evaluate, hellaswag, known_values, lambada, results, wikitext
from core.eval.check import MISSING, Row
from core.eval.evaluate import ScoringConfig
from core.eval.results import Result
from core.eval.task import Task
from core.train.optim import build_optimizer
from core.train.recipe import resolve_recipe
from model import GPT

STARTER_PACK, BATCH_FILE = "karpathy/llmc-starter-pack", "tiny_shakespeare_val.bin"  # on the hub


@dataclass
class Config:
    ckpt: tuple[str, ...] = ("gpt2",)
    """Models: hub names of OpenAI's weights, or folders with them."""
    batch_tokens: Annotated[int | None, cli.DEFAULT_IN_HELP] = None
    """Tokens per forward pass. Default: 32,768 on a GPU, 1,024 on a CPU."""
    device: str = "auto"
    """Device: auto, cuda, mps or cpu. With torchrun, each rank scores a share of the questions."""
    out: str = "logs/published.md"
    """File for the table (Markdown). The results are also written to logs/results/."""
    terminal: cli.Terminal = field(default_factory=cli.Terminal)


def main(config: Config) -> None:
    options = ScoringConfig(ckpt=config.ckpt, batch_tokens=config.batch_tokens, device=config.device)
    sources = evaluate.check_options(options, [])
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    with process_group(config.device) as ranks:
        sources = ranks.broadcast(sources)
        sizes, rows = check_known_values(sources, ranks)
        report(ranks, rows)
        found: list[Result] = []
        for task, questions in evaluations(sizes):
            try:
                sets = task.load(questions)
            except ValueError as error:  # one data set that can't be fetched doesn't prevent the others
                new = [missing(task, str(error))]
            else:
                scored = evaluate.score_models(task, sources, sets, options, ranks)
                found += scored
                new = check.compare(scored)
                if ranks.is_main:
                    results.save(scored, None)
            rows += new
            report(ranks, new)
            if ranks.is_main:
                Path(config.out).write_text(page(rows, found, ranks), encoding="utf-8")
        ranks.log(f"\n{check.summary(rows)}; wrote {config.out}")
    if status := check.status(rows):
        sys.exit(status if ranks.is_main else 0)


def evaluations(sizes: list[str | None]) -> list[tuple[Task, Any]]:
    """Every evaluation with the protocols of published figures of OpenAI's weights of these sizes."""
    strides = tuple(
        figure["stride"]
        for figure in results.published("wikitext")
        if "stride" in figure and any(size in figure for size in sizes)
    )
    return [
        (lambada.TASK, lambada.LambadaConfig(protocol=("all",))),
        (cbt.TASK, cbt.CBTConfig()),  # the paper's: validation, CN and NE
        (cbt.TASK, cbt.CBTConfig(types=("NE",), split="test", protocol=("sentence",))),  # the original project's
        (hellaswag.TASK, hellaswag.HellaSwagConfig(protocol=("all",))),
        (wikitext.TASK, wikitext.WikiTextConfig(protocol=("all",), stride=strides)),
    ]


def missing(task: Task, reason: str) -> Row:
    """The row of a task that could not run."""
    empty = dict.fromkeys(("model", "protocol", "questions", "measure", "found", "published", "tolerance"), "")
    return Row(task=task.name, verdict=MISSING, note=reason, **empty)


def report(ranks: Ranks, rows: list[Row]) -> None:
    if rows:
        ranks.log(f"\n{check.table(rows)}")


def check_known_values(sources: list[str], ranks: Ranks) -> tuple[list[str | None], list[Row]]:
    """The size of each model, and the known values of those that have the size of the values. On every rank."""
    rows: list[Row] = []
    sizes: list[str | None] = []
    for source in sources:
        model = evaluate.load_model(source, ranks)
        sizes.append(evaluate.size_of(model))
        if sizes[-1] == known_values.load()["size"]:
            rows += known_values.check(model, checkpoint.load_encoding(source, model.config.vocab_size), source)
            rows.append(check_training(model, source))  # the last: it changes the weights
        del model
    return sizes, rows


def check_training(model: GPT, name: str) -> Row:
    """Ten AdamW steps of this project on the first tokens of Tiny Shakespeare, in float32."""
    known = known_values.load()["training"]
    label = f"losses of {known['steps']} AdamW steps"
    try:
        ids = open_shard(first_batch_file())
    except ValueError as error:
        return replace(missing(lambada.TASK, str(error)), model=name, task="known values", questions=label)
    losses = overfit(model, torch.from_numpy(ids[: 4 * 64 + 1].astype("int64")), known)
    worst = max(zip(losses, known["losses"], strict=True), key=lambda pair: abs(pair[0] - pair[1]))
    is_near = abs(worst[0] - worst[1]) <= known["tolerance"]
    found, published = (f"{value:.4f}" for value in worst)
    return known_values.row(name, label, found, published, f"{known['tolerance']:g}", is_near)


def first_batch_file() -> Path:
    """llm.c's file of tokens, from a folder of the hub's name or from the hub. Raises ValueError for neither."""
    local = Path(STARTER_PACK, BATCH_FILE)
    if local.is_file():
        return local
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(STARTER_PACK, BATCH_FILE, repo_type="dataset"))
    except Exception as error:  # the client raises errors of several libraries
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise
        raise ValueError(f"{STARTER_PACK} can't be loaded from the hub ({short_reason(error)})") from None


def overfit(model: GPT, ids: torch.Tensor, known: dict[str, Any]) -> list[float]:
    """The loss before each step on the same batch. `known`: steps, batch (B, T) and values of AdamW."""
    batch, seq_len = known["batch"]
    steps = known["steps"]
    values = {name: known[name] for name in ("lr", "beta1", "beta2", "weight_decay")}
    values |= {"embed_lr": known["lr"], "batch_tokens": batch * seq_len}
    recipe = resolve_recipe(
        "original", model.config, tokens=steps * batch * seq_len, seq_len=seq_len, steps=steps, overrides=values
    )
    optimizer = build_optimizer(model, recipe, Ranks(0, 1, model.device))
    ids = ids.to(model.device)
    inputs, targets = ids[:-1].view(batch, seq_len), ids[1:].view(batch, seq_len)
    torch.set_float32_matmul_precision("highest")
    losses = []
    for _ in range(steps):
        loss = model(inputs, targets)
        loss.backward()
        optimizer.set_lr(1.0)
        optimizer.step(skip=torch.zeros((), device=model.device))
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def page(rows: list[Row], found: list[Result], ranks: Ranks) -> str:
    """The Markdown page: verdicts, all results with the published figures, and the hardware and version."""
    place = f"{ranks.world_size} x {device_name(ranks.device)}, torch {torch.__version__}"
    date = datetime.now(UTC).date().isoformat()
    sections = ["# Published figures of GPT-2", f"`make check-published` on {date}: {place}."]
    sections += [check.table(rows), "## Results"]
    sections += [results.results_table(found), results.footnotes(found)] if found else []
    for name in dict.fromkeys(result.task for result in found):
        protocols = [result.protocol for result in found if result.task == name]
        sections += [f"## Published: {name}, accuracy % (perplexity)", results.published_table(name, protocols)]
    return "\n\n".join(section for section in sections if section) + "\n"


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
