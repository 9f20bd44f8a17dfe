"""Pictures of a run: grids of samples, the loss over training, and trajectories from noise to image.

Symbols: n images, K levels, H height, W width, C channels (1 or 3). Images are uint8.
"""

import io
import itertools
import math
import textwrap
import warnings

import numpy as np
from etils import epath

from ntm_jax import files


def displayable(images, levels: int) -> np.ndarray:
    """Pixel values 0..levels-1 [..., C] -> 0..255. Of latents (levels 0), the first three channels in false colours, -3 to 3."""
    if not levels:
        shown = np.asarray(images)[..., : 3 if np.shape(images)[-1] >= 3 else 1]
        return ((shown.clip(-3, 3) + 3) * (255 / 6)).round().astype(np.uint8)
    return (np.asarray(images, np.float32) * (255 / (levels - 1))).round().astype(np.uint8)


def picture(images, levels: int, columns: int = 10) -> np.ndarray:
    """One grid [H, W, C] of images [n, H, W, C], small ones enlarged."""
    return image_grid(displayable(images, levels), min(len(images), columns), max(1, 64 // images.shape[1]))

HELD_OUT = {"evaluate/bits_per_dim": "bits per dimension", "evaluate/nats_per_dim": "nats per dimension",
            "evaluate/mse": "mean squared error", "evaluate/velocity_error": "mean squared error"}
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


def contact_sheet(images, captions, out_png, columns: int = 8) -> None:
    """Draws images [n, H, W, C], each with its caption under it, wrapped and cut to four lines."""
    images, columns = np.asarray(images), min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    figure, axes = _figure(1.4 * columns, 1.95 * rows, rows, columns)
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, image, caption in zip(axes.flat, images, captions, strict=False):
        panel.imshow(_displayable(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        text = "\n".join(textwrap.wrap(caption, 26, max_lines=4, placeholder=" ..."))
        panel.text(0.5, -0.04, text, transform=panel.transAxes, ha="center", va="top", fontsize=6, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a script that the font lacks is drawn as boxes
        _save(figure, out_png)


def save_png(path, image) -> None:
    """Writes a uint8 array [H, W, C] as a PNG file, locally or to object storage."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(_displayable(image)).save(buffer, "png")
    files.write(path, buffer.getvalue())


def loss_plot(metrics_path, out_png, loss_label: str = "training loss (nats per dimension)") -> bool:
    """Draws the "loss" of a metrics.jsonl over the steps, raw and smoothed, and the held-out bound on a second axis where lines have it.

    Returns:
      Whether there was anything to draw: False, and no file, before the first line with a finite loss.
    """
    lines = files.read_lines(metrics_path)
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


def losses_plot(runs: dict, out_png) -> None:
    """Draws the smoothed training losses of runs, {name: its metrics.jsonl}, and below, where they have it, the distance of their means to
    those of the frozen flow-matching model, mean over levels. Runs without the file are left out."""
    figure, axes = _figure(7, 6, 2, 1)
    for name, path in runs.items():
        if not epath.Path(path).exists():
            continue
        lines = files.read_lines(path)
        for line in lines:
            apart = [value for key, value in line.items() if key.startswith("misalignment/") and _is_number(value)]
            line["apart"] = sum(apart) / len(apart) if apart else None
        for (axis,), key in zip(axes, ("loss", "apart"), strict=True):
            steps, values = _points(lines, key)
            axis.plot(steps, _smoothed(values), label=name)
    axes[0, 0].set(ylabel="training loss", yscale="symlog" if np.abs(axes[0, 0].dataLim.intervaly).max() > 10 else "linear")
    axes[0, 0].legend()
    axes[1, 0].set(xlabel="step", ylabel="distance of the means, squared", yscale="log" if axes[1, 0].lines else "linear")
    _save(figure, out_png)


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


def points_picture(points, levels, extent: float, out_png) -> None:
    """Draws points of the plane [n, K, 2] on [-extent, extent]^2 at noise levels [K], in columns."""
    points = np.asarray(points)
    figure, axes = _figure(2.5 * len(levels), 2.8, 1, len(levels))
    for k, (panel, level) in enumerate(zip(axes[0], levels, strict=True)):
        panel.scatter(*points[:, k].T, s=2, linewidths=0)
        panel.set(title=f"t={level:.2g}", xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
    _save(figure, out_png)


def levels_plot(result: dict, out_png) -> None:
    """Draws what each noise level costs, of an evaluation.json: its NLL, and the terms that make up the bound, in nats per dimension.

    A transition's rate is what the bound pays for it, the predictor, the transporter's log-det and the forward process together.
    """
    nll, terms, rate = result["trajectory_nll"], result["contributions"], result["rate_by_level"]
    figure, axes = _figure(11, 4, 1, 2)
    left, right = axes[0]
    names = [f"{s:.2g} from {t:.2g}" for s, t in itertools.pairwise(result["provenance"]["levels"])]
    left.bar(names, nll["by_level"], yerr=nll["stderr_by_level"], color="tab:blue")
    left.set(title="trajectory NLL by transition of the noise level t", ylabel="nats per dimension")
    parts = {name: np.negative(terms[name][: len(rate)]) for name in ("predictor", "log_det", "forward")}
    for i, (name, values) in enumerate(parts.items()):
        right.bar(np.arange(len(rate)) + (i - 1) * 0.25, values, 0.25, label=name.replace("_", "-"), alpha=0.6)
    right.plot(np.arange(len(rate)), rate, "ko-", label="rate: their sum")
    if "reconstruction" in terms:
        right.axhline(-terms["reconstruction"], color="tab:red", linestyle="--", label="reconstruction")
    right.set_xticks(np.arange(len(rate)), names)
    right.set(title="what makes up the bound", ylabel="nats per dimension")
    right.axhline(0, color="black", linewidth=0.5)
    right.legend()
    _save(figure, out_png)


def density_picture(true, learned, levels, extent: float, out_png) -> None:
    """Draws densities of the plane, true (upper row) and learned [K, m, m], at noise levels [K] in any order: noisy (left) to clean.

    Densities are given by row y and column x on [-extent, extent]; those of a level share their colours, of which white is 0.
    """
    levels = np.asarray(levels)
    figure, axes = _figure(1.6 * len(levels) + 0.3, 3.5, 2, len(levels))
    for column, level in enumerate(np.argsort(-levels)):
        axes[0, column].set_title(f"t={levels[level]:.2g}", fontsize=8)
        brightest = max(np.max(true[level]), np.max(learned[level]))
        for row, density in enumerate((true[level], learned[level])):
            axes[row, column].imshow(density, cmap="Blues", vmin=0, vmax=brightest, origin="lower", extent=(-extent, extent) * 2)
            axes[row, column].set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("true")
    axes[1, 0].set_ylabel("learned")
    _save(figure, out_png)


def _points(lines, key):
    """Steps and values of the lines that have a finite value under the key."""
    pairs = [(line["step"], line[key]) for line in lines if _is_number(line.get("step")) and _is_number(line.get(key))]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e300  # which leaves out NaN too


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
    files.write(path, buffer.getvalue())
