"""One dataclass a script is its command line, its help and its logged config; and how scripts speak to who watches."""

import errno
import inspect
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, make_dataclass
from typing import Any, TypeVar

import tyro
from tqdm import tqdm

Config = TypeVar("Config")
REMEDIES = {  # for what the system says of a path
    errno.ENOENT: ": see whether the path is right",
    errno.EISDIR: ": name a file in it",
    errno.ENOTDIR: ": a file stands where a folder should be; name another",
    errno.EEXIST: ": a file stands where a folder should be; name another",
    errno.EACCES: ": you may not; name another, or change its permissions",
    errno.ENOSPC: ": make room and give the same command again",
}
# For an option whose default is None: its text says what that means.
UNSET = tyro.conf.arg(help_behavior_hint="")


@dataclass
class Terminal:
    """What is said on the way."""

    quiet: bool = False
    """No progress bars and no line a step: results, warnings and errors alone. CI=1 in the environment: no bars."""


terminal = Terminal()


def run(main: Callable[[Config], None], config_type: type[Config], description: str | None) -> None:
    """Parse the command line into `config_type` and call `main` with it.

    ValueError and OSError are what a user can cause: they end in one sentence and exit status 2. TRACEBACK=1 in the
    environment shows where they came from.
    """
    config = parse(config_type, description)
    try:
        main(config)
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"error: {sentence(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def sentence(error: Exception) -> str:
    """An error without Python's own notation, `[Errno 21] Is a directory: 'data'`, and with what to do."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}{REMEDIES.get(error.errno or 0, '')}"
    return str(error)


def parse(config_type: type[Config], description: str | None, args: list[str] | None = None) -> Config:
    """The command line as a `config_type`.

    Where that only joins dataclasses, each is a group of --help, named after the class and described by its docstring.
    """
    parts = [part for part in config_type.__mro__ if is_dataclass(part) and inspect.get_annotations(part)]
    groups = {"script": config_type} if config_type in parts else {part.__name__.lower(): part for part in parts}
    members = [
        (name, tyro.conf.OmitArgPrefixes[part])  # type: ignore[misc, valid-type]  # a type that the class given decides
        for name, part in (groups | {"terminal": Terminal}).items()
    ]
    style = (tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
    parsed: Any = tyro.cli(make_dataclass("Command", members), description=description, args=args, config=style)
    terminal.quiet = parsed.terminal.quiet
    return config_type(**{key: value for name in groups for key, value in vars(getattr(parsed, name)).items()})


def bar(*args: Any, hidden: bool = False, **settings: Any) -> Any:
    """A progress bar where somebody watches: on a terminal, without --quiet, outside CI."""
    return tqdm(*args, disable=hidden or terminal.quiet or bool(os.environ.get("CI")) or None, **settings)


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
