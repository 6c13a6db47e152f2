"""report.py turns runs, also unfinished ones, into a page and plots, and names what it can't find."""

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from urllib.parse import unquote

import pytest
from conftest import ROOT, run, wait_until

import report

PNG = b"\x89PNG\r\n\x1a\n"
RESULT = {"task": "lambada", "protocol": "openai", "model": "first/step_000030", "data": "lambada_test.jsonl"}
RESULT |= {"sha256": None, "correct": 1678, "total": 5153, "perplexity": 40.06, "seconds": 1.0, "near_ties": 0}
RESULT |= {"has_published": True, "size": "gpt2", "dtype": "float32", "subset": "", "unscored": {}, "remarks": {}}


def write_run(folder, name, data, end="", losses=None, val_losses=(6.0, 3.5, 2.5)):
    """A run's files, as train.py writes them, of 30 steps of 1,000 tokens in half a second each."""
    path = folder / "logs" / name
    path.mkdir(parents=True)
    facts = {"data": str(data), "preset": "tiny", "parameters": 1_234_567, "steps": 40, "world_size": 1}
    (path / "run.json").write_text(json.dumps(facts | {"versions": {"device": "CPU"}}), encoding="utf-8")
    losses = losses or [6.5 * math.exp(-step / 20) + 1 for step in range(1, 31)]
    lines = []
    for step, loss in enumerate(losses, 1):
        line = {"step": step, "tokens": 1000 * step, "split": "train", "loss": loss, "seconds": step / 2}
        lines.append(line | {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 2000.0, "mfu": None})
    for step, loss in zip((0, 15, 30), val_losses, strict=True):
        bits = loss and loss / math.log(2) / 4
        line = {"step": step, "tokens": 1000 * step, "split": "val", "loss": loss, "bits_per_byte": bits}
        lines.append(line | {"seconds": step / 2})
    lines.sort(key=lambda line: line["step"])
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end, encoding="utf-8")


def check_plot(path):
    content = path.read_bytes()
    assert content.startswith(PNG)
    assert len(content) > 10_000
    width, height = struct.unpack(">II", content[16:24])
    assert width > height >= 600


def cells(page, name):
    """A row of the first table, by its first cell."""
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_a_finished_and_an_unfinished_run_with_the_entropy_of_the_data(world, tmp_path):
    write_run(tmp_path, "first", world / "data/small")
    write_run(tmp_path, "second", world / "data/small", end='{"step": 31, "tokens": 310')
    floor = world / "data/stories/stories.jsonl"
    run("report.py", "--floor", floor, cwd=tmp_path)
    for path in ("logs/loss.png", "logs/first/loss.png", "logs/second/loss.png"):
        check_plot(tmp_path / path)
    page = (tmp_path / "logs/report.md").read_text(encoding="utf-8")
    nats = [json.loads(line)["nats"] for line in floor.read_text(encoding="utf-8").splitlines()]
    manifest = json.loads((world / "data/small/manifest.json").read_text(encoding="utf-8"))
    (val,) = (shard for shard in manifest["shards"] if shard["split"] == "val")
    least = sum(nats[: val["documents"]]) / val["tokens"]
    for name, state in (("first", "not finished"), ("second", "not finished")):
        assert cells(page, name) == [
            *(name, "tiny (1.2M)", "30 of 40", "30k", "2.5000", f"{2.5 / math.log(2) / 4:.4f}"),
            *(f"{least:.4f} (+{2.5 / least - 1:.1%})", "2.0", "0.2", "1 x CPU", state),
        ]
    for plot in ("first/loss.png", "second/loss.png", "loss.png"):
        assert f"![loss curves]({plot})" in page
    assert "| entropy of the data (loss above it) |" in page


def test_one_run_by_name_without_entropy_into_another_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "first", world / "data/small")
    write_run(tmp_path, "second", world / "data/small")
    report.main(report.Config(runs=("second",), out="logs/pages/one"))
    page = (tmp_path / "logs/pages/one/report.md").read_text(encoding="utf-8")
    assert "| second " in page
    assert "| first " not in page
    assert "![loss curves](../../second/loss.png)" in page
    check_plot(tmp_path / "logs/second/loss.png")
    assert not (tmp_path / "logs/first/loss.png").exists()
    assert "entropy" not in page
    assert cells(page, "second")[-1] == "not finished"


def test_results_are_compared_with_published_figures_of_the_same_questions(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "first", world / "data/small")
    other = RESULT | {"task": "cbt", "protocol": "paper", "model": "gpt2", "data": "stories", "has_published": False}
    (tmp_path / "logs/results").mkdir()
    (tmp_path / "logs/results/both.json").write_text(
        json.dumps([RESULT, other | {"perplexity": None}]), encoding="utf-8"
    )
    report.main(report.Config())
    page = (tmp_path / "logs/report.md").read_text(encoding="utf-8")
    row = cells(page, "first/step_000030")
    assert row[1:5] == ["lambada", "openai", "lambada_test.jsonl", "32.56"]
    assert row[5:] == ["31.30 to 33.86", "1,678 of 5,153", "40.06", "32.56 (40.06)", "+0.00"]
    assert cells(page, "gpt2")[1:5] == ["cbt", "paper", "stories", "32.56"]
    assert "lambada, published" in page
    assert "cbt, published" not in page
    report.main(report.Config(runs=("first",)))
    assert "| gpt2 " not in (tmp_path / "logs/report.md").read_text(encoding="utf-8")


def test_a_diverged_run_is_shown(world, tmp_path, monkeypatch):
    """metrics.jsonl has null for a loss that isn't finite."""
    monkeypatch.chdir(tmp_path)
    losses = [3.0] * 29 + [None]
    write_run(tmp_path, "diverged", world / "data/small", losses=losses, val_losses=(3.0, 2.0, None))
    report.main(report.Config())
    assert cells((tmp_path / "logs/report.md").read_text(encoding="utf-8"), "diverged")[2] == "30 of 40"
    check_plot(tmp_path / "logs/diverged/loss.png")


def test_the_plot_shows_each_run_by_tokens_and_by_time(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        write_run(tmp_path, name, world / "data/small")
    scored = {"step": 30, "tokens": 30_000, "split": "lambada", "accuracy": 0.25, "protocol": "openai", "seconds": 15}
    with open("logs/second/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(scored) + "\n")
    runs = [report.load_run(name) for name in ("first", "second")]
    panels = {axes.get_ylabel().split(" (")[0]: axes for axes in report.build_figure(runs, []).axes}
    assert list(panels) == ["loss", "LAMBADA accuracy", "learning rate", "thousand tokens per second", "gradient norm"]
    tokens, seconds = (axes for axes in report.build_figure(runs, []).axes if axes.get_ylabel().startswith("loss"))
    for axes, unit in ((tokens, 1000), (seconds, 0.5)):
        first, second = ([line for line in axes.lines if line.get_color() == c] for c in report.COLORS[:2])
        for training, start, validation in (first, second):
            assert [*start.get_xdata(), *start.get_ydata(), start.get_linestyle()] == [0, 6.0, "None"]
            assert list(training.get_xdata()) == [unit * step for step in range(1, 31)]
            assert [*validation.get_xdata(), *validation.get_ydata()] == [15 * unit, 30 * unit, 3.5, 2.5]
    assert seconds.get_xlabel() == "seconds of training"
    (curve,) = panels["LAMBADA accuracy"].lines
    assert (list(curve.get_ydata()), curve.get_color()) == ([25], report.COLORS[1])
    assert {tuple(line.get_ydata()) for line in panels["thousand tokens per second"].lines} == {(2.0,) * 30}


@pytest.mark.parametrize("seconds, unit", [(90, "seconds"), (120, "minutes"), (7199, "minutes"), (7200, "hours")])
def test_the_longest_run_determines_the_unit_of_time(seconds, unit):
    runs = [report.Curves("run", {"train": [{"seconds": last}]}) for last in (1, seconds)]
    assert report.time_unit(runs)[0] == unit


def test_no_runs_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"logs/ contains no runs\. Start one with train\.py"):
        report.main(report.Config())
    with pytest.raises(ValueError, match=r"^--log-files: main\.log: No such file or directory\. Check the path$"):
        report.main(report.Config(log_files=("main.log",)))


def test_an_unknown_run_is_refused_with_the_names_of_all_runs(world, tmp_path, monkeypatch):
    write_run(tmp_path, "first", world / "data/small")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"--runs frist: logs/frist contains no run\. Choose from first"):
        report.main(report.Config(runs=("frist",)))


@pytest.mark.parametrize("content", ['{"text": "no nats here"}\n', '{"text": "one story", "nats": 20.0}\n'])
def test_a_floor_file_that_is_not_the_runs_data_is_refused_by_name(world, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "first", world / "data/small")
    (tmp_path / "stories.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"stories\.jsonl"):
        report.main(report.Config(floor="stories.jsonl"))


def test_a_floor_that_is_no_file_or_of_no_run_is_named(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "first", world / "data/small")
    with pytest.raises(ValueError, match=r"--floor none is not a file\. Name the demo's stories\.jsonl"):
        report.main(report.Config(floor="none"))
    (tmp_path / "other.jsonl").write_text("{}\n")
    report.main(report.Config(floor="other.jsonl"))
    page = (tmp_path / "logs/report.md").read_text(encoding="utf-8")
    assert "not shown: --floor other.jsonl: no run was trained on a file of this name" in page


WRONG = [{"correct": "x"}, {"total": 0}, {"model": None}, {"task": "none"}, {"perplexity": "x"}, {"data": 5}]


@pytest.mark.parametrize(
    "content", ["[{", '[{"task": "lambada"}]', "7", "[" * 100_000, *(json.dumps([RESULT | wrong]) for wrong in WRONG)]
)
def test_a_damaged_result_is_named_and_the_rest_is_reported(world, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "first", world / "data/small")
    (tmp_path / "logs/results").mkdir()
    (tmp_path / "logs/results/broken.json").write_text(content, encoding="utf-8")
    report.main(report.Config())
    page = (tmp_path / "logs/report.md").read_text(encoding="utf-8")
    assert "not shown: logs/results/broken.json is not a results file" in page
    assert cells(page, "first")[2] == "30 of 40"


def test_a_result_that_cannot_be_read_is_an_error_of_the_machine_and_not_damage(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "first", world / "data/small")
    (tmp_path / "logs/results/folder.json").mkdir(parents=True)
    report.main(report.Config())
    page = (tmp_path / "logs/report.md").read_text(encoding="utf-8")
    assert "not shown: logs/results/folder.json: Is a directory\n" in page


def test_a_plot_that_cannot_be_written_is_named_and_the_others_are_written(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        write_run(tmp_path, name, world / "data/small")
    (tmp_path / "logs/first/loss.png").mkdir()
    report.main(report.Config())
    page = (tmp_path / "logs/report.md").read_text(encoding="utf-8")
    assert "not shown: logs/first/loss.png: Is a directory" in page
    for path in ("logs/loss.png", "logs/second/loss.png"):
        check_plot(tmp_path / path)


def test_a_run_whose_data_is_gone_has_no_entropy_and_the_others_have_theirs(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "first", world / "data/small")
    write_run(tmp_path, "moved", tmp_path / "data/none")
    report.main(report.Config(floor=str(world / "data/stories/stories.jsonl")))
    page = (tmp_path / "logs/report.md").read_text(encoding="utf-8")
    assert cells(page, "first")[6]
    assert cells(page, "moved")[6] == ""
    assert cells(page, "moved")[-1] == "its data can't be read, so their entropy is unknown; not finished"


def test_the_newest_runs_are_those_with_the_newest_metrics(world, tmp_path, monkeypatch):
    """The time of a run's folder changes when report.py writes its plot."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate("abcdefg"):
        write_run(tmp_path, name, world / "data/small")
        os.utime(f"logs/{name}/metrics.jsonl", (1e9 - age, 1e9 - age))
    runs = [report.load_run(name) for name in "abcdefg"]
    assert [run.name for run in report.newest(runs)] == list("fedcba")


def damage(folder, name):
    """Damage a run's files, or remove them."""
    metrics, settings = folder / "metrics.jsonl", folder / "run.json"
    if name == "no-metrics":
        metrics.unlink()
    elif name == "empty-metrics":
        metrics.write_text("")
    elif name == "no-settings":
        settings.unlink()
    elif name == "torn-settings":
        settings.write_text('{"preset": "ti')
    elif name == "list-settings":
        settings.write_text("[1]")
    elif name == "few-settings":
        settings.write_text("{}")
    elif name == "torn-line":
        lines = metrics.read_text().split("\n")
        metrics.write_text("\n".join([*lines[:10], lines[10][:20], *lines[11:]]))
    elif name == "other-types":
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        lines[5]["loss"], lines[6]["tokens"] = "x", None
        del lines[7]["seconds"], lines[8]["split"]
        metrics.write_text("".join(json.dumps(line) + "\n" for line in [*lines, 5, [1]]))
    elif name == "odd-values":
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        lines[5]["seconds"], lines[6]["split"], lines[7]["grad_norm"] = None, ["train"], "x"
        lines[8]["loss"] = 10**400
        metrics.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"split": {}}]))
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"parameters": 10**400, "steps": None}))
    elif name == "nested":
        metrics.write_text("[" * 100_000 + "\n" + metrics.read_text())
        settings.write_text("[" * 100_000)
    elif name == "first-validation":
        metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    else:
        assert name == "binary"
        metrics.write_bytes(bytes(range(256)) * 9)
        settings.write_bytes(bytes(range(256)))


DAMAGE = {
    "no-metrics": ("0 of 40", "metrics.jsonl is missing; no step yet"),
    "empty-metrics": ("0 of 40", "no step yet"),
    "no-settings": ("30", "run.json is missing; not finished"),
    "torn-settings": ("30", "run.json is damaged; not finished"),
    "list-settings": ("30", "run.json is damaged; not finished"),
    "few-settings": ("30", "not finished"),
    "torn-line": ("30 of 40", "1 damaged line in metrics.jsonl; not finished"),
    "other-types": ("30 of 40", "5 damaged lines in metrics.jsonl; not finished"),
    "odd-values": ("30", "1 damaged line in metrics.jsonl; not finished"),
    "nested": ("30", "run.json is damaged; 1 damaged line in metrics.jsonl; not finished"),
    "first-validation": ("0 of 40", "no step yet"),
    "binary": ("0", "run.json is damaged; 9 damaged lines in metrics.jsonl; no step yet"),
}


def test_a_damaged_run_is_a_row_and_the_others_are_reported_as_usual(world, tmp_path):
    write_run(tmp_path, "good", world / "data/small")
    for name in DAMAGE:
        write_run(tmp_path, name, world / "data/small")
        damage(tmp_path / "logs" / name, name)
    run("report.py", cwd=tmp_path)
    page = (tmp_path / "logs/report.md").read_text(encoding="utf-8")
    assert cells(page, "good")[2:5] == ["30 of 40", "30k", "2.5000"]
    for name, (steps, state) in DAMAGE.items():
        row = cells(page, name)
        assert (row[2], row[-1]) == (steps, state), name
    check_plot(tmp_path / "logs/loss.png")
    check_plot(tmp_path / "logs/good/loss.png")


NAMES = ["a$b$c", "_hidden", "a|b", "back\\slash", "поиск", "a_b*c*", "`quoted`"]


def test_names_appear_as_they_are_in_plots_and_tables(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES[:6]:
        write_run(tmp_path, name, world / "data/small")
    (tmp_path / "logs/results").mkdir()
    scored = [RESULT | {"model": f"{name}/step_000030"} for name in NAMES]
    (tmp_path / "logs/results/all.json").write_text(json.dumps(scored), encoding="utf-8")
    report.main(report.Config())
    page = (tmp_path / "logs/report.md").read_text(encoding="utf-8")
    for cell in ("`a\\|b/step_000030`", "`_hidden/step_000030`", "`` `quoted`/step_000030 ``", "поиск/step_000030"):
        assert f"| {cell} " in page
    browser_page = (tmp_path / "logs/report.html").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"<td>{name}/step_000030</td>" in browser_page
    for cell in ("`a$b$c`", "`_hidden`", "`a\\|b`", "`back\\slash`", "поиск", "`a_b*c*`"):
        assert f"| {cell} " in page
    links = re.findall(r"!\[loss curves\]\((\S*)/loss.png\)", page)
    assert sorted(map(unquote, links)) == sorted(NAMES[:6])
    assert re.fullmatch(r"[\w/.%-]+", "".join(links), re.ASCII)  # no character has a meaning in Markdown
    figure = report.build_figure([report.load_run(name) for name in NAMES[:6]], [])
    texts = figure.legends[0].get_texts()
    assert [text.get_text() for text in texts] == [f"{name}: validation loss 2.500" for name in NAMES[:6]]
    assert not any(text.get_parse_math() for text in texts)
    assert report.cell("`quoted`") == "`` `quoted` ``"
    assert report.cell("my_run") == "my_run"


def test_published_curves_are_drawn_by_tokens(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "first", world / "data/small")
    report.main(report.Config(reference=("build-nanogpt", "llm.c")))
    page = (tmp_path / "logs/report.md").read_text(encoding="utf-8")
    assert "build-nanogpt: log of a 124M run" in page
    assert "losses on FineWeb can't be compared with those on FineWeb-Edu" in page
    references = [report.load_reference(name) for name in report.reference_names()]
    figure = report.build_figure([report.load_run("first")], references)
    panels = {axes.get_ylabel().split(" (")[0]: axes for axes in figure.axes if axes.get_xlabel() == "training tokens"}
    grays = [line for line in panels["loss"].lines if line.get_color() in report.GRAYS and line.get_gid()]
    ends = {line.get_gid(): (line.get_xdata()[-1], line.get_ydata()[-1]) for line in grays}
    assert ends == {
        "build-nanogpt (FineWeb-Edu): validation loss 3.062": (19_072 * 524_288, 3.0619),
        "llm.c (FineWeb): validation loss 3.272": (19_560 * 524_288, 3.2722),
    }
    (accuracy,) = (line for line in panels["HellaSwag accuracy"].lines if len(line.get_xdata()))
    assert accuracy.get_ydata()[-1] == pytest.approx(30.25)


LLMC = "s:0 tel:11.0092\ns:0 trl:11.0091 lr:0.000001 norm:15.37\ns:250 eval:0.2501\ns:250 tel:6.5\n"
BUILD = "0 val 10.9522\n0 hella 0.2487\n0 train 10.952208\n250 val 6.1608\n250 hella 0.2431\n"


@pytest.mark.parametrize("content, last", [(LLMC, 6.5), (BUILD, 6.1608), (f"{LLMC}s:27", 6.5)])  # one is being written
def test_a_log_file_of_another_project_is_read(tmp_path, content, last):
    (tmp_path / "log.txt").write_text(content)
    curves = report.load_log(tmp_path / "log.txt", step_tokens=1000)
    assert [(line["tokens"], line["loss"]) for line in curves.val][-1] == (250_000, last)
    assert len(curves.train) == 1
    assert curves.lines["hellaswag"][-1]["accuracy"] in (0.2501, 0.2431)


def test_a_log_file_that_is_none_is_named_and_the_rest_is_reported(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "first", world / "data/small")
    (tmp_path / "main.log").write_text(LLMC + "hello\n")
    (tmp_path / "empty.log").write_text("")
    report.main(report.Config(log_files=("main.log", "empty.log", "missing.log")))
    page = (tmp_path / "logs/report.md").read_text(encoding="utf-8")
    for problem in ("main.log, line 5 is not of a log", "empty.log has no loss", "missing.log: No such file"):
        assert f"not shown: --log-files: {problem}" in page
    assert cells(page, "first")[2] == "30 of 40"


@pytest.mark.parametrize("options", [{"log_files": ("main.log",)}, {"reference": ("llm.c",)}])
def test_logs_of_other_projects_need_no_run(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "main.log").write_text("250 val 6.5\n" if "log_files" in options else LLMC)
    report.main(report.Config(log_step_tokens=1000, **options))
    check_plot(tmp_path / "logs/loss.png")
    page = (tmp_path / "logs/report.md").read_text(encoding="utf-8")
    assert "![loss curves](loss.png)" in page
    if "log_files" in options:
        assert cells(page, "main.log") == ["main.log", "", "250", "250k", "6.5000", "", "", "", "", "log file"]
    browser_page = (tmp_path / "logs/report.html").read_text(encoding="utf-8")
    assert browser_page.count("Plotly.newPlot(") == 1  # loss
    assert "location.reload()" not in browser_page


def test_the_page_for_a_browser_is_one_file_and_reloads_while_a_run_is_not_finished(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "a<b>|c", world / "data/small")
    report.main(report.Config(reference=("build-nanogpt",)))
    page = (tmp_path / "logs/report.html").read_text(encoding="utf-8")
    (until,) = re.findall(r"if \(Date\.now\(\) < (\d+) \* 1000\) setTimeout\(\(\) => location\.reload\(\)", page)
    metrics = tmp_path / "logs/a<b>|c/metrics.jsonl"
    assert int(until) == pytest.approx(metrics.stat().st_mtime + 3600, abs=1)  # a killed run's page stops
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=", page)  # no other file
    assert "<td>a&lt;b&gt;|c</td>" in page
    assert page.count("Plotly.newPlot(") == 6  # no panel for LAMBADA
    # One name in each of the run's 5 panels and the reference's 2; the layout of each of the 6 panels has the flag too.
    shown = [len(re.findall(f'"showlegend":{flag}', page)) for flag in ("true", "false")]
    assert shown == [5 + 2 + 6, 5]  # the training loss and the values behind the medians are hidden with their run
    settings = json.loads((tmp_path / "logs/a<b>|c/run.json").read_text(encoding="utf-8"))
    (tmp_path / "logs/a<b>|c/run.json").write_text(json.dumps(settings | {"steps": 30}), encoding="utf-8")
    report.main(report.Config())
    assert "location.reload()" not in (tmp_path / "logs/report.html").read_text(encoding="utf-8")


def test_a_watched_report_is_written_again(world, tmp_path):
    write_run(tmp_path, "first", world / "data/small")
    command = [sys.executable, str(ROOT / "report.py"), "--watch", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    page = tmp_path / "logs/report.md"
    wait_until(page.exists)
    before = page.stat().st_mtime_ns
    wait_until(lambda: page.stat().st_mtime_ns > before)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].endswith("stopped\n")
