"""What an evaluation saves before its end, and what it says when Ctrl-C or SIGTERM stops it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from core.eval import results
from core.eval.results import Result
from core.eval.task import QuestionSet

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = "interrupted"  # a field of the items of a set of questions that is not complete


class Output:
    """Results and items on the disk, after each set of questions: a kill loses only the set that was being scored."""

    def __init__(self, out: str | None, items: str | None) -> None:
        """The values of --out and --items."""
        self.results: list[Result] = []
        self.items: list[dict[str, Any]] = []
        self.place: Path | None = None  # of the results; None: none is saved
        self._out, self._items = out, items

    def add(self, found: list[Result], items: list[dict[str, Any]]) -> None:
        """Save these and all before them."""
        self.results += found
        self.items += items
        self._save()

    def _save(self) -> None:
        if self.results:
            self.place = results.save(self.results, self._out)
        if self._items and self.items:
            results.save_items(self.items, self._items)

    def interruption(self, models: list[str], sets: list[QuestionSet]) -> str:
        """A line on what is saved, and on what is missing for these models on these sets."""
        self._save()  # again, as the signal may have ended it
        expected = [(model, p, questions.data) for model in models for questions in sets for p in questions.protocols]
        complete = {(r.model, r.protocol, r.data) for r in self.results}
        missing = [" ".join(key) for key in expected if key not in complete]
        parts = [f"saved {len(complete)} of {len(expected)} results" + (f" in {self.place}" if self.place else "")]
        if self._items and self.items:
            partial = sum(INTERRUPTED in item for item in self.items)
            parts.append(f"{self._items} has {partial:,} questions of those that are not complete")
        return "; ".join([f"interrupted: {', '.join(parts)}", f"not complete: {', '.join(missing)}"])


@contextmanager
def interruptible(*, is_main: bool) -> Iterator[None]:
    """Within the context, SIGTERM raises KeyboardInterrupt, as Ctrl-C does. Ranks that save nothing end at once."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        for number in previous:  # torchrun passes a Ctrl-C on as a second signal, which would end the saving
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    handler = stop if is_main else signal.SIG_DFL
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    previous = {number: old for number, old in previous.items() if old is not signal.SIG_IGN}  # as under nohup
    for number in previous:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
