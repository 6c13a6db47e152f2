"""Whole data folders, looked at: checked against their manifest, or describe where another project made the shards."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from core import cli
from core.data import tokenizer
from core.data.shards import MANIFEST, UNFINISHED, Dataset, open_dataset, open_shard
from core.files import sha256, write_json

DOCUMENTS = 50  # of each split are decoded and encoded again


def summarize(dataset: Dataset) -> None:
    """Print what a data folder holds."""
    print(f"{dataset.folder}:")
    for split in ("val", "train"):
        shards = dataset.shards(split)
        tokens, documents, text = (sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes"))
        print(
            f"  {split:5} {tokens:>14,} tokens {documents:>10,} documents {text / 1e6:>10,.1f} MB of text "
            f"{len(shards):>5} shards"
        )
    for kind in ("empty", "broken"):
        left_out = dataset.manifest.get(f"{kind}_documents") or 0
        if number := left_out if isinstance(left_out, int) else len(left_out):
            print(f"  {number:,} {kind} documents left out")


def verify(folder: Path) -> None:
    """Compare every shard with the manifest: sha256, tokens, documents, bytes of text, place in the source.

    Then decode a sample of documents and encode them again. Raises ValueError with every shard that differs.
    """
    dataset = open_dataset(folder)
    shards = dataset.manifest["shards"]
    sizes = tokenizer.token_bytes(folder)
    problems = _misplaced(shards)
    with ThreadPoolExecutor(8) as pool:
        checks = pool.map(lambda shard: _problem(dataset, shard, sizes), shards)
        checks = cli.progress_bar(checks, "checking shards", len(shards), leave=False, delay=1)
        problems += [f"{shard['file']} {problem}" for shard, problem in zip(shards, checks, strict=True) if problem]
    if not problems:
        problems = _check_sample(dataset)
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}. Write it again with --overwrite")
    summarize(dataset)
    print(
        f"  all {len(shards)} shards are the manifest's: sha256, tokens, documents, bytes of text and place. Of each "
        f"split {DOCUMENTS} documents (or all there are) decode and encode to the same ids"
    )


def _problem(dataset: Dataset, shard: dict[str, Any], sizes: np.ndarray) -> str:
    path = dataset.folder / shard["file"]
    try:
        if sha256(path) != shard["sha256"]:
            return "was cut short or altered: its sha256 is not the manifest's"
        found = _counts(open_shard(path, shard["tokens"]), dataset.manifest["end_of_text_id"], sizes)
    except (OSError, ValueError) as error:
        return f"can't be read: {error}"
    differing = [f"{key} {found[key]}, not {shard.get(key)}" for key in found if found[key] != shard.get(key)]
    return f"holds {', '.join(differing)}" if differing else ""


def _counts(ids: np.ndarray, end_of_text_id: int, sizes: np.ndarray) -> dict[str, int]:
    """Tokens, documents begun and bytes of text in a shard. Raises ValueError for an id outside the vocabulary."""
    documents = text_bytes = 0
    for first in range(0, len(ids), 2**24):  # a piece at a time, to keep memory flat
        piece = ids[first : first + 2**24]
        if (largest := int(piece.max())) >= len(sizes):
            raise ValueError(f"token id {largest} is outside the vocabulary of {len(sizes)}")
        documents += int(np.count_nonzero(piece == end_of_text_id))
        text_bytes += int(sizes[piece].sum())
    return {"tokens": len(ids), "documents": documents, "bytes": text_bytes}


def _misplaced(shards: list[dict[str, Any]]) -> list[str]:
    """Shards that don't begin after the one before them in the same source file."""
    problems, last = [], (-1, -1, -1)
    for shard in shards:
        if (begin := shard.get("begin")) is None:
            continue
        place = (shard["source_file"], begin["row"], begin["token"])
        if place <= last:
            problems.append(f"{shard['file']} begins at {place} of the source, before the end of the shard before it")
        last = place
    return problems


def _check_sample(dataset: Dataset) -> list[str]:
    encoding = tokenizer.load(dataset.folder)
    if dataset.manifest.get("encoding_sha256", found := tokenizer.fingerprint(encoding)) != found:
        return ["tokenizer.json is not the encoding that the manifest names"]
    problems: list[str] = []
    for split in ("val", "train"):
        for name, number, ids in _sample(dataset, split):
            try:
                same = encoding.encode_ordinary(encoding.decode_bytes(ids).decode()) == ids
            except (UnicodeDecodeError, KeyError) as error:
                same, problems = False, [*problems, f"{name}: document {number} is no text: {error}"]
            if not same:
                return [*problems, f"{name}: document {number} encodes to other ids than it was decoded from"]
    return problems


def _sample(dataset: Dataset, split: str) -> Iterator[tuple[str, int, list[int]]]:
    """Documents that lie whole in a shard, spread evenly over the split: shard, number in it, ids."""
    shards = dataset.shards(split)
    share = -(-DOCUMENTS // max(len(shards), 1))
    for shard in shards:
        ids = open_shard(dataset.folder / shard["file"], shard["tokens"])
        starts = np.flatnonzero(ids == dataset.manifest["end_of_text_id"])
        for i in np.unique(np.linspace(0, max(len(starts) - 2, 0), share).astype(int)) if len(starts) > 1 else ():
            yield shard["file"], int(i), ids[starts[i] + 1 : starts[i + 1]].tolist()


def adopt(folder: Path, encoding_name: str, overwrite: bool) -> None:
    """Check the shards of another project, and describe them in a manifest; the shards stay as they are.

    Takes uint16 .npy files (build-nanogpt) and .bin files with llm.c's header. Raises ValueError for others.
    """
    if (folder / MANIFEST).is_file() and not overwrite:
        raise ValueError(f"{folder} has a manifest already: --verify checks it, --overwrite writes a new one")
    if (folder / UNFINISHED).exists():
        raise ValueError(f"fineweb.py has begun {folder} and not ended: give its command again")
    paths = sorted([*folder.glob("*.npy"), *folder.glob("*.bin")])
    splits = {path.name: "val" if "val" in path.name else "train" for path in paths}
    for split in ("val", "train"):
        if split not in splits.values():
            raise ValueError(
                f"{folder} holds no {split} shard: .npy or .bin, those of validation with `val` in the name"
            )
    encoding = tokenizer.load(encoding_name)
    tokenizer.save(encoding, folder)
    sizes, end_of_text_id = tokenizer.token_bytes(folder), tokenizer.end_of_text_id(encoding)
    shards = []
    for path in cli.progress_bar(sorted(paths, key=lambda path: (splits[path.name] != "val", path.name)), "reading"):
        try:
            counts = _counts(open_shard(path), end_of_text_id, sizes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if not counts["documents"]:
            raise ValueError(
                f"{path} holds no end-of-text token (id {end_of_text_id}): is its --encoding {encoding_name}?"
            )
        entry = {"file": path.name, "split": splits[path.name]} | counts | {"sha256": sha256(path)}
        shards.append(entry | {"source_file": None, "begin": None})
    head: dict[str, Any] = {"source": {"name": f"adopted from {folder.resolve().name}", "revision": None, "files": []}}
    head |= {"encoding": encoding.name, "encoding_sha256": tokenizer.fingerprint(encoding)}
    head |= {"vocab_size": encoding.n_vocab, "end_of_text_id": end_of_text_id, "shards": shards}
    write_json(folder / MANIFEST, head)
    verify(folder)
