"""The command line of every script: one dataclass is its options, its help and its logged config.

Nested dataclasses are groups of options in `--help`; their names don't become part of the option's name.
"""

import errno
import io
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import tyro
from tqdm import tqdm

Options = TypeVar("Options")
REMEDIES = {  # for errors of the operating system that concern a path
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file in it",
    errno.ENOTDIR: "a file has the name of a folder on this path; choose another path",
    errno.EEXIST: "a file has the name of a folder on this path; choose another path",
    errno.EACCES: "choose another path, or change its permissions",
    errno.ENOMEM: "free memory and rerun the same command",
    errno.EMFILE: "raise the limit on open files, as by ulimit -n 65536",
    errno.ENOSPC: "free disk space and rerun the same command",
}
# For an option whose default None is explained in its help text.
DEFAULT_IN_HELP = tyro.conf.arg(help_behavior_hint="")
STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)


@dataclass
class Terminal:
    """Output on the terminal."""

    quiet: bool = False
    """No progress bars and no line per step; only results, warnings and errors. CI=1 in the environment: no bars."""


terminal = Terminal()


def run(main: Callable[[Options], None], config_type: type[Options], description: str | None) -> None:
    """Parse the command line into `config_type` and call `main` with it.

    ValueError, OSError and MemoryError are errors that a user can cause: they end in one line and exit status 2. With
    TRACEBACK=1 in the environment the traceback is shown instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without UTF-8 shows other characters as escapes
            stream.reconfigure(errors="backslashreplace")
    config = parse(config_type, description)
    terminal.quiet = getattr(config, "terminal", terminal).quiet
    try:
        main(config)
    except (ValueError, OSError, MemoryError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"error: {message(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def parse(config_type: type[Options], description: str | None = None, args: list[str] | None = None) -> Options:
    """The command line, or `args`, as a `config_type`. Exits with status 2 on an unknown option or value."""
    return tyro.cli(config_type, description=description, args=args, config=STYLE)


def message(error: Exception) -> str:
    """An error in one line: an OSError as path, reason and remedy, without `[Errno 21]`."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        remedy = REMEDIES.get(error.errno or 0)
        return f"{error.filename}: {error.strerror}{f': {remedy}' if remedy else ''}"
    if isinstance(error, MemoryError):
        return f"out of memory: {str(error) or 'the machine has too little'}. Free memory and rerun the same command"
    return str(error)


def progress_bar(*args: Any, hidden: bool = False, **settings: Any) -> Any:
    """A tqdm bar, shown on a terminal only, and neither with --quiet nor in CI."""
    return tqdm(*args, disable=hidden or terminal.quiet or bool(os.environ.get("CI")) or None, **settings)


def option_name(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def check_positive(**values: float) -> None:
    """Raise ValueError for a value that isn't positive and finite, by the name of its option."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{option_name(name)} {value} must be above 0")


def check_between(low: float, high: float, **values: float) -> None:
    """Raise ValueError for a value outside [low, high], by the name of its option."""
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"{option_name(name)} {value} must be between {low:g} and {high:g}")
