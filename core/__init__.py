"""Shared code of the scripts, and what must be set before they import torch.

A KeyboardInterrupt during their imports ends without a traceback, as later ones do.
"""

import os
import sys
from types import TracebackType


def print_stopped(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt) and not os.environ.get("TRACEBACK"):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = print_stopped  # before the heavy imports, which take seconds
# Threads of OpenMP that wait must not spin: with another busy process on two cores, demo training is 7 times as fast,
# and 6 % slower on idle cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
