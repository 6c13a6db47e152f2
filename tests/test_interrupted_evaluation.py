"""An evaluation that is stopped keeps what is complete, marks what is not, and says both in one line."""

import json
import os
import signal

import pytest
from conftest import ended, refused, run, save_model, started, wait_until

DATA = ("data/stories/stories_NE_valid.txt", "data/stories/stories_CN_valid.txt")
PROTOCOLS = ("sentence", "paper")
SCRIPT = """
import os, signal, sys, time
import eval_cbt
from core import cli
from core.eval import results, scoring

batches, score_batch, save_items, build = 0, scoring._score_batch, results.save_items, scoring._build_batches

def wait():  # for a signal
    open("reached", "w").close()
    for _ in range(600):  # one sleep of 60 s isn't ended by a signal that comes just before it
        time.sleep(0.1)

def counted(*arguments):
    built = build(*arguments)
    print("batches", len(built))
    return built

def delayed(*arguments):
    global batches
    batches += 1
    if (batches, os.environ.get("RANK", "0")) == (int(os.environ["AT"]), "0"):
        wait()
    return score_batch(*arguments)

def delayed_save(items, path):
    if any("interrupted" in item for item in items):
        open("saving", "w").close()
        time.sleep(0.5)
    save_items(items, path)

scoring._score_batch, results.save_items, scoring._build_batches = delayed, delayed_save, counted
cli.run(eval_cbt.main, eval_cbt.Config, "")
"""


@pytest.fixture(scope="module")
def complete(world):
    """Of an evaluation that nothing stopped: options, results, items, and the number of batches of each set."""
    save_model(world / "interrupted", seed=4)
    options = ("--data", *DATA, "--protocol", *PROTOCOLS, "--device", "cpu", "--batch-tokens", 300)
    (world / "stopped.py").write_text(SCRIPT)
    places = ("--ckpt", "interrupted", "--out", "all.json", "--items", "all.jsonl")
    printed = run(world / "stopped.py", *places, *options, cwd=world, AT="0").stdout
    batches = [int(line.split()[1]) for line in printed.splitlines() if line.startswith("batches ")]
    return options, json.loads((world / "all.json").read_text()), lines(world / "all.jsonl"), batches


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def stop(world, options, numbers, *, at, ranks=0):
    """The result of an evaluation that gets the signals at the batch with the number `at` of rank 0."""
    for name in ("reached", "saving", "some.json", "some.jsonl"):
        (world / name).unlink(missing_ok=True)
    places = ("--out", "some.json", "--items", "some.jsonl")
    command = (world / "stopped.py", "--ckpt", "interrupted", *options, *places)
    with started(*command, cwd=world, ranks=ranks, AT=str(at)) as process:
        for number, file in zip(numbers, ("reached", "saving"), strict=False):
            assert wait_until((world / file).exists, process)
            os.kill(process.pid, number)
        return ended(process)


@pytest.mark.parametrize(
    ("numbers", "ranks"),
    [
        ((signal.SIGINT,), 0),
        ((signal.SIGTERM,), 0),
        ((signal.SIGINT, signal.SIGTERM), 0),  # the second while it saves
        ((signal.SIGINT,), 2),
        ((signal.SIGTERM,), 2),
    ],
)
def test_a_stopped_evaluation_saves_complete_sets_and_marks_the_items_of_others(world, complete, numbers, ranks):
    options, results, items, batches = complete
    count = len(items) // 4
    own = [-(-number // max(ranks, 1)) for number in batches]  # of rank 0
    result = stop(world, options, numbers, at=sum(own), ranks=ranks)  # at the last of the second set
    assert result.returncode == (1 if ranks else 130)  # torchrun has its own
    saved = lines(world / "some.jsonl")
    assert without_seconds(json.loads((world / "some.json").read_text())) == without_seconds(results[:2])
    assert saved[: 2 * count] == items[: 2 * count]
    partial = saved[2 * count :]
    assert 0 < len(partial) < 2 * count
    assert partial == [marked for item in items[2 * count :] if (marked := item | {"interrupted": True}) in partial]
    assert {item["protocol"] for item in partial} == set(PROTOCOLS)
    names = [f"interrupted {protocol} {DATA[1].rpartition('/')[2]}" for protocol in PROTOCOLS]
    assert result.stderr.count("interrupted: ") == 1
    assert (
        f"interrupted: saved 2 of 4 results in some.json, some.jsonl has {len(partial)} questions of those that are "
        f"not complete; not complete: {', '.join(names)}\n"
    ) in result.stderr
    if not ranks:
        assert result.stderr.endswith("\nstopped\n")
        assert "Traceback" not in result.stderr


def test_a_kill_loses_only_the_set_that_is_scored(world, complete):
    options, results, items, batches = complete
    assert stop(world, options, (signal.SIGKILL,), at=batches[0] + 1).returncode == -signal.SIGKILL
    assert without_seconds(json.loads((world / "some.json").read_text())) == without_seconds(results[:2])
    assert lines(world / "some.jsonl") == items[: len(items) // 2]


def test_without_a_complete_set_nothing_but_items_is_saved(world, complete):
    options, _, items, _ = complete
    result = stop(world, options, (signal.SIGINT,), at=3)
    assert "interrupted: saved 0 of 4 results, some.jsonl has" in result.stderr
    assert not (world / "some.json").exists()
    assert 0 < len(lines(world / "some.jsonl")) < len(items) // 2


def test_incomplete_items_are_not_compared_as_a_complete_set(world, complete):
    partial = [item | {"interrupted": True} for item in complete[2][:5]]
    other = [item | {"model": "b"} for item in partial]
    for name, content in (("a", partial), ("b", other)):
        (world / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in content))
    message = refused(run("eval_cbt.py", "--compare", "a.jsonl", "all.jsonl", cwd=world, check=False))
    assert "answered 5 questions" in message
    printed = run("eval_cbt.py", "--compare", "a.jsonl", "b.jsonl", cwd=world).stdout
    for name in ("a", "b"):
        assert f"{name}.jsonl is not complete: its evaluation was interrupted" in printed
