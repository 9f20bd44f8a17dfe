"""Draws samples of two runs from the same noise side by side: with and without the transporter.

    python docs/_figures/transporter.py WITH WITHOUT OUT

WITH and WITHOUT are folders of class-conditional runs of gray images, OUT is a PNG file. A row is a
class; an image of the left half and that in its place in the right half start from the same noise.
"""

import sys

import numpy as np
from style import chart, look, save

import ntm_jax

CLASSES, COLUMNS, SCALE, GAP = 6, 8, 10, 4


def sheet(run):
    """COLUMNS samples of each of the first CLASSES classes, [H, W], white between them."""
    labels = np.repeat(np.arange(CLASSES), COLUMNS)
    images = run.sample(len(labels), label=labels, seed=0)[..., 0] / (run.spec.pixel_levels - 1)
    images = images.repeat(SCALE, 1).repeat(SCALE, 2)
    images = np.pad(images, ((0, 0), (GAP, GAP), (GAP, GAP)), constant_values=1)
    _, height, width = images.shape
    rows = images.reshape(CLASSES, COLUMNS, height, width).swapaxes(1, 2)
    return rows.reshape(CLASSES * height, COLUMNS * width)


def main(with_transporter: str, without: str, out: str):
    """Samples both runs and writes the picture."""
    with look():
        figure, (both,) = chart(2.88, 1, 2)
        for axes, folder, title in zip(both, (with_transporter, without),
                                       ("with transporter", "without transporter"), strict=True):
            picture = sheet(ntm_jax.load(folder))
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(title=title, xticks=[])
            axes.set_yticks((np.arange(CLASSES) + 0.5) * len(picture) / CLASSES, range(CLASSES))
            axes.tick_params(length=0)
            axes.grid(False)
            axes.spines[:].set_visible(False)
        both[0].set_ylabel("class")
        save(figure, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
