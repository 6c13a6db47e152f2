"""The settings that all processes of a data folder share, and the removal of what was written with others."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from core.data.shards import MANIFEST, UNFINISHED, open_dataset, short_reason
from core.files import PRESENCE, FileLocks, write_json

SETTINGS = "settings.json"


def recorded_settings(out: Path) -> dict[str, Any]:
    """The settings that a finished or unfinished folder was made with; empty for a new folder."""
    if (out / MANIFEST).is_file():
        return open_dataset(out).manifest
    path = out / UNFINISHED / SETTINGS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({short_reason(error)}). Start again with --overwrite") from None


def check_settings(out: Path, header: dict[str, Any]) -> None:
    """Raise ValueError if the folder was begun with other settings. Record the settings of a new folder."""
    recorded = recorded_settings(out)
    finished = (out / MANIFEST).is_file()
    for key, value in (header if finished else _without_contents(header)).items():
        if recorded and recorded.get(key) != value:
            name, old, new = _difference(key, recorded.get(key), value)
            raise ValueError(
                f"{out} was made with {name} {old}, but this command has {new}. Use another --out, or --overwrite"
            )
    for shard in recorded["shards"] if finished else ():
        if not (out / shard["file"]).is_file():
            raise ValueError(
                f"{out / shard['file']} is missing, but the manifest lists it. Write the folder again with --overwrite"
            )
    if finished:
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    elif not recorded:
        (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
        write_json(out / UNFINISHED / SETTINGS, _without_contents(header))
    if older := [path for path in (out / UNFINISHED).glob("*") if path.is_dir()]:
        print(f"{out / UNFINISHED} is of an earlier version: its shards are written again", flush=True)
        for folder in older:
            shutil.rmtree(folder)


def _without_contents(header: dict[str, Any]) -> dict[str, Any]:
    """The settings with only the names of the source files. Each chunk's record identifies its content."""
    names = [file["name"] for file in header["source"]["files"]]
    return header | {"source": header["source"] | {"files": names}}


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The innermost entry in which two values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        return _difference(f"{name} {key}", old.get(key), new.get(key))
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"a number of {name} of", len(old), len(new)
        i = next(i for i in range(len(old)) if old[i] != new[i])
        label = old[i].get("name", i) if isinstance(old[i], dict) else i
        return _difference(f"{name} {label}", old[i], new[i])
    return name, old, new


def remove_shards(out: Path, keep: set[str]) -> None:
    """Remove shards and incomplete files except for the names in `keep`."""
    for path in out.iterdir():
        if (
            re.fullmatch(r"(?:val|train)_\d{6}\.npy|\..*\.(?:unfinished|json\.[0-9a-f]+)", path.name)
            and path.name not in keep
        ):
            path.unlink()


def clear(out: Path, locks: FileLocks, only_empty: bool = False) -> bool:
    """Remove all shards, the manifest first, unless `only_empty` and there is a train shard.

    Returns whether they were removed. Raises ValueError if another process is writing the folder.
    """
    if only_empty and ((out / MANIFEST).exists() or any(out.glob("train_*.npy"))):
        return False
    locks.acquire(PRESENCE)
    (out / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    remove_shards(out, keep=set())
    return True
