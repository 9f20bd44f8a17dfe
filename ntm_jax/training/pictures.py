"""Pictures of a run as it learns: samples beside real images, trajectories, the loss curve."""

import dataclasses
import functools

import jax
import numpy as np
from etils import epath

from ntm_jax.core.conditions import Text
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
CHANGE_COLUMNS = 6  # samples in a row of before_after.png, on each side
MAX_TABLE_ROWS = 1000  # rows of an array, held out and sampled, in a picture of its columns
MIN_SIGNAL = 0.1  # (1 - t) / t of the levels that are drawn beside pure noise: others look like it


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row of samples: its name, the indices and the condition of its images, and real images."""

    name: str
    index: np.ndarray
    condition: np.ndarray | Text | None
    real: list


def draw(run: Run, source: Source, held_out: Source, loss_label: str) -> list[str]:
    """Draws samples.png, trajectories.png and loss.png in the run's folder, in process 0.

    samples.png has a row for each class, beside training images, or for each of the first held-out
    captions, beside its own image; of an array it shows pairs of columns, and there is no
    trajectories.png. Returns the paths.
    """
    folder = epath.Path(run.workdir)
    paths = [folder / f"{name}.png" for name in ("samples", "trajectories")]
    if jax.process_index() == 0 and plots.loss_plot(
            folder / "metrics.jsonl", folder / "loss.png", loss_label):
        paths.append(folder / "loss.png")
    if source.columns:
        del paths[1]
        _draw_columns({"samples": run}, held_out, paths[0])
    elif source.planar_extent:
        _draw_points(run, source.planar_extent, *paths[:2])
    else:
        _draw_images(run, held_out, *paths[:2])
    return [str(path) for path in paths]


def draw_change(run: Run, before: dict, held_out: Source) -> str:
    """Draws before_after.png: samples of the parameters `before` beside the run's, on one noise.

    Returns its path.
    """
    path = str(epath.Path(run.workdir) / "before_after.png")
    runs = {"before": dataclasses.replace(run, params=before), "after": run}
    if held_out.columns:
        _draw_columns(runs, held_out, path)
        return path
    if held_out.planar_extent:
        clean = [generate.sample_at(r, np.arange(min(_count(run), 500))) for r in runs.values()]
        if jax.process_index() == 0:
            points = np.stack([np.asarray(a).reshape(-1, 2) for a in clean], 1)
            plots.points_picture(points, [0.0, 0.0], held_out.planar_extent, path)
        return path
    rows = [dataclasses.replace(row, index=row.index[:CHANGE_COLUMNS], condition=jax.tree.map(
        lambda a: a[:CHANGE_COLUMNS], row.condition)) for row in _rows(run, held_out)]
    ends = np.cumsum([len(row.index) for row in rows])[:-1]
    first, last = (np.split(plots.displayable(_sampled(r, rows)[0], run.spec.pixel_levels), ends)
                   for r in runs.values())
    if jax.process_index() == 0:
        plots.contact_sheet([plots.SheetRow(row.name, *images) for row, *images in
                             zip(rows, first, last, strict=True)], path, tuple(runs))
    return path


def _draw_images(run: Run, held_out: Source, samples, trajectories) -> None:
    """Draws rows of samples, and a trajectory of each row."""
    pixel_levels, rows = run.spec.pixel_levels, _rows(run, held_out)
    clean, levels = _sampled(run, rows)
    ends = np.cumsum([len(row.index) for row in rows])[:-1]
    sheet = [plots.SheetRow(row.name, plots.displayable(images, pixel_levels),
                            plots.displayable(np.stack(row.real), pixel_levels) if row.real else ())
             for row, images in zip(rows, np.split(clean, ends), strict=True)]
    # A trajectory of each row, or several where there are few rows.
    each = max(1, MAX_ROWS // len(rows))
    chosen = [(row.name, begin + i) for row, begin in zip(rows, [0, *ends], strict=True)
              for i in range(min(each, len(row.index)))][:MAX_ROWS]
    names, numbers = zip(*chosen, strict=True)
    t, levels = _shown_levels(run, clean[list(numbers)], levels[list(numbers)])
    if jax.process_index() == 0:
        plots.contact_sheet(sheet, samples)
        shown = plots.displayable(levels, pixel_levels)
        plots.trajectory_picture(shown, t, trajectories, names)


def _sampled(run: Run, rows: list[_Row]) -> tuple[np.ndarray, np.ndarray]:
    """The images of all rows [n, H, W, C], and their levels from noise down [n, K, H, W, C]."""
    index, condition = np.concatenate([row.index for row in rows]), None
    if rows[0].condition is not None:
        condition = jax.tree.map(lambda *parts: np.concatenate(parts),
                                 *(row.condition for row in rows))
    parts = [generate.sample_at(
        run, index[some], jax.tree.map(lambda a, some=some: a[some], condition), with_levels=True)
        for some in generate.in_batches(len(index), generate.BATCH)]
    clean, levels = zip(*parts, strict=True)
    return np.concatenate(clean), np.concatenate(levels)


def _draw_points(run: Run, extent: float, samples, trajectories) -> None:
    """Draws points of the plane; they cost little, and many of them show a density."""
    first, *rest = generate.in_batches(_count(run), 500)
    clean, levels = generate.sample_at(run, first, with_levels=True)
    points = np.concatenate([clean, *(generate.sample_at(run, index) for index in rest)])
    t, levels = _shown_levels(run, clean, levels)
    if jax.process_index() == 0:
        plots.points_picture(points.reshape(-1, 1, 2), [0.0], extent, samples)
        levels = levels.reshape(*levels.shape[:2], 2)
        plots.points_picture(levels, t, extent, trajectories)


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
    shown = np.array([k for k in shown if not k or (1 - t[k]) / max(t[k], 1e-9) >= MIN_SIGNAL])
    t, levels = t[shown], levels[:, shown]
    if t[-1]:  # an ODE's last level is the clean image
        t, levels = np.append(t, 0.0), np.concatenate([levels, clean[:, None]], 1)
    return t, levels


def _count(run: Run) -> int:
    """The number of samples that are drawn: config.sample.num, and one where that is 0."""
    return max(1, run.config.sample.num)


def _rows(run: Run, held_out: Source) -> list[_Row]:
    """The rows of samples.png, config.sample.num images in all, at most ten a row."""
    num, classes = _count(run), run.condition.classes
    if run.condition.captioned:
        return _caption_rows(held_out, num)
    if not classes:
        index = np.arange(num)
        return [_Row("", part, None, []) for part in np.split(index, range(10, num, 10))]
    drawn, real = min(classes, MAX_ROWS, num), _real_images(run.config.data, min(classes, MAX_ROWS))
    names = run.spec.class_names or [f"class {label}" for label in range(classes)]
    rows = []
    for label in range(drawn):
        # Image i is of class i % classes, as in sampling without labels.
        index = label + classes * np.arange(max(1, min(10, num // drawn)))
        rows.append(_Row(names[label], index, np.full(len(index), label), real[label]))
    return rows


def _caption_rows(held_out: Source, num: int) -> list[_Row]:
    """A row for each of the first distinct held-out captions, with its own image."""
    first = {}  # {caption: its first record}
    for r in range(min(MAX_RECORDS_READ, len(held_out.records))):
        first.setdefault(held_out.captions[r] if held_out.captions else f"record {r}", r)
        if len(first) == min(MAX_ROWS, num):
            break
    columns, rows = min(10, num // len(first)), []
    for caption, r in first.items():
        record = held_out.records[r]
        text = Text(*(np.stack([record[key]] * columns) for key in ("text", "text_mask")))
        index = len(rows) * columns + np.arange(columns)
        rows.append(_Row(caption or f"record {r}", index, text, [record["image"]]))
    return rows


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
