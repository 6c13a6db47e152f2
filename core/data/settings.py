"""The settings of a data folder: a resumed or repeated preparation must have the same."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from core.data.shards import MANIFEST, UNFINISHED, open_dataset, short_reason
from core.files import ALL_ITEMS, FileLocks, write_json

SETTINGS = "settings.json"


def records(out: Path) -> list[Path]:
    """The records of chunks that are done, in a folder without a manifest."""
    return [path for path in (out / UNFINISHED).glob("*.json") if path.name != SETTINGS]


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


def _without_contents(header: dict[str, Any]) -> dict[str, Any]:
    """The settings with only the names of the source files. Each chunk's record has a hash of their contents."""
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


def clear(out: Path, locks: FileLocks) -> None:
    """Remove all shards, the manifest first. Raises ValueError if another process is writing the folder."""
    locks.acquire(0, count=ALL_ITEMS)
    with locks.exclusive():
        (out / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        remove_shards(out, keep=set())
    locks.release(0, count=ALL_ITEMS)


def discard_empty(out: Path, locks: FileLocks) -> bool:
    """Remove the settings of a preparation that ended before its first shard, e.g. with a mistyped --source.

    Returns whether they were removed.
    """
    if not records(out) and not (out / MANIFEST).exists() and locks.is_free():
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        return True
    return False


def remove_shards(out: Path, keep: set[str]) -> None:
    """Remove shards and incomplete files except for the names in `keep`."""
    for path in out.iterdir():
        if (
            re.fullmatch(r"(?:val|train)_\d{6}\.npy|\..*\.(?:unfinished|json\.[0-9a-f]+)", path.name)
            and path.name not in keep
        ):
            path.unlink()
