"""The charts of the results pages follow the tables of the pages."""

import importlib

from PIL import Image

from tests.common import ROOT

IMAGES = ROOT / "docs/images"


def test_every_chart_shows_its_table_and_is_on_a_page(monkeypatch):
    """A chart that fails here is drawn again by `python docs/_figures/results.py`."""
    monkeypatch.syspath_prepend(ROOT / "docs/_figures")
    results = importlib.import_module("results")
    pages = "".join(path.read_text() for path in (ROOT / "docs/results").glob("*.md"))
    with results.style.look():
        drawn = {name: results.style.digest(draw()) for name, draw in results.CHARTS.items()}
    stored = {name: Image.open(IMAGES / f"{name}.png").text[results.style.DRAWN] for name in drawn}
    assert stored == drawn
    assert [name for name in drawn if f"](../images/{name}.png)" not in pages] == []
