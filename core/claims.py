"""Who writes what in a data folder: locks between processes, and between machines that share the folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

ALL = 2**30  # more source files than there can be; the byte of that number is for what one process does at a time


class Claims:
    """Which source files this process alone works on.

    They are locked bytes of a file, which the system frees when the process ends, however it ends, and which hold
    between machines where the file system has POSIX locks.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._file = open(out / ".lock", "ab")  # noqa: SIM115  open as long as the process lives

    def take(self, number: int, wait: bool = False, count: int = 1) -> None:
        """Claim `count` files from `number` on. Raises ValueError where another process holds one."""
        import fcntl

        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), count, number)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"another process is writing {self._out}: let it end, or stop it, or take another --out"
            ) from None
        except OSError as error:
            print(f"{self._out} is on a file system without locks ({error}): start no second process on it", flush=True)

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
