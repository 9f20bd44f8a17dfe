"""The pictures: pixels of grids, and the points of plots, read from matplotlib."""

import json

import numpy as np
from matplotlib import font_manager

from ntm_jax.runtime import plots


def test_grid_places_and_enlarges_every_image():
    images = np.random.default_rng(0).integers(0, 200, (5, 3, 4, 3), np.uint8)
    grid = plots.image_grid(images, columns=2, scale=3, padding=2)
    assert grid.shape == (3 * (9 + 2) + 2, 2 * (12 + 2) + 2, 3)
    assert grid.dtype == np.uint8
    for i, image in enumerate(images):
        top, left = 2 + (i // 2) * 11, 2 + (i % 2) * 14
        enlarged = np.kron(image, np.ones((3, 3, 1), np.uint8))
        np.testing.assert_array_equal(grid[top : top + 9, left : left + 12], enlarged)
        grid[top : top + 9, left : left + 12] = 255
    assert (grid == 255).all()  # nothing else: white padding, white empty place


def test_letters_that_no_font_has_are_escapes_and_others_find_a_font(monkeypatch):
    letter = "\u1d84"  # of STIXGeneral, and not of DejaVu Sans
    texts, fonts = plots.drawable(["cat\n\U0010ffff", letter])
    assert texts == ["cat\n\\U0010ffff", letter]
    assert (fonts[0], len(fonts)) == ("DejaVu Sans", 2)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    assert plots.drawable(["caf\u00e9", "\u732b"]) == (["caf\u00e9", r"\u732b"], ["DejaVu Sans"])


def test_loss_plot_has_both_curves_and_units(tmp_path, monkeypatch):
    lines = [{"step": s, "wall_time": 0.0, "loss": None if s == 30 else 10.0 / s}
             for s in range(1, 301)]
    for line, bound in ((lines[99], 3.5), (lines[199], 3.25)):
        line |= {"evaluate/nll/level_1": 1.0, "evaluate/bits_per_dim": bound}
    path, figures = tmp_path / "metrics.jsonl", []
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(plots, "save_figure", lambda *given: figures.append(given[0]))
    assert plots.loss_plot(path, tmp_path / "loss.png", "training loss (squared error)")
    losses, held_out = figures[0].axes
    raw, smooth = losses.lines
    assert (len(raw.get_xdata()), 30 in raw.get_xdata()) == (299, False)
    mean = np.mean(raw.get_ydata()[98:103])
    np.testing.assert_allclose(smooth.get_ydata()[100], mean, rtol=1e-12)
    assert held_out.lines[0].get_xydata().tolist() == [[100, 3.5], [200, 3.25]]
    assert held_out.get_ylabel() == "held-out bits per dim"
