"""Pictures of a run: grids of samples, the training loss, and trajectories from noise to image.

Symbols: n images, K levels, H height, W width, C channels (1 or 3). Images are uint8.
"""

import dataclasses
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from ntm_jax import files

SMOOTHING_POINTS = 50  # the smoothed loss averages over 1/50 of the points
GRID_COLUMNS = 10  # images in a row of a grid of samples
PAIRED_COLUMNS = 5  # of an array, of which a picture shows all pairs
DPI = 120  # of all figures
NAME_MARGIN, TITLE_MARGIN = 150, 22  # pixels beside and above the images of a sheet
NAME_LETTERS = 16  # that fit beside them


def displayable(images, pixel_levels: int) -> np.ndarray:
    """Values 0..pixel_levels-1 [..., C], or latents if pixel_levels is 0 -> uint8 images.

    The first three channels of latents are shown in false colours, which span -3 to 3.
    """
    if not pixel_levels:
        shown = np.asarray(images)[..., : 3 if np.shape(images)[-1] >= 3 else 1]
        return ((shown.clip(-3, 3) + 3) * (255 / 6)).round().astype(np.uint8)
    return (np.asarray(images, np.float32) * (255 / (pixel_levels - 1))).round().astype(np.uint8)


def picture(images, pixel_levels: int) -> np.ndarray:
    """One uint8 grid [H, W, C] of values or latents [n, H, W, C], enlarging small images."""
    scale = max(1, 64 // images.shape[1])
    return image_grid(displayable(images, pixel_levels), min(len(images), GRID_COLUMNS), scale)


def image_grid(images, columns: int, scale: int = 1, padding: int = 2) -> np.ndarray:
    """Lays out images [n, H, W, C] in rows on white, `padding` pixels apart.

    scale: enlarges each pixel to scale x scale.

    Returns:
      uint8 [rows * (scale * H + padding) + padding, columns * (scale * W + padding) + padding, C].
    """
    images = np.asarray(images).repeat(scale, axis=1).repeat(scale, axis=2)
    missing = -len(images) % columns
    cells = np.pad(images, ((0, missing), (0, padding), (0, padding), (0, 0)), constant_values=255)
    _, height, width, channels = cells.shape
    rows = cells.reshape(-1, columns, height, width, channels).swapaxes(1, 2)
    grid = rows.reshape(-1, columns * width, channels)
    return np.pad(grid, ((padding, 0), (padding, 0), (0, 0)), constant_values=255)


@dataclasses.dataclass(frozen=True)
class SheetRow:
    """A row of a contact sheet: samples [n, H, W, C], other images [m, H, W, C] beside, a name."""

    name: str
    samples: np.ndarray
    beside: np.ndarray | tuple = ()


def contact_sheet(rows: list[SheetRow], out_png, titles=("samples", "real images")) -> None:
    """Draws rows of uint8 images, each beside its name, which is wrapped and cut to four lines.

    titles: of the samples, and of the other images, which stand to the right of all samples.
    """
    made, others = (max(map(len, kind)) for kind in
                    zip(*((row.samples, row.beside) for row in rows), strict=True))
    first = made + 1  # an empty column divides the two
    cells = np.full((len(rows), first + others if others else made, *rows[0].samples.shape[1:]),
                    255, np.uint8)
    for place, row in zip(cells, rows, strict=True):
        place[: len(row.samples)] = row.samples
        if len(row.beside):
            place[first : first + len(row.beside)] = row.beside
    titles = dict(zip((0, first), titles, strict=True)) if others else {}
    _save_sheet(cells, [row.name for row in rows], titles, out_png)


def _save_sheet(images, names: list[str], titles: dict[int, str], out_png) -> None:
    """Draws uint8 images [rows, columns, H, W, C] beside names, under titles {column: title}.

    One picture holds all images, since a matplotlib axes for each would take a minute.
    """
    rows, columns, *shape = images.shape
    scale = max(1, round(64 / max(shape[:2])))
    sheet = image_grid(images.reshape(-1, *shape), columns, scale)
    height, width = sheet.shape[:2]
    left, top = NAME_MARGIN if names else 0, TITLE_MARGIN if titles else 0
    plot, ((axes,),) = figure((left + width) / DPI, (top + height) / DPI)
    plot.set_layout_engine("none")
    axes.set_position((left / (left + width), 0, width / (left + width), height / (top + height)))
    axes.imshow(_without_gray_axis(sheet), cmap="gray", vmin=0, vmax=255, interpolation="nearest",
                aspect="auto")
    names, fonts = drawable(names)
    wrapped = ["\n".join(textwrap.wrap(name, NAME_LETTERS, max_lines=4, placeholder=" ..."))
               for name in names]
    axes.set_yticks((np.arange(len(names)) + 0.5) * height / rows, wrapped, parse_math=False,
                    family=fonts)
    axes.set_xticks([column * width / columns for column in titles], titles.values(), ha="left")
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=7)
    axes.set_frame_on(False)
    save_figure(plot, out_png)


def drawable(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """(texts, the fonts that draw them); a letter that no font here has becomes its escape."""
    from matplotlib import font_manager

    fonts = ["DejaVu Sans"]  # comes with matplotlib
    font = font_manager.get_font(font_manager.findfont(fonts[0]))
    missing = {letter for text in texts for letter in text
               if not letter.isspace() and not font.get_char_index(ord(letter))}
    for entry in font_manager.fontManager.ttflist if missing else ():
        font = font_manager.get_font(entry.fname)
        if font.scalable and not entry.name.startswith("Last Resort"):  # which has boxes
            found = {letter for letter in missing if font.get_char_index(ord(letter))}
            fonts += [entry.name] if found else []
            missing -= found
    escape = {ord(letter): ascii(letter)[1:-1] for letter in missing}
    return [text.translate(escape) for text in texts], fonts


def save_png(path, image) -> None:
    """Writes a uint8 array [H, W, C] as a PNG file, locally or to object storage."""
    from PIL import Image

    with files.atomic_writer(path) as file:
        Image.fromarray(_without_gray_axis(image)).save(file, "png")


def loss_plot(metrics_path, out_png, loss_label: str) -> bool:
    """Draws a metrics.jsonl's loss over the steps, raw and smoothed; returns whether it has one.

    Draws in a panel below the first held-out figure that is logged, `evaluate/NAME`. Writes no file
    without a finite loss.
    """
    lines = files.read_lines(metrics_path)
    steps, losses = metric_points(lines, "loss")
    if not steps:
        return False
    keys = (key for line in lines for key in line)
    key = next((key for key in keys if re.fullmatch("evaluate/[^/]+", key)), None)
    plot, panels = figure(7, 6 if key else 3.5, 2 if key else 1)
    top, bottom = panels[0, 0], panels[-1, 0]
    top.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="each step logged")
    top.plot(steps, smoothed(losses), color="tab:blue", label="smoothed")
    top.set_ylabel(loss_label)
    plot.legend(loc="outside upper right", ncols=2)
    if key:
        bottom.plot(*metric_points(lines, key), color="tab:orange", marker="o", markersize=4)
        bottom.set_ylabel("held-out " + key.removeprefix("evaluate/").replace("_", " "))
        bottom.sharex(top)
    bottom.set_xlabel("step")
    save_figure(plot, out_png)
    return True


def trajectory_picture(images, levels, out_png, names=()) -> None:
    """Draws trajectories, one per row, from pure noise (left) to clean.

    images: [n, K, H, W, C] at noise levels [K] in any order. names: of the rows, up to n.
    """
    order = np.argsort(-np.asarray(levels))
    titles = {column: f"t={levels[level]:.2g}" for column, level in enumerate(order)}
    _save_sheet(np.asarray(images)[:, order], list(names), titles, out_png)


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


def columns_picture(rows: dict[str, np.ndarray], out_png) -> None:
    """Draws the first columns of rows [n, D] by name, such as held out, and their pairs."""
    count = min(min(np.shape(values)[1] for values in rows.values()), PAIRED_COLUMNS)
    plot, axes = figure(2 * count + 1, 2 * count + 0.6, count, count)
    for row, column in np.ndindex(count, count):
        panel = axes[row, column]
        panel.axis("on" if row >= column else "off")
        for name, values in rows.items():
            if row == column:
                panel.hist(values[:, row], 30, density=True, histtype="step", label=name)
            elif row > column:
                panel.scatter(values[:, column], values[:, row], s=2, linewidths=0, alpha=0.5)
    plot.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right")
    save_figure(plot, out_png)


def metric_points(lines: list[dict], key: str) -> tuple[list, list]:
    """(steps, values) of the metrics' lines that have a finite value under the key."""
    pairs = [(line["step"], line[key]) for line in lines
             if isinstance(line.get(key), (int, float)) and abs(line[key]) < 1e300]  # not NaN
    return [step for step, _ in pairs], [value for _, value in pairs]


def smoothed(values: list) -> list[float]:
    """The centred running mean of values, over fewer of them near the ends."""
    half = len(values) // (2 * SMOOTHING_POINTS)
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """(figure, an array of its axes [rows, columns]) of a size in inches."""
    from matplotlib.figure import Figure

    # Not pyplot's, which opens a window system and keeps a global list of figures.
    made = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False)


def save_figure(figure, path) -> None:
    """Writes a figure as a PNG file, locally or to object storage."""
    with files.atomic_writer(path) as file:
        figure.savefig(file, format="png")


def _without_gray_axis(image):
    """[H, W, 1] as [H, W], the shape of gray images in Pillow and matplotlib."""
    image = np.asarray(image)
    return image[..., 0] if image.shape[-1] == 1 else image
