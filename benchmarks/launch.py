"""A script on several ranks, for benchmarks that start torchrun themselves."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def torchrun(ranks: int, *script: str, **streams: Any) -> Iterator[subprocess.Popen[str]]:
    """The torchrun of a script and its options; however the context ends, its ranks have ended too."""
    # -P: torchrun must not find this folder's tokenize.py in place of Python's, whatever folder it is started in.
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # torchrun's own, but for one rank
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by way of what follows `yield`
    with subprocess.Popen([*command, *script], env=os.environ | threads, text=True, **streams) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            signal.signal(signal.SIGTERM, before)
