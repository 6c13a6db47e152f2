"""Checkpoints: Hugging Face model folders with the training state beside the weights; and what `--ckpt` means.

A folder appears by rename, complete or not at all, and holds the sha256 of each of its files.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from core.distributed import Ranks
from core.files import METRICS, json_text, sha256, write_json
from model import GPT, PRESETS

CHECKSUMS = "checksums.json"
TRAINING_STATE = "training_state.pt"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
NEEDED = ("config.json", "model.safetensors", TRAINING_STATE)


def save(
    run: Path,
    model: GPT,
    state: dict[str, Any],
    end_of_text_id: int | None = None,
    tokenizer_from: Path | None = None,
    card: str | None = None,
) -> Path:
    """Write `run`/checkpoints/step_NNNNNN and return it. `state` holds plain values and tensors, `step` among them."""
    folder = run / "checkpoints" / f"step_{state['step']:06d}"
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        model.save_pretrained(unfinished, end_of_text_id)
        torch.save(state, unfinished / TRAINING_STATE)
        for name in TOKENIZER_FILES:
            if tokenizer_from is not None and (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, unfinished / name)
        if card is not None:
            (unfinished / "README.md").write_text(card)
        write_json(unfinished / CHECKSUMS, {path.name: sha256(path) for path in sorted(unfinished.iterdir())})
        for path in (*unfinished.iterdir(), run / METRICS):  # no power cut may leave a step in one and not in the other
            flush_to_disk(path)
        shutil.rmtree(folder, ignore_errors=True)  # one that failed its checksums, or the resume would have begun there
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)  # a full disk gets its room back
        raise
    flush_to_disk(folder.parent)
    return folder


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def problem(folder: Path) -> str | None:
    """Why this checkpoint can't be trusted, naming the file, or None."""
    try:
        text = (folder / CHECKSUMS).read_text()
        checksums = json.loads(text)
        if text != json_text(checksums) or not set(NEEDED) <= checksums.keys():
            return f"{CHECKSUMS} was cut short or altered"
        for name, digest in checksums.items():
            if not (folder / name).is_file():
                return f"{name} is missing, and listed in {CHECKSUMS}"
            if sha256(folder / name) != digest:
                return f"{name} was cut short or altered: its sha256 is not that of {CHECKSUMS}"
    except (OSError, ValueError, AttributeError) as error:
        return f"{CHECKSUMS} can't be read ({type(error).__name__})"
    return None


def listed(run: Path) -> list[Path]:
    """A run's checkpoints in order of their steps, whether whole or not."""
    return sorted((p for p in (run / "checkpoints").glob("step_*") if p.name[5:].isdigit()), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """A run's newest checkpoint that verifies (None if there is none), and why newer ones were passed over."""
    passed_over: list[str] = []
    for folder in reversed(listed(run)):
        reason = problem(folder)
        if reason is None:
            return folder, passed_over
        passed_over.append(f"passed over {folder}: {reason}")
    return None, passed_over


def find(run: Path, ranks: Ranks, anew: bool) -> Path | None:
    """The checkpoint that a run goes on from, the same on every rank; None where it begins. All ranks must call it.

    Raises ValueError where all are damaged, and where the run is to begin `anew` and exists.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # by torchrun --max-restarts
    if anew and not restarted:
        if (run / METRICS).is_file():
            raise ValueError(f"{run} holds a run already: take another --run, or --resume auto to go on with it")
        return None
    found, passed_over = ranks.broadcast(newest(run) if ranks.is_main else None)
    for line in passed_over:
        ranks.log(line)
    if passed_over and found is None:
        raise ValueError(f"{run} has no checkpoint that verifies: move the folder away to begin anew")
    if found is not None and not found.is_dir():
        raise ValueError(f"rank {ranks.rank} can't see {found}: all nodes need the same logs/ and data/")
    return found


def load_training_state(folder: Path, must_agree: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's training state. Raises ValueError where a setting that must agree differs from the run's."""
    path = folder / TRAINING_STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can make the reader raise anything
        raise ValueError(f"{path} holds more than plain values and tensors ({type(error).__name__})") from None
    for name, value in must_agree.items():
        if name not in state["settings"]:
            raise ValueError(
                f"run {folder.parent.parent.name} was begun by an earlier version of this project, without {name}: "
                f"finish it with that version, or take another --run"
            )
        begun_with, run = state["settings"][name], folder.parent.parent
        if begun_with != value:
            raise ValueError(
                f"run {run.name} was begun with {name} {begun_with}, now it is {value}: restore the setting to go on, "
                f"or take another --run, which begins with these weights by --init-from {run}"
            )
    return state


def resolve(ckpt: str, option: str = "--ckpt") -> str:
    """What `--ckpt` (or another `option`) names, as a model folder or a hub name.

    A checkpoint folder, a run folder (its newest valid checkpoint), a Hugging Face folder, or a hub name (gpt2,
    gpt2-medium, gpt2-large, gpt2-xl). Raises ValueError for a folder that is none of these, or a damaged checkpoint.
    """
    folder = Path(ckpt)
    if not folder.is_dir():
        if folder.exists() or ckpt.startswith((".", "/", "logs/")):
            raise ValueError(f"{option} {ckpt} is no folder; {known_runs()}")
        return ckpt
    if (folder / "checkpoints").is_dir():
        found, passed_over = newest(folder)
        for line in passed_over:
            print(line)
        if found is None:
            raise ValueError(f"{option} {ckpt}: the run has no checkpoint that verifies")
        return str(found)
    if (folder / CHECKSUMS).is_file() and (reason := problem(folder)):
        raise ValueError(f"{option} {ckpt}: {reason}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{option} {ckpt} holds neither checkpoints nor a config.json; {known_runs()}")
    return str(folder)


def resolve_init(init_from: str, ranks: Ranks) -> str:
    """What `--init-from` names, where rank 0 finds it: a run that still trains may show each rank another one."""
    return ranks.broadcast(resolve(init_from, "--init-from"))


def resolve_all(ckpts: tuple[str, ...]) -> list[str]:
    if not ckpts:
        raise ValueError(f"--ckpt names no model; {known_runs()}")
    return [resolve(ckpt) for ckpt in ckpts]


def known_runs() -> str:
    runs = sorted(str(path.parent) for path in Path("logs").glob("*/checkpoints"))
    return (
        f"runs here: {', '.join(runs)}" if runs else "train one with train.py, or name one of the hub's, such as gpt2"
    )


def load_model(source: str) -> GPT:
    """The model of a folder or hub name that `resolve` gave. Raises ValueError, naming it, where it is no GPT-2."""
    try:
        return GPT.from_pretrained(source)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def load_encoding(source: str, vocab_size: int) -> Any:
    """The tokenizer stored with a model, else GPT-2's where the vocabulary has its size."""
    from core.data import tokenizer

    folder = Path(source)
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        return tokenizer.load(folder)
    if vocab_size != PRESETS["gpt2"].vocab_size:
        raise ValueError(f"{source} has a vocabulary of {vocab_size} and no tokenizer.json to encode text with")
    return tokenizer.load("gpt2")
