"""Byte-level BPE encodings: tiktoken encodes and decodes, and folders store Hugging Face's tokenizer files.

An encoding is loaded by tiktoken's name (one of NAMES) or from a folder with a `tokenizer.json`. Both become a
`tiktoken.Encoding`, so that every script encodes text in the same way.
"""

import functools
import hashlib
import json
import os
import uuid
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from core.data import tokenizer_files
from core.data.tokenizer_files import END_OF_TEXT

if TYPE_CHECKING:
    import tiktoken

GPT2_MERGES = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"  # sha256 of the lines of merges.txt
NAMES = ("gpt2", "r50k_base")  # tiktoken's encodings that split text as ByteLevel in tokenizer.json does


def load(name_or_folder: str | Path) -> "tiktoken.Encoding":
    """The encoding with this name, or of the tokenizer files in this folder. Raises ValueError if there is none."""
    folder = Path(name_or_folder)
    return _from_folder(folder) if folder.is_dir() else _by_name(str(name_or_folder))


def end_of_text_id(encoding: "tiktoken.Encoding") -> int:
    return encoding.encode_single_token(END_OF_TEXT)


def fingerprint(encoding: "tiktoken.Encoding") -> str:
    """The sha256 of all tokens in the order of their ids. Different encodings can have the same name."""
    tokens = [encoding.decode_single_token_bytes(i) if has_token(encoding, i) else b"" for i in range(encoding.n_vocab)]
    return hashlib.sha256(b"".join(len(token).to_bytes(4, "little") + token for token in tokens)).hexdigest()


def has_token(encoding: "tiktoken.Encoding", i: int) -> bool:
    """Whether id `i` stands for a token: a vocabulary can have gaps, and a model more rows than its encoding."""
    try:
        encoding.decode_single_token_bytes(i)
    except KeyError:
        return False
    return True


def _by_name(name: str) -> "tiktoken.Encoding":
    import tiktoken

    if name not in NAMES:
        raise ValueError(
            f"--encoding {name} is neither a folder nor a supported encoding. Use {' or '.join(NAMES)}, or a folder "
            f"with a tokenizer.json"
        )
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # of the machine; errors of the network have no errno
            raise
        raise ValueError(
            f"encoding {name} could not be downloaded ({type(error).__name__}). Without a network, set "
            "TIKTOKEN_CACHE_DIR to a folder with tiktoken's files"
        ) from None


def _from_folder(folder: Path) -> "tiktoken.Encoding":
    from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 splits text before the merges

    from core.data.added_tokens import AddedTokensEncoding

    files = tokenizer_files.read(folder)
    to_byte = {char: byte for byte, char in _byte_characters().items()}
    try:
        ranks = {bytes(to_byte[char] for char in token): rank for token, rank in files.vocab.items()}
    except KeyError as error:
        raise ValueError(f"{files.path} is not a byte-level BPE: {error} represents no byte") from None
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(f"{files.path} is not a byte-level BPE: some single bytes have no token")
    encoding = AddedTokensEncoding(
        folder.name,
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={token: i for token, (i, _) in files.added.items()},
        in_text={token for token, (_, is_special) in files.added.items() if not is_special},
    )
    _check_merges(files, ranks)
    tokenizer_files.compare(files, encoding)
    return encoding


def _check_merges(files: "tokenizer_files.TokenizerFiles", ranks: dict[bytes, int]) -> None:
    """Raise ValueError where the merges are not those of the ids: tiktoken merges in the order of the ids."""
    ids = [files.vocab.get(a + b, -1) for a, b in files.merges]
    is_ordered = len(ids) == len(ranks) - 256 and all(i < j for i, j in pairwise([-1, *ids]))
    text = "\n".join(f"{a} {b}" for a, b in files.merges)
    if is_ordered and hashlib.sha256(text.encode()).hexdigest() == GPT2_MERGES:
        return  # known to be right; computing them would take 0.4 s
    try:
        expected = [(_text(a), _text(b)) for a, b in _merges(ranks)]
    except ValueError as error:
        raise ValueError(f"{files.merges_path}: merges: {error}. Use a tokenizer with all merges") from None
    if files.merges != expected:
        pairs = zip(files.merges, expected, strict=False)
        number = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(files.merges), len(expected)))
        raise ValueError(
            f"{files.merges_path}: merges differ from the order of the ids, from merge {number:,} on. "
            f"Use a tokenizer whose ids are in the order of its merges"
        )


def token_bytes(folder: Path) -> np.ndarray:
    """Bytes of text that each id decodes to, (vocab_size,) int64; 0 for end-of-text and for gaps."""
    files = tokenizer_files.read(folder)
    lengths = np.zeros(files.n_vocab, dtype=np.int64)
    for token, i in files.vocab.items():
        lengths[i] = len(token)  # one character is one byte
    for token, (i, _) in files.added.items():
        lengths[i] = 0 if token == END_OF_TEXT else len(token.encode())
    return lengths


def save(encoding: "tiktoken.Encoding", folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, for `transformers.AutoTokenizer`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    ranks, added = encoding._mergeable_ranks, encoding._special_tokens
    vocab = {_text(token): rank for token, rank in ranks.items()}
    if added != {END_OF_TEXT: len(ranks)}:
        vocab |= added  # tokenizers gives other added tokens these ids only where the vocabulary has them
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(_text(a), _text(b)) for a, b in _merges(ranks)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    in_text: frozenset[str] = getattr(encoding, "in_text", frozenset())
    for token in sorted(added, key=added.__getitem__):
        add = tokenizer.add_tokens if token in in_text else tokenizer.add_special_tokens
        add([AddedToken(token, special=token not in in_text, normalized=False)])
        assert tokenizer.token_to_id(token) == added[token]
    unfinished = folder / f".tokenizer.json.{uuid.uuid4().hex}"  # by rename: several processes may write it at once
    unfinished.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    os.replace(unfinished, folder / "tokenizer.json")
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _text(token: bytes) -> str:
    """A token as the vocabulary files write it."""
    return token.decode("latin-1").translate(_byte_characters())


@functools.cache
def _byte_characters() -> dict[int, str]:
    """The printable character that represents each byte in GPT-2's vocabulary files."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token is merged from, in order: the last two parts when BPE applies only earlier merges."""
    no_merge = max(ranks.values()) + 1
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        edges = list(range(len(token) + 1))  # of the parts of the token
        pairs = [ranks.get(token[i : i + 2], no_merge) for i in range(len(token) - 1)]  # rank of each two neighbors
        while len(pairs) > 1:
            i = pairs.index(min(pairs))
            if pairs[i] >= rank:
                raise ValueError(f"no merges produce token {rank}")
            del edges[i + 1], pairs[i]
            if i:
                pairs[i - 1] = ranks.get(token[edges[i - 1] : edges[i + 1]], no_merge)
            if i < len(pairs):
                pairs[i] = ranks.get(token[edges[i] : edges[i + 2]], no_merge)
        if pairs:
            merges.append((token[: edges[1]], token[edges[1] :]))
    return merges
