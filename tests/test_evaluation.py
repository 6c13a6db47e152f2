"""What the two evaluations share: files that are no questions, tables beside published figures, McNemar's test of two
models, and calls that can't be meant."""

import contextlib
import json
import math
import re
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ENCODING, refused, run, save_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

import eval_cbt
import eval_hellaswag
import eval_lambada
from core import cli
from core.distributed import Ranks
from core.eval import cbt, evaluate, lambada, results
from core.eval.results import Result
from core.eval.task import LONGEST_LINE, QuestionSet, UnscorableError, Verdict
from model import GPT, PRESETS

TEN = "bell|boat|book|drum|flute|kite|lamp|ring|rope|sack"
CLOZE = "".join(f"{i} `` Ana 's caf\u00e9 , '' said Ben .\n" for i in range(1, 21)) + f"21 A XXXXX !\tlamp\t\t{TEN}\n"
PASSAGES = ["So the lamp\u2019s light went home with Ana", "`` No , '' said caf\u00e9 owners"]
FORMATS = {  # by file name: the task, its reader, and a file that holds questions
    "a.txt": (lambada.TASK, lambada.read, "\n".join(PASSAGES) + "\n"),
    "a.jsonl": (
        lambada.TASK,
        lambada.read,
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in PASSAGES),
    ),
    "cloze.txt": (cbt.TASK, cbt.read, f"{CLOZE}\n{CLOZE}"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drawn")


def reads_or_is_refused(folder, name, content):
    """Whatever the bytes: questions that can be asked, or a ValueError that names the file."""
    task, read, _ = FORMATS[name]
    (folder / name).write_bytes(content)
    try:
        questions = read(folder / name)
    except ValueError as error:
        assert str(folder / name) in str(error)
        return
    assert questions
    for question in questions:
        assert task.text(question).encode()
        for protocol in task.protocols:
            try:
                requests = task.requests(protocol, question, ENCODING.encode_ordinary)
            except UnscorableError:
                continue
            assert all(request.context and request.continuation for request in requests)


@pytest.mark.parametrize("name", FORMATS)
def test_the_files_here_are_read_whole(folder, name):
    _, read, content = FORMATS[name]
    (folder / name).write_text(content, encoding="utf-8")
    assert len(read(folder / name)) == 2


@pytest.mark.parametrize("name", FORMATS)
@settings(derandomize=True, deadline=None, max_examples=150)
@given(content=st.one_of(st.binary(), st.text().map(str.encode), st.text('{}[]"text: \\u9e1 \n\t|').map(str.encode)))
@example(content=b"[" * 100_000)
@example(content=b"9" * 100_000)
@example(content=b"\xef\xbb\xbf")
@example(content=b"1 \n" * 50)
def test_any_bytes_are_questions_or_refused_by_name(folder, name, content):
    reads_or_is_refused(folder, name, content)


@pytest.mark.parametrize("name", FORMATS)
@settings(derandomize=True, deadline=None, max_examples=150)
@given(place=st.floats(0, 0.999), change=st.sampled_from(["cut", "flip", "drop", "insert"]), byte=st.integers(1, 255))
def test_a_damaged_file_is_questions_or_refused_by_name(folder, name, place, change, byte):
    content = FORMATS[name][2].encode()
    i = int(place * len(content))
    damaged = {
        "cut": content[:i],
        "flip": content[:i] + bytes([content[i] ^ byte]) + content[i + 1 :],
        "drop": content[:i] + content[i + byte :],
        "insert": content[:i] + bytes([byte, 255 - byte]) + content[i:],
    }
    reads_or_is_refused(folder, name, damaged[change])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.encode().replace("\u00e9".encode(), b"\0"), "holds a zero byte: this is no text file"),
        (lambda text: text.replace("\u2019", "'").encode("latin-1"), "is not UTF-8 text"),
        (lambda text: text.encode("utf-16"), "is not UTF-8 text"),
        (lambda text: text.replace("\u2019", "'").encode("utf-16-le"), "(holds a zero byte|is not UTF-8 text)"),
        (lambda text: text.encode() + b"x" * (LONGEST_LINE + 1), "more than 1,048,576 bytes: this is no question file"),
    ],
)
def test_what_is_no_text_is_refused_by_file_and_line(tmp_path, name, damage, message):
    _, read, content = FORMATS[name]
    damaged = damage(content)
    (tmp_path / name).write_bytes(damaged)
    bad = next(i for i, line in enumerate(damaged.split(b"\n"), 1) if is_bad(line))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))}, line {bad}:? {message}"):
        read(tmp_path / name)


def is_bad(line):
    try:
        return "\0" in line.decode() or len(line) > LONGEST_LINE
    except UnicodeDecodeError:
        return True


@pytest.mark.parametrize("name", FORMATS)
def test_a_line_without_end_is_not_read_into_memory(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 30)  # takes no space on the disk
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{tmp_path / name}, line 1: more than 1,048,576 bytes"):
            FORMATS[name][1](tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_is_no_file_of_questions(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=f"'{tmp_path / name}'"):
        FORMATS[name][1](tmp_path / name)


def make_result(**changes):
    """OpenAI's smallest on the hub's LAMBADA."""
    facts = {"task": "lambada", "protocol": "openai", "model": "gpt2", "size": "gpt2", "dtype": "float32"}
    facts |= {"data": "EleutherAI/lambada_openai", "sha256": None, "subset": "", "correct": 1690, "total": 5153}
    facts |= {"unscored": {}, "remarks": {}, "perplexity": 40.0, "seconds": 1.0, "has_published": True, "near_ties": 0}
    return Result(**facts | changes)


def test_what_an_accuracy_does_not_say_stands_below_the_table():
    assert results.footnotes([make_result()]) == ""
    said = results.footnotes(
        [make_result(near_ties=2), make_result(near_ties=1, unscored={"no context": 4}, remarks={"cut": 5})]
    )
    assert "4 not scored, counted as wrong: no context" in said
    assert "5 scored all the same: cut" in said
    assert said.endswith("near ties, whose answer another batch size or device may turn: 3")


def tables(text):
    """The Markdown tables in a text, each a list of rows by column."""
    found = []
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def is_openais(figure):
    return "model" not in figure


def subset_of(figure):
    return f"{figure['type']} {figure['split']}" if "type" in figure else ""


@pytest.mark.parametrize("task", ["lambada", "cbt", "hellaswag"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_figure_belongs_to_its_protocol_and_questions_and_size_and_to_openais_weights(monkeypatch, task, reverse):
    figures = results.published(task)
    monkeypatch.setattr(results, "published", lambda name: figures[::-1] if reverse else figures)
    for figure in filter(is_openais, figures):
        for size in results.SIZES:
            result = make_result(task=task, protocol=figure["protocol"], subset=subset_of(figure), size=size)
            assert results.published_figure(result) == figure.get(size)
            assert results.published_figure(replace(result, has_published=False)) is None
            assert results.published_figure(replace(result, size=None)) is None
            assert results.published_figure(replace(result, protocol="another")) is None
            assert results.published_figure(replace(result, subset="V test")) is None


def test_others_weights_are_never_the_measure():
    others = [figure for figure in results.published("cbt") if not is_openais(figure)]
    assert {subset_of(figure) for figure in others} >= {"CN test"}
    assert results.published_figure(make_result(task="cbt", protocol="sentence", subset="CN test")) is None


def test_each_protocol_stands_in_a_row_of_its_own_beside_its_own_figure():
    rows = [make_result(protocol=protocol) for protocol in lambada.PROTOCOLS]
    (table,) = tables(results.results_table(rows))
    assert [row["protocol"] for row in table] == list(lambada.PROTOCOLS)
    published = [row["published, same size"] for row in table]
    assert published == ["32.56 (40.06)", "26.06", "46.67", "47.66", "45.99 (35.13)"]
    percent = 100 * 1690 / 5153
    differences = [f"{percent - value:+.2f}" for value in (32.56, 26.06, 46.67, 47.66, 45.99)]
    assert [row["difference"] for row in table] == differences


def test_what_nobody_published_has_no_difference():
    same = make_result()
    others = [make_result(size=None, model="tiny"), make_result(has_published=False), make_result(subset="V test")]
    (table,) = tables(results.results_table([others[0], same, *others[1:]]))
    assert [row["difference"] for row in table] == ["", "+0.24", "", ""]
    assert [row["published, same size"] for row in table] == ["", "32.56 (40.06)", "", ""]
    for other in others:
        (table,) = tables(results.results_table([other]))
        assert not {"published, same size", "difference"} & table[0].keys()
    (table,) = tables(results.results_table(others))
    assert "difference" not in table[0]


@pytest.mark.parametrize("task", ["lambada", "cbt", "hellaswag"])
def test_the_published_table_has_a_row_a_figure_and_no_row_of_two(task):
    figures = results.published(task)
    for protocol in {figure["protocol"] for figure in figures}:
        (table,) = tables(results.published_table(task, [protocol]))
        chosen = [figure for figure in figures if figure["protocol"] == protocol]
        assert len(table) == len(chosen)
        for row, figure in zip(table, chosen, strict=True):
            name, *cells, source = row.values()
            assert name == f"{subset_of(figure)} `{protocol}`".strip()
            assert source == figure["source"]
            assert [cell.split(" ")[0] for cell in cells] == [
                f"{figure[size][0]:.2f}" if size in figure else "" for size in results.SIZES
            ]
    assert all(figure["source"] for figure in figures)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_size_is_known_by_its_shape(preset):
    model = SimpleNamespace(config=replace(PRESETS[preset], vocab_size=50304))
    questions = QuestionSet(["so it is"], ["openai"], "a.txt", None)
    result = evaluate.summarize(
        lambada.TASK, model, "logs/mine", "openai", questions, [Verdict(True, logprob=-1.0)], "float32", 1.0
    )
    assert result.size == (preset if preset in results.SIZES else None)
    assert result.model == "logs/mine"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("logs/demo/checkpoints/step_001000", "demo/step_001000"),
        ("/far/logs/demo/checkpoints/step_001000/", "demo/step_001000"),
        ("gpt2-xl", "gpt2-xl"),
        ("models/a/", "models/a"),
    ],
)
def test_a_checkpoint_is_called_by_its_run_and_step(source, name):
    assert results.short_names([source]) == [name]


def test_results_that_were_saved_are_loaded_as_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [
        make_result(),
        make_result(dtype="bfloat16"),
        make_result(task="cbt", protocol="sentence", model="demo/step_001000", unscored={"why": 2}, remarks={"so": 1}),
    ]
    assert results.save(found, None) == results.RESULTS
    assert len(list(results.RESULTS.iterdir())) == 3
    assert sorted(results.load_all(), key=repr) == sorted(found, key=repr)
    (path,) = results.RESULTS.glob("lambada-openai-gpt2-EleutherAI-lambada_openai-*.json")
    (row,) = json.loads(path.read_text())
    assert row["accuracy"] == found[0].accuracy
    assert row["interval"][0] < row["accuracy"] < row["interval"][1]


OUTCOMES = ("1111110000", "1100011111")
ONLY_A, ONLY_B = 3, 4


def write_items(path, model, outcome, questions=None, **changes):
    facts = {"task": "lambada", "protocol": "openai", "model": model, "subset": ""} | changes
    questions = questions or [f"{i:016x}" for i in range(len(outcome))]
    items = [
        facts | {"index": i, "question": question, "correct": right == "1"}
        for i, (question, right) in enumerate(zip(questions, outcome, strict=True))
    ]
    with open(path, "a") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)


def compared(capsys, script=eval_lambada):
    script.main(script.Config(compare=("a.jsonl", "b.jsonl")))
    (table,) = tables(capsys.readouterr().out)
    return table


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("script", [eval_lambada, eval_cbt, eval_hellaswag])
@pytest.mark.parametrize(
    ("a", "b", "only_a", "only_b", "p"),
    [
        (*OUTCOMES, ONLY_A, ONLY_B, "1.0000"),  # 2 * (1 + 7 + 21 + 35) / 128
        ("1111000000", "1111000000", 0, 0, "1.0000"),
        ("1000000000", "0011111000", 1, 5, "0.2188"),  # 2 * (1 + 6) / 64
        ("1111111111", "0000000000", 10, 0, "0.0020"),  # 2 / 1024
        ("1" * 20, "0" * 20, 20, 0, "1.9e-06"),  # 2 / 2 ** 20
    ],
)
def test_two_files_of_items_are_compared_by_mcnemars_test(here, capsys, script, a, b, only_a, only_b, p):
    write_items("a.jsonl", "first", a)
    write_items("b.jsonl", "second", b)
    (row,) = compared(capsys, script)
    assert row == {
        **{"task": "lambada", "protocol": "openai", "questions": "", "A": "first", "B": "second"},
        **{"A %": f"{100 * a.count('1') / len(a):.2f}", "B %": f"{100 * b.count('1') / len(b):.2f}"},
        **{"only A right": str(only_a), "only B right": str(only_b), "p (McNemar)": p},
    }


def test_lines_may_stand_in_any_order(here, capsys):
    write_items("a.jsonl", "first", OUTCOMES[0])
    write_items("b.jsonl", "second", OUTCOMES[1])
    lines = (here / "b.jsonl").read_text().splitlines()
    (here / "b.jsonl").write_text("\n".join(lines[::-1]))
    (row,) = compared(capsys)
    assert (row["only A right"], row["only B right"]) == (str(ONLY_A), str(ONLY_B))


def test_each_protocol_and_set_is_compared_with_its_like_alone(here, capsys):
    kinds = [("paper", "NE test"), ("paper", "CN test"), ("sentence", "NE test")]
    for protocol, subset in kinds:
        write_items("a.jsonl", "first", "1100", task="cbt", protocol=protocol, subset=subset)
    for protocol, subset in [*kinds[:0:-1], ("sentence", "V test")]:
        write_items("b.jsonl", "second", "0110", task="cbt", protocol=protocol, subset=subset)
    table = compared(capsys)
    assert [(row["protocol"], row["questions"]) for row in table] == kinds[1:]
    assert all((row["only A right"], row["only B right"]) == ("1", "1") for row in table)


@pytest.mark.parametrize(
    ("outcome", "questions", "message"),
    [
        ("111", None, "lambada openai .*first answered 4 questions, second 3, 3 of them the same"),
        ("1111", ["0", "1", "2", "3"], "first answered 4 questions, second 4, 0 of them the same"),
        ("1111", [f"{i:016x}" for i in (0, 1, 3, 2)], "first answered 4 questions, second 4, 2 of them the same"),
    ],
)
def test_answers_to_other_questions_are_not_compared(here, outcome, questions, message):
    write_items("a.jsonl", "first", "1100")
    write_items("b.jsonl", "second", outcome, questions)
    with pytest.raises(ValueError, match=message):
        eval_lambada.main(eval_lambada.Config(compare=("a.jsonl", "b.jsonl")))


def test_what_has_no_protocol_in_common_is_not_compared(here):
    write_items("a.jsonl", "first", "1100")
    write_items("b.jsonl", "second", "1100", protocol="last-token")
    with pytest.raises(ValueError, match=r"a\.jsonl and b\.jsonl have no protocol in common"):
        eval_lambada.main(eval_lambada.Config(compare=("a.jsonl", "b.jsonl")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "b.jsonl is empty: write it with --items b.jsonl"),
        (b"{", "b.jsonl, line 1 is not what --items writes"),
        (b"[]\n", "b.jsonl, line 1 is not what --items writes"),
        (b'"task"\n', "b.jsonl, line 1 is not what --items writes"),
        (b'{"task": "lambada"}\n', "b.jsonl, line 1 is not what --items writes"),
        (b"[" * 100_000, "b.jsonl, line 1 is not what --items writes"),
        (b"\n\n", "b.jsonl, line 1 is not what --items writes"),
        (b"\xff\n", "b.jsonl, line 1 is not UTF-8 text"),
        (b"x" * (LONGEST_LINE + 1), "b.jsonl, line 1: more than 1,048,576 bytes"),
    ],
)
@pytest.mark.parametrize("lines_before", [0, 3])
def test_items_that_cannot_be_read_are_named_by_file_and_line(here, content, message, lines_before):
    write_items("a.jsonl", "first", "1100")
    write_items("b.jsonl", "second", "1" * lines_before)
    if lines_before and not content:
        return
    (here / "b.jsonl").write_bytes((here / "b.jsonl").read_bytes() + content)
    with pytest.raises(ValueError, match=message.replace("line 1", f"line {lines_before + 1}")):
        eval_lambada.main(eval_lambada.Config(compare=("a.jsonl", "b.jsonl")))


@pytest.mark.parametrize(
    ("key", "value"),
    [("index", [1]), ("task", {}), ("model", 3), ("question", []), ("correct", None), ("correct", "no")],
)
def test_items_of_other_types_are_named_by_file_and_line(here, key, value):
    write_items("a.jsonl", "first", "1")
    item = json.loads((here / "a.jsonl").read_text())
    (here / "b.jsonl").write_text(json.dumps(item | {key: value}))
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1"):
        eval_lambada.main(eval_lambada.Config(compare=("b.jsonl", "a.jsonl")))


SETS = {
    "eval_lambada.py": (eval_lambada, ("--data", "data/stories/lambada.txt", "--text", "other")),
    "eval_cbt.py": (eval_cbt, ("--data", "data/stories/stories_NE_valid.txt", "data/stories/stories_CN_valid.txt")),
}


@pytest.fixture(scope="module")
def models(world):
    for name, seed in (("one", 1), ("two", 2), ("three", 3)):
        save_model(world / "models" / name, seed)
    return ["models/one", "models/two", "models/three"]


@pytest.fixture
def call(world, models, monkeypatch, capsys):
    """Runs a script's command line within this process in the world: what it printed, and its exit status."""
    monkeypatch.chdir(world)

    def execute(name, *arguments):
        script = SETS[name][0]
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        status = 0
        try:
            cli.run(script.main, script.Config, script.__doc__)
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr()
        return said.out, said.err, status

    return execute


@pytest.mark.parametrize("name", SETS)
def test_several_models_give_one_table_and_a_test_of_each_pair(call, world, models, name):
    _, data = SETS[name]
    places = ("--out", "several.json", "--items", "several.jsonl")
    printed, _, status = call(name, "--ckpt", *models, models[0], *data, *places)
    assert status == 0
    accuracies, pairs, *published = tables(printed)
    assert not published  # these questions are nobody's else
    subsets = [""] if name == "eval_lambada.py" else ["stories_NE_valid", "stories_CN_valid"]
    assert [row["model"] for row in accuracies] == [model for model in models for _ in subsets]
    expected = {(a, b, subset) for a, b in (("one", "two"), ("one", "three"), ("two", "three")) for subset in subsets}
    names = [(row["A"].removeprefix("models/"), row["B"].removeprefix("models/"), row["questions"]) for row in pairs]
    assert len(pairs) == len(expected)
    assert set(names) == expected
    items = [json.loads(line) for line in (world / "several.jsonl").read_text().splitlines()]
    rows = json.loads((world / "several.json").read_text())
    assert len(items) == sum(row["total"] for row in rows)
    for row in pairs:
        a, b = ([item["correct"] for item in items if is_of(item, row, side)] for side in "AB")
        only_a = sum(x and not y for x, y in zip(a, b, strict=True))
        only_b = sum(y and not x for x, y in zip(a, b, strict=True))
        assert (row["only A right"], row["only B right"]) == (str(only_a), str(only_b))
        assert row["A %"] == f"{100 * sum(a) / len(a):.2f}"
        total = only_a + only_b
        tail = sum(math.comb(total, k) for k in range(min(only_a, only_b) + 1)) / 2**total
        assert float(row["p (McNemar)"]) == pytest.approx(min(1, 2 * tail), abs=5e-5)


def is_of(item, row, side):
    return (item["model"], item["subset"]) == (row[side], row["questions"])


@pytest.mark.parametrize("name", SETS)
def test_models_scored_apart_compare_as_those_scored_together(call, models, name):
    _, data = SETS[name]
    together, _, _ = call(name, "--ckpt", *models[:2], *data, "--out", "x.json")
    for i in (0, 1):
        alone, _, _ = call(name, "--ckpt", models[i], *data, "--out", "x.json", "--items", f"{i}.jsonl")
        assert len(tables(alone)) == 1  # one model has no pair
    printed, _, status = call(name, "--compare", "0.jsonl", "1.jsonl")
    assert status == 0
    assert tables(printed) == [tables(together)[1]]
    _, error, status = call(name, "--compare", "0.jsonl", "none.jsonl")
    assert (status, error.count("\n")) == (2, 1)
    assert "none.jsonl" in error


@pytest.mark.parametrize(
    ("name", "protocols"), [("eval_lambada.py", lambada.allowed("openai")), ("eval_cbt.py", list(cbt.PROTOCOLS))]
)
def test_a_protocol_is_named_in_its_row_and_scored_once(call, models, monkeypatch, name, protocols):
    _, data = SETS[name]
    data = data[:2] + ("--text", "openai") * (name == "eval_lambada.py")
    common = (name, "--ckpt", models[0], *data, "--out", "x.json", "--protocol")
    accuracies, *_ = tables(call(*common, "all")[0])
    assert [row["protocol"] for row in accuracies] == protocols
    asked = []
    monkeypatch.setattr(evaluate, "run", lambda task, options, sources, sets, reference: asked.extend(sets))
    call(*common, protocols[1], protocols[0], protocols[1])
    assert [questions.protocols for questions in asked] == [protocols[1::-1]]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("--ckpt names no model",)),
        (("--ckpt",), ("--ckpt names no model",)),
        (("--ckpt", "logs/none"), ("--ckpt logs/none is no folder",)),
        (("--ckpt", "models/one", "data/stories"), ("--ckpt data/stories holds neither checkpoints nor",)),
        (("--ckpt", "models/one", "--batch-tokens", "0"), ("--batch-tokens 0 must be above 0",)),
        (("--ckpt", "models/one", "--batch-tokens", "-1"), ("--batch-tokens -1 must be above 0",)),
        (("--ckpt", "models/one", "--device", "abacus"), ("--device abacus is no device",)),
        (("--compare", "a.jsonl", "b.jsonl", "--ckpt", "models/one"), ("--compare", "leave --ckpt out")),
        (("--compare", "a.jsonl", "b.jsonl", "--out", "x", "--items", "y"), ("leave --out and --items out",)),
        (("--compare", "nowhere.jsonl", "b.jsonl"), ("nowhere.jsonl",)),
    ],
)
def test_what_cannot_be_meant_ends_in_one_sentence(call, world, name, arguments, parts):
    scored = (*SETS[name][1], "--out", "none.json", "--items", "none.jsonl") if "--compare" not in arguments else ()
    printed, error, status = call(name, *arguments, *scored)
    assert (status, error.count("\n"), printed) == (2, 1, "")
    assert error.startswith("error: ")
    assert all(part in error for part in parts)
    assert not (world / "none.json").exists()
    assert not (world / "none.jsonl").exists()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--dtype", "float64"), "--dtype"),
        (("--batch-tokens", "many"), "--batch-tokens"),
        (("--batch-size", "8"), "--batch-size"),
        (("--protocol", "harness"), "--protocol"),
        (("--compare", "a.jsonl"), "--compare"),
    ],
)
def test_what_the_command_line_does_not_know_is_refused_by_option(call, models, name, arguments, option):
    printed, error, status = call(name, "--ckpt", models[0], *SETS[name][1], *arguments)
    assert status == 2
    assert option in printed + error


def test_a_wrong_call_leaves_exit_status_2(world, models):
    message = refused(
        run("eval_cbt.py", "--compare", "a.jsonl", "b.jsonl", "--ckpt", models[0], cwd=world, check=False)
    )
    assert message.startswith("--compare reads what --items wrote")


@pytest.mark.parametrize("name", SETS)
def test_a_damaged_file_ends_in_one_sentence_before_anything_is_scored(call, world, models, name):
    (world / "damaged.txt").write_bytes(b"two words\n\xff\xfe\n")
    data = ("--data", "damaged.txt", *SETS[name][1][2:] * (name == "eval_lambada.py"))
    printed, error, status = call(name, "--ckpt", models[0], *data)
    assert (status, error.count("\n"), printed) == (2, 1, "")
    assert error.startswith("error: damaged.txt, line 2 is not UTF-8 text")


def test_results_of_like_names_are_all_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    models = [f"{i}/logs/mine/checkpoints/step_000001" for i in (1, 2)]
    for seed, model in enumerate(models):
        save_model(tmp_path / model, seed=seed)
    (tmp_path / "a.txt").write_text(CLOZE)
    eval_cbt.main(eval_cbt.Config(ckpt=tuple(models), data=("a.txt",)))
    assert [result.model for result in results.load_all()] == models
    assert "p (McNemar)" in capsys.readouterr().out


def test_results_whose_names_differ_in_a_sign_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/a", "models-a", "x", "y"):
        save_model(tmp_path / folder, seed=len(folder))
    for folder, copies in (("x", 1), ("y", 2)):
        (tmp_path / folder / "a.txt").write_text(f"{CLOZE}\n" * copies)
        eval_cbt.main(eval_cbt.Config(ckpt=("models/a", "models-a"), data=(f"{folder}/a.txt",)))
    kept = {(result.model, result.total) for result in results.load_all()}
    assert kept == {("models/a", 1), ("models-a", 1), ("models/a", 2), ("models-a", 2)}


@pytest.mark.parametrize("name", SETS)
def test_no_file_is_overwritten_by_another(call, world, models, name):
    data = SETS[name][1]
    whole = (world / data[1]).read_bytes()
    for wrong in (("--out", "same", "--items", "same"), ("--out", data[1]), ("--items", f"logs/../{data[1]}")):
        printed, error, status = call(name, "--ckpt", models[0], *data, *wrong)
        assert (status, printed) == (2, "")
        assert "would overwrite" in error
    assert (world / data[1]).read_bytes() == whole
    assert not (world / "same").exists()


@pytest.mark.parametrize("name", SETS)
def test_a_place_that_cannot_be_is_refused_before_the_scoring(call, world, models, monkeypatch, name):
    monkeypatch.setattr(evaluate, "run", lambda *_: pytest.fail("it was scored"))
    printed, error, status = call(name, "--ckpt", models[0], *SETS[name][1], "--items", "data/stories/lambada.txt/x")
    assert (status, error.count("\n"), printed) == (2, 1, "")


def test_results_are_saved_before_anybody_reads_of_them(world, models, monkeypatch):
    monkeypatch.chdir(world)

    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    config = eval_cbt.Config(
        ckpt=(models[0],), data=SETS["eval_cbt.py"][1][1:], out="unread.json", items="unread.jsonl"
    )
    with pytest.raises(BrokenPipeError):
        eval_cbt.main(config)
    assert len(json.loads((world / "unread.json").read_text())) == 2
    assert len((world / "unread.jsonl").read_text().splitlines()) == 80


def test_all_ranks_score_the_checkpoint_that_rank_0_found(world, models, monkeypatch):
    """A run that goes on may show the next rank a newer one."""

    class Second(Ranks):
        def from_main(self, value):
            return ["models/two"] if value == ["models/one"] else value

    monkeypatch.chdir(world)
    ranks = contextlib.nullcontext(Second(0, 1, torch.device("cpu")))
    monkeypatch.setattr(evaluate, "process_group", lambda device: ranks)
    eval_cbt.main(eval_cbt.Config(ckpt=("models/one",), data=SETS["eval_cbt.py"][1][1:2], out="found.json"))
    assert [row["model"] for row in json.loads((world / "found.json").read_text())] == ["models/two"]


def test_a_model_that_does_not_fit_on_the_gpu_ends_in_a_sentence(call, models, monkeypatch):
    def full(self, device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(GPT, "to", full)
    _, error, status = call("eval_cbt.py", "--ckpt", models[0], *SETS["eval_cbt.py"][1])
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("error: models/one doesn't fit on the GPU")


def test_the_least_p_is_not_0():
    assert [results.format_p(p) for p in (0.25, 1e-4, 3e-9, 0.0)] == ["0.2500", "0.0001", "3.0e-09", "< 1e-300"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("lambada_test.jsonl", "standard"), ("lambada_development_plain_text.txt", "openai")],
)
def test_a_text_other_than_the_files_name_says_is_refused(call, world, models, name, text):
    (world / name).write_text("any words\n")
    _, error, status = call("eval_lambada.py", "--ckpt", models[0], "--data", name, "--text", text)
    assert status == 2
    assert f"--text {text}, but {name} is " in error


def test_two_files_of_one_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in (1, 2):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}/a.txt").write_text(f"{CLOZE}\n" * i)
    with pytest.raises(ValueError, match=r"--data 1/a\.txt 2/a\.txt: two files of one name"):
        eval_cbt.main(eval_cbt.Config(ckpt=("any",), data=("1/a.txt", "2/a.txt")))


def test_two_files_whose_sets_have_one_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("set.old", "set.new"):
        (tmp_path / name).write_text(CLOZE)
    with pytest.raises(ValueError, match="two files of one name"):
        eval_cbt.main(eval_cbt.Config(ckpt=("any",), data=("set.old", "set.new")))


@pytest.fixture
def diverged(world):
    """A model whose weights are no numbers."""
    model = save_model(world / "models/diverged", seed=1)
    with torch.no_grad():
        model.transformer.wte.weight.fill_(math.nan)
    model.save_pretrained(world / "models/diverged", ENCODING.eot_token)
    return "models/diverged"


def test_a_diverged_model_knows_nothing(world, diverged, call):
    (world / "first.txt").write_text(CLOZE.replace("\tlamp\t", "\tbell\t"), encoding="utf-8")
    call("eval_cbt.py", "--ckpt", diverged, "--data", "first.txt", "--protocol", "all", "--out", "x.json")
    assert [row["correct"] for row in json.loads((world / "x.json").read_text())] == [0, 0]


def test_files_of_a_diverged_model_are_json(world, diverged, call):
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    places = ("--out", "x.json", "--items", "x.jsonl")
    _, _, status = call("eval_lambada.py", "--ckpt", diverged, *SETS["eval_lambada.py"][1], *places)
    assert status == 0
    json.loads((world / "x.json").read_text(), parse_constant=refuse)
    for line in (world / "x.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_question_is_told_from_another_by_its_whole_text(world, models):
    sets = [
        (lambada.TASK, ["so it is", "so it was"]),
        (
            cbt.TASK,
            [
                cbt.Cloze(["Ana ."], "He met XXXXX .", "Ana", ["Ana", "Ben"]),
                cbt.Cloze(["Ben ."], "He met XXXXX .", "Ana", ["Ana", "Ben"]),
                cbt.Cloze(["Ana ."], "I met XXXXX .", "Ana", ["Ana", "Ben"]),
                cbt.Cloze(["Ana ."], "He met XXXXX .", "Ben", ["Ana", "Ben"]),
                cbt.Cloze(["Ana ."], "He met XXXXX .", "Ana", ["Ana", "Bo"]),
            ],
        ),
    ]
    for task, questions in sets:
        result = make_result(task=task.name)
        verdicts = [Verdict(True)] * len(questions)
        items = evaluate.itemize(task, result, QuestionSet(questions, ["openai"], "a", None), verdicts)
        assert len({item["question"] for item in items}) == len(questions)
        again = evaluate.itemize(task, result, QuestionSet(questions, ["openai"], "b", None), verdicts)
        assert again == items
