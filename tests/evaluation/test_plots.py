"""Plots of an evaluation, read back from matplotlib: curves of two runs, and densities."""

import json

import numpy as np
from PIL import Image

from ntm_jax.evaluation import plots


def collect_figures(monkeypatch):
    """A list that receives the figures, which are not written."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def write_metrics(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_losses_of_runs_share_their_axes(tmp_path, monkeypatch):
    one = write_metrics(tmp_path / "one.jsonl", [{"step": s, "loss": 10.0 / s} for s in (1, 2, 3)])
    other = write_metrics(tmp_path / "other.jsonl", [
        {"step": s, "loss": -1.0, "misalignment/level_0": 1.0, "misalignment/level_1": 3.0}
        for s in (1, 2)])
    figures = collect_figures(monkeypatch)
    plots.losses_plot({"one": one, "two": other, "missing": tmp_path / "none"}, "unused")
    losses, distances = figures[0].axes
    assert [line.get_label() for line in losses.lines] == ["one", "two"]
    assert losses.lines[1].get_xydata().tolist() == [[1, -1], [2, -1]]
    assert distances.lines[1].get_xydata().tolist() == [[1, 2], [2, 2]]
    assert len(distances.lines[0].get_xydata()) == 0
    write_metrics(other, [{"step": 1, "loss": -1.0}, {"step": 2, "loss": 1000.0}])
    plots.losses_plot({"wide": other}, "unused")
    assert len(figures[1].axes) == 1  # no panel of distances, which it does not log
    assert (losses.get_yscale(), figures[1].axes[0].get_yscale()) == ("linear", "symlog")


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
