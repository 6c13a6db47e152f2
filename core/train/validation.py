"""Evaluation during training, shared by the ranks: validation loss, LAMBADA, HellaSwag; and `train.py --eval-only`."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from core import checkpoint, cli, generation
from core.data import tokenizer
from core.data.shards import Dataset, Windows, verify
from core.distributed import Ranks, autocast
from core.eval import evaluate, hellaswag, lambada
from core.eval.task import QuestionSet, Task, exp_mean, format_perplexity
from core.train.config import Config, EvalConfig
from core.train.setup import check_files, resolve_system
from model import GPT, GPTConfig

VAL_BATCH = 16  # maximum windows per forward pass, as logits are large


class Evaluation(Protocol):
    """An evaluation that runs every `every` steps; a line of metrics.jsonl has its name as `split`."""

    split: str
    data: str
    every: int

    def run(self, model: GPT, stop: Callable[[], bool] = ...) -> dict[str, Any] | None:
        """Its metrics by name; None where `stop` ended it. All ranks must call it."""

    def describe(self, result: dict[str, Any]) -> str: ...


class Validation:
    split = "val"

    def __init__(
        self,
        dataset: Dataset,
        ranks: Ranks,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        *,
        seq_len: int,
        max_tokens: int,
        batch_size: int,
        dtype: str,
        every: int = 0,
    ) -> None:
        """The loss on the first `max_tokens` of the split, by `loss_fn` on batches of `batch_size` windows."""
        self.every = every
        self._windows = Windows(dataset, "val", seq_len)
        self._ranks, self._loss_fn, self._dtype, self._batch_size = ranks, loss_fn, dtype, batch_size
        self._count = min(max(max_tokens // seq_len, 1), len(self._windows))
        has_tokenizer = (dataset.folder / "tokenizer.json").is_file()
        self._token_bytes = tokenizer.token_bytes(dataset.folder) if has_tokenizer else None
        self.data = f"{self._count * seq_len:,} validation tokens of {dataset.folder} in sequences of {seq_len:,}"

    @torch.no_grad()
    def run(self, model: GPT, stop: Callable[[], bool] = lambda: False) -> dict[str, float | None] | None:
        """`loss` in nats per token and `bits_per_byte` of text (None without a tokenizer); None where stopped."""
        losses, sizes, text_bytes = [], [], 0
        ranks, size = self._ranks, self._batch_size
        batches = range(0, self._count, ranks.world_size * size)  # of all ranks, so that they stop together
        check_every = 8 if ranks.device.type == "cuda" else 1  # agreement waits for the device
        bar = cli.progress_bar(batches, "validation", unit="batches", leave=False, delay=1, hidden=not ranks.is_main)
        for number, start in enumerate(bar):
            if number % check_every == 0 and stop():
                return None
            first = start + ranks.rank * size
            if first >= self._count:
                continue
            inputs, targets = self._windows.batch(range(first, min(first + size, self._count)))  # (B, T)
            if self._token_bytes is not None:
                text_bytes += int(self._token_bytes[targets.numpy()].sum())
            loss_fn = self._loss_fn if len(inputs) == size else model  # a smaller batch would be compiled separately
            with autocast(ranks, self._dtype):
                losses.append(loss_fn(*ranks.to_device(inputs, targets)))
            sizes.append(targets.numel())
        means = torch.stack(losses).tolist() if losses else []  # the only synchronization with the device
        nats = math.fsum(mean * n for mean, n in zip(means, sizes, strict=True))
        nats, tokens, total_bytes = ranks.all_reduce([nats, sum(sizes), text_bytes])
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / total_bytes if total_bytes else None}

    def describe(self, result: dict[str, Any]) -> str:
        bits = f" | bits_per_byte {result['bits_per_byte']:.4f}" if result["bits_per_byte"] else ""
        return f"val_loss {result['loss']:.4f}{bits}"


class QuestionsDuringTraining:
    """The accuracy on the questions of a file, by the first protocol of `load`; the subclass names the task."""

    split: str
    task: Task
    option: str
    load: Callable[[Path], QuestionSet]

    def __init__(
        self, file: str, dataset: Dataset, ranks: Ranks, *, n_positions: int, dtype: str, every: int = 0
    ) -> None:
        """Read and encode the questions. Raises ValueError for a damaged file, or shards without a tokenizer."""
        if not (dataset.folder / "tokenizer.json").is_file():
            raise ValueError(
                f"{self.option} needs {dataset.folder / 'tokenizer.json'}, which is missing. Omit {self.option}, or "
                f"copy the tokenizer's files there"
            )
        self.every, self.data = every, file
        self._ranks, self._dtype = ranks, dtype
        questions = self.load(Path(file))
        self.protocol = questions.protocols[0]
        encoding = tokenizer.load(dataset.folder)
        self._instances = evaluate.build_requests(self.task, questions, encoding, n_positions)

    def run(self, model: GPT, stop: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
        """Accuracy, counts, and perplexity if the task has one; None where stopped before it started."""
        if stop():
            return None
        verdicts = evaluate.score_requests(
            self.task, model, self._instances, ranks=self._ranks, dtype=self._dtype, label=self.task.title
        )
        correct = sum(verdict.correct for verdict in verdicts)
        facts = {"protocol": self.protocol, "accuracy": correct / len(verdicts), "correct": correct}
        return facts | {"total": len(verdicts), "perplexity": self.task.perplexity(self.protocol, verdicts)}

    def describe(self, result: dict[str, Any]) -> str:
        perplexity = f" | perplexity {format_perplexity(result['perplexity'])}" if result["perplexity"] else ""
        counts = f"{result['correct']:,} of {result['total']:,}"
        return f"{self.task.title} {result['protocol']} {result['accuracy']:.2%} ({counts}){perplexity}"


class LambadaDuringTraining(QuestionsDuringTraining):
    """LAMBADA by the protocol that the text allows: `standard` for the tokenized one, `openai` for all others."""

    split, task, option = "lambada", lambada.TASK, "--eval-lambada"
    load = staticmethod(lambada.load_file)


class HellaSwagDuringTraining(QuestionsDuringTraining):
    """HellaSwag by `completion-norm`, the figure that llm.c and build-nanogpt report during training."""

    split, task, option = "hellaswag", hellaswag.TASK, "--eval-hellaswag"
    load = staticmethod(partial(hellaswag.load_file, protocols=["completion-norm"]))


def build_evaluations(
    options: EvalConfig,
    dataset: Dataset,
    ranks: Ranks,
    shape: GPTConfig,
    loss_fn: Any,
    seq_len: int,
    dtype: str,
    micro_batch: int,
) -> list[Evaluation]:
    """The evaluations of the options for a model of this shape; validation, by `loss_fn`, is the first."""
    validation = Validation(
        dataset,
        ranks,
        loss_fn,
        seq_len=seq_len,
        max_tokens=options.val_tokens,
        batch_size=min(micro_batch, VAL_BATCH),
        dtype=dtype,
        every=options.val_every,
    )
    evaluations: list[Evaluation] = [validation]
    for kind, file in (
        (LambadaDuringTraining, options.eval_lambada),
        (HellaSwagDuringTraining, options.eval_hellaswag),
    ):
        if file is not None:
            n_positions, every = shape.n_positions, options.eval_every
            evaluations.append(kind(file, dataset, ranks, n_positions=n_positions, dtype=dtype, every=every))
    return evaluations


def evaluate_only(config: Config, dataset: Dataset, ranks: Ranks, run_folder: Path) -> None:
    """Print the evaluations of --init-from, else of the newest checkpoint of the run. All ranks must call it.

    Raises ValueError where the weights have another vocabulary than the shards, or --seq-len exceeds their context.
    """
    check_files(config.evaluation)
    if config.run.init_from:
        source = checkpoint.resolve_init(config.run.init_from, ranks)
    else:
        found = checkpoint.find(run_folder, ranks, restart=False)
        if found is None:
            raise ValueError(f"{run_folder} has no checkpoint to evaluate. Name weights with --init-from")
        source = str(found)
    model = checkpoint.load_model(source).to(ranks.device)
    shape = model.config
    if shape.vocab_size < dataset.vocab_size:
        raise ValueError(
            f"{source} has {shape.vocab_size:,} token ids, {dataset.folder} has {dataset.vocab_size:,}. "
            f"Name shards of its encoding with --data"
        )
    checkpoint.check_tokens(source, model, dataset.folder, dataset.vocab_size)
    dtype = resolve_system(config.system, ranks).dtype
    seq_len = config.recipe.seq_len or checkpoint.trained_seq_len(source) or shape.n_positions
    micro_batch = VAL_BATCH if config.run.micro_batch == "auto" else config.run.micro_batch
    cli.check_between(1, shape.n_positions, seq_len=seq_len)
    cli.check_positive(val_tokens=config.evaluation.val_tokens, micro_batch=micro_batch)
    if not config.checkpoints.no_verify:
        verify(dataset, ranks)
    for evaluation in build_evaluations(config.evaluation, dataset, ranks, shape, model, seq_len, dtype, micro_batch):
        result = evaluation.run(model)
        assert result is not None  # nothing stops it
        line = f"{source} on {evaluation.data}, {dtype} | {evaluation.describe(result)}"
        if evaluation.split == "val":
            line += f" | perplexity {format_perplexity(exp_mean([-result['loss']], 1))}"
        ranks.log(line)


def sample_line(model: GPT, folder: Path, seed: int) -> str:
    """A log line with a short text from the model."""
    length = min(64, model.config.n_positions - 1)
    texts = generation.sample_text(model, tokenizer.load(folder), "", length, top_k=50, seed=seed)
    try:
        return f"sample: {next(texts)}"
    except ValueError as error:
        return f"no sample: {error}"
