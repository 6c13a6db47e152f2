"""Byte-level BPE encodings: tiktoken encodes and decodes, and folders store Hugging Face's tokenizer files.

An encoding is loaded by tiktoken's name (`gpt2`) or from a folder with a `tokenizer.json`. Both become a
`tiktoken.Encoding`, so that every script encodes text in the same way.
"""

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from core.data.shards import short_reason

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB_SIZE = 2**16  # shards hold uint16
NAMES = ("gpt2", "r50k_base")  # tiktoken's encodings that split text as ByteLevel in tokenizer.json does


def load(name_or_folder: str | Path) -> "tiktoken.Encoding":
    """The encoding with this name, or of the tokenizer files in this folder. Raises ValueError if there is none."""
    folder = Path(name_or_folder)
    encoding = _from_folder(folder) if folder.is_dir() else _by_name(str(name_or_folder))
    if encoding.n_vocab > MAX_VOCAB_SIZE:
        raise ValueError(
            f"encoding {encoding.name} has {encoding.n_vocab:,} ids; uint16 shards allow at most {MAX_VOCAB_SIZE:,}. "
            "Use gpt2"
        )
    return encoding


def end_of_text_id(encoding: "tiktoken.Encoding") -> int:
    return encoding.encode_single_token(END_OF_TEXT)


def fingerprint(encoding: "tiktoken.Encoding") -> str:
    """The sha256 of all tokens in the order of their ids. Different encodings can have the same name."""
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    return hashlib.sha256(b"".join(len(token).to_bytes(4, "little") + token for token in tokens)).hexdigest()


def _by_name(name: str) -> "tiktoken.Encoding":
    import tiktoken

    if name not in NAMES:
        raise ValueError(
            f"no encoding and no folder {name!r}. Use {' or '.join(NAMES)}, or a folder with a tokenizer.json"
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
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 splits text before the merges

    vocab = read_vocab(folder)
    special = {END_OF_TEXT: vocab.pop(END_OF_TEXT)}
    to_byte = {char: byte for byte, char in _byte_characters().items()}
    try:
        ranks = {bytes(to_byte[char] for char in token): rank for token, rank in vocab.items()}
    except KeyError as error:
        raise ValueError(f"{folder / 'tokenizer.json'} is not a byte-level BPE: {error} represents no byte") from None
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError(f"{folder / 'tokenizer.json'} is not a byte-level BPE: some single bytes have no token")
    return tiktoken.Encoding(folder.name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def read_vocab(folder: Path) -> dict[str, int]:
    """Token -> id from a folder's tokenizer.json, or from the vocab.json of older uploads. Raises ValueError."""
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            tokenizer = json.loads(path.read_text(encoding="utf-8"))
            if (kind := tokenizer["pre_tokenizer"]["type"]) != "ByteLevel":
                raise ValueError(f"{path} splits text by {str(kind)[:40]}, but GPT-2's encodings by ByteLevel")
            vocab = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
        else:
            path = folder / "vocab.json"
            vocab = json.loads(path.read_text(encoding="utf-8"))
        ids = set(vocab.values())
    except FileNotFoundError:
        raise ValueError(f"{folder} has no tokenizer.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a Hugging Face tokenizer file ({short_reason(error)})") from None
    if END_OF_TEXT not in vocab:
        raise ValueError(f"{path} has no {END_OF_TEXT}, the token before each document")
    if ids != set(range(len(vocab))):
        raise ValueError(
            f"{path} is damaged: its {len(vocab)} tokens must have the ids 0 to {len(vocab) - 1}, each once"
        )
    return vocab


def token_bytes(folder: Path) -> np.ndarray:
    """Bytes of text that each id decodes to, (vocab_size,) int64; 0 for end-of-text."""
    vocab = read_vocab(folder)
    lengths = np.zeros(max(vocab.values()) + 1, dtype=np.int64)
    for token, i in vocab.items():
        lengths[i] = 0 if token == END_OF_TEXT else len(token)  # one character is one byte
    return lengths


def save(encoding: "tiktoken.Encoding", folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, for `transformers.AutoTokenizer`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    characters = _byte_characters()

    def text(token: bytes) -> str:
        return token.decode("latin-1").translate(characters)

    ranks = encoding._mergeable_ranks
    merges = [(text(a), text(b)) for a, b in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab={text(token): rank for token, rank in ranks.items()}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    assert tokenizer.token_to_id(END_OF_TEXT) == end_of_text_id(encoding)
    unfinished = folder / f".tokenizer.json.{uuid.uuid4().hex}"  # by rename: several processes may write it at once
    unfinished.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    os.replace(unfinished, folder / "tokenizer.json")
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _byte_characters() -> dict[int, str]:
    """The printable character that represents each byte in GPT-2's vocabulary files."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token is merged from, in order: the last two parts when BPE applies only earlier merges."""
    no_merge = len(ranks)
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        edges = list(range(len(token) + 1))  # of the parts of the token
        pairs = [ranks.get(token[i : i + 2], no_merge) for i in range(len(token) - 1)]  # rank of each two neighbors
        while len(pairs) > 1:
            i = pairs.index(min(pairs))
            assert pairs[i] < rank, f"no merges produce {token!r}"
            del edges[i + 1], pairs[i]
            if i:
                pairs[i - 1] = ranks.get(token[edges[i - 1] : edges[i + 1]], no_merge)
            if i < len(pairs):
                pairs[i] = ranks.get(token[edges[i] : edges[i + 2]], no_merge)
        if pairs:
            merges.append((token[: edges[1]], token[edges[1] :]))
    return merges
