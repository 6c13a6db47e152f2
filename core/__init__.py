"""Shared code of the scripts. A KeyboardInterrupt during their imports ends without a traceback, as later ones do."""

import os
import sys
from types import TracebackType


def print_stopped(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt) and not os.environ.get("TRACEBACK"):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = print_stopped  # before the heavy imports, which take seconds
