"""Starts Python programs in processes that are forked from one that has imported torch, which takes 2 seconds.

Each has its own folder, environment, arguments, session and output files, like a process that a shell starts.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PRELOADED = ("processes", "torch._dynamo", "torch.distributed.run", "safetensors.torch", "tokenizers", "tiktoken")
PRELOADED = (*PRELOADED, "train", "fineweb", "eval_cbt", "eval_hellaswag", "eval_lambada", "eval_wikitext", "sample")
PRELOADED = (*PRELOADED, "convert", "report", "fastokens", "fsspec", "pyarrow.parquet")
INSTALLED = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
FRESH = ("PYTHON", "TRITON", "LC_", "LANG", "OMP")  # variables that matter when Python starts or imports a package
OWN_START = {"PYTHONUNBUFFERED": "1"}  # the environment of a program that needs a new interpreter, or pipes
context = multiprocessing.get_context("forkserver")


def needs_own_start(env):
    """Whether a program with these variables needs a new interpreter."""
    return any(name.startswith(FRESH) for name in env)


def run_program(command, cwd, env, outputs, hangup):
    """Run `python SCRIPT`, `python -m MODULE` or `python -c CODE`, with arguments, in the forked process.

    `hangup`: what SIGHUP does.
    """
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # the default, for processes that the program starts
    signal.signal(signal.SIGHUP, hangup)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate((os.devnull, *outputs)):
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout = open(0), open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    option, *arguments = command[1:]
    sys.argv, sys.orig_argv = [option, *arguments], command
    sys.path[:] = ["", *env["PYTHONPATH"].split(os.pathsep), *INSTALLED]
    if option == "-m":
        sys.argv = arguments
        sys.modules.pop(arguments[0], None)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        sys.argv = ["-c", *arguments[1:]]
        exec(arguments[0], {"__name__": "__main__"})
    else:
        sys.path[0] = str(Path(option).parent)
        runpy.run_path(option, run_name="__main__")


class Forked:
    """A running program; the interface of subprocess.Popen. `close` kills it and deletes its output."""

    def __init__(self, command, cwd, env):
        self.args, self.returncode = [str(part) for part in command], None
        self._outputs = []
        for _ in range(2):
            file, path = tempfile.mkstemp()
            os.close(file)
            self._outputs.append(path)
        start_server()
        hangup = signal.getsignal(signal.SIGHUP)  # ignored under nohup
        self._process = context.Process(target=run_program, args=(self.args, str(cwd), env, self._outputs, hangup))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """The output, as text, after the end."""
        self.wait(timeout)
        stdout, stderr = (Path(path).read_text(encoding="utf-8") for path in self._outputs)
        return stdout, stderr

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        for path in self._outputs:
            Path(path).unlink(missing_ok=True)


def start_server():
    """Start the process to fork from, with one thread and the packages above, unless it runs."""
    before = os.environ.copy()
    os.environ.update(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    context.set_forkserver_preload([*PRELOADED])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
