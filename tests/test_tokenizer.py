"""The saved tokenizer files give the same ids in transformers and tokenizers as in tiktoken, and load again."""

import json
from itertools import product

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


def test_the_check_of_gpt2s_merges_is_needed_only_for_other_merges(tmp_path, monkeypatch):
    """The sha256 of known merges saves the computation, not the comparison of ids with merges."""
    try:
        tokenizer.save(tokenizer.load("gpt2"), tmp_path)
    except ValueError as error:
        pytest.skip(str(error))
    with monkeypatch.context() as patch:
        patch.delattr(tokenizer, "_merges")
        tokenizer.load(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["\u0120the"], vocab["\u0120a"] = vocab["\u0120a"], vocab["\u0120the"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="merges"):
        tokenizer.load(tmp_path)


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
        vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
        pairs = product([token for token in vocab if len(token) == 1], repeat=2)  # of bytes
        new = [pair for pair in pairs if "".join(pair) not in vocab]
        missing = 2**16 + more - len(vocab) - 1  # end-of-text is one of the added tokens
        first = len(vocab) + 1
        vocab |= {a + b: first + i for i, (a, b) in enumerate(new[:missing])}
        merges += [list(pair) for pair in new[:missing]]
        vocab["<|endoftext|>"] = spec["added_tokens"][0]["id"]

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


def add_token(content, i=None, in_vocabulary=False, **flags):
    """A change of tokenizer.json: another added token, with the next id unless `i` is given."""

    def change(spec):
        names = ("single_word", "lstrip", "rstrip", "normalized")
        token = {"id": i or 664, "content": content, "special": False} | dict.fromkeys(names, False) | flags
        spec["added_tokens"].append(token)
        if in_vocabulary:
            spec["model"]["vocab"] |= {t["content"]: t["id"] for t in spec["added_tokens"]}

    return change


def swap_merges(spec):
    merges = spec["model"]["merges"]
    merges[300], merges[301] = merges[301], merges[300]


def swap_merge_of_same_token(spec):
    merges = spec["model"]["merges"]
    a, b = merges[-1]
    merges[-1] = [a[0], a[1:] + b]


# What changes ids, and the field that the error names.
OTHER_RULES = {
    "a space before the text": (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space is True"),
    "no splitting of words": (lambda s: s["pre_tokenizer"].update(use_regex=False), "use_regex is False"),
    "a normalizer": (lambda s: s.update(normalizer={"type": "NFC"}), "normalizer is"),
    "lower case": (lambda s: s.update(normalizer={"type": "Lowercase"}), "normalizer is"),
    "random merges": (lambda s: s["model"].update(dropout=0.1), "model.dropout is 0.1"),
    "a suffix of words": (lambda s: s["model"].update(end_of_word_suffix="</w>"), "model.end_of_word_suffix is </w>"),
    "another model": (lambda s: s["model"].update(type="WordPiece"), "model.type is WordPiece"),
    "a token in front of the text": (
        lambda s: s.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [663], "tokens": ["<|endoftext|>"]}},
            }
        ),
        "post_processor gives other ids",
    ),
    "merges in another order": (swap_merges, "merges differ from the order of the ids, from merge 300 on"),
    "another merge of a token": (swap_merge_of_same_token, "merges differ from the order of the ids"),
    "a merge that is missing": (lambda s: s["model"]["merges"].pop(200), "merges differ .* from merge 200 on"),
    "a last merge that is missing": (lambda s: s["model"]["merges"].pop(), "merges differ .* from merge 406 on"),
    "a token without merges": (lambda s: s["model"]["vocab"].update(qxz=664), "merges: no merges produce token 664"),
    "an added token that removes spaces": (add_token("<x>", lstrip=True), "added_tokens gives other ids"),
    "an added token that is a whole word": (add_token("lamp", single_word=True), "added_tokens gives other ids"),
    "an id that tokenizers replaces": (add_token("<x>", 700), "added_tokens: '<x>' has id 700, .* gives it 664"),
    "an added token of the vocabulary": (
        lambda s: add_token("".join(s["model"]["merges"][-1]), 662)(s),
        "added_tokens: .* is also a token of the vocabulary",
    ),
    "added tokens that overlap": (
        lambda s: add_token("<x>")(s) or add_token("<x>2", 665)(s),
        "added_tokens: '<x>' is the beginning of '<x>2'",
    ),
}


@pytest.mark.parametrize("rule", OTHER_RULES)
def test_a_tokenizer_with_other_rules_is_refused_by_the_name_of_the_field(tmp_path, rule):
    change, message = OTHER_RULES[rule]
    write_tokenizer(tmp_path, change)
    with pytest.raises(ValueError, match=rf"{tmp_path}/tokenizer.json: .*{message}"):
        tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"add_prefix_space": True}, "add_prefix_space is True"),
        ({"add_bos_token": True}, "add_bos_token is True"),
        ({"tokenizer_class": "GPTNeoXTokenizerFast"}, "tokenizer_class is GPTNeoXTokenizerFast"),
        ({"added_tokens_decoder": {"700": {"content": "<|endoftext|>", "special": True}}}, "two ids"),
    ],
)
def test_a_tokenizer_config_with_other_rules_is_refused_by_the_name_of_the_field(tmp_path, config, message):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ValueError, match=rf"{tmp_path}/tokenizer.*json: .*{message}"):
        tokenizer.load(tmp_path)


ADDED = {
    "a space": (add_token("the lamp"), "the lamp", 664),
    "an emoji": (add_token("\U0001f642"), "\U0001f642", 664),
    "characters of GPT-2's vocabulary": (add_token("\u0120xq"), "\u0120xq", 664),
    "a gap of ids": (add_token("<far>", 900, in_vocabulary=True), "<far>", 900),
}


@pytest.mark.parametrize("kind", ADDED)
def test_added_tokens_split_ordinary_text_as_in_transformers(tmp_path, kind):
    from transformers import AutoTokenizer

    change, token, i = ADDED[kind]
    write_tokenizer(tmp_path, change)
    loaded = tokenizer.load(tmp_path)
    text = f"Ana took {token}, and{token} {token}"
    ids = loaded.encode_ordinary(text)
    assert ids.count(i) == 3
    assert ids == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert ids == list(loaded.encode_to_numpy(text, disallowed_special=()))
    assert loaded.decode(ids) == text
    assert tokenizer.token_bytes(tmp_path)[ids].sum() == len(text.encode())
    (tmp_path / "again").mkdir()
    tokenizer.save(loaded, tmp_path / "again")
    again = tokenizer.load(tmp_path / "again")
    assert again.encode_ordinary(text) == ids
    assert tokenizer.fingerprint(again) == tokenizer.fingerprint(loaded)


# Fields of tokenizer.json and tokenizer_config.json that don't change ids.
HARMLESS = {
    "merges as text": lambda s: s["model"].update(merges=[" ".join(pair) for pair in s["model"]["merges"]]),
    "whole words first": lambda s: s["model"].update(ignore_merges=True),
    "offsets": lambda s: s["pre_tokenizer"].update(trim_offsets=False),
    "no post-processor": lambda s: s.update(post_processor=None),
    "bytes as a fallback": lambda s: s["model"].update(byte_fallback=True),
    "truncation": lambda s: s.update(
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    ),
    "a token for unknown text": lambda s: s["model"].update(unk_token="<|endoftext|>"),
    "end-of-text within words": lambda s: s["added_tokens"][0].update(normalized=True),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_fields_that_do_not_change_ids_are_accepted(tmp_path, kind):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, HARMLESS[kind])
    loaded, reference = tokenizer.load(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference.no_truncation()
    as_transformers = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = loaded.encode(text, allowed_special="all")
        assert ids == reference.encode(text).ids == as_transformers(text, truncation=False)["input_ids"]


def test_special_tokens_in_ordinary_text_are_text(tmp_path):
    write_tokenizer(tmp_path, add_token("<pad>", special=True))
    loaded = tokenizer.load(tmp_path)
    assert 664 not in loaded.encode_ordinary("a <pad>")
    assert loaded.encode("a <pad>", allowed_special="all")[-1] == 664


def write_older_tokenizer(folder):
    """vocab.json and merges.txt, as in uploads before tokenizer.json."""
    write_tokenizer(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"] | {"<|endoftext|>": 663}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in spec["model"]["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer.json").unlink()
    return lines


def test_an_older_tokenizer_gives_the_ids_of_transformers(tmp_path):
    from transformers import AutoTokenizer

    write_older_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"the lamp": 664}')
    loaded, reference = tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "Ana took the lamp."):
        assert loaded.encode(text, allowed_special="all") == reference(text)["input_ids"]
    assert loaded.encode_ordinary("Ana took the lamp.")[-2] == 664


def test_an_older_tokenizer_without_its_merges_is_refused(tmp_path):
    lines = write_older_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("\n".join([*lines[:100], *reversed(lines[100:])]))
    with pytest.raises(ValueError, match=r"merges.txt: merges differ from the order of the ids, from merge 99 on"):
        tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"merges.txt is missing"):
        tokenizer.load(tmp_path)


def test_end_of_text_can_have_the_first_id_and_ids_can_have_gaps(tmp_path):
    """The first id is that of tokenizers that `tokenizers` trains with special tokens."""

    def shift(spec):
        vocab = spec["model"]["vocab"]
        vocab.update({token: 2 * i + 1 for token, i in vocab.items()})
        vocab["<|endoftext|>"] = spec["added_tokens"][0]["id"] = 0

    write_tokenizer(tmp_path, shift)
    loaded = tokenizer.load(tmp_path)
    assert tokenizer.end_of_text_id(loaded) == 0
    (tmp_path / "again").mkdir()
    tokenizer.save(loaded, tmp_path / "again")
    assert tokenizer.fingerprint(tokenizer.load(tmp_path / "again")) == tokenizer.fingerprint(loaded)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(
        ValueError, match=r"tokenizer\.json is a pointer of Git LFS, not the content\. Run git lfs pull"
    ):
        tokenizer.load(tmp_path)


def test_a_truncated_or_altered_tokenizer_is_refused_by_file_in_a_short_error(tmp_path):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    intact = path.read_bytes()
    wrong_byte = intact[:5000] + b"\xff" + intact[5001:]
    for content in (intact[:1000], b"", b"\xff\xfe\x00", b"[]", b"null", b"[" * 100_000, wrong_byte):
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
