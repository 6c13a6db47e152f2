"""A shard that is written while its documents arrive."""

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from core.data.encode import Documents
from core.data.shards import UNFINISHED
from core.files import sha256, write_json

HEADER_BYTES = 128  # of a .npy file with one dimension


class ShardWriter:
    """Writes one shard after another. A thread completes a shard while the next one is written."""

    def __init__(self, out: Path) -> None:
        self._out, self._path = out, Path()  # the folder, and the unfinished shard
        self._file: io.BufferedWriter | None = None
        self._thread = ThreadPoolExecutor(1)
        self._in_flight: Future[None] | None = None

    def begin(self, name: str) -> None:
        self._path = self._out / f".{name}.npy.unfinished"
        self._file = open(self._path, "wb")  # noqa: SIM115  closed by `_complete` or `close`
        self._file.write(bytes(HEADER_BYTES))
        self.tokens = self._documents = self._text_bytes = 0

    def add(self, documents: Documents) -> None:
        assert self._file is not None
        with disk_full_reported(self._path):
            self._file.write(documents.ids.data)
        self.tokens += len(documents.ids)
        self._documents += len(documents)
        self._text_bytes += int(documents.text_bytes.sum())

    def finish(self, name: str, place: dict[str, Any], record: dict[str, Any]) -> None:
        """Complete the shard and write `record` with its manifest entry; without documents, only the record.

        `place`: of its first document in the source. Raises OSError for the shard before it.
        """
        self.wait()
        assert self._file is not None
        entry = {"file": f"{name}.npy", "split": name.partition("_")[0], "tokens": self.tokens}
        entry |= {"documents": self._documents, "bytes": self._text_bytes} | place
        record = record | {"shard": entry if self.tokens else None}
        self._in_flight = self._thread.submit(self._complete, self._file, self._path, name, record)
        self._file = None

    def _complete(self, file: io.BufferedWriter, path: Path, name: str, record: dict[str, Any]) -> None:
        shard = record["shard"]
        with disk_full_reported(path), file:
            if shard:
                header = io.BytesIO()
                described = {"descr": "<u2", "fortran_order": False, "shape": (shard["tokens"],)}
                np.lib.format.write_array_header_1_0(header, described)
                assert len(header.getvalue()) == HEADER_BYTES
                file.seek(0)
                file.write(header.getvalue())
            file.flush()
            os.fsync(file.fileno())
        if shard:
            shard["sha256"] = sha256(path)
            os.replace(path, self._out / shard["file"])
        else:
            path.unlink()
        write_json(self._out / UNFINISHED / f"{name}.json", record)

    def wait(self) -> None:
        """Wait until the shard in flight is complete. Raises OSError."""
        if self._in_flight:
            future, self._in_flight = self._in_flight, None
            future.result()

    def close(self) -> None:
        """Stop the thread, and remove the unfinished shard."""
        self._thread.shutdown()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_full_reported(path: Path) -> Iterator[None]:
    """Remove the file, and raise OSError with a remedy, where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        path.unlink(missing_ok=True)
        raise OSError(
            f"{path.parent} has no space left for a shard. Free disk space and rerun the same command to resume"
        ) from None
