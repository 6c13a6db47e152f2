"""Parts that all evaluations share: damaged files, tables with published figures, McNemar's test, and wrong options."""

import contextlib
import errno
import json
import math
import re
import sys
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
from core.eval import cbt, evaluate, lambada, results, task
from core.eval.cbt import CBTConfig
from core.eval.evaluate import ScoringConfig
from core.eval.results import Result
from core.eval.task import LONGEST_LINE, QuestionSet, UnscorableError, Verdict
from model import GPT, PRESETS

TEN = "bell|boat|book|drum|flute|kite|lamp|ring|rope|sack"
CLOZE = "".join(f"{i} `` Ana 's caf\u00e9 , '' said Ben .\n" for i in range(1, 21)) + f"21 A XXXXX !\tlamp\t\t{TEN}\n"
PASSAGES = ["So the lamp\u2019s light went home with Ana", "`` No , '' said caf\u00e9 owners"]
FORMATS = {  # by file name: the task, its reader, and a file with questions
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


def read_or_refused(folder, name, content):
    """For any bytes: questions with valid requests, or a ValueError that names the file."""
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
def test_the_example_files_are_read(folder, name):
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
    read_or_refused(folder, name, content)


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
    read_or_refused(folder, name, damaged[change])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.encode().replace("\u00e9".encode(), b"\0"), "contains a zero byte: this is not a text file"),
        (lambda text: text.replace("\u2019", "'").encode("latin-1"), "is not UTF-8 text"),
        (lambda text: text.encode("utf-16"), "is not UTF-8 text"),
        (lambda text: text.replace("\u2019", "'").encode("utf-16-le"), "(contains a zero byte|is not UTF-8 text)"),
        (
            lambda text: text.encode() + b"x" * (LONGEST_LINE + 1),
            "has more than 1,048,576 bytes: this is not a question file",
        ),
    ],
)
def test_a_line_that_is_not_text_is_refused_by_file_and_line(tmp_path, name, damage, message):
    _, read, content = FORMATS[name]
    damaged = damage(content)
    (tmp_path / name).write_bytes(damaged)
    bad = next(i for i, line in enumerate(damaged.split(b"\n"), 1) if is_bad(line))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))}, line {bad} {message}"):
        read(tmp_path / name)


def is_bad(line):
    try:
        return "\0" in line.decode() or len(line) > LONGEST_LINE
    except UnicodeDecodeError:
        return True


@pytest.mark.parametrize("name", FORMATS)
def test_an_endless_line_is_not_read_into_memory(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 30)  # takes no space on the disk
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{tmp_path / name}, line 1 has more than 1,048,576 bytes"):
            FORMATS[name][1](tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_is_not_a_question_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=f"'{tmp_path / name}'"):
        FORMATS[name][1](tmp_path / name)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            ConnectionError("no route\nto the hub"),
            ValueError,
            r"owner/name can't be loaded .*no route\). Check the network",
        ),
        (RuntimeError("x" * 1000), ValueError, "x{200}\\)"),
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "No space left on device"),
    ],
)
def test_an_unreachable_hub_is_a_user_error_and_a_full_disk_is_not(monkeypatch, capsys, error, kind, message):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(kind, match=message):
        task.hub_rows("owner/name", "default", "test")
    assert capsys.readouterr().out == "note: loading owner/name from the Hugging Face hub\n"


def make_result(**changes):
    """The result of OpenAI's smallest model on the hub's LAMBADA."""
    facts = {"task": "lambada", "protocol": "openai", "model": "gpt2", "size": "gpt2", "dtype": "float32"}
    facts |= {"data": "EleutherAI/lambada_openai", "sha256": None, "subset": "", "correct": 1690, "total": 5153}
    facts |= {"unscored": {}, "warnings": {}, "perplexity": 40.0, "seconds": 1.0, "has_published": True, "near_ties": 0}
    return Result(**facts | changes)


def test_footnotes_report_unscored_and_irregular_questions_and_near_ties():
    assert results.footnotes([make_result()]) == ""
    notes = results.footnotes(
        [make_result(near_ties=2), make_result(near_ties=1, unscored={"no context": 4}, warnings={"cut": 5})]
    )
    assert "4 not scored, counted as wrong: no context" in notes
    assert "5 scored with a warning: cut" in notes
    assert notes.endswith("near ties, whose outcome can depend on batch size or device: 3")


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


def test_the_published_sizes_are_presets_and_their_labels_the_numbers_of_parameters():
    for size, label in results.published_sizes().items():
        with torch.device("meta"):
            model = GPT(PRESETS[size], seed=None)
        assert label == f"{model.num_parameters() / 1e6:.0f}M"


@pytest.mark.parametrize("task", ["lambada", "cbt", "hellaswag"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_published_figure_applies_only_to_its_protocol_questions_size_and_openais_weights(monkeypatch, task, reverse):
    figures = results.published(task)
    monkeypatch.setattr(results, "published", lambda name: figures[::-1] if reverse else figures)
    for figure in filter(is_openais, figures):
        for size in results.published_sizes():
            result = make_result(task=task, protocol=figure["protocol"], subset=subset_of(figure), size=size)
            assert results.published_figure(result) == figure.get(size)
            assert results.published_figure(replace(result, has_published=False)) is None
            assert results.published_figure(replace(result, size=None)) is None
            assert results.published_figure(replace(result, protocol="another")) is None
            assert results.published_figure(replace(result, subset="V test")) is None


def test_figures_of_other_weights_are_never_compared_with():
    others = [figure for figure in results.published("cbt") if not is_openais(figure)]
    assert {subset_of(figure) for figure in others} >= {"CN test"}
    assert results.published_figure(make_result(task="cbt", protocol="sentence", subset="CN test")) is None


def test_each_protocol_has_its_own_row_with_its_own_figure():
    rows = [make_result(protocol=protocol) for protocol in lambada.PROTOCOLS]
    (table,) = tables(results.results_table(rows))
    assert [row["protocol"] for row in table] == list(lambada.PROTOCOLS)
    published = [row["published, same size"] for row in table]
    assert published == ["32.56 (40.06)", "26.06", "46.67", "47.66", "45.99 (35.13)"]
    percent = 100 * 1690 / 5153
    differences = [f"{percent - value:+.2f}" for value in (32.56, 26.06, 46.67, 47.66, 45.99)]
    assert [row["difference"] for row in table] == differences


def test_a_result_without_a_published_figure_has_no_difference():
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
def test_the_published_table_has_one_row_per_figure(task):
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
                f"{figure[size][0]:.2f}" if size in figure else "" for size in results.published_sizes()
            ]
    assert all(figure["source"] for figure in figures)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_size_of_a_model_follows_from_its_shape(preset):
    model = SimpleNamespace(config=replace(PRESETS[preset], vocab_size=50304))
    questions = QuestionSet(["so it is"], ["openai"], "a.txt", None)
    result = evaluate.summarize(
        lambada.TASK, model, "logs/mine", "openai", questions, [Verdict(True, logprob=-1.0)], "float32", 1.0
    )
    assert result.size == (preset if preset in results.published_sizes() else None)
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
def test_the_short_name_of_a_checkpoint_is_its_run_and_step(source, name):
    assert results.short_names([source]) == [name]


def test_saved_results_are_loaded_unchanged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [
        make_result(),
        make_result(dtype="bfloat16"),
        make_result(task="cbt", protocol="sentence", model="demo/step_001000", unscored={"why": 2}, warnings={"so": 1}),
    ]
    assert results.save(found, None) == results.RESULTS
    assert len(list(results.RESULTS.iterdir())) == 3
    assert sorted(results.load_all()[0], key=repr) == sorted(found, key=repr)
    (path,) = results.RESULTS.glob("lambada-openai-gpt2-EleutherAI-lambada_openai-*.json")
    (row,) = json.loads(path.read_text())
    assert row["accuracy"] == found[0].accuracy
    assert row["remarks"] == {}  # the name on disk
    assert row["interval"][0] < row["accuracy"] < row["interval"][1]


def test_results_of_models_with_long_paths_are_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [make_result(model="/".join(["ä" * 120, "experiments" * 20, name])) for name in ("a", "b")]
    results.save(found, None)
    assert sorted(results.load_all()[0], key=repr) == sorted(found, key=repr)


@pytest.mark.parametrize("bits, perplexity", [(3.0, 8.0), (2000.0, None), (None, None)])
def test_a_perplexity_per_byte_too_large_for_a_float_is_null(tmp_path, bits, perplexity):
    results.save([make_result(bits_per_byte=bits)], str(tmp_path / "r.json"))
    (row,) = json.loads((tmp_path / "r.json").read_text())
    assert row["byte_perplexity"] == (perplexity and pytest.approx(perplexity))


OUTCOMES = ("1111110000", "1100011111")
ONLY_A, ONLY_B = 3, 4


def write_items(path, model, outcome, questions=None, **changes):
    facts = {"task": "lambada", "protocol": "openai", "model": model, "subset": ""} | changes
    questions = questions or [f"{i:016x}" for i in range(len(outcome))]
    items = [
        facts | {"index": i, "question": question, "correct": correct == "1"}
        for i, (question, correct) in enumerate(zip(questions, outcome, strict=True))
    ]
    with open(path, "a") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)


def compare(a, b, script=eval_lambada):
    script.main(script.Config(scoring=ScoringConfig(compare=(a, b))))


def comparison(capsys, script=eval_lambada):
    compare("a.jsonl", "b.jsonl", script)
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
    (row,) = comparison(capsys, script)
    assert row == {
        **{"task": "lambada", "protocol": "openai", "questions": "", "A": "first", "B": "second"},
        **{"A %": f"{100 * a.count('1') / len(a):.2f}", "B %": f"{100 * b.count('1') / len(b):.2f}"},
        **{"only A right": str(only_a), "only B right": str(only_b), "p (McNemar)": p},
    }


def test_the_order_of_lines_does_not_matter(here, capsys):
    write_items("a.jsonl", "first", OUTCOMES[0])
    write_items("b.jsonl", "second", OUTCOMES[1])
    lines = (here / "b.jsonl").read_text().splitlines()
    (here / "b.jsonl").write_text("\n".join(lines[::-1]))
    (row,) = comparison(capsys)
    assert (row["only A right"], row["only B right"]) == (str(ONLY_A), str(ONLY_B))


def test_only_equal_protocols_and_sets_are_compared(here, capsys):
    kinds = [("paper", "NE test"), ("paper", "CN test"), ("sentence", "NE test")]
    for protocol, subset in kinds:
        write_items("a.jsonl", "first", "1100", task="cbt", protocol=protocol, subset=subset)
    for protocol, subset in [*kinds[:0:-1], ("sentence", "V test")]:
        write_items("b.jsonl", "second", "0110", task="cbt", protocol=protocol, subset=subset)
    table = comparison(capsys)
    assert [(row["protocol"], row["questions"]) for row in table] == kinds[1:]
    assert all((row["only A right"], row["only B right"]) == ("1", "1") for row in table)


@pytest.mark.parametrize(
    ("outcome", "questions", "message"),
    [
        ("111", None, "lambada openai .*first answered 4 questions, second 3, with 3 in common"),
        ("1111", ["0", "1", "2", "3"], "first answered 4 questions, second 4, with 0 in common"),
        ("1111", [f"{i:016x}" for i in (0, 1, 3, 2)], "first answered 4 questions, second 4, with 2 in common"),
    ],
)
def test_answers_to_different_questions_are_not_compared(here, outcome, questions, message):
    write_items("a.jsonl", "first", "1100")
    write_items("b.jsonl", "second", outcome, questions)
    with pytest.raises(ValueError, match=message):
        compare("a.jsonl", "b.jsonl")


def test_files_without_a_common_protocol_are_not_compared(here):
    write_items("a.jsonl", "first", "1100")
    write_items("b.jsonl", "second", "1100", protocol="last-token")
    with pytest.raises(ValueError, match=r"--compare a\.jsonl b\.jsonl: the files have no protocol in common"):
        compare("a.jsonl", "b.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "b.jsonl is empty. Score a model with --items b.jsonl"),
        (b"{", "b.jsonl, line 1 is not a JSON object"),
        (b"[]\n", "b.jsonl, line 1 is not a JSON object"),
        (b'"task"\n', "b.jsonl, line 1 is not a JSON object"),
        (b'{"task": "lambada"}\n', "b.jsonl, line 1 was not written by --items"),
        (b"[" * 100_000, "b.jsonl, line 1 is not a JSON object"),
        (b"\n\n", "b.jsonl, line 1 is not a JSON object"),
        (b"\xff\n", "b.jsonl, line 1 is not UTF-8 text"),
        (b"x" * (LONGEST_LINE + 1), "b.jsonl, line 1 has more than 1,048,576 bytes"),
    ],
)
@pytest.mark.parametrize("lines_before", [0, 3])
def test_damaged_items_are_refused_by_file_and_line(here, content, message, lines_before):
    write_items("a.jsonl", "first", "1100")
    write_items("b.jsonl", "second", "1" * lines_before)
    if lines_before and not content:
        return
    (here / "b.jsonl").write_bytes((here / "b.jsonl").read_bytes() + content)
    with pytest.raises(ValueError, match=message.replace("line 1", f"line {lines_before + 1}")):
        compare("a.jsonl", "b.jsonl")


@pytest.mark.parametrize(
    ("key", "value"),
    [("index", [1]), ("task", {}), ("model", 3), ("question", []), ("correct", None), ("correct", "no")],
)
def test_items_with_wrong_types_are_refused_by_file_and_line(here, key, value):
    write_items("a.jsonl", "first", "1")
    item = json.loads((here / "a.jsonl").read_text())
    (here / "b.jsonl").write_text(json.dumps(item | {key: value}))
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1 was not written by --items"):
        compare("b.jsonl", "a.jsonl")


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
    """Run a script's command line in this process in the world: its output, its errors, and its exit status."""
    monkeypatch.chdir(world)

    def execute(name, *arguments):
        script = SETS[name][0]
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        status = 0
        try:
            cli.run(script.main, script.Config, script.__doc__)
        except SystemExit as ended:
            status = ended.code
        captured = capsys.readouterr()
        return captured.out, captured.err, status

    return execute


@pytest.mark.parametrize("name", SETS)
def test_several_models_give_one_table_and_a_test_of_each_pair(call, world, models, name):
    _, data = SETS[name]
    places = ("--out", "several.json", "--items", "several.jsonl")
    printed, _, status = call(name, "--ckpt", *models, models[0], *data, *places)
    assert status == 0
    accuracies, pairs, *published = tables(printed)
    assert not published  # no figures are published for these questions
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
def test_models_scored_separately_compare_like_models_scored_together(call, models, name):
    _, data = SETS[name]
    together, _, _ = call(name, "--ckpt", *models[:2], *data, "--out", "x.json")
    for i in (0, 1):
        output, _, _ = call(name, "--ckpt", models[i], *data, "--out", "x.json", "--items", f"{i}.jsonl")
        assert len(tables(output)) == 1  # one model has no pair
    printed, _, status = call(name, "--compare", "0.jsonl", "1.jsonl")
    assert status == 0
    assert tables(printed) == [tables(together)[1]]
    _, error, status = call(name, "--compare", "0.jsonl", "none.jsonl")
    assert (status, error.count("\n")) == (2, 1)
    assert "none.jsonl" in error


@pytest.mark.parametrize(
    ("name", "protocols"),
    [("eval_lambada.py", lambada.allowed_protocols("openai")), ("eval_cbt.py", list(cbt.PROTOCOLS))],
)
def test_a_protocol_has_its_own_row_and_is_scored_once(call, models, monkeypatch, name, protocols):
    _, data = SETS[name]
    data = data[:2] + ("--text", "openai") * (name == "eval_lambada.py")
    common = (name, "--ckpt", models[0], *data, "--out", "x.json", "--protocol")
    accuracies, *_ = tables(call(*common, "all")[0])
    assert [row["protocol"] for row in accuracies] == protocols
    scored = []

    def score_models(task, sources, sets, options, ranks, add):
        scored.extend(sets)
        raise ValueError("enough")

    monkeypatch.setattr(evaluate, "score_models", score_models)
    call(*common, protocols[1], protocols[0], protocols[1])
    assert [questions.protocols for questions in scored] == [protocols[1::-1]]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("--ckpt names no model",)),
        (("--ckpt",), ("--ckpt names no model",)),
        (("--ckpt", "logs/none"), ("--ckpt logs/none does not exist",)),
        (("--ckpt", "models/one", "data/stories"), ("--ckpt data/stories contains neither checkpoints nor",)),
        (("--ckpt", "models/one", "--batch-tokens", "0"), ("--batch-tokens 0 must be above 0",)),
        (("--ckpt", "models/one", "--batch-tokens", "-1"), ("--batch-tokens -1 must be above 0",)),
        (("--ckpt", "models/one", "--device", "abacus"), ("--device abacus",)),
        (("--compare", "a.jsonl", "b.jsonl", "--ckpt", "models/one"), ("--compare", "Remove --ckpt")),
        (("--compare", "a.jsonl", "b.jsonl", "--out", "x", "--items", "y"), ("Remove --out and --items",)),
        (("--compare", "a.jsonl", "b.jsonl", "--data", "d.txt"), ("--compare", "Remove --data")),
        (("--compare", "nowhere.jsonl", "b.jsonl"), ("nowhere.jsonl",)),
    ],
)
def test_wrong_options_are_a_one_line_error(call, world, name, arguments, parts):
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
def test_an_unknown_option_or_value_is_refused_by_name(call, models, name, arguments, option):
    printed, error, status = call(name, "--ckpt", models[0], *SETS[name][1], *arguments)
    assert status == 2
    assert option in printed + error


def test_wrong_options_exit_with_status_2(world, models):
    message = refused(
        run("eval_cbt.py", "--compare", "a.jsonl", "b.jsonl", "--ckpt", models[0], cwd=world, check=False)
    )
    assert message.startswith("--compare reads two files of --items")


@pytest.mark.parametrize("name", SETS)
def test_a_damaged_file_is_a_one_line_error_before_scoring(call, world, models, name):
    (world / "damaged.txt").write_bytes(b"two words\n\xff\xfe\n")
    data = ("--data", "damaged.txt", *SETS[name][1][2:] * (name == "eval_lambada.py"))
    printed, error, status = call(name, "--ckpt", models[0], *data)
    assert (status, error.count("\n"), printed) == (2, 1, "")
    assert error.startswith("error: damaged.txt, line 2 is not UTF-8 text")


def test_results_of_equal_names_are_all_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    models = [f"{i}/logs/mine/checkpoints/step_000001" for i in (1, 2)]
    for seed, model in enumerate(models):
        save_model(tmp_path / model, seed=seed)
    (tmp_path / "a.txt").write_text(CLOZE)
    eval_cbt.main(eval_cbt.Config(CBTConfig(data=("a.txt",)), ScoringConfig(ckpt=tuple(models))))
    assert [result.model for result in results.load_all()[0]] == models
    assert "p (McNemar)" in capsys.readouterr().out


def test_results_whose_names_differ_in_punctuation_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/a", "models-a", "x", "y"):
        save_model(tmp_path / folder, seed=len(folder))
    for folder, copies in (("x", 1), ("y", 2)):
        (tmp_path / folder / "a.txt").write_text(f"{CLOZE}\n" * copies)
        scoring = ScoringConfig(ckpt=("models/a", "models-a"))
        eval_cbt.main(eval_cbt.Config(CBTConfig(data=(f"{folder}/a.txt",)), scoring))
    kept = {(result.model, result.total) for result in results.load_all()[0]}
    assert kept == {("models/a", 1), ("models-a", 1), ("models/a", 2), ("models-a", 2)}


@pytest.mark.parametrize("name", SETS)
def test_no_output_overwrites_another_file(call, world, models, name):
    data = SETS[name][1]
    original = (world / data[1]).read_bytes()
    for wrong in (("--out", "same", "--items", "same"), ("--out", data[1]), ("--items", f"logs/../{data[1]}")):
        printed, error, status = call(name, "--ckpt", models[0], *data, *wrong)
        assert (status, printed) == (2, "")
        assert "would overwrite" in error
    assert (world / data[1]).read_bytes() == original
    assert not (world / "same").exists()


@pytest.mark.parametrize("name", SETS)
def test_an_impossible_output_path_is_refused_before_scoring(call, world, models, monkeypatch, name):
    monkeypatch.setattr(evaluate, "score_models", lambda *_, **__: pytest.fail("scored"))
    printed, error, status = call(name, "--ckpt", models[0], *SETS[name][1], "--items", "data/stories/lambada.txt/x")
    assert (status, error.count("\n"), printed) == (2, 1, "")


def test_results_are_saved_before_they_are_printed(world, models, monkeypatch):
    monkeypatch.chdir(world)

    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    scoring = ScoringConfig(ckpt=(models[0],), out="unread.json", items="unread.jsonl")
    with pytest.raises(BrokenPipeError):
        eval_cbt.main(eval_cbt.Config(CBTConfig(data=SETS["eval_cbt.py"][1][1:]), scoring))
    assert len(json.loads((world / "unread.json").read_text())) == 2
    assert len((world / "unread.jsonl").read_text().splitlines()) == 80


def test_all_ranks_score_the_checkpoint_that_rank_0_found(world, models, monkeypatch):
    """Another rank may find a newer checkpoint of a run in training."""

    class Second(Ranks):
        def broadcast(self, value):
            return ["models/two"] if value == ["models/one"] else value

    monkeypatch.chdir(world)
    ranks = contextlib.nullcontext(Second(0, 1, torch.device("cpu")))
    monkeypatch.setattr(evaluate, "process_group", lambda device: ranks)
    scoring = ScoringConfig(ckpt=("models/one",), out="found.json")
    eval_cbt.main(eval_cbt.Config(CBTConfig(data=SETS["eval_cbt.py"][1][1:2]), scoring))
    assert [row["model"] for row in json.loads((world / "found.json").read_text())] == ["models/two"]


def test_a_model_that_does_not_fit_on_the_gpu_is_a_one_line_error(call, models, monkeypatch):
    def full(self, device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(GPT, "to", full)
    _, error, status = call("eval_cbt.py", "--ckpt", models[0], *SETS["eval_cbt.py"][1])
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("error: --ckpt models/one does not fit in the free memory of the GPU")


def test_the_smallest_p_is_not_printed_as_0():
    assert [results.format_p(p) for p in (0.25, 1e-4, 3e-9, 0.0)] == ["0.2500", "0.0001", "3.0e-09", "< 1e-300"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("lambada_test.jsonl", "standard"), ("lambada_development_plain_text.txt", "openai")],
)
def test_a_text_that_contradicts_the_file_name_is_refused(call, world, models, name, text):
    (world / name).write_text("any words\n")
    _, error, status = call("eval_lambada.py", "--ckpt", models[0], "--data", name, "--text", text)
    assert status == 2
    assert f"--text {text} contradicts --data {name}" in error


def test_two_files_of_one_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in (1, 2):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}/a.txt").write_text(f"{CLOZE}\n" * i)
    with pytest.raises(ValueError, match=r"--data 1/a\.txt 2/a\.txt has two files of one name"):
        cbt.load(CBTConfig(data=("1/a.txt", "2/a.txt")))


def test_two_files_with_one_subset_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("set.old", "set.new"):
        (tmp_path / name).write_text(CLOZE)
    with pytest.raises(ValueError, match="two files of one name"):
        cbt.load(CBTConfig(data=("set.old", "set.new")))


@pytest.fixture
def diverged(world):
    """A model whose weights are NaN."""
    model = save_model(world / "models/diverged", seed=1)
    with torch.no_grad():
        model.transformer.wte.weight.fill_(math.nan)
    model.save_pretrained(world / "models/diverged", ENCODING.eot_token)
    return "models/diverged"


def test_a_diverged_model_scores_0(world, diverged, call):
    (world / "first.txt").write_text(CLOZE.replace("\tlamp\t", "\tbell\t"), encoding="utf-8")
    call("eval_cbt.py", "--ckpt", diverged, "--data", "first.txt", "--protocol", "all", "--out", "x.json")
    assert [row["correct"] for row in json.loads((world / "x.json").read_text())] == [0, 0]


def test_files_of_a_diverged_model_are_json(world, diverged, call):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    places = ("--out", "x.json", "--items", "x.jsonl")
    _, _, status = call("eval_lambada.py", "--ckpt", diverged, *SETS["eval_lambada.py"][1], *places)
    assert status == 0
    json.loads((world / "x.json").read_text(), parse_constant=refuse)
    for line in (world / "x.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_questions_are_identified_by_their_complete_text(world, models):
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
    for kind, questions in sets:
        verdicts = [Verdict(True)] * len(questions)
        items = evaluate.build_items(kind, "m", "openai", QuestionSet(questions, ["openai"], "a", None), verdicts)
        assert len({item["question"] for item in items}) == len(questions)
        again = evaluate.build_items(kind, "m", "openai", QuestionSet(questions, ["openai"], "b", None), verdicts)
        assert again == items


@pytest.mark.parametrize(
    "value, text",
    [
        (7.625, "7.62"),
        (99_999.99, "99,999.99"),
        (100_001.0, "1.00e+05"),
        (1.234e300, "1.23e+300"),
        (None, "not finite"),
        (math.nan, "not finite"),
    ],
)
def test_a_perplexity_above_100000_has_an_exponent(value, text):
    assert task.format_perplexity(value) == text
    (row,) = tables(results.results_table([make_result(perplexity=value, perplexity_interval=[value or 1.0] * 2)]))[0]
    if value:
        assert row["perplexity"] == text
        assert row["95 % of perplexity"] == f"{text} to {text}"
