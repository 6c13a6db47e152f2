"""Who writes what in a data folder: locks between processes, and between machines that share the folder."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # fineweb.py needs no torch, and starts sooner without it
    from core.distributed import Ranks

LOCK = ".lock"
ALL = 2**30  # more source files than there can be; the byte of that number is for what one process does at a time


class Claims:
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


@contextlib.contextmanager
def hold_run(folder: Path, ranks: "Ranks") -> Iterator[None]:
    """Keep other processes off a run's folder. Raises ValueError, on every rank, where one is training the run."""
    lock, problem = None, None
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Claims(folder, "--run")
        try:
            lock.take(0)
        except ValueError as error:
            problem = str(error)
    if problem := ranks.from_main(problem):
        raise ValueError(problem)
    try:
        yield
    finally:
        if lock is not None and [path.name for path in folder.iterdir()] == [LOCK]:  # it came to no run
            shutil.rmtree(folder)
