"""Files that every stage reads or writes: JSON, metrics, checksums, locks between processes, Markdown tables."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
LOCK = ".lock"
ALL = 2**30  # more source files than there can be; the byte of that number is for what one process does at a time


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_text(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write by rename, so that a reader finds the old file or the whole new one."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        unfinished.write_text(json_text(value))
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(
            f"{path} can't be written ({error.strerror}): see to it and give the same command again"
        ) from None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """A run's metrics so far, also while it goes on. A last line that is being written is left out."""
    lines = (run / METRICS).read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


class FileLocks:
    """Which source files this process alone works on.

    They are locked bytes of a file, which the system frees when the process ends, however it ends, and which hold
    between machines where the file system has POSIX locks.
    """

    def __init__(self, out: Path, option: str = "--out") -> None:
        """`option` is what names the folder on the command line."""
        self._out, self._option = out, option
        self._file = open(out / LOCK, "ab")  # noqa: SIM115  open as long as the process lives

    def take(self, number: int, wait: bool = False, count: int = 1) -> None:
        """Claim `count` files from `number` on. Raises ValueError where another process holds one."""
        import fcntl

        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), count, number)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"another process is writing {self._out}: let it end, or stop it, or take another {self._option}"
            ) from None
        except OSError as error:
            print(f"{self._out} is on a file system without locks ({error}): start no second process on it", flush=True)

    def unheld(self) -> bool:
        """Whether no process holds a file, this one included."""
        import fcntl

        try:
            self.take(0, count=ALL)
        except ValueError:
            return False
        with contextlib.suppress(OSError):
            fcntl.lockf(self._file, fcntl.LOCK_UN, ALL, 0)
        return True

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time: the others wait here."""
        import fcntl

        self.take(ALL, wait=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, ALL)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with its columns aligned, to be read on a terminal as it is."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])
