"""A locale that isn't UTF-8 changes neither files nor exit statuses: text, names and paths can have any character."""

import json
import shutil

import pytest
from conftest import TRAIN, refused, run

LOCALES = {
    "ASCII": {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
    "ASCII on the terminal": {"PYTHONIOENCODING": "ascii", "LC_ALL": "C.UTF-8"},
}
NAME = "na\u00efve \u65e5\u672c"


@pytest.fixture
def here(world, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copytree(world / "data/small", tmp_path / f"data/{NAME}")
    return tmp_path


@pytest.mark.parametrize("locale", LOCALES)
def test_preparation_reads_and_names_any_text(world, here, locale):
    texts = [f"caf\u00e9 {NAME} \U0001f642 {number}" for number in range(90)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (here / f"{NAME}.jsonl").write_text("".join(lines), encoding="utf-8")
    command = ("--source", f"{NAME}.jsonl", "--encoding", world / "data/stories", "--workers", "2")
    run("fineweb.py", *command, "--out", "expected", cwd=here)
    run("fineweb.py", *command, "--out", f"out {NAME}", cwd=here, **LOCALES[locale])
    for path in (here / "expected").iterdir():
        if path.name != ".lock":
            assert (here / f"out {NAME}" / path.name).read_bytes() == path.read_bytes()
    (here / f"{NAME}.jsonl").write_text("".join([*lines[:9], f'{{"{NAME}": 3}}\n']), encoding="utf-8")
    message = refused(run("fineweb.py", *command, "--out", "other", cwd=here, check=False, **LOCALES[locale]))
    shown = NAME.encode("ascii", "backslashreplace").decode()
    assert message.startswith((f"{here}/{NAME}.jsonl, byte", f"{here}/{shown}.jsonl, byte"))


def test_training_reports_and_samples_read_and_name_any_path(here):
    command = (*TRAIN, "--data", f"data/{NAME}", "--run-name", f"run {NAME}", "--steps", 2)
    run("train.py", *command, cwd=here, **LOCALES["ASCII"])
    folder = here / f"logs/run {NAME}"
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))
    report = run("report.py", "--runs", f"run {NAME}", "--out", f"report {NAME}", cwd=here, **LOCALES["ASCII"])
    page = (here / f"report {NAME}/report.md").read_text(encoding="utf-8")
    assert f"run {NAME}" in page
    assert page.splitlines()[0] in report.stdout
    sample = ("--ckpt", f"logs/run {NAME}", "--prompt", "na\u00efve", "--tokens", 3, "--device", "cpu")
    assert "na\u00efve" in run("sample.py", *sample, cwd=here, **LOCALES["ASCII"]).stdout
    assert "na\\xefve" in run("sample.py", *sample, cwd=here, **LOCALES["ASCII on the terminal"]).stdout
