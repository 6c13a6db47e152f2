"""The validation loss: on a fixed set of tokens, the work shared among the ranks."""

import math

import torch

from core.distributed import Ranks, autocast
from core.shards import Dataset, Windows
from core.tokenizer import token_bytes
from model import GPT


class Validation:
    def __init__(
        self, dataset: Dataset, ranks: Ranks, seq_len: int, max_tokens: int, batch_size: int, dtype: str
    ) -> None:
        """The first `max_tokens` of the split, in windows of `seq_len`, `batch_size` windows a forward."""
        self._windows = Windows(dataset, "val", seq_len)
        self._ranks, self._dtype, self._batch_size = ranks, dtype, batch_size
        self._count = min(max(max_tokens // seq_len, 1), len(self._windows))
        self._token_bytes = token_bytes(dataset.folder) if (dataset.folder / "tokenizer.json").is_file() else None
        self.tokens = self._count * seq_len

    @torch.no_grad()
    def run(self, model: GPT) -> dict[str, float | None]:
        """`loss` in nats a token and `bits_per_byte` of text (None without a tokenizer). All ranks must call it."""
        losses, sizes, text_bytes = [], [], 0
        ranks, size = self._ranks, self._batch_size
        for first in range(ranks.rank * size, self._count, ranks.world_size * size):
            inputs, targets = self._windows.batch(range(first, min(first + size, self._count)))  # (B, T)
            if self._token_bytes is not None:
                text_bytes += int(self._token_bytes[targets.numpy()].sum())
            with autocast(ranks, self._dtype):
                losses.append(model(*ranks.to_device(inputs, targets)))
            sizes.append(targets.numel())
        means = torch.stack(losses).tolist() if losses else []  # one wait for the device, at the end
        nats = math.fsum(mean * n for mean, n in zip(means, sizes, strict=True))
        nats, tokens, text_bytes = ranks.sum([nats, sum(sizes), text_bytes])
        return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None}


def in_bits(result: dict[str, float | None]) -> str:
    return f", {result['bits_per_byte']:.4f} bits per byte" if result["bits_per_byte"] else ""
