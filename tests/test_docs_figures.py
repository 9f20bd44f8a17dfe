"""The charts of the results pages follow the tables of the pages; the tables of outliers."""

import importlib
import re
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
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


def test_the_other_images_have_the_digits_shape_and_range(figures):
    digits = load_digits().images[:40, ..., None].astype(np.uint8)
    sets = figures("outliers").other_images(digits)
    assert {images.shape for images in sets.values()} == {digits.shape}
    assert {images.dtype for images in sets.values()} == {digits.dtype}
    assert max(int(images.max()) for images in sets.values()) == 16
    np.testing.assert_array_equal(sets["rotated by 180°"], digits[:, ::-1, ::-1])
    assert (np.ptp(sets["constant"], axis=(1, 2)) == 0).all()
    assert len(np.unique(sets["letters"], axis=0)) == 40


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
