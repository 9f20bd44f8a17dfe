"""The charts of the results pages follow the tables of the pages; the tables of outliers."""

import importlib

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from tests.common import ROOT

IMAGES = ROOT / "docs/images"


@pytest.fixture(autouse=True)
def figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs/_figures")


def test_every_chart_shows_its_table_and_is_on_a_page():
    """A chart that fails here is drawn again by `python docs/_figures/results.py`."""
    results = importlib.import_module("results")
    pages = "".join(path.read_text() for path in (ROOT / "docs/results").glob("*.md"))
    with results.style.look():
        drawn = {name: results.style.digest(draw()) for name, draw in results.CHARTS.items()}
    stored = {name: Image.open(IMAGES / f"{name}.png").text[results.style.DRAWN] for name in drawn}
    assert stored == drawn
    assert [name for name in drawn if f"](../images/{name}.png)" not in pages] == []


def test_auroc_and_its_error():
    """Against scikit-learn, and the variance of Mann and Whitney's statistic without an effect."""
    outliers = importlib.import_module("outliers")
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=(2, 200)).round(1)  # with ties
    area, error = outliers.auroc(inside, outside, paired=False)
    truth = np.repeat([0, 1], 200)
    assert area == pytest.approx(roc_auc_score(truth, np.concatenate([inside, outside])))
    assert error == pytest.approx(np.sqrt(401 / (12 * 200**2)), rel=0.15)
    _, paired = outliers.auroc(inside, inside + 0.1, paired=True)
    assert paired < error / 5
