"""Checkpoints: Hugging Face model folders with a training state; and what `--ckpt` and `--init-from` accept.

A folder appears by rename, complete or not at all, and contains the sha256 of each of its files.
"""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core import cli, formats
from core.convert import download, refuse_adapter, save_pretrained
from core.distributed import Ranks
from core.files import METRICS, json_text, sha256, write_json
from core.weights import WEIGHT_FILES
from model import GPT, PRESETS

# Settings that earlier versions didn't have, with the values that they trained with.
EARLIER_SETTINGS = {
    "token_dropout": 0.0,
    "windows": "fixed",
    "long_every": 0,
    "softmax": "full",
    "shallow_fraction": 0.0,
}
CHECKSUMS = "checksums.json"
TRAINING_STATE = "training_state.pt"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CHECKPOINT_FILES = (".pt", ".bin")  # endings of other projects' checkpoint files
REQUIRED_FILES = ("config.json", "model.safetensors", TRAINING_STATE)
MODEL_FILES = (*REQUIRED_FILES, *WEIGHT_FILES, *TOKENIZER_FILES, CHECKSUMS)


def save(
    run_folder: Path,
    model: GPT,
    state: dict[str, Any],
    *,
    end_of_text_id: int | None = None,
    tokenizer_from: Path | None = None,
    card: str | None = None,
    is_gpt2: bool | None = None,
) -> Path:
    """Write `run`/checkpoints/step_NNNNNN and return it. `state`: plain values and tensors, with `step`.

    `is_gpt2`: the result of convert.computes_gpt2; None: compute it here.
    """
    folder = run_folder / "checkpoints" / f"step_{state['step']:06d}"
    temporary = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_pretrained(model, temporary, end_of_text_id, is_gpt2)
        torch.save(state, temporary / TRAINING_STATE)
        for name in TOKENIZER_FILES:
            if tokenizer_from is not None and (tokenizer_from / name).is_file():
                shutil.copyfile(tokenizer_from / name, temporary / name)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        write_json(temporary / CHECKSUMS, {path.name: sha256(path) for path in sorted(temporary.iterdir())})
        for path in (*temporary.iterdir(), run_folder / METRICS):  # after a power failure both must contain the step
            fsync(path)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged checkpoint of this step
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # frees the space on a full disk
        raise
    fsync(folder.parent)
    return folder


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damage(folder: Path) -> str | None:
    """Why a checkpoint is invalid, naming the file; None where it is valid.

    Raises OSError where a file exists but can't be read.
    """
    try:
        text = (folder / CHECKSUMS).read_text(encoding="utf-8")
        checksums = json.loads(text)
        if text != json_text(checksums) or not set(REQUIRED_FILES) <= checksums.keys():
            return f"{CHECKSUMS} is truncated or altered"
        for name, digest in checksums.items():
            if not (folder / name).is_file():
                return f"{name} is missing, but listed in {CHECKSUMS}"
            if sha256(folder / name) != digest:
                return f"{name} is truncated or altered: its sha256 differs from {CHECKSUMS}"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except (ValueError, AttributeError, RecursionError):
        return f"{CHECKSUMS} is truncated or altered"
    return None


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run in order of their steps, valid or not."""
    return sorted((p for p in (run_folder / "checkpoints").glob("step_*") if p.name[5:].isdigit()), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def newest_valid(run_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint of a run (None: there is none), and a warning for each newer, invalid one."""
    warnings: list[str] = []
    for folder in reversed(list_checkpoints(run_folder)):
        damage = find_damage(folder)
        if damage is None:
            return folder, warnings
        warnings.append(f"warning: skipping {folder}: {damage}")
    return None, warnings


def find(run_folder: Path, ranks: Ranks, *, restart: bool) -> Path | None:
    """The checkpoint that a run resumes from, the same on every rank; None for a new run. All ranks must call it.

    Raises ValueError, on all ranks, where all checkpoints are damaged, where the run must `restart` but exists, and
    where a rank doesn't see the checkpoint.
    """
    restarted_by_torchrun = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    def find_here() -> Path | None:
        if restart and not restarted_by_torchrun:
            if (run_folder / METRICS).is_file():
                raise ValueError(
                    f"{run_folder} already contains a run. Use another --run, or --resume auto to resume it"
                )
            return None
        found, warnings = newest_valid(run_folder)
        for line in warnings:
            ranks.log(line)
        if warnings and found is None:
            raise ValueError(f"{run_folder} has no valid checkpoint. Move the folder away to start the run again")
        return found

    found = ranks.on_main(find_here)
    is_visible = ranks.all_gather(found is None or found.is_dir())
    if not all(is_visible):
        raise ValueError(
            f"{found} is not visible to rank {is_visible.index(False)}. All nodes need the same logs/ and data/"
        )
    return found


def load_training_state(folder: Path, fixed_settings: dict[str, Any], recipe: str) -> dict[str, Any]:
    """The training state of a checkpoint. Raises ValueError where a fixed setting differs from that of the run.

    `recipe`: the recipe of this command; another one with the same values is no difference.
    """
    path, run_folder = folder / TRAINING_STATE, folder.parent.parent
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} contains more than plain values and tensors. Use another checkpoint") from None
    except RuntimeError as error:  # also a lack of memory
        raise ValueError(
            f"{path} could not be loaded: {str(error).splitlines()[0][:200]}. Free memory and retry"
        ) from None
    state["settings"] = EARLIER_SETTINGS | state["settings"]
    check_settings(run_folder, state, fixed_settings, recipe)
    return state


def check_settings(run_folder: Path, state: dict[str, Any], fixed_settings: dict[str, Any], recipe: str) -> None:
    """Raise ValueError, with both values, for the first fixed setting that differs from that of the training state."""
    settings = state["settings"]
    for name, value in fixed_settings.items():
        if name not in settings:
            raise ValueError(
                f"run {run_folder.name} was started by an earlier version of this project, without the setting {name}. "
                f"Finish it with that version, or use another --run"
            )
        if settings[name] == value:
            continue
        if name == "steps" and state["step"] == settings["steps"]:
            raise ValueError(
                f"run {run_folder.name} is finished: {settings['steps']} steps. It can't be extended to {value}, as "
                f"its learning rate has ended. To train its weights further, use another --run with --init-from "
                f"{run_folder}"
            )
        before, now = (describe_setting(name, each) for each in (settings[name], value))
        recorded = read_settings(run_folder).get("recipe", recipe)
        if recorded != recipe:  # probably the cause
            before, now = f"{before} (--recipe {recorded})", f"{now} (--recipe {recipe})"
        raise ValueError(
            f"run {run_folder.name} was started with {before}, now it is {now}. Restore the setting to resume, or use "
            f"another --run with --init-from {run_folder}"
        )


def describe_setting(name: str, value: Any) -> str:
    """As on the command line, where it is an option."""
    if name == "manifest_hash":
        return f"--data of manifest_hash {value}"
    return f"no {cli.option_name(name)}" if value is None else f"{cli.option_name(name)} {value}"


def check_preset(run_folder: Path, options: dict[str, str]) -> None:
    """Raise ValueError where a run with a checkpoint was started with another preset, before its data are opened.

    `options`: the values now of preset and of other options, which a user who forgets one often forgets too.
    """
    recorded = read_settings(run_folder)  # the checkpoint is authoritative, where it lacks one
    differing = {name: recorded[name] for name, value in options.items() if recorded.get(name, value) != value}
    if "preset" in differing and list_checkpoints(run_folder):
        before = " ".join(f"--{name} {value}" for name, value in differing.items())
        now = " ".join(f"--{name} {options[name]}" for name in differing)
        raise ValueError(
            f"run {run_folder.name} was started with {before}, now it is {now}. Restore the options to resume, or use "
            f"another --run"
        )


def trained_seq_len(source: str) -> int | None:
    """Tokens per sequence of the run that wrote this checkpoint, by its run.json; None for other weights."""
    value = read_settings(Path(source).parent.parent).get("seq_len")
    return value if isinstance(value, int) else None


def read_settings(run_folder: Path) -> dict[str, Any]:
    """The settings in run.json; empty where it can't be read."""
    try:
        return dict(json.loads((run_folder / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def resolve(ckpt: str, option: str = "--ckpt") -> str:
    """What `--ckpt` (or another `option`) names, as a model folder, a checkpoint file or a hub name.

    A checkpoint folder, a run folder (its newest valid checkpoint), a Hugging Face folder, a checkpoint file of another
    project, or a hub name (gpt2, gpt2-medium, gpt2-large, gpt2-xl). Raises ValueError for anything else, and for a
    damaged checkpoint.
    """
    folder = Path(ckpt)
    if folder.is_file():
        if folder.name in MODEL_FILES and (folder.parent / "config.json").is_file():
            raise ValueError(f"{option} {ckpt} is one file of a model folder. Use {option} {folder.parent}")
        if not formats.is_checkpoint_file(folder):
            raise ValueError(
                f"{option} {ckpt} is not a folder, and not a checkpoint file of a known format. {known_runs()}"
            )
        return str(folder)
    if not folder.is_dir():
        if folder.exists() or ckpt.startswith((".", "/", "~", "logs/")):
            reason = "is not a folder or file" if folder.exists() else "does not exist"
            raise ValueError(f"{option} {ckpt} {reason}. {known_runs()}")
        return ckpt
    if folder.name == "checkpoints" and list_checkpoints(folder.parent):
        folder = folder.parent
    if (folder / "checkpoints").is_dir():
        found, warnings = newest_valid(folder)
        for line in warnings:
            print(line)
        if found is None:
            raise ValueError(f"{option} {ckpt}: the run has no valid checkpoint. {known_runs()}")
        return str(found)
    if (folder / CHECKSUMS).is_file() and (damage := find_damage(folder)):
        raise ValueError(f"{option} {ckpt}: {damage}. Use another checkpoint")
    refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        files = sorted(path for path in folder.glob("*") if path.name.endswith(CHECKPOINT_FILES))
        remedy = f"Name a checkpoint file in it, such as {files[-1]}" if files else known_runs()
        raise ValueError(f"{option} {ckpt} contains neither checkpoints nor a config.json. {remedy}")
    return str(folder)


def resolve_init(init_from: str, ranks: Ranks) -> str:
    """What `--init-from` names, as rank 0 finds it: a run that is still training may save a checkpoint meanwhile."""
    return ranks.on_main(lambda: resolve(init_from, "--init-from"))


def resolve_all(ckpts: tuple[str, ...]) -> list[str]:
    if not ckpts:
        raise ValueError(f"--ckpt names no model. {known_runs()}")
    return [resolve(ckpt) for ckpt in ckpts]


def known_runs() -> str:
    """A remedy: what the option accepts."""
    runs = sorted(str(path.parent) for path in Path("logs").glob("*/checkpoints"))
    trained = f"a run ({', '.join(runs)})" if runs else "a run of train.py"
    return f"Use {trained}, a Hugging Face folder, a checkpoint file of nanoGPT or llm.c, or a hub name such as gpt2"


def load_model(source: str) -> GPT:
    """The model of a source that `resolve` returned. Raises ValueError where it isn't a GPT-2."""
    try:
        if not Path(source).is_file():
            return GPT.from_pretrained(source)
        model, note = formats.read_checkpoint_file(Path(source))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(source) else f"{source}: {text}") from None
    cli.print_note(note)
    return model


def check_tokens(source: str, model: GPT, data: Path, data_vocab_size: int) -> None:
    """Raise ValueError where an id of the shards in `data` is, or can be, another token in the model of `source`."""
    from core.data import tokenizer_files

    folder = Path(source) if Path(source).exists() else download(source)
    has_tokenizer = [
        any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")) for path in (data, folder)
    ]
    if not all(has_tokenizer):
        if model.config.vocab_size > replace(model.config, vocab_size=data_vocab_size).padded_vocab_size:
            raise ValueError(
                f"{source} has {model.config.vocab_size:,} token ids, {data} has {data_vocab_size:,}, and one has no "
                f"tokenizer to compare. Add its tokenizer.json"
            )
        return
    expected, found = (tokenizer_files.read(path).tokens() for path in (data, folder))
    for i, token in expected.items():
        if found.get(i) != token:
            raise ValueError(
                f"{source} has another tokenizer than {data}: id {i} is {found.get(i)!r:.40} in the model and "
                f"{token!r:.40} in the shards. Use shards of the model's tokenizer"
            )


def load_encoding(source: str, vocab_size: int) -> Any:
    """The tokenizer in a model folder; without one, that of GPT-2 if the vocabulary has its size, padded or not."""
    from core.data import tokenizer

    folder = Path(source)
    if not folder.exists():
        folder = download(source)
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        return tokenizer.load(folder)
    gpt2 = PRESETS["gpt2"]
    if not gpt2.vocab_size <= vocab_size <= gpt2.padded_vocab_size:
        remedy = "Convert it with convert.py, and add" if folder.is_file() else "Add"
        raise ValueError(f"{source} has {vocab_size} token ids and no tokenizer.json. {remedy} its tokenizer.json")
    cli.print_note(f"{source} has no tokenizer: GPT-2's is used")
    return tokenizer.load("gpt2")
