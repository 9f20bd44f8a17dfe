"""The charts of the results pages follow the tables of the pages."""

import importlib
import re
import sys

import pytest
from PIL import Image

from tests.common import ROOT

IMAGES = ROOT / "docs/images"


@pytest.fixture(scope="module")
def results():
    """The module docs/_figures/results.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs/_figures")
        yield importlib.import_module("results")
        for name in ("results", "style"):
            del sys.modules[name]


def test_a_cell_is_a_number_with_an_error_or_refused(results):
    cells = {"2.040 ± 0.016": (2.04, 0.016), "98.1 ± 0.2 %": (98.1, 0.2), "1,407": (1407, 0),
             "-0.9925": (-0.9925, 0), "25.5 of 95": (25.5, 0)}
    assert {cell: results.number(cell) for cell in cells} == cells
    for cell in ("", "two", "0.931, 0.447", "2.04 ±", "1.2e-6", "313 / 206 / 16"):
        with pytest.raises(ValueError, match="is not a number with an error"):
            results.number(cell)


def test_a_table_is_found_by_its_heading_and_columns(results):
    page = (ROOT / "docs/results/digits.md").read_text()
    (line,) = re.findall(r"^\| bits/dim \|.*$", page, re.M)
    texts = re.findall(r"(\S+) ± (\S+)", line)
    bounds = results.table("digits", "More trajectories tighten the bound", "K")
    assert results.numbers(bounds.row("bits/dim")[1:]) == tuple(
        [float(text) for text in column] for column in zip(*texts, strict=True))
    for section, columns in (("Samples", ["K"]), ("Guidance", ["guidance", "recall"])):
        with pytest.raises(ValueError, match=r"digits\.md has 0 tables"):
            results.table("digits", section, *columns)
    with pytest.raises(ValueError, match=r"flow-matching\.md has 2 tables"):
        results.table("flow-matching", "Digits", "model")


def test_every_chart_shows_its_table_and_is_on_a_page(results):
    """A chart that fails here is drawn again by `python docs/_figures/results.py`."""
    pages = "".join(path.read_text() for path in (ROOT / "docs/results").glob("*.md"))
    with results.style.look():
        drawn = {name: results.style.digest(draw()) for name, draw in results.CHARTS.items()}
    stored = {name: Image.open(IMAGES / f"{name}.png").text[results.style.DRAWN] for name in drawn}
    assert stored == drawn
    assert [name for name in drawn if f"](../images/{name}.png)" not in pages] == []


def test_a_changed_cell_changes_its_chart(results, monkeypatch, tmp_path):
    for page in (ROOT / "docs/results").glob("*.md"):
        (tmp_path / page.name).write_text(page.read_text().replace("± 0.017 |", "± 0.018 |"))
    monkeypatch.setattr(results, "PAGES", tmp_path)
    with results.style.look():
        results.style.save(results.digits_trajectories_k(), tmp_path / "chart.png", dpi=40)
    stored = IMAGES / "digits-trajectories-k.png"
    assert Image.open(tmp_path / "chart.png").text[results.style.DRAWN] != Image.open(stored).text[
        results.style.DRAWN]
