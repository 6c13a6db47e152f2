"""A loss or gradient that isn't finite changes no weight and is counted; too many of them end the run."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TRAIN, ended, faulty, on_ranks, refused, run, started, tiny_config
from safetensors.torch import load_file

import train
from core import checkpoint
from core.files import METRICS, read_metrics

COMMAND = (*TRAIN, "--data", "data/small", "--steps", 8, "--save-every", 1, "--keep", 99)
FAULTS = {
    "loss": "loss = loss * float('nan')",
    "gradient": "loss = loss + (0 * loss).sqrt()",  # finite, but its derivative isn't
}
SLOW = """
import time
from core import checkpoint
save = checkpoint.save
checkpoint.save = lambda *args, **options: (time.sleep(3), save(*args, **options))[1]
"""


def weights(folder, step):
    return (folder / f"checkpoints/step_{step:06d}/model.safetensors").read_bytes()


def moments(folder, step):
    path = folder / f"checkpoints/step_{step:06d}" / checkpoint.TRAINING_STATE
    return torch.load(path, weights_only=True)["optimizer"]["AdamW"]["state"]


def assert_skipped(folder, step):
    """Assert that a step changed neither weights nor moments, in contrast to the steps before and after it."""
    assert weights(folder, step) == weights(folder, step - 1)
    before, after = moments(folder, step - 1), moments(folder, step)
    assert all(torch.equal(after[i][name], before[i][name]) for i in before for name in before[i])
    assert len({weights(folder, s) for s in (step - 2, step - 1, step + 1)}) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_step_changes_nothing_and_is_counted(world, tmp_path, fault):
    script, folder = faulty(tmp_path / "bad.py", "call == 9", FAULTS[fault]), world / f"logs/bad-{fault}"
    output = run(script, *COMMAND, "--run", folder.name, cwd=world).stdout  # two micro-batches per step: step 5
    assert_skipped(folder, 5)
    lines = {line["step"]: line for line in read_strictly(folder) if line["split"] == "train"}
    assert list(lines) == list(range(1, 9))
    assert [step for step, line in lines.items() if line.get("skipped")] == [5]
    assert lines[5]["grad_norm"] is None
    assert (lines[5]["loss"] is None) == (fault == "loss")
    assert len(re.findall(r"SKIPPED \(1 so far\)", output)) == 1
    assert "1 of 8 steps were skipped: loss or gradient not finite" in output
    states = [
        checkpoint.load_training_state(path, {}, "original")["bad_steps"]
        for path in checkpoint.list_checkpoints(folder)
    ]
    assert states == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_bad_loss_on_one_of_two_ranks_skips_the_step_on_both(world, tmp_path):
    script, folder = faulty(tmp_path / "bad.py", "rank == 1 and call == 5", FAULTS["loss"]), world / "logs/bad-rank"
    output = on_ranks(2, script, *COMMAND, "--run-name", folder.name, cwd=world).stdout
    assert_skipped(folder, 5)
    hashes = re.findall(r"weights of a rank: (\w+)", output)
    assert len(hashes) == 2
    assert len(set(hashes)) == 1
    assert all(
        weight.isfinite().all()
        for weight in load_file(checkpoint.list_checkpoints(folder)[-1] / "model.safetensors").values()
    )


def test_a_resumed_run_continues_the_count(world, tmp_path):
    """One bad step before the stop and one after the resume: two are more than the limit of one."""
    command, folder = (*COMMAND, "--run", "bad-resumed", "--max-bad-steps", 1), world / "logs/bad-resumed"
    stop = "loss = loss * float('nan'); import signal; os.kill(os.getpid(), signal.SIGTERM)"
    output = run(faulty(tmp_path / "stops.py", "call == 6", stop), *command, cwd=world).stdout
    assert "stopped after step 3/8." in output
    message = refused(run(faulty(tmp_path / "bad.py", "call == 3", FAULTS["loss"]), *command, cwd=world, check=False))
    assert "2 steps were skipped, more than --max-bad-steps 1" in message
    assert [line["step"] for line in read_strictly(folder) if line.get("skipped")] == [3, 5]


@pytest.mark.parametrize("ranks", [0, 2])
def test_too_many_bad_steps_end_the_run_and_name_the_last_good_checkpoint(world, tmp_path, ranks):
    script, folder = faulty(tmp_path / "bad.py", "call >= 8", FAULTS["loss"]), world / f"logs/bad-{ranks}"
    arguments = (script, *COMMAND, "--save-every", 3, "--steps", 100, "--max-bad-steps", 2, "--run-name", folder.name)
    if ranks:
        result = on_ranks(2, *arguments, "--micro-batch", 8, cwd=world, check=False)
        assert result.returncode
        assert result.stderr.count("more than --max-bad-steps 2") == 2
    else:
        result = run(*arguments, cwd=world, check=False)
        assert refused(result).startswith("step 6: loss nan, gradient norm nan. 3 steps were skipped, more than ")
    assert f"the run ends early | last good checkpoint: logs/{folder.name}/checkpoints/step_000003" in result.stdout
    lines = [line for line in read_strictly(folder) if line["split"] == "train"]
    assert [line.get("skipped", False) for line in lines] == [False] * 3 + [True] * 3
    assert_checkpoints_are_finite(folder)


def test_no_rank_ends_before_the_last_good_checkpoint_is_written(world, tmp_path):
    """torchrun kills the remaining ranks once one has ended, also one that writes."""
    script, folder = faulty(tmp_path / "bad.py", "call >= 8", FAULTS["loss"]), world / "logs/bad-slow"
    script.write_text(SLOW + script.read_text(encoding="utf-8"), encoding="utf-8")
    options = ("--micro-batch", 8, "--save-every", 3, "--steps", 100, "--max-bad-steps", 2, "--run-name", folder.name)
    with started(script, *COMMAND, *options, cwd=world, ranks=2) as process:
        result = ended(process)
    assert result.returncode
    assert f"the run ends early | last good checkpoint: logs/{folder.name}/checkpoints/step_000003" in result.stdout
    assert checkpoint.find_damage(folder / "checkpoints/step_000003") is None


@pytest.mark.parametrize("steps", [1, 3], ids=["last-step", "earlier-step"])
def test_weights_that_overflow_in_the_update_are_not_saved(world, monkeypatch, steps):
    """The loss of step 1 is still finite: only the next loss, or the weights themselves, show the overflow."""
    monkeypatch.chdir(world)
    folder = Path(f"logs/overflow-{steps}")
    with contextlib.suppress(ValueError):
        train.main(tiny_config(run=folder.name, steps=steps, save_every=1, lr=1e39))
    read_strictly(folder)
    assert_checkpoints_are_finite(folder)


def read_strictly(folder):
    """The lines of metrics.jsonl, parsed as standard JSON, which has no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = [
        json.loads(line, parse_constant=refuse) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()
    ]
    assert lines == read_metrics(folder)
    return lines


def assert_checkpoints_are_finite(folder):
    for path in folder.glob("checkpoints/step_*/model.safetensors"):
        assert all(weight.isfinite().all() for weight in load_file(path).values()), path
