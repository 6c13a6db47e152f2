"""What the tests share: the scripts run as a user runs them, and a small world of stories made by those scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core import stories, tokenizer
from model import GPT, GPTConfig

torch.set_num_threads(1)  # as the processes below have: for products this small a second thread only waits

ROOT = Path(__file__).parent.parent
ENCODING = stories.encoding()
POSITIONS = 48  # save_model's context; most of the stories' questions are longer
TRAIN = ("--preset", "tiny", "--seq-len", "64", "--batch-tokens", "2048", "--micro-batch", "16", "--device", "cpu")


def run(script, *args, cwd, check=True, **env):
    """Run a script of the repo in folder `cwd`; its stdout and stderr as text."""
    command = [sys.executable, ROOT / script, *map(str, args)]
    return execute(command, cwd, check, env)


def torchrun(ranks, script, *args, cwd, check=True, **env):
    """The same under torchrun with `ranks` processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return execute([*launch, ROOT / script, *map(str, args)], cwd, check, env)


def execute(command, cwd, check, env):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)
    if check and result.returncode:
        raise AssertionError(f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def refused(result):
    """The one sentence in which a call ended that the user got wrong."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").strip()


def save_model(folder, seed, vocab_size=ENCODING.n_vocab):
    """Save a model of random weights, some tokens much likelier than others, with the stories' tokenizer."""
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
    execute([sys.executable, "-m", "core.stories", "--stories", "600", "--questions", "40"], folder, True, {})
    source = ("--source", "data/stories/stories.jsonl", "--encoding", "data/stories")
    run("fineweb.py", *source, "--out", "data/small", "--val-tokens", "6000", "--workers", "1", cwd=folder)
    return folder
