"""Shared by the tests: running the scripts as a user does, and a small data set of stories made by them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from processes import Forked, needs_own_start

import train
from core import cli
from core.data import tokenizer
from core.train.recipe import resolve_recipe
from demo import stories
from model import GPT, PRESETS, GPTConfig

for number in (signal.SIGINT, signal.SIGHUP):  # ignored in background jobs of a shell, and under nohup
    signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)

torch.set_num_threads(1)  # as in the processes below: a second thread only slows down products this small

ROOT = Path(__file__).parent.parent
ENCODING = stories.encoding()
POSITIONS = 48  # context of save_model; most questions of the stories are longer
TRAIN = ("--preset", "tiny", "--seq-len", "64", "--batch-tokens", "2048", "--micro-batch", "16", "--device", "cpu")
FAULTY = """
import hashlib, os, time
import torch
import train
from core import cli
from model import GPT

call, rank, forward, main = -2, int(os.environ.get("RANK", 0)), GPT.forward, train.train  # two calls time a step

def faulty(self, *args, **options):
    global call
    loss = forward(self, *args, **options)
    if torch.is_grad_enabled():
        call += 1
        if {when}:
            {fault}
    return loss

def train_and_print_hash(run):
    main(run)
    weights = b"".join(p.detach().numpy().tobytes() for p in run.model.parameters())
    os.write(1, b"weights of a rank: " + hashlib.sha256(weights).hexdigest().encode() + b"\\n")  # one atomic write

GPT.forward, train.train = faulty, train_and_print_hash
cli.run(train.main, train.Config, "")
"""


def run(script, *args, cwd, check=True, **env):
    """Run a script of the repository in the folder `cwd`; returns stdout and stderr as text."""
    return execute(command_of(script, args), cwd, check, env)


def train_here(*args, cwd):
    """train.py within this process, which saves the start of another."""
    with contextlib.chdir(cwd):
        train.main(cli.parse(train.Config, args=[str(arg) for arg in args]))


def on_ranks(ranks, script, *args, cwd, check=True, **env):
    """The same on several ranks."""
    with started_ranks(ranks, script, *args, cwd=cwd, **env) as processes:
        return ended_ranks(processes, check)


@contextlib.contextmanager
def started_ranks(ranks, script, *args, cwd, **env):
    """A script on several ranks in the background, without torchrun, whose workers import torch again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        addresses = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(started(script, *args, cwd=cwd, **env, **addresses, RANK=str(i), LOCAL_RANK=str(i)))
            for i in range(ranks)
        ]


def ended_ranks(processes, check=True):
    results = [ended(process) for process in processes]
    stdout, stderr = "".join(each.stdout for each in results), "".join(each.stderr for each in results)
    status = max((each.returncode for each in results), key=abs)
    if check and status:
        raise AssertionError(f"{len(results)} ranks of {processes[0].args} ended with {status}:\n{stdout}\n{stderr}")
    return subprocess.CompletedProcess(processes[0].args, status, stdout, stderr)


def command_of(script, args, ranks=0, launch=("--standalone",)):
    torchrun = ["-m", "torch.distributed.run", *launch, f"--nproc_per_node={ranks}"] if ranks else []
    is_module = str(script).startswith("benchmarks.")
    return [
        sys.executable,
        *map(str, torchrun),
        *(["-m", script] if is_module else [str(ROOT / script)]),
        *map(str, args),
    ]


def environment(env):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "CI": ""} | env


def execute(command, cwd, check, env):
    """Run a Python program; see processes.py for how it starts."""
    if command[0] != sys.executable or needs_own_start(env):
        streams = {"capture_output": True, "text": True, "timeout": 300}
        result = subprocess.run(command, check=False, cwd=cwd, env=environment(env), **streams)
    else:
        with contextlib.closing(Forked(command, cwd, environment(env))) as process:
            result = ended(process, timeout=300)
    if check and result.returncode:
        raise AssertionError(f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


@contextlib.contextmanager
def started(script, *args, cwd, ranks=0, launch=("--standalone",), **env):
    """A script that runs in the background; its processes are killed at the end of the context."""
    command = command_of(script, args, ranks, launch)
    if needs_own_start(env):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=cwd, env=environment(env), start_new_session=True, **streams)
    else:
        process = Forked(command, cwd, environment(env))
    try:
        yield process
    finally:
        for pid in (*children(process.pid), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        process.close() if isinstance(process, Forked) else process.communicate()


def ended(process, timeout=120):
    """Wait for a started script; returns what `run` returns."""
    stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_until(true, process=None, seconds=60.0):
    """Whether the condition became true before the process ended."""
    end = time.monotonic() + seconds
    while not true():
        if process is not None and process.poll() is not None:
            return False
        assert time.monotonic() < end
        time.sleep(0.001)
    return True


def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def faulty(path, when, fault):
    """A train.py with a `fault` in the micro-batches where `when`, an expression of rank and call, is true."""
    path.write_text(FAULTY.format(when=when, fault=fault))
    return path


def config_of(**options):
    """The Config of train.py from options by their names on the command line; None and False are omitted."""
    args = []
    for name, value in options.items():
        if value is not None and value is not False:
            args += [cli.option_name(name)] + ([] if value is True else [str(value)])
    return cli.parse(train.Config, args=args)


def tiny_config(**options):
    """The Config of the options TRAIN and the data of `world`; `options` replace them."""
    tiny = {"preset": "tiny", "seq_len": 64, "batch_tokens": 2048, "micro_batch": 16, "device": "cpu"}
    return config_of(**(tiny | {"data": "data/small"} | options))


def option_names(config):
    """The options of a dataclass and of its groups, as written on the command line."""
    for field in fields(config):
        hint = get_type_hints(config, include_extras=True)[field.name]
        if is_dataclass(hint):
            yield from option_names(hint)
        else:
            names = [annotation.name for annotation in getattr(hint, "__metadata__", ()) if hasattr(annotation, "name")]
            yield cli.option_name(next((name for name in names if name), field.name))


def resolved(world_size=1, shape=PRESETS["tiny"], micro_batch=1, recipe="original", **options):
    """A resolved recipe; options as on the command line of train.py."""
    lengths = {name: options.pop(name, None) for name in ("tokens", "steps", "unique_tokens", "vocab_size")}
    lengths["tokens"] = lengths["tokens"] if lengths["tokens"] is not None else 10_000_000_000
    seq_len = options.pop("seq_len", 64)
    division = {"micro_batch": micro_batch, "world_size": world_size}
    return resolve_recipe(recipe, shape, **lengths, seq_len=seq_len, overrides=options, **division)


def fill(path):
    """Write a file until the disk is full."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass


def refused(result):
    """The error message, one line, of a script that ended with exit status 2."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").strip()


def save_model(folder, seed, vocab_size=ENCODING.n_vocab):
    """Save a model with random weights, large enough for a peaked distribution, and the tokenizer of the stories."""
    shape = GPTConfig(n_layer=1, n_head=2, n_embd=32, n_positions=POSITIONS, vocab_size=vocab_size)
    model = GPT(shape, seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)
    model.save_pretrained(folder, ENCODING.eot_token)
    tokenizer.save(ENCODING, folder)
    return model


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with data/stories (corpus, encoding, questions) and data/small (its shards)."""
    folder = tmp_path_factory.mktemp("world")
    execute([sys.executable, "-m", "demo.stories", "--stories", "600", "--questions", "40"], folder, True, {})
    source = ("--source", "data/stories/stories.jsonl", "--encoding", "data/stories")
    run("fineweb.py", *source, "--out", "data/small", "--val-tokens", "6000", "--workers", "1", cwd=folder)
    return folder


@pytest.fixture
def disk(tmp_path):
    """A small disk, mounted for the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
