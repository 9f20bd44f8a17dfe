"""Pictures of a run: grids of samples, the loss over training, and trajectories from noise to image.

Symbols: n images, K levels, H height, W width, C channels (1 or 3). Images are uint8.
"""

import io
import json
import math

import numpy as np
from etils import epath

HELD_OUT = {"evaluate/bits_per_dim": "bits per dimension", "evaluate/nats_per_dim": "nats per dimension"}
SMOOTHING_POINTS = 50  # the smoothed loss averages over a 50th of the points
CELL_INCHES = 0.9


def image_grid(images, columns: int, scale: int = 1, padding: int = 2) -> np.ndarray:
    """Lays images [n, H, W, C] out in rows, each pixel enlarged to scale x scale, on white with `padding` pixels around each image.

    Returns:
      uint8 [rows * (scale * H + padding) + padding, columns * (scale * W + padding) + padding, C].
    """
    images = np.asarray(images)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, channels = images.shape
    rows = math.ceil(n / columns)
    grid = np.full((rows * (height + padding) + padding, columns * (width + padding) + padding, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (padding + place * (size + padding) for place, size in zip(divmod(i, columns), (height, width), strict=True))
        grid[top : top + height, left : left + width] = image
    return grid


def save_png(path, image) -> None:
    """Writes a uint8 array [H, W, C] as a PNG file, locally or to object storage."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(_displayable(image)).save(buffer, "png")
    epath.Path(path).write_bytes(buffer.getvalue())


def loss_plot(metrics_path, out_png, loss_label: str = "training loss (nats per dimension)") -> bool:
    """Draws the "loss" of a metrics.jsonl over the steps, raw and smoothed, and the held-out bound on a second axis where lines have it.

    Returns:
      Whether there was anything to draw: False, and no file, before the first line with a finite loss.
    """
    lines = [json.loads(line) for line in epath.Path(metrics_path).read_text().splitlines()]
    steps, losses = _points(lines, "loss")
    if not steps:
        return False
    figure, axes = _figure(7, 4)
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    curves = axes.plot(steps, _smoothed(losses), color="tab:blue", label=loss_label)
    axes.set(xlabel="step", ylabel=loss_label)
    key = next((key for key in HELD_OUT if _points(lines, key)[0]), None)
    if key:
        held_out = axes.twinx()
        label = f"held-out bound ({HELD_OUT[key]})"
        curves += held_out.plot(*_points(lines, key), color="tab:orange", marker="o", markersize=4, label=label)
        held_out.set_ylabel(label)
    axes.legend(curves, [curve.get_label() for curve in curves])
    _save(figure, out_png)
    return True


def trajectory_picture(images, levels, out_png) -> None:
    """Draws trajectories, images [n, K, H, W, C] at noise levels [K] in any order: a row an image, from pure noise (left) to clean."""
    images, levels = np.asarray(images), np.asarray(levels)
    n, k = images.shape[:2]
    figure, axes = _figure(CELL_INCHES * k, CELL_INCHES * n + 0.3, n, k)
    for column, level in enumerate(np.argsort(-levels)):
        axes[0, column].set_title(f"t={levels[level]:.2g}", fontsize=8)
        for row in range(n):
            axes[row, column].imshow(_displayable(images[row, level]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes[row, column].set_axis_off()
    _save(figure, out_png)


def _points(lines, key):
    """Steps and values of the lines that have a finite value under the key."""
    pairs = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _smoothed(values):
    """Centred running mean; near the ends, of the points there are."""
    half = len(values) // (2 * SMOOTHING_POINTS)
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def _displayable(image):
    """[H, W, 1] as [H, W], which is how picture libraries know gray."""
    image = np.asarray(image)
    return image[..., 0] if image.shape[-1] == 1 else image


def _figure(width, height, rows=None, columns=None):
    """A figure of its own, not pyplot's: no window system, no global list of figures to leak. Returns (figure, its axes)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    return figure, figure.subplots() if rows is None else figure.subplots(rows, columns, squeeze=False)


def _save(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    epath.Path(path).write_bytes(buffer.getvalue())
