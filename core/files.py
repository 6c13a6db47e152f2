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
EXCLUSIVE = 2**30  # larger than the number of any shard: the lock of `exclusive`
PRESENCE = EXCLUSIVE + 1  # shared by all processes that work in the folder


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an error of the machine, such as too many open files. It means nothing about the content."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def sha256(path: Path) -> str:
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_pointer(path: Path) -> None:
    """Raise ValueError where a file is the pointer that Git LFS leaves in place of the content."""
    with open(path, "rb") as file:
        if file.read(42).startswith(b"version https://git-lfs.github.com/spec/v1"):
            raise ValueError(f"{path} is a pointer of Git LFS, not the content. Run git lfs pull in its repository")


def json_text(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write as `write_text` does."""
    write_text(path, json_text(value))


def write_text(path: Path, text: str) -> None:
    """Write by rename: a reader finds the old file or the complete new one, also after a power failure.

    Raises OSError with a remedy.
    """
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = error.strerror or type(error).__name__
        raise OSError(f"{path} can't be written ({reason}). Fix this and rerun the same command") from None


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, also during the run. An incomplete last line is ignored."""
    lines = (run_folder / METRICS).read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


class FileLocks:
    """Locks on numbered items of a folder, such as shards; one process holds each.

    A lock is one locked byte of the file `.lock`. The operating system releases it when the process ends, however it
    ends. Locks also work between machines where the file system supports POSIX locks.
    """

    def __init__(self, folder: Path, option: str = "--out") -> None:
        """`option` is the command line option that names the folder."""
        self._folder, self._option = folder, option
        self._file = open(folder / LOCK, "a+b")  # noqa: SIM115  open until the process ends
        self.supported = True

    def try_acquire(self, number: int, shared: bool = False, wait: bool = False) -> bool:
        """Lock an item, and return whether no other process holds it. Several processes can hold a shared lock."""
        import fcntl

        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.lockf(self._file, kind, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if self.supported:
                reason = f"the file system of {self._folder} has no locks ({error.strerror})"
                print(f"warning: {reason}. Do not start the same process twice", flush=True)
            self.supported = False
        return True

    def acquire(self, number: int, shared: bool = False) -> None:
        """Lock an item. Raises ValueError where another process holds it."""
        if not self.try_acquire(number, shared):
            raise ValueError(
                f"another process is writing {self._folder}. Wait until it ends, stop it, or use another {self._option}"
            )

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """A section that one process at a time enters; the others wait."""
        import fcntl

        if not self.try_acquire(EXCLUSIVE):
            print(f"waiting for another process that prepares {self._folder}", flush=True)
            self.try_acquire(EXCLUSIVE, wait=True)
        try:
            yield
        finally:
            if self.supported:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, EXCLUSIVE)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns. Cells can contain any character but a line break."""
    header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])
