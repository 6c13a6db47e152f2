"""What ends a run before its last step: a signal, after which it saves a checkpoint, or a step that hangs."""

import contextlib
import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from core.distributed import Ranks

# Slurm and cloud providers send SIGTERM or SIGUSR1 before they stop a machine; SIGHUP: the terminal was closed.
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")


class Interrupts:
    """Within the context, a signal requests a stop instead of killing the process, and a hang ends the process."""

    def __init__(self, hang_timeout: float, is_main: bool) -> None:
        """`hang_timeout` in seconds. The main process reports signals."""
        self.stop_requested = False
        self._hang_timeout = hang_timeout
        self._is_main = is_main
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def restart_hang_timer(self) -> None:
        """Restart the hang timer. Call it at least every `hang_timeout` seconds, or call `stop_hang_timer`.

        When the timer expires, the process prints its stack traces and exits with status 1. The timer runs in a C
        thread, so that it also ends an interpreter that is blocked in a read or in a collective.
        """
        faulthandler.dump_traceback_later(self._hang_timeout, exit=True, file=sys.__stderr__ or sys.stderr)

    def stop_hang_timer(self) -> None:
        """Stop the hang timer before slow work. Collectives keep the timeout of the process group."""
        faulthandler.cancel_dump_traceback_later()

    def stop_step(self, ranks: Ranks) -> bool:
        """Whether to stop in the middle of a step; the same on every rank. All ranks must call it.

        Several GPUs complete their step first: agreement would make the host wait for the device.
        """
        if ranks.world_size > 1 and ranks.device.type == "cuda":
            return False
        return self.stop_now(ranks)

    def stop_now(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop; the same on every rank. All ranks must call it."""
        return ranks.all_reduce([self.stop_requested])[0] > 0

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C quits at once
        is_first, self.stop_requested = not self.stop_requested, True
        if is_first and self._is_main:
            hint = "; press Ctrl-C again to quit without saving" if number == signal.SIGINT else ""
            line = f"\n{signal.Signals(number).name}: stopping, then saving a checkpoint{hint}\n"
            with contextlib.suppress(OSError):  # a closed terminal, or `| tee`, which the same Ctrl-C ended
                os.write(2, line.encode())  # not print, which the signal may have interrupted

    def __enter__(self) -> "Interrupts":
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows lacks some
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_hang_timer()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
