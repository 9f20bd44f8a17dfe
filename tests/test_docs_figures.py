"""The charts of the results pages follow the tables of the pages; the tables of outliers."""

import importlib
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from tests.common import ROOT

IMAGES = ROOT / "docs/images"


@pytest.fixture(scope="module")
def figures():
    """A function that imports a module of docs/_figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs/_figures")
        yield importlib.import_module
        for name in {"results", "outliers", "style"} & set(sys.modules):
            del sys.modules[name]


@pytest.fixture(scope="module")
def results(figures):
    """The module docs/_figures/results.py."""
    return figures("results")


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


def test_auroc_and_its_error(figures):
    """Against scikit-learn, and the variance of Mann and Whitney's statistic without an effect."""
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=(2, 200)).round(1)  # with ties
    area, error = figures("outliers").auroc(inside, outside, paired=False)
    truth = np.repeat([0, 1], 200)
    assert area == pytest.approx(roc_auc_score(truth, np.concatenate([inside, outside])))
    assert error == pytest.approx(np.sqrt(401 / (12 * 200**2)), rel=0.15)
    _, paired = figures("outliers").auroc(inside, inside + 0.1, paired=True)
    assert paired < error / 5


def test_a_distance_is_mahalanobis(figures):
    outliers, reference = figures("outliers"), np.random.default_rng(0).normal(size=(300, 2))
    one = outliers.distance([3.0, -1.0], reference[:, 0])
    mean, deviation = reference[:, 0].mean(), reference[:, 0].std(ddof=1)
    np.testing.assert_allclose(one, np.abs([3 - mean, -1 - mean]) / deviation)
    mixed = reference @ [[2.0, 0.5], [0.0, 0.1]]  # does not change distances
    np.testing.assert_allclose(outliers.distance(mixed, mixed),
                               outliers.distance(reference, reference))
