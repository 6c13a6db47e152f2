"""What the benchmarks of several GPUs say: a step is its slowest rank's, and a run handed on is one run."""

import json
import signal

import pytest
from conftest import children, lives, refused, run, started, wait_until
from test_resume import reached

from benchmarks import relay, scaling
from core import checkpoint
from core.files import read_metrics

TINY = ("--device", "cpu", "--preset", "tiny", "--seq-len", 64)


def rank(together, apart, exchange_ms=0.0):
    steps = {"together": together, "apart": apart}
    return {how: {"step_s": s, "peak_gib": 3.0 + s[0]} for how, s in steps.items()} | {"exchange_ms": exchange_ms}


def test_a_step_takes_what_its_slowest_rank_takes():
    """Efficiency is the rate of a GPU beside that of the first row's."""
    config = scaling.Config(batch_tokens=1000, device="cpu", gpus=(2, 4))
    fast, slow = rank([1.0, 1.0, 1.0], [0.9, 0.9, 0.9], 5.0), rank([1.0, 2.0, 4.0], [0.8, 2.5, 2.5], 7.0)
    measured = {2: [rank([4.0] * 3, [4.0] * 3)] * 2, 4: [fast, slow, fast, fast]}
    first, row = (scaling.derived(config, count, measured) for count in (2, 4))
    assert (first["efficiency"], first["tokens_per_second"]) == (1.0, 250.0)
    assert row["step_ms"] == [2000.0, 1000.0, 4000.0]
    assert row["tokens_per_second"] == 500.0
    assert row["efficiency"] == 1.0  # twice the GPUs, half the time
    assert row["ten_billion_tokens_s"] == 1e10 / 500
    assert row["together_ms"] == [1000.0, 2000.0, 1000.0, 1000.0]
    assert row["apart_ms"] == [900.0, 2500.0, 900.0, 900.0]
    assert (row["exchange_ms"], row["peak_gib"]) == (7.0, 4.0)
    each = scaling.derived(scaling.Config(batch_tokens=1000, device="cpu", per_gpu=True), 4, measured)
    assert (each["batch_tokens"], each["tokens_per_second"], each["efficiency"]) == (4000, 2000.0, 2.0)


def test_steps_on_one_rank_and_on_two(world):
    command = ("--gpus", 1, 2, "--micro-batch", 1, "--batch-tokens", 128, "--steps", 2)
    said = run("benchmarks/scaling.py", *TINY, *command, cwd=world).stdout
    found = json.loads((world / "logs/benchmarks/scaling.json").read_text())
    assert [row["gpus"] for row in found["rows"]] == [1, 2]
    assert [len(found["ranks"][count]) for count in ("1", "2")] == [1, 2]
    for ranks in found["ranks"].values():
        assert all(len(each["together"]["step_s"]) == 2 * len(ranks) for each in ranks)
    assert all(len(each["apart"]["step_s"]) == 4 and each["exchange_ms"] > 0 for each in found["ranks"]["2"])
    for row in found["rows"]:
        assert f"{row['tokens_per_second'] / 1e3:,.1f}" in said
        assert f"{row['efficiency']:.1%}" in said


@pytest.mark.parametrize(
    "given, said",
    [
        ({"gpus": (0, 1)}, "--gpus 0: this machine has"),
        ({"gpus": (1, 99_999)}, "--gpus 99999: this machine has"),
        ({"micro_batch": 0}, "--micro-batch 0 must be above 0"),
        ({"gpus": (1, 2), "micro_batch": 4, "batch_tokens": 256}, "2 ranks = 512: take --batch-tokens"),
    ],
)
def test_what_does_not_go_is_said_before_anything_is_timed(monkeypatch, given, said):
    monkeypatch.setattr(scaling, "on", None)  # can't be called
    with pytest.raises(ValueError, match=said):
        scaling.main(scaling.Config(device="cpu", preset="tiny", seq_len=64, **given))


def test_a_run_that_is_handed_on_is_one_run(world):
    options = "--preset tiny --seq-len 64 --batch-tokens 2048 --steps 60 --val-every 20 --val-tokens 1280"
    command = ("--data", "data/small", "--device", "cpu", "--legs", 2, 1, f"--options={options}")
    said = run("benchmarks/relay.py", *command, cwd=world).stdout
    folder = world / "logs/relay"
    first, second = json.loads((folder / "relay.json").read_text())["legs"]
    assert (first["gpus"], first["first"], second["gpus"], second["last"]) == (2, 0, 1, 60)
    assert 30 <= first["last"] == second["first"] < 60
    assert f"stopped after step {first['last']} of 60: the same command goes on" in said
    assert f"step_{first['last']:06d}: step {first['last']} of 60" in said  # from where it resumed
    assert first["stopped_s"] > 0
    assert second["stopped_s"] is None
    lines = read_metrics(folder)
    assert [line["step"] for line in lines if line["split"] == "train"] == [*range(1, 61)]
    assert [line["step"] for line in lines if line["split"] == "val"] == [0, 20, 40, 60]
    assert checkpoint.step_of(checkpoint.listed(folder)[-1]) == 60
    losses = [first["loss_begin"], first["loss_end"], second["loss_begin"], second["loss_end"]]
    assert losses == sorted(losses, reverse=True)
    again = run("benchmarks/relay.py", *command, cwd=world, check=False)
    assert "logs/relay is there already, and a relay begins anew: take another --name" in refused(again)


def test_a_skipped_step_spoils_no_table():
    train = [
        {"step": step, "split": "train", "loss": None if step == 2 else 3.0, "tokens_per_second": 5e3}
        for step in (1, 2)
    ]
    lines = [*train, {"step": 2, "split": "val", "loss": None}]
    rows = relay.derived([relay.Leg(2, 0, 2, 1.5, None)], lines)
    assert "| 2    | 1 to 2 | 5.0 " in relay.page(rows)
    assert "nan" in relay.page(rows)


def test_no_rank_outlives_a_benchmark_that_is_stopped(world):
    options = "--preset tiny --seq-len 64 --batch-tokens 2048 --steps 100000 --val-tokens 1280"
    command = ("--data", "data/small", "--device", "cpu", "--legs", 1, 1, f"--options={options}", "--name", "orphan")
    with started("benchmarks/relay.py", *command, cwd=world) as process:
        assert wait_until(lambda: reached(world / "logs/orphan", 3), process)
        (launcher,) = children(process.pid)
        (rank,) = children(launcher)
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
        assert not lives(launcher)
        assert not lives(rank)


@pytest.mark.parametrize(
    "options, said",
    [
        ("--steps 5 --run-name=other", "--options names --run-name, which relay.py gives itself"),
        ("--steps '5", "--options --steps '5: No closing quotation"),
    ],
)
def test_options_that_relay_can_not_pass_on(options, said):
    with pytest.raises(ValueError, match=said):
        relay.main(relay.Config(data="data/small", device="cpu", options=options, name="none"))


def test_a_run_too_short_to_be_stopped_is_said_to_be(world, monkeypatch):
    monkeypatch.chdir(world)
    options = "--preset tiny --seq-len 64 --batch-tokens 2048 --steps 1 --val-tokens 640"
    config = relay.Config(data="data/small", device="cpu", legs=(1, 1), options=options, name="short")
    with pytest.raises(ValueError, match=r"logs/short was over before it could be stopped: give it more steps"):
        relay.main(config)


def test_a_leg_that_fails_ends_the_relay(world, monkeypatch):
    monkeypatch.chdir(world)
    config = relay.Config(data="data/small", device="cpu", legs=(1, 1), options="--preset none", name="failed")
    with pytest.raises(ValueError, match=r"logs/failed ended with status 1 after step 0 of 0, see above"):
        relay.main(config)
