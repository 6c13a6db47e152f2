"""Several nodes: two launchers train one model together; only rank 0 writes, and all ranks evaluate."""

import os
import signal
import socket

import pytest
from conftest import TRAIN, children, ended, on_ranks, started, wait_until
from test_resume import assert_like, reached

STEPS = 12
COMMAND = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--val-every", 5, "--save-every", 5, "--micro-batch", 8)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def node(rank, port):
    return ("--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}")


@pytest.fixture(scope="module")
def one_node(world):
    on_ranks(2, "train.py", *COMMAND, "--run-name", "one-node", cwd=world)
    return world / "logs/one-node"


def test_two_nodes_of_one_rank_equal_one_node_of_two(world, one_node):
    """Each node's process has local rank 0, so that the use of the local rank instead of the global one fails."""
    port, command = free_port(), ("train.py", *COMMAND, "--run-name", "two-nodes")
    with (
        started(*command, cwd=world, ranks=1, launch=node(0, port)) as first,
        started(*command, cwd=world, ranks=1, launch=node(1, port)) as second,
    ):
        results = [ended(process) for process in (first, second)]
    assert [result.returncode for result in results] == [0, 0], results
    assert "val_loss" in results[0].stdout
    assert "saved logs/two-nodes" in results[0].stdout
    assert results[1].stdout == ""
    assert_like(world / "logs/two-nodes", one_node, STEPS)


def test_after_the_death_of_a_rank_both_nodes_resume_together(world, one_node):
    """Each launcher counts its own restarts, so that the counts of the nodes differ."""
    folder, endpoint = world / "logs/elastic", f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    launch = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=elastic", endpoint, "--max-restarts=2")
    nodes = {"cwd": world, "ranks": 1, "launch": launch}
    command = ("train.py", *COMMAND, "--run-name", "elastic")
    with started(*command, **nodes) as first, started(*command, **nodes) as second:
        assert wait_until(lambda: reached(folder, 7), first)
        os.kill(children(second.pid)[0], signal.SIGKILL)
        results = [ended(process) for process in (first, second)]
    assert [result.returncode for result in results] == [0, 0], results
    assert sum("resuming from logs/elastic/checkpoints/step_00000" in result.stdout for result in results) == 1
    assert_like(folder, one_node, STEPS)
