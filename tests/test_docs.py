"""Documentation states facts of the code: published figures, recipe values, files and links that exist."""

import re
from pathlib import Path

import pytest

from core.eval import results
from core.train.recipe import RECIPES

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])


@pytest.mark.parametrize("task", ["lambada", "cbt", "hellaswag", "wikitext"])
def test_evaluation_page_has_the_published_figures(task):
    protocols = [figure["protocol"] for figure in results.published(task)]
    assert results.published_table(task, protocols) in (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


def test_recipes_page_has_the_values_of_the_recipes():
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    original, speedrun = RECIPES["original"], RECIPES["speedrun"]
    rows = {
        "matrices of the blocks": ("AdamW, 6e-4", f"Muon, {speedrun.lr}, momentum {speedrun.momentum}"),
        "tokens per step": (f"{original.batch_tokens:,}", f"{speedrun.first_batch_tokens:,} for 160 steps"),
        "sequence length": ("1,024", f"{speedrun.short_seq_len} for the first 40 % of the tokens, at most 22M"),
    }
    for name, cells in rows.items():
        (row,) = re.findall(rf"^\| {name} \|.*$", text, re.M)
        assert all(cell in row for cell in cells), row
    assert original.lr == 6e-4
    assert speedrun.short_tokens == 22_000_000
    assert speedrun.embed_lr == 3e-3
    assert f"betas {speedrun.beta1} and {speedrun.beta2}" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_sections(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, section = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if section:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert section in slugs, target


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 140
    assert len(text.split()) <= 1200
    assert max(map(len, text.splitlines())) <= 145


def test_scripts_of_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\b([a-z_]+\.py)\b", text):
        assert (ROOT / name).is_file() or (ROOT / "core/train" / name).is_file(), name
