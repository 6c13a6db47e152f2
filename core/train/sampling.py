"""Sampled softmax (`--softmax sampled`): the loss of a training step takes part of the vocabulary.

The head and its loss take 21 % of a step of GPT-2 124M. A sampled softmax (Bengio and Senécal 2008; Jean et al. 2015,
arXiv:1412.2007) computes the logits of fewer tokens, the candidates: all targets of the step, on all ranks, and a
random sample of the other tokens, each of which stands for 1 / (its probability to be drawn) tokens.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from core.data.shards import Dataset, TokenOrder, Windows
from core.train.schedule import Shape

COUNTED_TOKENS = 16_777_216  # of the first shard, in which the frequency of each token is counted
FREQUENCY_POWER = 0.5  # the probability to be drawn grows with this power of the frequency


class Candidates:
    """The tokens whose logits the loss takes."""

    def __init__(self, ids: np.ndarray, offsets: np.ndarray, vocab_size: int) -> None:
        """`ids` (K,), and `offsets` (K,) to be added to their logits: -log of the probability to be drawn."""
        self.ids, self.offsets = torch.from_numpy(ids), torch.from_numpy(offsets.astype(np.float32))
        self._index = torch.full((vocab_size,), -1)
        self._index[self.ids] = torch.arange(len(ids))

    def index(self, targets: Tensor) -> Tensor:
        """The index of each target among the ids, in the shape of `targets`."""
        return self._index[targets]


class CandidateSampler:
    """Draws the candidates of a step: a pure function of the data, the seed and the sequences of the step."""

    def __init__(
        self, dataset: Dataset, windows: Windows, order: TokenOrder, *, seed: int, log: Callable[[str], None] = print
    ) -> None:
        """`log` gets a line at the first step that can't be sampled."""
        self._log, self._has_logged = log, False
        self._windows, self._order, self._seed, self._vocab_size = windows, order, seed, dataset.vocab_size
        first_shard = dataset.open(dataset.shards("train")[0])
        counts = np.bincount(first_shard[:COUNTED_TOKENS], minlength=self._vocab_size)
        self._by_frequency = np.argsort(-counts, kind="stable")
        self._weights = (counts + 1.0) ** FREQUENCY_POWER

    def draw(self, sequences: range, count: int) -> Candidates | None:
        """`count` candidates for the sequences of a step; None where these have more different targets."""
        is_target = np.zeros(self._vocab_size, dtype=bool)
        for index, shift in zip(self._order[sequences], self._order.shifts(sequences), strict=True):
            is_target[self._windows.window(int(index), int(shift))[1:]] = True
        others = self._by_frequency[~is_target[self._by_frequency]]
        sample_size = count - int(is_target.sum())
        if not 0 <= sample_size <= len(others):
            if not self._has_logged:
                self._log(
                    f"warning: a step has {count - sample_size:,} different targets, more than the {count:,} "
                    f"candidates of its softmax: such steps take the whole vocabulary"
                )
                self._has_logged = True
            return None
        probabilities = inclusion_probabilities(self._weights[others], sample_size)
        # RandomState: numpy guarantees that its stream never changes (NEP 19), unlike that of Generator.
        start = np.random.RandomState(np.random.Philox(key=[self._seed, sequences.start])).random_sample()
        # Systematic sampling: where the sum of the probabilities passes start, start + 1, ...
        drawn = np.searchsorted(np.cumsum(probabilities), start + np.arange(sample_size), side="right")
        drawn = np.minimum(drawn, len(others) - 1)  # the sum may be rounded down
        ids = np.concatenate([np.flatnonzero(is_target), others[drawn]])
        offsets = np.concatenate([np.zeros(count - sample_size), -np.log(probabilities[drawn])])
        return Candidates(ids, offsets, self._vocab_size)


def inclusion_probabilities(weights: np.ndarray, size: int) -> np.ndarray:
    """Probabilities (n,) proportional to the weights, but at most 1, with the sum `size`; weights fall, size <= n."""
    if not size:
        return np.zeros(len(weights))
    remaining = size - np.arange(len(weights))  # of the sum, where that many of the largest weights have probability 1
    rest = np.cumsum(weights[::-1])[::-1]  # the sum of the other weights
    certain = int(np.argmax(remaining * weights <= rest * (1 + 1e-9)))
    return np.minimum(1.0, weights * (remaining[certain] / rest[certain]))


def blank_batch(shape: Shape, device: torch.device) -> list[Tensor]:
    """A micro-batch of this shape, to compile and to time."""
    batch = [torch.zeros(shape.rows, shape.seq_len, dtype=torch.long, device=device) for _ in range(2)]
    if shape.candidates:
        batch += [torch.arange(shape.candidates, device=device), torch.zeros(shape.candidates, device=device)]
    return batch


def shape_of(batch: list[Tensor], shallow: bool) -> Shape:
    """The shape of a micro-batch."""
    rows, seq_len = batch[0].shape
    return Shape(rows, seq_len, len(batch[2]) if len(batch) > 2 else 0, shallow)
