"""What is measured while a run goes on, the work shared among the ranks: the validation loss, and LAMBADA."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from core import checkpoint, cli
from core.data import tokenizer
from core.data.shards import Dataset, Windows, verify
from core.distributed import Ranks, autocast
from core.eval import evaluate as evaluation
from core.eval import lambada
from core.eval.task import QuestionSet
from core.train.setup import resolve_computation
from model import GPT

VAL_BATCH = 16  # windows a forward at most, as logits are large


@dataclass
class Measurement:
    """What is measured on the way; each at step 0 and after the last step too."""

    val_every: int = 250
    """Steps between validations."""
    val_tokens: int = 10_485_760
    """Validation tokens at most, always the same ones."""
    eval_lambada: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """File of LAMBADA passages to score while the run goes on: the accuracy's curve beside the loss's."""
    eval_every: int = 250
    """Steps between those scores."""
    sample_every: int = 0
    """Steps between text samples; 0: none."""
    log_every: int = 10
    """Steps between lines on the terminal; metrics.jsonl has every step."""
    wandb_project: Annotated[str | None, cli.DEFAULT_IN_HELP] = None
    """Mirror the metrics to this wandb project, offline where there is no login."""
    eval_only: bool = False
    """Print the validation loss, perplexity and bits per byte of --init-from or the run, and stop."""


class Validation:
    split = "val"  # in metrics.jsonl

    def __init__(
        self,
        dataset: Dataset,
        ranks: Ranks,
        loss: Callable[[Tensor, Tensor], Tensor],
        seq_len: int,
        max_tokens: int,
        batch_size: int,
        dtype: str,
    ) -> None:
        """The first `max_tokens` of the split, by a model's `loss` on `batch_size` windows of `seq_len` at once."""
        self._windows = Windows(dataset, "val", seq_len)
        self._ranks, self._loss, self._dtype, self._batch_size = ranks, loss, dtype, batch_size
        self._count = min(max(max_tokens // seq_len, 1), len(self._windows))
        has_tokenizer = (dataset.folder / "tokenizer.json").is_file()
        self._token_bytes = tokenizer.token_bytes(dataset.folder) if has_tokenizer else None
        self.tokens = self._count * seq_len

    @torch.no_grad()
    def run(self, model: GPT) -> dict[str, float | None]:
        """`loss` in nats a token and `bits_per_byte` of text (None without a tokenizer). All ranks must call it."""
        losses, sizes, text_bytes = [], [], 0
        ranks, size = self._ranks, self._batch_size
        firsts = range(ranks.rank * size, self._count, ranks.world_size * size)
        for first in cli.progress_bar(firsts, "validation", leave=False, delay=1, hidden=not ranks.is_main):
            inputs, targets = self._windows.batch(range(first, min(first + size, self._count)))  # (B, T)
            if self._token_bytes is not None:
                text_bytes += int(self._token_bytes[targets.numpy()].sum())
            loss = self._loss if len(inputs) == size else model  # the last few would be compiled for themselves
            with autocast(ranks, self._dtype):
                losses.append(loss(*ranks.to_device(inputs, targets)))
            sizes.append(targets.numel())
        means = torch.stack(losses).tolist() if losses else []  # one wait for the device, at the end
        nats = math.fsum(mean * n for mean, n in zip(means, sizes, strict=True))
        nats, tokens, all_bytes = ranks.all_reduce([nats, sum(sizes), text_bytes])
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / all_bytes if all_bytes else None}

    def describe(self, result: dict[str, Any]) -> str:
        bits = f", {result['bits_per_byte']:.4f} bits per byte" if result["bits_per_byte"] else ""
        return f"validation loss {result['loss']:.4f} nats a token{bits}"


class LambadaCurve:
    """LAMBADA by the rule that the file's text allows: `standard` for the tokenised one, `openai` for all others."""

    split = "lambada"

    def __init__(self, file: str, dataset: Dataset, ranks: Ranks, n_positions: int, dtype: str) -> None:
        """Read and encode the passages once. Raises ValueError for a broken file, or shards without a tokenizer."""
        if not (dataset.folder / "tokenizer.json").is_file():
            raise ValueError(f"--eval-lambada needs {dataset.folder / 'tokenizer.json'}, which is missing")
        self.protocol = lambada.allowed(lambada.text_of(Path(file)) or "other")[0]
        questions = QuestionSet(lambada.read(Path(file)), [self.protocol], Path(file).name, None)
        encode = tokenizer.load(dataset.folder).encode_ordinary
        self._asked = evaluation.ask(lambada.TASK, questions, encode, n_positions)
        self._how = {"ranks": ranks, "dtype": dtype, "label": "LAMBADA"}

    def run(self, model: GPT) -> dict[str, Any]:
        """Accuracy, counts, and perplexity a word. All ranks must call it."""
        verdicts = evaluation.answer(lambada.TASK, model, self._asked, **self._how)
        correct = sum(verdict.correct for verdict in verdicts)
        facts = {"protocol": self.protocol, "accuracy": correct / len(verdicts), "correct": correct}
        return facts | {"total": len(verdicts), "perplexity": lambada.perplexity(self.protocol, verdicts)}

    def describe(self, result: dict[str, Any]) -> str:
        perplexity = f", perplexity {result['perplexity']:,.2f}" if result["perplexity"] else ""
        counts = f"{result['correct']:,} of {result['total']:,}"
        return f"LAMBADA {result['protocol']} {result['accuracy']:.2%}, {counts}{perplexity}"


def open_measures(config: Any, dataset: Dataset, ranks: Ranks, loss: Any, n_positions: int) -> list[tuple[int, Any]]:
    """What train.py's settings ask to measure, each with the steps between; validation, by `loss`, first."""
    batch = VAL_BATCH if config.micro_batch == "auto" else min(config.micro_batch, VAL_BATCH)
    validation = Validation(dataset, ranks, loss, config.seq_len, config.val_tokens, batch, config.dtype)
    if config.eval_lambada is None:
        return [(config.val_every, validation)]
    curve = LambadaCurve(config.eval_lambada, dataset, ranks, n_positions, config.dtype)
    return [(config.val_every, validation), (config.eval_every, curve)]


def evaluate(source: str, config: Any, dataset: Dataset, ranks: Ranks) -> None:
    """Say what the weights of `source` come to, whatever their size. All ranks must call it.

    Raises ValueError where they don't know the shards' vocabulary, or --seq-len passes their context.
    """
    model = checkpoint.load_model(source).to(ranks.device)
    shape = model.config
    if shape.vocab_size != dataset.vocab_size:
        raise ValueError(
            f"{source} knows {shape.vocab_size:,} token ids, {dataset.folder} has {dataset.vocab_size:,}: name shards "
            f"of its encoding with --data"
        )
    config = resolve_computation(replace(config, seq_len=config.seq_len or shape.n_positions), ranks)
    micro_batch = 1 if config.micro_batch == "auto" else config.micro_batch
    cli.check_between(1, shape.n_positions, seq_len=config.seq_len)
    cli.check_positive(val_tokens=config.val_tokens, micro_batch=micro_batch)
    if config.verify:
        verify(dataset, ranks)
    (_, validation), *others = open_measures(config, dataset, ranks, model, shape.n_positions)
    result = validation.run(model)
    ranks.log(f"{source} on {validation.tokens:,} validation tokens of {dataset.folder}, in {config.dtype}:")
    ranks.log(f"{validation.describe(result)}, perplexity {math.exp(result['loss']):.2f}")
    for _, other in others:
        ranks.log(other.describe(other.run(model)))
