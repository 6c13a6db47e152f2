"""What ends a run before its last step: a signal, after which it saves, or a step that hangs."""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

# Slurm and clouds send SIGTERM or SIGUSR1 before they take a machine away; SIGHUP is a terminal that closes.
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")


class Interrupts:
    """While the context is open, signals ask for a stop in place of killing, and a hang ends the process."""

    def __init__(self, hang_timeout: float, speaks: bool) -> None:
        """`hang_timeout` in seconds; the process that `speaks` says that a signal has come."""
        self.stop = False
        self._hang_timeout = hang_timeout
        self._speaks = speaks
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def alive(self) -> None:
        """Begin the hang's count anew; to be called at least once each `hang_timeout` seconds, or `pause`.

        Where it isn't, the process prints where it stands and ends with status 1. The count runs in a thread of C,
        so that it also ends a process whose interpreter is stuck in a read or a collective.
        """
        faulthandler.dump_traceback_later(self._hang_timeout, exit=True, file=sys.__stderr__ or sys.stderr)

    def pause(self) -> None:
        """Stop counting: what follows may take long. Collectives keep the process group's own time-out."""
        faulthandler.cancel_dump_traceback_later()

    def _asked(self, number: int, _frame: FrameType | None) -> None:
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt  # who presses Ctrl-C again doesn't want to wait
        if not self.stop and self._speaks:  # os.write, as print may be what the signal interrupted
            again = "; Ctrl-C again quits without saving" if number == signal.SIGINT else ""
            os.write(2, f"\n{signal.Signals(number).name}: finishing the step, then saving{again}\n".encode())
        self.stop = True

    def __enter__(self) -> "Interrupts":
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows lacks some
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()
        for number, handler in self._before.items():
            signal.signal(number, handler)
