"""One dataclass a script is its command line, its help and its logged config."""

import math
import os
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

Config = TypeVar("Config")


def run(main: Callable[[Config], None], config_type: type[Config], description: str | None) -> None:
    """Parse the command line into `config_type` and call `main` with it.

    ValueError and OSError are what a user can cause: they end in one sentence and exit status 2. TRACEBACK=1 in the
    environment shows where they came from.
    """
    config = tyro.cli(config_type, description=description)
    try:
        main(config)
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def check_positive(**values: float) -> None:
    """Raise ValueError for a setting that isn't above 0 and finite, by the name of its option."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be above 0")


def check_between(low: float, high: float, **values: float) -> None:
    """Raise ValueError for a setting outside [low, high], by the name of its option."""
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value} must lie between {low:g} and {high:g}")
