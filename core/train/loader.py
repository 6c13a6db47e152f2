"""The micro-batches of each rank, as a pure function of the step."""

from collections.abc import Callable, Generator, Iterator

import numpy as np
import torch
from torch import Tensor

from core.data.shards import Dataset, TokenOrder, Windows, prefetched
from core.distributed import Ranks
from core.train.recipe import Recipe
from core.train.sampling import CandidateSampler
from core.train.schedule import Schedule

PREFETCH = 4  # micro-batches prepared in host memory ahead of their use


class TokenDropout:
    """Replaces a random fraction of the input tokens by end-of-text, in every epoch but the first.

    A pure function of the seed and of the sequence. Targets stay. A model can then repeat a text less easily from
    memory (word dropout, Bowman et al. 2016, arXiv:1511.06349).
    """

    def __init__(self, rate: float, *, seed: int, end_of_text_id: int, epoch_sequences: int) -> None:
        """`epoch_sequences`: the number of sequences in an epoch."""
        self._rate, self._seed = rate, seed
        self._end_of_text_id, self._epoch_sequences = end_of_text_id, epoch_sequences

    def __call__(self, inputs: Tensor, sequences: range) -> None:
        """Change, in place, the inputs (B, T) of the sequences with these indices in the token order."""
        for row, sequence in zip(inputs, sequences, strict=True):
            if self._rate and sequence >= self._epoch_sequences:
                # RandomState: numpy guarantees that its stream never changes (NEP 19), unlike that of Generator.
                random = np.random.RandomState(np.random.Philox(key=[self._seed, sequence]))
                row[torch.from_numpy(random.random_sample(len(row)) < self._rate)] = self._end_of_text_id


def micro_batches(
    schedule: Schedule,
    micro_batch: int,
    ranks: Ranks,
    windows: Windows,
    order: TokenOrder,
    step: int,
    dropout: TokenDropout | None = None,
    sampler: CandidateSampler | None = None,
) -> Iterator[list[Tensor]]:
    """This rank's share of a step: inputs and targets (B, T) in host memory, T = schedule.seq_len(step).

    With a sampled softmax, targets are indices among the candidates, whose ids and offsets follow them, (K,) each.
    """
    sequences = schedule.sequences(step)
    shape, count = schedule.split(step, micro_batch, ranks.world_size)
    size = len(sequences) // ranks.world_size // count
    candidates = sampler.draw(sequences, shape.candidates) if sampler is not None and shape.candidates else None
    for first in range(sequences.start + ranks.rank * size, sequences.stop, size * ranks.world_size):
        own = range(first, first + size)
        inputs, targets = windows.batch(order[own], order.shifts(own))
        if dropout is not None:
            dropout(inputs, own)
        batch = [inputs.view(-1, shape.seq_len), targets.view(-1, shape.seq_len)]
        if candidates is not None:
            batch = [batch[0], candidates.index(batch[1]), candidates.ids, candidates.offsets]
        yield ranks.pinned(*batch)


def open_loader(
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    micro_batch: int,
    ranks: Ranks,
    steps: range,
    log: Callable[[str], None] = print,
) -> Generator[list[Tensor], None, None]:
    """This rank's micro-batches of those steps, prefetched by a thread. `log` gets a warning of the sampler."""
    schedule, windows = Schedule(recipe), Windows(dataset, "train", recipe.seq_len)
    shifted = recipe.windows == "shifted"
    order = TokenOrder(dataset.manifest_hash, seed, recipe.seq_len, len(windows), shifted=shifted)
    end_of_text_id = dataset.manifest["end_of_text_id"]
    dropout = TokenDropout(recipe.token_dropout, seed=seed, end_of_text_id=end_of_text_id, epoch_sequences=len(windows))
    sampler = CandidateSampler(dataset, windows, order, seed=seed, log=log) if recipe.softmax == "sampled" else None
    batches = (
        batch
        for step in steps
        for batch in micro_batches(schedule, micro_batch, ranks, windows, order, step, dropout, sampler)
    )
    return prefetched(batches, PREFETCH, ranks.set_thread_device)
