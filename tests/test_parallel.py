"""Ranks, micro-batches and resumes between them change nothing: the losses are those of one process."""

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
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("step", "split", "tokens", "lr"):
            assert ours.get(key) == theirs.get(key)
        for key in {"loss", "bits_per_byte", "grad_norm"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=5e-6), (ours["step"], ours["split"], key)


def test_the_run_learns(one_process):
    """Or losses would agree whatever the gradients are."""
    losses = [line["loss"] for line in one_process if line["split"] == "val"]
    assert losses[-1] < losses[0] - 1


def test_two_ranks_equal_one_process(world, one_process):
    """Four micro-batches a rank, so that gradients are accumulated before they are reduced. No launcher, as by srun."""
    on_ranks(2, "train.py", *RECIPE, "--micro-batch", 4, "--run-name", "two-ranks", cwd=world)
    assert_same(read_metrics(world / "logs/two-ranks"), one_process)


def test_a_smaller_micro_batch_changes_nothing(world, one_process):
    train_here(*RECIPE, "--micro-batch", 4, "--run", "micro", cwd=world)
    assert_same(read_metrics(world / "logs/micro"), one_process)


def test_resumed_by_two_and_by_three_ranks_it_goes_on_as_one_process(world):
    """Three steps each, of 12 sequences."""
    twelve = (*RECIPE, "--batch-tokens", 768, "--micro-batch", 3, "--steps", 9, "--save-every", 3, "--keep", 4)
    train_here(*twelve, "--run", "alone", cwd=world)
    expected = read_metrics(world / "logs/alone")
    shutil.copytree(world / "logs/alone", world / "logs/handed-on")
    for ranks, step in ((2, 3), (3, 6)):
        for path in (world / "logs/handed-on/checkpoints").iterdir():
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        said = on_ranks(ranks, "train.py", *twelve, "--micro-batch", 1, "--run-name", "handed-on", cwd=world).stdout
        assert f"step {step} of 9" in said
    metrics = read_metrics(world / "logs/handed-on")
    assert [(line["step"], line["split"]) for line in metrics] == [(line["step"], line["split"]) for line in expected]
    losses = [[line["loss"] for line in lines] for lines in (metrics, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-6)
    assert losses[0] != losses[1]  # sums over ranks round differently: they did take part
