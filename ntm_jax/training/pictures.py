"""Pictures of a run as it learns: samples beside real images, trajectories, the loss curve."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from ntm_jax.data.sources import Source
from ntm_jax.data.transforms import unstandardise
from ntm_jax.runtime import plots
from ntm_jax.runtime.config import Data
from ntm_jax.runtime.run import Run
from ntm_jax.sampling import generate

MAX_LEVELS = 17  # noise levels in a picture of trajectories
MAX_ROWS = 10  # rows of samples, by class or caption, and trajectories
REAL_PER_CLASS = 4  # training images beside the samples of a class
MAX_RECORDS_READ = 1000  # records that are read to find these, and distinct captions
COLUMNS = 10  # samples in a row of samples.png
CHANGE_COLUMNS = 6  # and of before_after.png, on each side
MAX_TABLE_ROWS = 1000  # rows of an array, held out and sampled, in a picture of its columns


class _Row(NamedTuple):
    """A row of samples: its name, the indices of its images, and real images of its condition.

    An index determines the condition: classes, or held-out records, take turns.
    """

    name: str
    index: np.ndarray
    real: Sequence = ()


def draw(run: Run, held_out: Source, loss_label: str) -> list[str]:
    """Draws samples.png, trajectories.png and loss.png in the run's folder, in process 0.

    samples.png has a row for each class, beside training images, or for each of the first held-out
    captions, beside its own image; of an array it shows pairs of columns, and there is no
    trajectories.png. Returns the paths.
    """
    folder = epath.Path(run.workdir)
    samples, trajectories, loss = paths = [
        folder / f"{name}.png" for name in ("samples", "trajectories", "loss")]
    if held_out.columns:
        paths.remove(trajectories)
        _draw_columns({"samples": run}, held_out, samples)
    elif held_out.planar_extent:
        _draw_points(run, held_out.planar_extent, samples, trajectories)
    else:
        _draw_images(run, held_out, samples, trajectories)
    if jax.process_index() or not plots.loss_plot(folder / "metrics.jsonl", loss, loss_label):
        paths.remove(loss)
    return [str(path) for path in paths]


def draw_change(run: Run, before: dict, held_out: Source) -> str:
    """Draws before_after.png: samples of the parameters `before` beside the run's, on one noise.

    Returns its path.
    """
    path = str(epath.Path(run.workdir) / "before_after.png")
    earlier = (run.params or {}) | before  # with p(x | x_0)
    runs = {"before": dataclasses.replace(run, params=earlier), "after": run}
    if held_out.columns:
        _draw_columns(runs, held_out, path)
    elif held_out.planar_extent:
        points = np.stack([generate.sample_at(r, np.arange(_count(run))) for r in runs.values()], 1)
        if jax.process_index() == 0:
            points = points.reshape(-1, 2, 2)
            plots.points_picture(points, [0.0, 0.0], held_out.planar_extent, path)
    else:
        rows = _rows(run, held_out, CHANGE_COLUMNS)
        drawn = [_shown(r, [clean for clean, _ in _sampled(r, rows)]) for r in runs.values()]
        if jax.process_index() == 0:
            plots.contact_sheet([plots.SheetRow(row.name, *images) for row, *images in
                                 zip(rows, *drawn, strict=True)], path, tuple(runs))
    return path


def _draw_images(run: Run, held_out: Source, samples, trajectories) -> None:
    """Draws rows of samples, and the trajectory of each row's first."""
    rows = _rows(run, held_out, COLUMNS)
    drawn = _sampled(run, rows)
    images = _shown(run, [clean for clean, _ in drawn]), _shown(run, [row.real for row in rows])
    if jax.process_index():
        return
    names = [row.name for row in rows]
    plots.contact_sheet([plots.SheetRow(*row) for row in zip(names, *images, strict=True)], samples)
    clean, levels = (np.stack([row[0] for row in part]) for part in zip(*drawn, strict=True))
    t, levels = _shown_levels(run, clean, levels)
    shown = plots.displayable(levels, run.spec.pixel_levels)  # of latents as they are
    plots.trajectory_picture(shown, t, trajectories, names)


def _shown(run: Run, rows: list) -> list:
    """Rows of images or latents, some of them empty, as uint8 images; all are decoded together."""
    ends = np.cumsum([len(row) for row in rows])
    if not ends[-1]:
        return [() for _ in rows]
    images = generate.as_pictures(run, np.concatenate([row for row in rows if len(row)]))
    return np.split(plots.displayable(images, generate.picture_levels(run)), ends[:-1])


def _sampled(run: Run, rows: list[_Row]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(images [n, H, W, C], their levels from noise down [n, K, H, W, C]) of each row."""
    index = np.concatenate([row.index for row in rows])
    parts = [generate.sample_at(run, index[some], with_levels=True)
             for some in generate.in_batches(len(index), generate.BATCH)]
    ends = np.cumsum([len(row.index) for row in rows])[:-1]
    clean, levels = (np.split(np.concatenate(part), ends) for part in zip(*parts, strict=True))
    return list(zip(clean, levels, strict=True))


def _draw_points(run: Run, extent: float, samples, trajectories) -> None:
    """Draws points of the plane; they cost little, and many of them show a density."""
    clean, levels = generate.sample_at(run, np.arange(_count(run)), with_levels=True)
    t, levels = _shown_levels(run, clean, levels)
    if jax.process_index() == 0:
        plots.points_picture(clean.reshape(-1, 1, 2), [0.0], extent, samples)
        plots.points_picture(levels.reshape(*levels.shape[:2], 2), t, extent, trajectories)


def _draw_columns(runs: dict[str, Run], held_out: Source, path) -> None:
    """Draws samples of runs on the conditions of held-out records, over these records."""
    count = min(len(held_out.records), MAX_TABLE_ROWS)
    drawn = {name: np.asarray(generate.sample_at(run, np.arange(count)))
             for name, run in runs.items()}
    if jax.process_index() == 0:
        rows = np.stack([held_out.records[i]["image"].ravel() for i in range(count)])
        rows = {"held out": unstandardise(rows, held_out.mean, held_out.std)}
        plots.columns_picture(rows | drawn, path)


def _shown_levels(run: Run, clean, levels) -> tuple[np.ndarray, np.ndarray]:
    """The noise levels that are drawn, from noise down, and the images [n, K, ...] there.

    The clean image is the last of them.
    """
    t = run.sampled_levels()[::-1]
    shown = np.unique(np.linspace(0, len(t) - 1, MAX_LEVELS).round().astype(int))
    t, levels = t[shown], levels[:, shown]
    if t[-1]:  # an ODE's last level is the clean image
        t, levels = np.append(t, 0.0), np.concatenate([levels, clean[:, None]], 1)
    return t, levels


def _count(run: Run) -> int:
    """The number of samples that are drawn: config.sample.num, and one where that is 0."""
    return max(1, run.config.sample.num)


def _rows(run: Run, held_out: Source, columns: int) -> list[_Row]:
    """The rows of a picture, config.sample.num images in all, at most `columns` in a row."""
    num, classes = _count(run), run.condition.classes
    if run.condition.captioned:
        return _caption_rows(held_out, num, columns)
    if not classes:
        return [_Row("", part) for part in np.split(np.arange(num), range(columns, num, columns))]
    shown = min(classes, MAX_ROWS, num)
    names = run.spec.class_names or [f"class {label}" for label in range(classes)]
    turns = classes * np.arange(min(columns, num // shown))
    return [_Row(names[label], label + turns, real)
            for label, real in enumerate(_real_images(run.config.data, shown))]


def _caption_rows(held_out: Source, num: int, columns: int) -> list[_Row]:
    """A row for each of the first distinct held-out captions, with its own image."""
    records, first = held_out.records, {}  # {caption: its first record}
    for r in range(min(MAX_RECORDS_READ, len(records))):
        first.setdefault(held_out.captions[r] if held_out.captions else f"record {r}", r)
        if len(first) == min(MAX_ROWS, num):
            break
    turns = len(records) * np.arange(min(columns, num // len(first)))
    return [_Row(caption or f"record {r}", r + turns, [records[r]["image"]])
            for caption, r in first.items()]


@functools.lru_cache(maxsize=1)
def _real_images(data: Data, classes: int) -> list[list]:
    """Training images of the first classes, up to REAL_PER_CLASS of each among the first records.

    They are read once for all pictures of a run.
    """
    records, found = data.open(data.split).records, [[] for _ in range(classes)]
    for i in range(min(MAX_RECORDS_READ, len(records))):
        record = records[i]
        if 0 <= record["label"] < classes and len(found[record["label"]]) < REAL_PER_CLASS:
            found[record["label"]].append(record["image"])
        if all(len(images) == REAL_PER_CLASS for images in found):
            break
    return found
