"""What each step of a recipe takes, as pure functions of the step."""

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from core.train.memory import largest_divisor

if TYPE_CHECKING:  # core/train/recipe.py imports this file
    from core.train.recipe import Recipe

FIRST_PHASE_STEPS = 160  # steps with the first batch size
CANDIDATES = 10_240  # of a sampled softmax, in a step of 32,768 tokens, which have 7,600 different ones
MAX_SAMPLED_TOKENS = 131_072  # of a step; larger steps contain most of the vocabulary


class Shape(NamedTuple):
    """What is computed of a micro-batch: inputs and targets (rows, seq_len), candidates of the softmax, and blocks."""

    rows: int
    seq_len: int
    candidates: int = 0  # 0: the softmax takes the whole vocabulary
    shallow: bool = False  # every second block is computed

    @property
    def forward_kwargs(self) -> dict[str, bool]:
        """Keywords of `GPT.forward`: none at full depth, so that an edited model.py may lack `shallow`."""
        return {"shallow": True} if self.shallow else {}


def candidate_count(step_tokens: int) -> int:
    """Candidates of a step: the number of different tokens in a text grows with about the root of its length."""
    return 2048 * math.ceil(CANDIDATES / 2048 * math.sqrt(step_tokens / 32_768))


class BatchSchedule:
    """Sequences per step: the first size for 160 steps, then doubled each time the tokens seen have quadrupled.

    The critical batch size grows like the square root of the tokens seen (Zhang et al. 2024, arXiv:2410.21676).
    """

    def __init__(self, first: int, largest: int) -> None:
        """Batch sizes in sequences, over all ranks; `largest` is `first` times a power of two."""
        self._sizes = [first]
        self._first_steps, self._sequences = [0], [0]  # of each phase: its first step, and the sequences before it
        while self._sizes[-1] < largest:
            phase = len(self._sizes)
            steps = FIRST_PHASE_STEPS if phase == 1 else FIRST_PHASE_STEPS * 3 * 2 ** (phase - 1) // 4
            self._first_steps.append(self._first_steps[-1] + steps)
            self._sequences.append(self._sequences[-1] + steps * self._sizes[-1])
            self._sizes.append(2 * self._sizes[-1])

    def size(self, step: int) -> int:
        """Sequences of a step, over all ranks."""
        return self._sizes[bisect_right(self._first_steps, step) - 1]

    def sequences_before(self, step: int) -> int:
        """Sequences of all steps before this one."""
        phase = bisect_right(self._first_steps, step) - 1
        return self._sequences[phase] + (step - self._first_steps[phase]) * self._sizes[phase]

    def steps_within(self, sequences: int) -> int:
        """The largest number of steps that take at most this many sequences."""
        phase = bisect_right(self._sequences, sequences) - 1
        return self._first_steps[phase] + (sequences - self._sequences[phase]) // self._sizes[phase]


def cosine(recipe: "Recipe", progress: float, _remaining: float) -> float:
    """Half a cosine from 1 down to the final fraction, as GPT-3 (Brown et al. 2020, appendix B)."""
    final = recipe.final_lr_fraction
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(recipe: "Recipe", _progress: float, remaining: float) -> float:
    """Constant, then linear over the last `decay_fraction` of the tokens (Hu et al. 2024, arXiv:2404.06395)."""
    final = recipe.final_lr_fraction
    return final + (1 - final) * min(1.0, remaining / recipe.decay_fraction) if recipe.decay_fraction else 1.0


# After the warm-up: the learning rate as a fraction of its peak, of (recipe, fraction of the steps after the warm-up
# that are done, fraction of all tokens that remain).
LR_SCHEDULES: dict[str, Callable[["Recipe", float, float], float]] = {"cosine": cosine, "wsd": warmup_stable_decay}


class Schedule:
    """Batch, sequence length and learning rate of each step: pure functions of the step, counted from 0."""

    def __init__(self, recipe: "Recipe") -> None:
        self._recipe = recipe
        self._batches = BatchSchedule(
            recipe.first_batch_tokens // recipe.seq_len, recipe.batch_tokens // recipe.seq_len
        )

    def sequences(self, step: int) -> range:
        """The indices, in the token order, of the sequences of a step."""
        return range(self._batches.sequences_before(step), self._batches.sequences_before(step + 1))

    def tokens(self, step: int) -> int:
        """Tokens seen before the step."""
        return self._batches.sequences_before(step) * self._recipe.seq_len

    def seq_len(self, step: int) -> int:
        """Tokens per sequence. In the first `short_tokens` tokens they are short, except in every `long_every`-th step.

        Long sequences train the positions that short ones lack, so that the loss doesn't rise where all become long.
        """
        recipe = self._recipe
        is_long = recipe.long_every > 0 and (step + 1) % recipe.long_every == 0
        is_short = self.tokens(step) < recipe.short_tokens and not is_long
        return min(recipe.short_seq_len, recipe.seq_len) if is_short else recipe.seq_len

    def candidates(self, step: int) -> int:
        """Tokens whose logits the loss takes (core/train/sampling.py); 0: all, as in the first and in large steps."""
        tokens = self._batches.size(step) * self._recipe.seq_len
        is_sampled = self._recipe.softmax == "sampled" and step >= FIRST_PHASE_STEPS and tokens <= MAX_SAMPLED_TOKENS
        return candidate_count(tokens) if is_sampled else 0

    def shallow(self, step: int) -> bool:
        """Whether every second block is computed (core/train/depth.py), as in the first steps; never in the last."""
        return step < self._recipe.steps - 1 and self.tokens(step) < self._recipe.shallow_fraction * self._recipe.tokens

    def deepens(self, step: int) -> bool:
        """Whether the step is the first one of full depth after shallow ones."""
        return step > 0 and self.shallow(step - 1) and not self.shallow(step)

    def split(self, step: int, micro_batch: int, world_size: int) -> tuple[Shape, int]:
        """The shape and the number of a rank's micro-batches in a step; each has at most `micro_batch` sequences."""
        share, seq_len = self._batches.size(step) // world_size, self.seq_len(step)
        size = largest_divisor(share, micro_batch)
        rows = size * self._recipe.seq_len // seq_len
        return Shape(rows, seq_len, self.candidates(step), self.shallow(step)), share // size

    def splits(self, first: int, micro_batch: int, world_size: int, shallow: bool = False) -> list[tuple[Shape, int]]:
        """The different values of `split` in the steps from `first` on that are or aren't shallow, in order."""
        kinds: dict[tuple[int, ...], int] = {}  # the first step of each kind
        for step in range(first, self._recipe.steps):
            if self.shallow(step) == shallow:
                kinds.setdefault((self._batches.size(step), self.seq_len(step), self.candidates(step)), step)
        return list(dict.fromkeys(self.split(step, micro_batch, world_size) for step in kinds.values()))

    def lr_scale(self, step: int) -> float:
        """The learning rate as a fraction of its peak."""
        recipe = self._recipe
        if step < recipe.warmup_steps:
            return (step + 1) / recipe.warmup_steps
        progress = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
        remaining = 1 - self.tokens(step) / recipe.tokens
        return LR_SCHEDULES[recipe.lr_schedule](recipe, progress, remaining)
