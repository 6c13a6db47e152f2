"""The command line of every script: one dataclass is its options, its help and its logged config.

Nested dataclasses are groups of options in `--help`; their names don't become part of the option's name.
"""

import contextlib
import errno
import io
import math
import os
import select
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from functools import partial
from types import NoneType, UnionType
from typing import IO, Any, Self, TypeVar, Union, get_args

import tyro
from tqdm import tqdm
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructTypeInfo,
    UnsupportedTypeAnnotationError,
)

Options = TypeVar("Options")
REMEDIES = {  # for errors of the operating system that concern a path
    errno.ENOENT: "Check the path",
    errno.EISDIR: "Name a file in it",
    errno.ENOTDIR: "A file has the name of a folder on this path. Choose another path",
    errno.EEXIST: "A file has the name of a folder on this path. Choose another path",
    errno.EACCES: "Choose another path, or change its permissions",
    errno.ENOMEM: "Free memory and rerun the same command",
    errno.EMFILE: "Raise the limit on open files, as by ulimit -n 65536",
    errno.ENOSPC: "Free disk space and rerun the same command",
}
# Packages that a plain train.py doesn't need; pyproject.toml lists them by purpose.
PACKAGES = (
    *("datasets", "fsspec", "huggingface_hub", "matplotlib", "plotly", "pyarrow", "tiktoken", "tokenizers"),
    "transformers",
)
# For an option whose default None is explained in its help text.
DEFAULT_IN_HELP = tyro.conf.arg(help_behavior_hint="")
STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)


@dataclass
class Terminal:
    """Output on the terminal."""

    quiet: bool = False
    """No progress bars, no progress lines and no line per step. Without a terminal, or with CI=1 in the environment,
    long work prints a line every 30 seconds in place of a bar."""


terminal = Terminal()


def run(main: Callable[[Options], None], config_type: type[Options], description: str | None) -> None:
    """Parse the command line into `config_type` and call `main` with it.

    ValueError, OSError and MemoryError are errors that a user can cause: they end in one line and exit status 2. With
    TRACEBACK=1 in the environment the traceback is shown instead. Where the reader of the output has ended, as with
    `| head`, the script ends without a message, like a program that SIGPIPE ended.
    """
    use_utf8()
    try:
        config = parse(config_type, description)
        terminal.quiet = getattr(config, "terminal", terminal).quiet
        main(config)
        write_out(sys.stdout)
    except (ValueError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and (is_closed(sys.stdout) or is_closed(sys.stderr)):
            sys.exit(128 + signal.SIGPIPE)
        if os.environ.get("TRACEBACK"):
            raise
        print_last(f"error: {message(error)}")
        sys.exit(2)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if os.environ.get("TRACEBACK") or package not in PACKAGES:
            raise
        print_last(f"error: the package {package} is not installed. Run pip install {package}")
        sys.exit(2)
    except KeyboardInterrupt:
        print_last("stopped")
        sys.exit(130)
    finally:
        for stream in (sys.stdout, sys.stderr):
            discard_unwritable(stream)


def is_closed(stream: IO[str]) -> bool:
    """Whether the other end of a pipe is closed."""
    try:
        poll = select.poll()
        poll.register(stream, select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a file of the operating system
        return False


def write_out(stream: IO[str]) -> None:
    """Write the buffered output. Raises OSError on a full disk. A closed pipe is not an error."""
    try:
        stream.flush()
    except BrokenPipeError:
        pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def print_last(line: str) -> None:
    with contextlib.suppress(OSError):  # a closed terminal or pipe
        print(line, file=sys.stderr, flush=True)


def discard_unwritable(stream: IO[str]) -> None:
    """Discard what can't be written: Python would print a message about it at its end."""
    try:
        stream.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def use_utf8() -> None:
    """Restart in Python's UTF-8 mode if the locale has another encoding, in which many file names are no valid text."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):  # PYTHONIOENCODING can still name another encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def parse(config_type: type[Options], description: str | None = None, args: list[str] | None = None) -> Options:
    """The command line, or `args`, as a `config_type`. Exits with status 2 on an unknown option or value."""
    return tyro.cli(config_type, description=wrap(description or ""), args=args, config=STYLE, registry=REGISTRY)


def wrap(description: str) -> str:
    """A description in the width of the terminal; blocks of examples as they are.

    tyro would join lines that start with a letter, and double blank lines: lines start with a space, and blank lines
    contain a character of width 0.
    """
    width = min(shutil.get_terminal_size().columns, 120)
    blocks = [
        block if block.startswith(" ") else textwrap.fill(block, width, initial_indent=" ", subsequent_indent=" ")
        for block in description.strip().split("\n\n")
    ]
    return "\n\u200b\n".join(blocks)


REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def optional_value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None:
    """Parse an option of type `T | None` like one of type T: tyro would list None among the choices of T in errors."""
    kinds = [kind for kind in get_args(info.type) if kind is not NoneType]
    if info.type_origin not in (Union, UnionType) or len(kinds) != 1:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return spec
    return replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
    )


def parse_number(kind: type[Any], values: list[str]) -> Any:
    """A float, or an integer, also as 1.5e8. Raises ValueError for anything else."""
    with contextlib.suppress(InvalidOperation):  # also of comparisons with NaN
        number = Decimal(values[0])
        if kind is float or (abs(number) < 10**20 and number == number.to_integral_value()):
            return kind(number)
    expected = "a number, such as 0.001 or 1e-3" if kind is float else "an integer, such as 150_000_000 or 1.5e8"
    raise ValueError(f"{values[0]!r:.40} must be {expected}")


@REGISTRY.primitive_rule
def number_value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Parse numbers by `parse_number`: the errors of tyro's own rules are those of Python."""
    if info.type not in (int, float):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT" if info.type is int else "FLOAT",
        instance_from_str=partial(parse_number, info.type),
        is_instance=lambda value: isinstance(value, (int, info.type)),
        str_from_instance=lambda value: [str(value)],
    )


class HelpRule:
    """The help of each option without the line breaks of its docstring, some of which tyro would keep."""

    def __init__(self) -> None:
        self._is_active = False

    def __call__(self, info: StructTypeInfo) -> StructConstructorSpec | None:
        if self._is_active:  # tyro's own rules follow
            return None
        self._is_active = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            self._is_active = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        fields = [replace(field, helptext=partial(join_lines, field.helptext)) for field in spec.fields]
        return replace(spec, fields=tuple(fields))


def join_lines(text: str | Callable[[], str | None] | None) -> str | None:
    text = text() if callable(text) else text
    return None if text is None else " ".join(text.split())


REGISTRY.struct_rule(HelpRule())


def message(error: Exception) -> str:
    """An error in one line: an OSError as path, reason and remedy, without `[Errno 21]`."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        remedy = REMEDIES.get(error.errno or 0)
        return f"{place}{error.strerror}{f'. {remedy}' if remedy else ''}"
    if isinstance(error, MemoryError):
        return f"out of memory: {str(error) or 'the machine has too little'}. Free memory and rerun the same command"
    return str(error)


LINE_SECONDS = 30.0  # between two progress lines


class ProgressLines:
    """The progress of long work without a terminal: a line on stderr every LINE_SECONDS. The interface of tqdm."""

    def __init__(
        self, iterable: Iterable[Any] | None, desc: str, total: int | None = None, *, unit: str, scaled: bool = False
    ) -> None:
        """`scaled`: numbers as 1.50M."""
        self._iterable, self._desc, self._unit, self._scaled = iterable, desc, unit, scaled
        self._total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self._done, self._start = 0, time.monotonic()
        self._last = self._start

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable or ():
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        if now - self._last >= LINE_SECONDS:
            self._last = now
            with contextlib.suppress(OSError):  # a closed stderr, or a log file on a full disk
                print(self.line(now - self._start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """Done and total, the rate, and the time left, after `seconds`."""
        rate = self._done / max(seconds, 1e-9)
        done, total, speed = (self._format(number) for number in (self._done, self._total or 0, rate))
        counts = f"{done}/{total}" if self._total else done
        parts = [f"{self._desc}: {counts} {self._unit}".removeprefix(": "), f"{speed} {self._unit}/s"]
        if self._total and rate:
            parts.append(f"{tqdm.format_interval((self._total - self._done) / rate)} left")
        return " | ".join(parts)

    def _format(self, number: float) -> str:
        if self._scaled:
            return tqdm.format_sizeof(number)
        return f"{number:,}" if isinstance(number, int) else f"{number:.3g}" if number < 1000 else f"{number:,.0f}"

    def close(self) -> None:
        """No line: the result of the work follows."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress_bar(
    iterable: Iterable[Any] | None = None,
    desc: str = "",
    total: int | None = None,
    *,
    unit: str = "it",
    unit_scale: bool = False,
    hidden: bool = False,
    lines: bool = True,
    **settings: Any,
) -> Any:
    """A tqdm bar on a terminal. Elsewhere and in CI: ProgressLines, unless not `lines`. Neither with --quiet.

    `settings`: of the tqdm bar alone.
    """
    on_terminal = sys.stderr is not None and sys.stderr.isatty() and not os.environ.get("CI")
    hidden = hidden or terminal.quiet
    if lines and not hidden and not on_terminal:
        return ProgressLines(iterable, desc, total, unit=unit, scaled=unit_scale)
    tqdm_settings = {"unit": f" {unit}", "unit_scale": unit_scale, "disable": hidden or not on_terminal} | settings
    return tqdm(iterable, desc, total, **tqdm_settings)


def print_note(text: str) -> None:
    """A line on standard output, from one rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", flush=True)


def option_name(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def check_positive(**values: float | None) -> None:
    """Raise ValueError for a value that isn't positive and finite, by the name of its option. None: not given."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            limit = "above 0" if math.isfinite(value) else "a finite number above 0"
            raise ValueError(f"{option_name(name)} {value} must be {limit}")


def check_between(low: float, high: float, **values: float) -> None:
    """Raise ValueError for a value outside [low, high], by the name of its option."""
    for name, value in values.items():
        if not low <= value <= high:
            limits = f"between {low:g} and {high:g}" if high <= 10**9 else f"{low:g} or more, and at most {high}"
            raise ValueError(f"{option_name(name)} {value} must be {limits}")
