"""Plots of an evaluation, read back from matplotlib: curves of two runs, and densities."""


import numpy as np
from PIL import Image

from ntm_jax.evaluation import plots


def collect_figures(monkeypatch):
    """A list that receives the figures, which are not written."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def test_densities_run_from_noisy_to_clean_with_the_true_above_the_learned(tmp_path, monkeypatch):
    true, learned = np.random.default_rng(3).random((2, 3, 8, 8))
    levels = np.array([0.05, 0.5, 0.25])
    plots.density_picture(true, learned, levels, 3.0, tmp_path / "d.png")
    with Image.open(tmp_path / "d.png") as image:
        assert image.height > 300
    figures = collect_figures(monkeypatch)
    plots.density_picture(true, learned, levels, 3.0, "unused")
    axes = np.reshape(figures[0].axes, (2, 3))
    assert [a.get_title() for a in axes[0]] == ["t=0.5", "t=0.25", "t=0.05"]
    assert [a.get_ylabel() for a in axes[:, 0]] == ["true", "learned"]
    for row, densities in enumerate((true, learned)):
        for column, level in enumerate((1, 2, 0)):
            (image,) = axes[row, column].images
            np.testing.assert_array_equal(image.get_array(), densities[level])
            assert (image.origin, list(image.get_extent())) == ("lower", [-3, 3, -3, 3])
            assert image.get_clim() == (0, max(true[level].max(), learned[level].max()))
