"""No poisoned steps: a loss or gradient that isn't finite changes no weight on any rank, is counted, and ends a run."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TRAIN, ended, faulty, on_ranks, refused, run, started
from safetensors.torch import load_file

import train
from core import checkpoint
from core.files import METRICS, read_metrics

COMMAND = (*TRAIN, "--data", "data/small", "--steps", 8, "--save-every", 1, "--keep", 99)
POISON = {
    "loss": "loss = loss * float('nan')",
    "gradient": "loss = loss + (0 * loss).sqrt()",  # finite, and its derivative isn't
}


SLOW = """
import time
from core import checkpoint
save = checkpoint.save
checkpoint.save = lambda *args: (time.sleep(3), save(*args))[1]
"""


def weights(folder, step):
    return (folder / f"checkpoints/step_{step:06d}/model.safetensors").read_bytes()


def moments(folder, step):
    path = folder / f"checkpoints/step_{step:06d}" / checkpoint.TRAINING_STATE
    return torch.load(path, weights_only=True)["optimizer"]["AdamW"]["state"]


def assert_skipped(folder, step):
    """Weights and moments stayed; the steps around it moved them."""
    assert weights(folder, step) == weights(folder, step - 1)
    before, after = moments(folder, step - 1), moments(folder, step)
    assert all(torch.equal(after[i][name], before[i][name]) for i in before for name in before[i])
    assert len({weights(folder, s) for s in (step - 2, step - 1, step + 1)}) == 3


@pytest.mark.parametrize("poison", POISON)
def test_a_bad_step_changes_nothing_and_is_counted(world, tmp_path, poison):
    script, folder = faulty(tmp_path / "bad.py", "call == 9", POISON[poison]), world / f"logs/bad-{poison}"
    said = run(script, *COMMAND, "--run", folder.name, cwd=world).stdout  # two micro-batches a step: it is the 5th
    assert_skipped(folder, 5)
    lines = {line["step"]: line for line in read_strictly(folder) if line["split"] == "train"}
    assert list(lines) == list(range(1, 9))
    assert [step for step, line in lines.items() if line.get("skipped")] == [5]
    assert lines[5]["grad_norm"] is None
    assert (lines[5]["loss"] is None) == (poison == "loss")
    assert len(re.findall("SKIPPED, 1 so far", said)) == 1
    assert "1 of 8 steps were skipped: no finite loss or gradient" in said
    states = [checkpoint.load_training_state(path, {})["bad_steps"] for path in checkpoint.listed(folder)]
    assert states == [0, 0, 0, 0, 1, 1, 1, 1]


def test_poison_on_one_of_two_ranks_skips_the_step_on_both(world, tmp_path):
    script, folder = faulty(tmp_path / "bad.py", "rank == 1 and call == 5", POISON["loss"]), world / "logs/bad-rank"
    said = on_ranks(2, script, *COMMAND, "--run-name", folder.name, cwd=world).stdout
    assert_skipped(folder, 5)
    hashes = re.findall(r"weights of a rank: (\w+)", said)
    assert len(hashes) == 2
    assert len(set(hashes)) == 1
    assert all(
        weight.isfinite().all() for weight in load_file(checkpoint.listed(folder)[-1] / "model.safetensors").values()
    )


def test_a_resume_counts_on(world, tmp_path):
    """One bad step before it was stopped and one after: the second is one too many."""
    command, folder = (*COMMAND, "--run", "bad-resumed", "--max-bad-steps", 1), world / "logs/bad-resumed"
    stop = "loss = loss * float('nan'); import signal; os.kill(os.getpid(), signal.SIGTERM)"
    said = run(faulty(tmp_path / "stops.py", "call == 5", stop), *command, cwd=world).stdout
    assert "stopped after step 3 of 8" in said
    said = refused(run(faulty(tmp_path / "bad.py", "call == 3", POISON["loss"]), *command, cwd=world, check=False))
    assert "2 steps were skipped, more than --max-bad-steps 1" in said
    assert [line["step"] for line in read_strictly(folder) if line.get("skipped")] == [3, 5]


@pytest.mark.parametrize("ranks", [0, 2])
def test_too_many_end_the_run_and_name_the_last_good_checkpoint(world, tmp_path, ranks):
    script, folder = faulty(tmp_path / "bad.py", "call >= 8", POISON["loss"]), world / f"logs/bad-{ranks}"
    arguments = (script, *COMMAND, "--save-every", 3, "--steps", 100, "--max-bad-steps", 2, "--run-name", folder.name)
    if ranks:
        result = on_ranks(2, *arguments, "--micro-batch", 8, cwd=world, check=False)
        assert result.returncode
        assert result.stderr.count("more than --max-bad-steps 2") == 2
    else:
        result = run(*arguments, cwd=world, check=False)
        assert refused(result).startswith("step 6: loss nan, gradient norm nan; 3 steps were skipped, more than ")
    assert f"its last good checkpoint: logs/{folder.name}/checkpoints/step_000003" in result.stdout
    lines = [line for line in read_strictly(folder) if line["split"] == "train"]
    assert [line.get("skipped", False) for line in lines] == [False] * 3 + [True] * 3
    assert_checkpoints_are_finite(folder)


def test_no_rank_ends_before_the_last_good_checkpoint_is_written(world, tmp_path):
    """torchrun kills the ranks that are left once one has ended, also one that writes."""
    script, folder = faulty(tmp_path / "bad.py", "call >= 8", POISON["loss"]), world / "logs/bad-slow"
    script.write_text(SLOW + script.read_text())
    given = ("--micro-batch", 8, "--save-every", 3, "--steps", 100, "--max-bad-steps", 2, "--run-name", folder.name)
    with started(script, *COMMAND, *given, cwd=world, ranks=2) as process:
        result = ended(process)
    assert result.returncode
    assert f"its last good checkpoint: logs/{folder.name}/checkpoints/step_000003" in result.stdout
    assert checkpoint.problem(folder / "checkpoints/step_000003") is None


@pytest.mark.parametrize("steps", [1, 3], ids=["last-step", "on-the-way"])
def test_weights_that_the_update_blows_up_are_not_saved(world, monkeypatch, steps):
    """The loss of step 1 is finite still: only the next loss, or the weights themselves, would tell."""
    monkeypatch.chdir(world)
    tiny = {"preset": "tiny", "seq_len": 64, "batch_tokens": 2048, "micro_batch": 16, "device": "cpu"}
    config = train.Config(**tiny, data="data/small", run=f"overflow-{steps}", steps=steps, save_every=1, lr=1e39)
    with contextlib.suppress(ValueError):
        train.main(config)
    read_strictly(Path("logs", config.run))
    assert_checkpoints_are_finite(Path("logs", config.run))


def read_strictly(folder):
    """metrics.jsonl as any reader of JSON sees it: NaN is none."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (folder / METRICS).read_text().splitlines()]
    assert lines == read_metrics(folder)
    return lines


def assert_checkpoints_are_finite(folder):
    for path in folder.glob("checkpoints/step_*/model.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(path).values()), path
