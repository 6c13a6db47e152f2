"""Operations on complete data folders: verify them against the manifest, or describe shards of another project."""

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from core import cli
from core.data import tokenizer
from core.data.shards import MANIFEST, UNFINISHED, Dataset, open_dataset, open_shard
from core.data.tokenizer import has_token
from core.files import sha256, write_json

SAMPLE_DOCUMENTS = 50  # of each split, to decode and encode again
VAL_WORDS = {"val", "valid", "validation"}  # in the names of adopted files


def summarize(dataset: Dataset) -> None:
    """Print the contents of a data folder."""
    print(f"{dataset.folder}:")
    for split in ("val", "train"):
        shards = dataset.shards(split)
        tokens, documents, text = (sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes"))
        print(
            f"  {split:5} {tokens:>14,} tokens {documents:>10,} documents {text / 1e6:>10,.1f} MB of text "
            f"{len(shards):>5} shards"
        )
    for kind in ("empty", "broken"):
        skipped = dataset.manifest.get(f"{kind}_documents") or 0
        if number := skipped if isinstance(skipped, int) else len(skipped):
            print(f"  {number:,} {kind} documents skipped")


def verify(folder: Path) -> None:
    """Compare each shard with the manifest: sha256, tokens, documents, bytes of text, order in the source.

    Then decode a sample of documents and encode them again. Raises ValueError that names each shard that differs, and
    OSError for a shard that can't be read.
    """
    dataset, encoding, sizes = open_dataset(folder), tokenizer.load(folder), tokenizer.token_bytes(folder)
    shards = dataset.manifest["shards"]
    # A row, byte or line of a file; in older folders a row and a token; in adopted folders nothing.
    places = [(shard["source_file"], *shard["begin"].values(), shard["file"]) for shard in shards if shard.get("begin")]
    problems = [f"{b[-1]} is not after {a[-1]} in the source" for a, b in pairwise(places) if a[:-1] >= b[:-1]]
    with ThreadPoolExecutor(8) as pool:
        checks = pool.map(lambda shard: _compare(dataset, shard, sizes), shards)
        checks = cli.progress_bar(checks, "checking shards", len(shards), unit="shards", leave=False, delay=1)
        problems += filter(None, checks)
    if problems := problems or _check_sample(dataset, encoding):
        raise ValueError(f"{folder}: {'; '.join(problems)}. {dataset.remedy}")
    summarize(dataset)
    print(
        f"  all {len(shards)} shards match the manifest: sha256, tokens, documents, bytes of text and order\n"
        f"  {SAMPLE_DOCUMENTS} documents of each split (or all, if fewer) decode and encode to the same ids"
    )


def _compare(dataset: Dataset, shard: dict[str, Any], sizes: np.ndarray) -> str:
    """How a shard differs from the manifest; empty if it doesn't."""
    try:
        found = _describe(dataset.folder / shard["file"], dataset.manifest["end_of_text_id"], sizes)
    except ValueError as error:
        return str(error)
    differing = [f"{key} {found[key]}, not {shard.get(key)}" for key in found if found[key] != shard.get(key)]
    return f"{shard['file']} holds {', '.join(differing)}" if differing else ""


def _describe(path: Path, end_of_text_id: int, sizes: np.ndarray) -> dict[str, Any]:
    """A shard's tokens, first tokens of documents, bytes of text, and sha256. `sizes` is the bytes of text per id.

    Raises ValueError for another content than ids of the vocabulary, OSError for an error of the machine.
    """
    ids, documents, text_bytes = open_shard(path), 0, 0
    for first in range(0, len(ids), 2**24):  # in blocks, to bound memory
        block = ids[first : first + 2**24]
        if (largest := int(block.max())) >= len(sizes):
            raise ValueError(f"{path}: token id {largest} is outside the vocabulary of {len(sizes)}")
        documents += int(np.count_nonzero(block == end_of_text_id))
        text_bytes += int(sizes[block].sum())
    return {"tokens": len(ids), "documents": documents, "bytes": text_bytes, "sha256": sha256(path)}


def _check_sample(dataset: Dataset, encoding: Any) -> list[str]:
    """The first difference in evenly spaced documents that are complete in one shard, if there is one."""
    if dataset.manifest.get("encoding_sha256", found := tokenizer.fingerprint(encoding)) != found:
        return ["tokenizer.json is not the encoding that the manifest lists"]
    for shard in dataset.manifest["shards"]:
        ids, share = dataset.open(shard), -(-SAMPLE_DOCUMENTS // len(dataset.shards(shard["split"])))
        starts = np.flatnonzero(ids == dataset.manifest["end_of_text_id"])
        for i in np.unique(np.linspace(0, len(starts) - 2, share).astype(int)) if len(starts) > 1 else ():
            document = ids[starts[i] + 1 : starts[i + 1]].tolist()
            with contextlib.suppress(UnicodeDecodeError, KeyError):  # it is not text
                if encoding.encode_ordinary(encoding.decode_bytes(document).decode()) == document:
                    continue
            return [f"{shard['file']}: document {i} is not text that encodes to the same ids"]
    return []


def adopt(folder: Path, encoding_name: str, overwrite: bool) -> None:
    """Check the shards of another project and describe them in a manifest. The shards don't change.

    Accepts uint16 .npy files (build-nanogpt), .bin files with llm.c's header, and nanoGPT's train.bin and val.bin.
    Raises ValueError for others, and then writes nothing.
    """
    if (folder / MANIFEST).is_file() and not overwrite:
        raise ValueError(f"--adopt {folder} has a manifest already. Check it with --verify, or add --overwrite")
    if (folder / UNFINISHED).exists():
        raise ValueError(f"--adopt {folder} is unfinished output of fineweb.py. Rerun that command to resume")
    paths = [path for path in (*folder.glob("*.npy"), *folder.glob("*.bin")) if not path.name.startswith(".")]
    splits = {path: "val" if VAL_WORDS & set(re.split("[^a-z]+", path.name.lower())) else "train" for path in paths}
    for split in ("val", "train"):
        if split not in splits.values():
            raise ValueError(
                f"--adopt {folder} has no {split} shard (.npy or .bin). Put `val` into the names of validation shards"
            )
    encoding = tokenizer.load(encoding_name)
    ids, end_of_text_id = range(encoding.n_vocab), tokenizer.end_of_text_id(encoding)
    sizes = np.array([len(encoding.decode_single_token_bytes(i)) if has_token(encoding, i) else 0 for i in ids])
    sizes[end_of_text_id] = 0
    shards = []
    paths.sort(key=lambda path: (splits[path] != "val", path.name))
    for path in cli.progress_bar(paths, "reading", unit="shards"):
        try:
            found = _describe(path, end_of_text_id, sizes)
            if not found["documents"]:
                raise ValueError(f"{path} has no end-of-text token (id {end_of_text_id})")
        except ValueError as error:
            raise ValueError(f"{error}. Check the file and --encoding {encoding_name}") from None
        shards.append({"file": path.name, "split": splits[path]} | found | {"source_file": None, "begin": None})
    name = f"adopted from {folder.resolve().name}"
    header: dict[str, Any] = {"source": {"name": name, "revision": None, "files": []}}
    header |= {"encoding": encoding.name, "encoding_sha256": tokenizer.fingerprint(encoding)}
    header |= {"vocab_size": encoding.n_vocab, "end_of_text_id": end_of_text_id, "shards": shards}
    dataset = Dataset(folder, header, "")
    if problems := _check_sample(dataset, encoding):
        raise ValueError(f"{folder}: {problems[0]}. Use its own --encoding, not {encoding_name}")
    tokenizer.save(encoding, folder)
    write_json(folder / MANIFEST, header)
    summarize(dataset)
