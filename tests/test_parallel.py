"""The losses of a run don't depend on ranks, micro-batches, or a resume with another number of ranks."""

import shutil

import pytest
from conftest import TRAIN, on_ranks, train_here

from core.files import read_metrics

STEPS = 20
RECIPE = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--val-every", 7, "--warmup-steps", 2, "--lr", "3e-3")


@pytest.fixture(scope="module")
def one_process(world):
    train_here(*RECIPE, "--run", "one", cwd=world)
    return read_metrics(world / "logs/one")


def assert_same(metrics, expected):
    assert len(metrics) == STEPS + 4  # validations at 0, 7, 14 and 20
    for line, expected_line in zip(metrics, expected, strict=True):
        assert line.keys() == expected_line.keys()
        for key in ("step", "split", "tokens", "lr"):
            assert line.get(key) == expected_line.get(key)
        for key in {"loss", "bits_per_byte", "grad_norm"} & line.keys():
            assert line[key] == pytest.approx(expected_line[key], rel=5e-6), (line["step"], line["split"], key)


def test_the_run_learns(one_process):
    """Otherwise losses would agree with any gradients."""
    losses = [line["loss"] for line in one_process if line["split"] == "val"]
    assert losses[-1] < losses[0] - 1


def test_two_ranks_equal_one_process(world, one_process):
    """Four micro-batches per rank: gradients are accumulated before they are reduced. No launcher, as with srun."""
    on_ranks(2, "train.py", *RECIPE, "--micro-batch", 4, "--run-name", "two-ranks", cwd=world)
    assert_same(read_metrics(world / "logs/two-ranks"), one_process)


def test_a_smaller_micro_batch_changes_nothing(world, one_process):
    train_here(*RECIPE, "--micro-batch", 4, "--run", "micro", cwd=world)
    assert_same(read_metrics(world / "logs/micro"), one_process)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_resumed_on_two_and_on_three_ranks_equals_one_process(world, optimizer):
    """Three steps each, of 12 sequences. Ranks that share the momenta of Muon save and load all of them."""
    twelve = (*RECIPE, "--batch-tokens", 768, "--micro-batch", 3, "--steps", 9, "--save-every", 3, "--keep", 4)
    twelve = (*twelve, "--optimizer", optimizer)
    train_here(*twelve, "--run", "alone", cwd=world)
    expected = read_metrics(world / "logs/alone")
    shutil.rmtree(world / "logs/other-ranks", ignore_errors=True)
    shutil.move(world / "logs/alone", world / "logs/other-ranks")
    for ranks, step in ((2, 3), (3, 6)):
        for path in (world / "logs/other-ranks/checkpoints").iterdir():
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        command = (*twelve, "--micro-batch", 1, "--run-name", "other-ranks")
        assert f"step {step}/9 " in on_ranks(ranks, "train.py", *command, cwd=world).stdout
    metrics = read_metrics(world / "logs/other-ranks")
    assert [(line["step"], line["split"]) for line in metrics] == [(line["step"], line["split"]) for line in expected]
    losses, expected_losses = ([line["loss"] for line in lines] for lines in (metrics, expected))
    assert losses == pytest.approx(expected_losses, rel=5e-6)
    assert losses != expected_losses  # sums over ranks round differently: the ranks did share the work
