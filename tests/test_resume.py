"""A run that is killed at any moment and started again by the same command ends bit for bit like an undisturbed one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TRAIN, config_of, resolved, run, tiny_config, train_here

import train
from core import checkpoint, cli
from core.data.shards import open_dataset
from core.distributed import Ranks
from core.files import METRICS, read_metrics, sha256, write_json
from core.train.optim import build_optimizer
from model import GPT, PRESETS

STEPS = 24
COMMAND = (*TRAIN, "--data", "data/small", "--steps", STEPS, "--val-every", 6, "--warmup-steps", 3, "--keep", 99)
TIMES = ("seconds", "tokens_per_second")  # only these may differ


@pytest.fixture(scope="module")
def undisturbed(world):
    """A run without an interruption."""
    train_here(*COMMAND, "--save-every", 5, "--run", "whole", cwd=world)
    return world / "logs/whole"


@pytest.fixture
def copied(undisturbed, tmp_path, monkeypatch):
    """A copy of that run and its data in a temporary folder, for runs within this process."""
    shutil.copytree(undisturbed.parents[1] / "data/small", tmp_path / "data/small")
    shutil.copytree(undisturbed, tmp_path / "logs/whole")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "logs/whole"


def settings(**options):
    """The same command for a call within this process."""
    own = {"steps": STEPS, "val_every": 6, "warmup_steps": 3, "save_every": 5, "run": "whole", "keep": 99}
    return tiny_config(**(own | options))


def delete_after(folder, step):
    """Delete all checkpoints after a step."""
    for path in (folder / "checkpoints").iterdir():
        if path.name > f"step_{step:06d}":
            shutil.rmtree(path)


def start_and_kill(world, command, condition):
    """Start training, and kill it without warning as soon as the condition is true."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train.py", *map(str, command)]
    process = subprocess.Popen(command, cwd=world, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            process.send_signal(signal.SIGSTOP)
            if condition():  # still true now that the process is suspended
                break
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    ended = process.poll()
    process.kill()
    process.wait()
    assert ended is None, "the run ended before it could be killed"
    assert time.monotonic() < deadline


def reached(folder, step):
    """Whether metrics.jsonl contains a step."""
    path = folder / METRICS
    return path.is_file() and f'"step": {step},' in path.read_text(encoding="utf-8")


def assert_like(folder, expected, steps=STEPS):
    """Assert that two runs of `steps` steps have the same weights and, except for times, the same metrics."""
    last = f"checkpoints/step_{steps:06d}"
    assert (folder / last / "model.safetensors").read_bytes() == (expected / last / "model.safetensors").read_bytes()
    lines, expected_lines = (
        [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(path)]
        for path in (folder, expected)
    )
    places, expected_places = ([(line["step"], line["split"]) for line in each] for each in (lines, expected_lines))
    assert places == expected_places
    assert lines == expected_lines
    assert not list((folder / "checkpoints").glob(".*")), "remains of an unfinished checkpoint"


def test_a_run_killed_at_three_moments_ends_like_an_undisturbed_one(world, undisturbed):
    """Before the first checkpoint; as soon as one appears, which must be complete; while one is written."""
    folder, command = world / "logs/killed", (*COMMAND, "--run", "killed")
    appeared = folder / "checkpoints/step_000010"

    def writing():
        return reached(folder, 14) and any((folder / "checkpoints").glob(".step_*.unfinished"))

    start_and_kill(world, (*command, "--save-every", 5), lambda: reached(folder, 2))
    assert not appeared.parent.exists()
    start_and_kill(world, (*command, "--save-every", 5), appeared.exists)
    assert checkpoint.find_damage(appeared) is None
    start_and_kill(world, (*command, "--save-every", 1), writing)
    assert writing()
    assert "resuming from " in run("train.py", *command, "--save-every", 1, cwd=world).stdout
    assert_like(folder, undisturbed)


def test_speedrun_resumes_in_any_epoch_like_an_undisturbed_run(copied, capsys):
    """In the third epoch, and in the first: sequences grow, windows are shifted, input tokens are dropped."""
    unique_tokens = open_dataset("data/small").tokens("train")
    options = {"run": "fast", "recipe": "speedrun", "steps": None, "tokens": 5 * unique_tokens // 2, "save_every": 2}
    options |= {
        "batch_tokens": 8192,
        "first_batch_tokens": 8192,
        "short_seq_len": 16,
        "warmup_steps": None,
        "val_every": 20,
        "token_dropout": 0.1,
    }
    train.main(settings(**options))
    folder = copied.with_name("fast")
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert (facts["optimizer"], facts["windows"], facts["short_tokens"] > 0) == ("muon", "shifted", True)
    shutil.copytree(folder, folder.with_name("expected"))
    epoch = unique_tokens // 8192
    for step in (2 * epoch, 2):
        delete_after(folder, step)
        capsys.readouterr()
        train.main(settings(**options))
        assert f"resuming from logs/fast/checkpoints/step_{step:06d}" in capsys.readouterr().out
        assert_like(folder, folder.with_name("expected"), facts["steps"])


def test_a_finished_run_is_not_changed(world, undisturbed):
    before = (undisturbed / METRICS).read_bytes()
    options = ("--save-every", 5, "--run", "whole", "--eval-lambada", "deleted.txt")  # not needed any more
    output = run("train.py", *COMMAND, *options, cwd=world).stdout  # exit status 0
    assert f"logs/whole is finished: {STEPS} steps" in output
    assert (undisturbed / METRICS).read_bytes() == before


@pytest.mark.parametrize(
    "change, before",
    [
        ({"preset": "demo"}, "tiny"),
        ({"seed": 7}, 1337),
        ({"lr": 0.001}, 0.0006),
        ({"steps": 30}, STEPS),
        ({"batch_tokens": 4096}, 2048),
        ({"seq_len": 32}, 64),
        ({"warmup_steps": 4}, 3),
        ({"final_lr_fraction": 0.2}, 0.1),
        ({"weight_decay": 0.0}, 0.1),
        ({"grad_clip": 2.0}, 1.0),
        ({"optimizer": "muon"}, "adamw"),
        ({"init": "aligned"}, "gpt2"),
        ({"init_from": "logs/whole"}, None),
        ({"recipe": "speedrun"}, "original"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_changed_setting_is_refused_with_both_values(copied, change, before):
    ((name, now),) = change.items()
    option = cli.option_name(name)
    delete_after(copied, 20)
    message = rf"run whole was started with {option} {before}, now it is {option} {now}\. .*--init-from logs/whole"
    if name == "init_from":
        message = "run whole was started with no --init-from, now it is --init-from logs/whole"
    elif name == "preset":
        message = f"run whole was started with {option} {before}, now it is {option} {now}. Restore the options"
    elif name == "recipe":  # the first of its values that differs
        message = (
            r"started with --optimizer adamw \(--recipe original\), now it is --optimizer muon \(--recipe speedrun\)"
        )
    with pytest.raises(ValueError, match=message):
        train.main(settings(**change))
    assert not (copied / "checkpoints/step_000024").exists()


def test_a_finished_run_that_should_be_longer_is_refused_with_the_way_to_continue(world, undisturbed, copied):
    message = f"run whole is finished: {STEPS} steps. It can't be extended to 30, .* another --run with --init-from"
    for change in ({"steps": 30}, {"steps": 30, "warmup_steps": None}, {"steps": None, "tokens": 30 * 2048}):
        with pytest.raises(ValueError, match=message):
            train.main(settings(**change))
    train.main(settings(run="longer", init_from="logs/whole", steps=2, warmup_steps=0))
    assert (copied.parent / "longer/checkpoints/step_000002").is_dir()
    delete_after(copied, 20)
    with pytest.raises(ValueError, match="run whole was started with --steps 24, now it is --steps 30"):
        train.main(settings(steps=None, tokens=30 * 2048, warmup_steps=None))


def test_a_resume_without_its_preset_is_told_so_before_the_data(copied):
    """With the default preset and default data, which don't exist."""
    message = (
        "run whole was started with --preset tiny --data data/small, now it is --preset gpt2 --data data/fineweb-edu. "
        "Restore the options to resume, or use another --run"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        train.main(config_of(run="whole", device="cpu"))
    with pytest.raises(ValueError, match="no shards in data/none"):
        train.main(settings(data="data/none"))
    for damaged in (b"{", bytes(range(256)), b"[" * 100_000):
        (copied / "run.json").write_bytes(damaged)
        with pytest.raises(ValueError, match="no shards in data/fineweb-edu"):
            train.main(config_of(run="whole", device="cpu"))
    with pytest.raises(ValueError, match=r"run whole was started with --preset tiny, now it is --preset demo\."):
        train.main(settings(preset="demo"))


def test_init_with_init_from_is_answered_with_a_warning(copied, capsys):
    train.main(settings(run="other", init_from="logs/whole", init="aligned", steps=1, warmup_steps=0))
    assert "warning: --init aligned has no effect, as --init-from logs/whole" in capsys.readouterr().out
    train.main(settings(run="another", init_from="logs/whole", steps=1, warmup_steps=0))
    assert "warning" not in capsys.readouterr().out


def test_a_recipe_of_another_name_and_the_same_values_resumes(copied):
    folder, settings = copied / "checkpoints/step_000020", {"seed": 1337, "lr": 6e-4}
    assert checkpoint.load_training_state(folder, settings, "renamed")["step"] == 20
    message = r"started with --seed 1337 \(--recipe original\), now it is --seed 3 \(--recipe renamed\)\. Restore the"
    with pytest.raises(ValueError, match=message):
        checkpoint.load_training_state(folder, settings | {"seed": 3}, "renamed")


def test_a_run_from_before_a_setting_existed_is_refused_with_a_remedy(copied):
    message = "started by an earlier version of this project, without the setting polish. Finish it with that version"
    with pytest.raises(ValueError, match=message):
        checkpoint.load_training_state(copied / "checkpoints/step_000020", {"seed": 1337, "polish": 3}, "original")


def test_other_data_are_refused_with_both_hashes(world, copied):
    """The same tokens in other shards have other windows in another order."""
    source = ("--source", "data/stories/stories.jsonl", "--encoding", "data/stories", "--val-tokens", "6000")
    out = copied.parents[1] / "data/other"
    run("fineweb.py", *source, "--out", out, "--shard-tokens", "30000", "--workers", "1", cwd=world)
    with pytest.raises(ValueError, match=r"started with --data of manifest_hash [0-9a-f]{64}, now it is --data of"):
        train.main(settings(data="data/other"))


def test_settings_without_influence_on_the_weights_may_change(copied, capsys):
    expected = read_metrics(copied)
    delete_after(copied, 15)
    train.main(settings(micro_batch=8, val_every=4, save_every=3, log_every=1))
    assert re.search("resuming from .* step 15/24 ", capsys.readouterr().out)
    metrics = read_metrics(copied)
    assert [line["step"] for line in metrics if line["split"] == "val"] == [0, 6, 12, 16, 20, 24]
    assert sorted(p.name for p in (copied / "checkpoints").iterdir())[-3:] == [
        "step_000018",
        "step_000021",
        "step_000024",
    ]
    losses, expected_losses = (
        [line["loss"] for line in lines if line["split"] == "train"] for lines in (metrics, expected)
    )
    assert losses == pytest.approx(expected_losses, rel=5e-6)


def test_an_incomplete_line_of_metrics_is_removed(copied):
    expected = read_metrics(copied)
    delete_after(copied, 20)
    path = copied / METRICS
    path.write_bytes(path.read_bytes()[:-40])
    train.main(settings())
    assert [(line["step"], line["split"]) for line in read_metrics(copied)] == [
        (line["step"], line["split"]) for line in expected
    ]


def test_a_resume_needs_only_the_training_state(copied):
    """The random state of the resuming process has no effect."""
    path = copied / "checkpoints/step_000024/model.safetensors"
    expected = path.read_bytes()
    delete_after(copied, 10)
    torch.manual_seed(99)
    train.main(settings())
    assert path.read_bytes() == expected


# The keys of parameter groups and settings in checkpoints of November 2026; `peak` is now `initial_lr`, and `pieces`
# is `splits`.
EARLIER_KEYS = {"initial_lr": "peak", "splits": "pieces"}
EARLIER_SETTINGS = {
    *("preset", "seed", "seq_len", "val_tokens", "init_from", "steps", "optimizer", "lr", "embed_lr", "beta1", "beta2"),
    *("momentum", "weight_decay", "grad_clip", "lr_schedule", "warmup_steps", "decay_fraction", "final_lr_fraction"),
    *("batch_tokens", "first_batch_tokens", "short_tokens", "short_seq_len", "init", "manifest_hash"),
}


def to_earlier_keys(optimizer_state):
    """Rename the keys of parameter groups, in place, to those of the earlier version."""
    for member in optimizer_state.values():
        groups = member["param_groups"]
        assert all("initial_lr" in group for group in groups)
        member["param_groups"] = [{EARLIER_KEYS.get(k, k): v for k, v in group.items()} for group in groups]


def to_earlier_format(folder):
    """Rewrite the training state of a checkpoint as the earlier version wrote it."""
    path = folder / checkpoint.TRAINING_STATE
    state = torch.load(path, weights_only=True)
    added = {"token_dropout": 0.0, "windows": "fixed", "long_every": 0, "softmax": "full", "shallow_fraction": 0.0}
    assert {name: state["settings"].pop(name) for name in added} == added
    assert state["settings"].keys() == EARLIER_SETTINGS
    to_earlier_keys(state["optimizer"])
    torch.save(state, path)
    checksums = json.loads((folder / checkpoint.CHECKSUMS).read_text(encoding="utf-8"))
    write_json(folder / checkpoint.CHECKSUMS, checksums | {path.name: sha256(path)})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_of_the_earlier_version_resumes(copied, capsys, optimizer):
    options = {"run": f"earlier-{optimizer}", "optimizer": optimizer, "steps": 6, "save_every": 3}
    train.main(settings(**options))
    folder = copied.with_name(options["run"])
    expected = (folder / "checkpoints/step_000006/model.safetensors").read_bytes()
    delete_after(folder, 3)
    to_earlier_format(folder / "checkpoints/step_000003")
    capsys.readouterr()
    train.main(settings(**options))
    assert f"resuming from logs/{folder.name}/checkpoints/step_000003 | step 3/6" in capsys.readouterr().out
    assert (folder / "checkpoints/step_000006/model.safetensors").read_bytes() == expected


def hyperparameters(optimizer):
    groups = [group for member in optimizer.members for group in member.param_groups]
    return [{name: value for name, value in group.items() if name != "params"} for group in groups]


@pytest.mark.parametrize("is_earlier", [False, True], ids=["current-keys", "earlier-keys"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_loaded_optimizer_keeps_the_hyperparameters_of_the_recipe(name, is_earlier):
    model, ranks = GPT(PRESETS["tiny"], seed=1), Ranks(0, 1, torch.device("cpu"))
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.01)
    saved = build_optimizer(model, resolved(steps=9, optimizer=name, lr=1e-3, beta1=0.7, weight_decay=0.3), ranks)
    saved.set_lr(0.5)
    saved.step(skip=torch.tensor(0.0))
    state = saved.state_dict()
    if is_earlier:
        to_earlier_keys(state)
    loaded = build_optimizer(model, resolved(steps=9, optimizer=name, lr=2e-3, beta1=0.8, weight_decay=0.2), ranks)
    before = hyperparameters(loaded)
    assert before != hyperparameters(saved)
    loaded.load_state_dict(state)
    assert hyperparameters(loaded) == before
    for member, expected in zip(loaded.members, saved.members, strict=True):
        assert member.state.keys() == expected.state.keys()
        for p, moments in expected.state.items():
            assert moments
            assert all(torch.equal(member.state[p][key], value) for key, value in moments.items())
    loaded.set_lr(0.5)
    assert [group["lr"] for group in hyperparameters(loaded)] == [group["initial_lr"] / 2 for group in before]
    loaded.step(skip=torch.tensor(0.0))


def test_resume_never_refuses_a_run_that_exists(copied):
    with pytest.raises(ValueError, match=r"logs/whole already contains a run\. Use another --run"):
        train.main(settings(resume="never"))


def test_resume_never_refuses_a_run_without_a_checkpoint(copied):
    """A run that was killed before its first checkpoint has metrics, which a new one would overwrite."""
    shutil.rmtree(copied / "checkpoints")
    before = (copied / METRICS).read_bytes()
    with pytest.raises(ValueError, match=r"logs/whole already contains a run\."):
        train.main(settings(resume="never"))
    assert (copied / METRICS).read_bytes() == before
