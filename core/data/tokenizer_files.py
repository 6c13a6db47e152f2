"""Hugging Face's tokenizer files: read, and compared with the `tokenizers` library.

A tokenizer.json has fields that change ids. What this project doesn't implement is refused by the name of its field.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.data.shards import short_reason
from core.files import refuse_pointer

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB_SIZE = 2**16  # shards hold uint16
NAMES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json")
# Fields of tokenizer.json that change ids, with the values that mean GPT-2's rule.
FIELDS: dict[tuple[str, ...], tuple[Any, ...]] = {
    ("normalizer",): (None,),
    ("pre_tokenizer", "type"): ("ByteLevel",),
    ("pre_tokenizer", "add_prefix_space"): (False,),
    ("pre_tokenizer", "use_regex"): (True, None),
    ("model", "type"): ("BPE", None),
    ("model", "dropout"): (None, 0),
    ("model", "continuing_subword_prefix"): (None, ""),
    ("model", "end_of_word_suffix"): (None, ""),
}
# The same for tokenizer_config.json. Other classes of `transformers` replace parts of tokenizer.json.
CONFIG_FIELDS: dict[tuple[str, ...], tuple[Any, ...]] = {
    ("add_prefix_space",): (None, False),
    ("add_bos_token",): (None, False),
    ("add_eos_token",): (None, False),
    ("tokenizer_class",): (
        None,
        "GPT2Tokenizer",
        "GPT2TokenizerFast",
        "PreTrainedTokenizer",
        "PreTrainedTokenizerFast",
        "TokenizersBackend",
    ),
}
MAX_CHECKED = 256  # added tokens that are compared within text
TEXTS = (
    "Hello World",
    " Hello  World   ",
    "It's 1907, isn't it? They'll say we're WE'RE they've I'd I'm",
    "na\u00efve cafe\u0301 \ufb01 \u2126 \uff21\uff22 \u1e9b\u0323 \u0130stanbul \u00df",  # changed by normalizers
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0 \ud55c\uad6d\uc5b4 \u0416\u0443\u043a \u0627\u0644\u0639 \u0e44\u0e17\u0e22",
    "\U0001f642\U0001f468\u200d\U0001f469 \u00a0no-break\u3000wide \ufeff \u200b",
    "lines\nand\r\nlines\n\n\n   indented\n\t\ttabs \t ",
    " " * 40 + "x" + "\n" * 40 + "zzzzzzzzzzzzzzzzzzzz" * 5,
    "0 12 345 6789 3.14159 1,000,000 $5 50% a@b.c http://x.y/?q=1#z snake_case camelCase",
    "control \x00\x07\x1b \x7f \u2028 \u0085 end",
    f"one.{END_OF_TEXT}Two {END_OF_TEXT} three{END_OF_TEXT}{END_OF_TEXT}",
    "<|endoftext <| endoftext|> |> <s> </s> <unk> [PAD] [CLS] <|im_start|>",
    "",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of a folder. Tokens of `vocab` and `merges` are written in GPT-2's characters for bytes."""

    path: Path
    merges_path: Path
    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[str, tuple[int, bool]]  # text of an added token -> its id, and whether it is special

    @property
    def n_vocab(self) -> int:
        """The largest id plus 1; the ids can have gaps."""
        return 1 + max([*self.vocab.values(), *(i for i, _ in self.added.values())])

    def tokens(self) -> dict[int, str]:
        """Id -> token, as the files write it."""
        return {i: token for token, i in self.vocab.items()} | {i: token for token, (i, _) in self.added.items()}


def read(folder: Path) -> TokenizerFiles:
    """The tokenizer.json of a folder, or the vocab.json and merges.txt of older uploads. Raises ValueError."""
    path = folder / "tokenizer.json"
    if not path.is_file() and (folder / "vocab.json").is_file():
        path = folder / "vocab.json"
    elif not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json")
    is_new = path.name == "tokenizer.json"
    merges_path = path if is_new else folder / "merges.txt"
    try:
        content = _read_json(path)
        vocab = {**content["model"]["vocab"]} if is_new else {**content}
        lines = content["model"]["merges"] if is_new else _read_merges(merges_path)
        merges = [_pair(line) for line in lines]
        added = {t["content"]: (t["id"], t["special"]) for t in content["added_tokens"]} if is_new else {}
        if is_new:
            _check_fields(path, content, FIELDS)
        for token, entry in _read_more_added(folder).items():
            if added.setdefault(token, entry)[0] != entry[0]:
                raise ValueError(f"{path}: added_tokens: the files of the folder give {token[:40]!r} two ids")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a Hugging Face tokenizer file ({short_reason(error)})") from None
    merged = {"".join(merge) for merge in merges}
    for token, (i, _) in added.items():
        if vocab.pop(token, i) != i or token in merged:
            raise ValueError(
                f"{path}: added_tokens: {token[:40]!r} is also a token of the vocabulary. Remove one of them"
            )
    if END_OF_TEXT in vocab:
        added[END_OF_TEXT] = (vocab.pop(END_OF_TEXT), True)
    files = TokenizerFiles(path, merges_path, vocab, merges, added)
    _check_ids(files)
    return files


def _pair(merge: str | list[str]) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2:
        raise TypeError("a merge that is not a pair")
    return parts[0], parts[1]


def _read_json(path: Path) -> Any:
    refuse_pointer(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise ValueError(f"{path} is not a Hugging Face tokenizer file ({short_reason(error)})") from None


def _read_merges(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: without merges, vocab.json determines no ids. Add the model's merges.txt")
    refuse_pointer(path)
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # a damaged line is no merge of the ids
    return [line for line in lines if line and not line.startswith("#version")]


def _read_more_added(folder: Path) -> dict[str, tuple[int, bool]]:
    """The added tokens in tokenizer_config.json and added_tokens.json. Raises ValueError for fields that change ids."""
    added: dict[str, tuple[int, bool]] = {}
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = _read_json(path)
        _check_fields(path, config, CONFIG_FIELDS)
        for i, token in config.get("added_tokens_decoder", {}).items():
            added[token["content"]] = (int(i) if i.isdigit() else -1, token["special"])
    if (folder / "added_tokens.json").is_file():
        for token, i in _read_json(folder / "added_tokens.json").items():
            added.setdefault(token, (i, False))
    return added


def _check_fields(path: Path, content: Any, fields: dict[tuple[str, ...], tuple[Any, ...]]) -> None:
    for keys, allowed in fields.items():
        value = content
        for key in keys:
            value = (value or {}).get(key)
        if value not in allowed:
            shown = value if isinstance(value, str | bool | int | float) else json.dumps(value)
            raise ValueError(
                f"{path}: {'.'.join(keys)} is {str(shown)[:60]}, but GPT-2's tokenizer has {allowed[0]}. "
                f"Its ids would differ: use a model with GPT-2's tokenizer rules"
            )


def _check_ids(files: TokenizerFiles) -> None:
    """Raise ValueError where ids are not distinct integers that fit, or there is no end-of-text token."""
    if END_OF_TEXT not in files.added:
        raise ValueError(f"{files.path} has no {END_OF_TEXT}, the token before each document. Add it")
    ids = [*files.vocab.values(), *(i for i, _ in files.added.values())]
    if not all(type(i) is int and i >= 0 for i in ids) or len(set(ids)) < len(ids):
        raise ValueError(f"{files.path} is damaged: its {len(ids)} ids must be integers from 0 on, each once")
    if files.n_vocab > MAX_VOCAB_SIZE:
        raise ValueError(
            f"{files.path} has {files.n_vocab:,} ids; uint16 shards allow at most {MAX_VOCAB_SIZE:,}. Use gpt2"
        )
    tokens = sorted(files.added)
    for shorter, longer in pairwise(tokens):
        if not shorter or longer.startswith(shorter):
            raise ValueError(
                f"{files.path}: added_tokens: {shorter[:40]!r} is the beginning of {longer[:40]!r}. Remove one of them"
            )


def compare(files: TokenizerFiles, encoding: "tiktoken.Encoding") -> None:
    """Raise ValueError where `encoding` and the `tokenizers` library give other ids for one of the odd texts."""
    reference = _reference(files)
    for token, (i, _) in files.added.items():
        if (found := reference.token_to_id(token)) != i:
            raise ValueError(
                f"{files.path}: added_tokens: {token[:40]!r} has id {i}, but the tokenizers library gives it {found}. "
                f"Add it to the vocabulary with its id"
            )
    within_text = [f"a {token} b{token}c\n{token}" for token in list(files.added)[:MAX_CHECKED]]
    for text in (*TEXTS, *within_text):
        found = encoding.encode(text, allowed_special="all")
        if found == reference.encode(text).ids:
            continue
        is_post = found == reference.encode(text, add_special_tokens=False).ids
        field = "post_processor" if is_post else "added_tokens" if text in within_text else "pre_tokenizer or model"
        raise ValueError(
            f"{files.path}: {field} gives other ids than GPT-2's tokenizer rules, as for {text[:40]!r}. "
            f"Use a model with these rules"
        )


def _reference(files: TokenizerFiles) -> Any:
    """The tokenizer of the `tokenizers` library for the same files."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    try:
        if files.path.name == "tokenizer.json":
            reference = Tokenizer.from_file(str(files.path))
        else:
            reference = Tokenizer(models.BPE(vocab=files.vocab, merges=files.merges))
            reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    except OSError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{files.path} is not a Hugging Face tokenizer file ({short_reason(error)})") from None
    reference.no_truncation()  # as `transformers` does by default
    reference.no_padding()
    known = {token.content for token in reference.get_added_tokens_decoder().values()}
    for token, (_, is_special) in sorted(files.added.items(), key=lambda item: item[1][0]):
        if token not in known:
            reference.add_tokens([AddedToken(token, special=is_special, normalized=False)])
    return reference
