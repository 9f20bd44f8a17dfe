"""The look of the documentation's charts: one style for all, white in the light and the dark theme.

A chart is as wide as the text of a page, so that its letters are as large as those of the page.
"""

import hashlib
import io
import json
import pathlib

import matplotlib

matplotlib.use("agg")
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

IMAGES = pathlib.Path(__file__).parents[1] / "images"
WIDTH, DPI = 7.36, 200  # inches, of 100 pixels on a page of 46 rem; two pixels of the file for each
INK, GREY, BAND = "#1f2430", "#8a909c", "#f0f2f5"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (  # told apart with any colour vision (Okabe and Ito)
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
STYLE = {
    "font.size": 10, "axes.titlesize": 10.5, "axes.titleweight": "bold", "legend.fontsize": 9.5,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e4e6ea", "grid.linewidth": 0.8, "axes.axisbelow": True, "lines.linewidth": 1.6,
    "lines.markersize": 5.5, "errorbar.capsize": 2.5, "legend.frameon": False,
    "figure.facecolor": "white", "axes.facecolor": "white",
}
DRAWN = "Drawn"  # key of a picture's metadata


def look():
    """A context in which figures are drawn and saved in this style."""
    return matplotlib.rc_context(STYLE)


def chart(height: float, rows: int = 1, columns: int = 1, **settings):
    """A figure as wide as a page and its axes, [rows, columns]. height: inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def digest(figure) -> str:
    """A digest of every point and error bar, which says whether two figures show the same data."""
    lines = [np.round(line.get_xydata(), 6).tolist() for axes in figure.axes for line in axes.lines]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def save(figure, path, dpi: int = DPI):
    """Writes a PNG file of few colours, with the digest of its data."""
    written, about = io.BytesIO(), PngInfo()
    figure.savefig(written, dpi=dpi)
    about.add_text(DRAWN, digest(figure))
    Image.open(written).convert("RGB").quantize(128).save(path, optimize=True, pnginfo=about)
