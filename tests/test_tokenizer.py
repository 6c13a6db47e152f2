"""The saved tokenizer files give the same ids in transformers and tokenizers as in tiktoken, and load again."""

import json
from itertools import islice, product

import pytest
from conftest import refused, run

from core.data import tokenizer
from demo import stories

TEXTS = (
    "",
    "Once there was a kind nurse named Ana. Ana took the lamp.",
    "It's 1907, isn't it? They'll say we're WE'RE they've I'd I'm",
    "  two spaces,   three, \t tab\t\tand trailing  ",
    "lines\nand\r\nlines\n\n\n   indented\n",
    "na\u00efve caf\u00e9 \u0416\u0443\u043a \u65e5\u672c\u8a9e \u0627\u0644\u0639 e\u0301",
    "\U0001f642\U0001f468\u200d\U0001f469 \u00a0no-break\u3000wide \ufeff",
    "snake_case camelCase x1y2 3.14159 1,000,000 $5 50% a@b.c http://x.y/?q=1#z",
    "control \x00\x07\x1b \x7f and \u2028 \u0085 line ends",
    "zzzzzzzzzzzzzzzzzzzz " * 20,
    "<|endoftext|>",
    "one.<|endoftext|>Two <|endoftext|> three<|endoftext|><|endoftext|>",
    "<|endoftext <| endoftext|> |>",
    # Every byte that UTF-8 text can hold.
    "".join(map(chr, (*range(0x800), *range(0x800, 0xD800, 0x400), *range(0x10000, 0x110000, 0x8000)))),
)


@pytest.fixture(scope="module", params=["stories", "gpt2"])
def encoding(request):
    if request.param == "stories":
        return stories.encoding()
    try:
        return tokenizer.load("gpt2")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(encoding, tmp_path_factory):
    folder = tmp_path_factory.mktemp(encoding.name)
    tokenizer.save(encoding, folder)
    return folder


def test_transformers_gives_the_same_ids_and_text(encoding, folder):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = encoding.encode(text, allowed_special="all")
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == text
    end_of_text = tokenizer.end_of_text_id(encoding)
    assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (end_of_text, end_of_text, encoding.n_vocab)


def test_tokenizers_gives_the_same_ids_and_text(encoding, folder):
    from tokenizers import Tokenizer, pre_tokenizers

    loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        ids = encoding.encode(text, allowed_special="all")
        assert loaded.encode(text).ids == ids
        assert loaded.decode(ids, skip_special_tokens=False) == text
    assert {token for token in loaded.get_vocab() if len(token) == 1} == set(pre_tokenizers.ByteLevel.alphabet())


def test_a_saved_encoding_loads_again(encoding, folder, tmp_path):
    loaded = tokenizer.load(folder)
    assert loaded.n_vocab == encoding.n_vocab
    assert tokenizer.end_of_text_id(loaded) == tokenizer.end_of_text_id(encoding)
    for text in TEXTS:
        assert loaded.encode_ordinary(text) == encoding.encode_ordinary(text)
        assert loaded.decode(loaded.encode_ordinary(text)) == text
    tokenizer.save(loaded, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_token_bytes_sum_to_the_length_of_the_text_in_utf8(encoding, folder):
    sizes = tokenizer.token_bytes(folder)
    assert len(sizes) == encoding.n_vocab
    assert sizes[tokenizer.end_of_text_id(encoding)] == 0
    for text in TEXTS:
        assert sizes[encoding.encode_ordinary(text)].sum() == len(text.encode())


def write_tokenizer(folder, change=lambda spec: None):
    """Write the tokenizer.json of the stories with a change."""
    tokenizer.save(stories.encoding(), folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))


@pytest.mark.parametrize(("more", "fits"), [(0, True), (1, False)])
def test_an_encoding_can_have_as_many_ids_as_uint16_and_no_more(tmp_path, more, fits):
    def grow(spec):
        vocab = spec["model"]["vocab"]
        words = ("".join(letters) for letters in product("abcdefghijklmnop", repeat=5))
        new = (word for word in words if word not in vocab)
        missing = 2**16 + more - len(vocab) - 1  # end-of-text is one of the added tokens
        first = len(vocab) + 1
        vocab |= {word: first + i for i, word in enumerate(islice(new, missing))}

    write_tokenizer(tmp_path, grow)
    if fits:
        assert tokenizer.load(tmp_path).n_vocab == 2**16
    else:
        with pytest.raises(ValueError, match=r"65,537 ids.*at most 65,536. Use gpt2"):
            tokenizer.load(tmp_path)


def test_an_unknown_name_is_refused_with_the_known_names():
    for name in ("gpt5", "cl100k_base", "no/folder"):
        with pytest.raises(ValueError, match=f"{name}.*gpt2 or r50k_base, or a folder with a tokenizer.json"):
            tokenizer.load(name)


def test_a_folder_without_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer.json"):
        tokenizer.load(tmp_path)


DAMAGES = {
    "another way to split text": lambda spec: spec["pre_tokenizer"].update(type="Metaspace"),
    "no end-of-text": lambda spec: spec["added_tokens"].clear() or spec["model"]["vocab"].pop("<|endoftext|>", None),
    "a character that represents no byte": lambda spec: spec["model"]["vocab"].update({"\u65e5": 700}),
    "no vocabulary": lambda spec: spec["model"].pop("vocab"),
    "a vocabulary that is a list": lambda spec: spec["model"].update(vocab=["a", "b"]),
    "an id that is text": lambda spec: spec["model"]["vocab"].update(b="7"),
    "an id that is a list": lambda spec: spec["model"]["vocab"].update(b=[7]),
    "an id given twice": lambda spec: spec["model"]["vocab"].update(b=5),
    "no token for a byte": lambda spec: spec["model"]["vocab"].pop("b"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tokenizer_is_refused_by_file(tmp_path, damage):
    write_tokenizer(tmp_path, DAMAGES[damage])
    with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer.json"):
        tokenizer.load(tmp_path)


def test_a_truncated_or_altered_tokenizer_is_refused_by_file_in_a_short_error(tmp_path):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    intact = path.read_bytes()
    wrong_byte = intact[:5000] + b"\xff" + intact[5001:]
    for content in (intact[:1000], b"", b"\xff\xfe\x00", b"[]", b"null", wrong_byte):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} is not a Hugging Face tokenizer file") as error:
            tokenizer.load(tmp_path)
        assert len(str(error.value)) < 500


def test_without_a_network_the_error_names_the_cache(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    environment = {"https_proxy": "http://127.0.0.1:9", "no_proxy": "", "TIKTOKEN_CACHE_DIR": str(tmp_path / "empty")}
    result = run("fineweb.py", "--source", "a.txt", "--out", "out", cwd=tmp_path, check=False, **environment)
    message = refused(result)
    assert "encoding gpt2 could not be downloaded" in message
    assert "TIKTOKEN_CACHE_DIR" in message
