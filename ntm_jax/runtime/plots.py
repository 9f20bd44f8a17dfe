"""Pictures of a run: grids of samples, the training loss, and trajectories from noise to image.

Symbols: n images, K levels, H height, W width, C channels (1 or 3). Images are uint8.
"""

import io
import math
import textwrap
import warnings
from typing import Any

import numpy as np

from ntm_jax import files

HELD_OUT = {
    "evaluate/bits_per_dim": "bits per dimension", "evaluate/nats_per_dim": "nats per dimension",
    "evaluate/mse": "mean squared error", "evaluate/velocity_error": "mean squared error"}
SMOOTHING_POINTS = 50  # the smoothed loss averages over 1/50 of the points
CELL_INCHES = 0.9


def displayable(images, pixel_levels: int) -> np.ndarray:
    """Values 0..pixel_levels-1 [..., C], or latents if pixel_levels is 0 -> uint8 images.

    The first three channels of latents are shown in false colours, which span -3 to 3.
    """
    if not pixel_levels:
        shown = np.asarray(images)[..., : 3 if np.shape(images)[-1] >= 3 else 1]
        return ((shown.clip(-3, 3) + 3) * (255 / 6)).round().astype(np.uint8)
    return (np.asarray(images, np.float32) * (255 / (pixel_levels - 1))).round().astype(np.uint8)


def picture(images, pixel_levels: int, columns: int = 10) -> np.ndarray:
    """One uint8 grid [H, W, C] of values or latents [n, H, W, C], enlarging small images."""
    scale = max(1, 64 // images.shape[1])
    return image_grid(displayable(images, pixel_levels), min(len(images), columns), scale)


def image_grid(images, columns: int, scale: int = 1, padding: int = 2) -> np.ndarray:
    """Lays out images [n, H, W, C] in rows on white, `padding` pixels apart.

    scale: enlarges each pixel to scale x scale.

    Returns:
      uint8 [rows * (scale * H + padding) + padding, columns * (scale * W + padding) + padding, C].
    """
    images = np.asarray(images)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, channels = images.shape
    rows = math.ceil(n / columns)
    shape = rows * (height + padding) + padding, columns * (width + padding) + padding, channels
    grid = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top, left = padding + row * (height + padding), padding + column * (width + padding)
        grid[top : top + height, left : left + width] = image
    return grid


def contact_sheet(images, captions, out_png, columns: int = 8) -> None:
    """Draws images [n, H, W, C], each above its caption, wrapped and cut to four lines."""
    images, columns = np.asarray(images), min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    sheet, axes = figure(1.4 * columns, 1.95 * rows, rows, columns)
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, image, caption in zip(axes.flat, images, captions, strict=False):
        _show(panel, image)
        text = "\n".join(textwrap.wrap(caption, 26, max_lines=4, placeholder=" ..."))
        panel.text(0.5, -0.04, text, transform=panel.transAxes, ha="center", va="top", fontsize=6,
                   parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font draws unsupported scripts as boxes
        save_figure(sheet, out_png)


def save_png(path, image) -> None:
    """Writes a uint8 array [H, W, C] as a PNG file, locally or to object storage."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(_without_gray_axis(image)).save(buffer, "png")
    files.write(path, buffer.getvalue())


def loss_plot(metrics_path, out_png,
              loss_label: str = "training loss (nats per dimension)") -> bool:
    """Draws a metrics.jsonl's loss over the steps, raw and smoothed; returns whether it has one.

    Draws the held-out bound on a second axis if it is logged. Writes no file without a finite loss.
    """
    lines = files.read_lines(metrics_path)
    steps, losses = metric_points(lines, "loss")
    if not steps:
        return False
    plot, axes = figure(7, 4)
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    curves = axes.plot(steps, smoothed(losses), color="tab:blue", label=loss_label)
    axes.set(xlabel="step", ylabel=loss_label)
    key = next((key for key in HELD_OUT if metric_points(lines, key)[0]), None)
    if key:
        held_out = axes.twinx()
        label = f"held-out bound ({HELD_OUT[key]})"
        curves += held_out.plot(*metric_points(lines, key), color="tab:orange", marker="o",
                                markersize=4, label=label)
        held_out.set_ylabel(label)
    axes.legend(curves, [curve.get_label() for curve in curves])
    save_figure(plot, out_png)
    return True


def trajectory_picture(images, levels, out_png) -> None:
    """Draws trajectories, one per row, from pure noise (left) to clean.

    images: [n, K, H, W, C] at noise levels [K] in any order.
    """
    images, levels = np.asarray(images), np.asarray(levels)
    n, k = images.shape[:2]
    plot, axes = figure(CELL_INCHES * k, CELL_INCHES * n + 0.3, n, k)
    for column, level in enumerate(np.argsort(-levels)):
        axes[0, column].set_title(f"t={levels[level]:.2g}", fontsize=8)
        for row in range(n):
            _show(axes[row, column], images[row, level])
            axes[row, column].set_axis_off()
    save_figure(plot, out_png)


def points_picture(points, levels, extent: float, out_png) -> None:
    """Draws points of the plane [n, K, 2] at noise levels [K], one panel per level.

    Each panel shows the square [-extent, extent]^2.
    """
    points = np.asarray(points)
    plot, axes = figure(2.5 * len(levels), 2.8, 1, len(levels))
    for k, (panel, level) in enumerate(zip(axes[0], levels, strict=True)):
        panel.scatter(*points[:, k].T, s=2, linewidths=0)
        panel.set(title=f"t={level:.2g}", xlim=(-extent, extent), ylim=(-extent, extent),
                  aspect="equal")
    save_figure(plot, out_png)


def metric_points(lines: list[dict], key: str) -> tuple[list, list]:
    """(steps, values) of the metrics' lines that have a finite value under the key."""
    pairs = [(line["step"], line[key]) for line in lines
             if is_number(line.get("step")) and is_number(line.get(key))]
    return [step for step, _ in pairs], [value for _, value in pairs]


def is_number(value) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and abs(value) < 1e300  # false for NaN


def smoothed(values: list) -> list[float]:
    """The centred running mean of values, over fewer of them near the ends."""
    half = len(values) // (2 * SMOOTHING_POINTS)
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def figure(width: float, height: float, rows: int | None = None,
           columns: int = 1) -> tuple[Any, Any]:
    """(figure, axes) of a size in inches: one axes, or an array of axes [rows, columns]."""
    from matplotlib.figure import Figure

    # Not pyplot's, which opens a window system and keeps a global list of figures.
    made = Figure(figsize=(width, height), dpi=120, layout="constrained")
    if rows is None:
        return made, made.subplots()
    return made, made.subplots(rows, columns, squeeze=False)


def save_figure(figure, path) -> None:
    """Writes a figure as a PNG file, locally or to object storage."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    files.write(path, buffer.getvalue())


def _show(panel, image) -> None:
    panel.imshow(_without_gray_axis(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def _without_gray_axis(image):
    """[H, W, 1] as [H, W], the shape of gray images in Pillow and matplotlib."""
    image = np.asarray(image)
    return image[..., 0] if image.shape[-1] == 1 else image
