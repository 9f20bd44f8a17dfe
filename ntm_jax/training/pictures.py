"""The pictures that a run ends with: samples, trajectories from noise to clean, the loss curve."""

import jax
import numpy as np
from etils import epath

from ntm_jax.data.sources import Source
from ntm_jax.runtime import plots
from ntm_jax.runtime.run import Run
from ntm_jax.sampling import generate

COLUMNS = 17  # at most, of a picture of trajectories


def draw(run: Run, source: Source, loss_label: str) -> None:
    """Draws samples.png, trajectories.png and loss.png in the run's folder, in process 0."""
    folder, spec, extent = epath.Path(run.workdir), run.spec, source.planar_extent
    # Points of a plane cost little, and many of them show a density.
    first, *rest = generate.in_batches(run.config.sample.num, 500 if extent else 100)
    clean, levels = generate.sample_at(run, first, with_levels=True)
    images = np.concatenate([clean, *(generate.sample_at(run, index) for index in rest)])
    clean, levels = (a[: 500 if extent else 10] for a in (clean, levels))
    t = run.sampled_levels()[::-1]
    shown = np.unique(np.linspace(0, len(t) - 1, COLUMNS).round().astype(int))
    t, levels = t[shown], levels[:, shown]
    if t[-1]:  # an ODE's last level is the clean image
        t, levels = np.append(t, 0.0), np.concatenate([levels, clean[:, None]], 1)
    if jax.process_index():
        return
    plots.loss_plot(folder / "metrics.jsonl", folder / "loss.png", loss_label)
    if extent:
        points = images.reshape(-1, 1, 2)
        plots.points_picture(points, [0.0], extent, folder / "samples.png")
        levels = levels.reshape(*levels.shape[:2], 2)
        plots.points_picture(levels, t, extent, folder / "trajectories.png")
    else:
        plots.save_png(folder / "samples.png", plots.picture(images, spec.pixel_levels))
        shown = plots.displayable(levels, spec.pixel_levels)
        plots.trajectory_picture(shown, t, folder / "trajectories.png")
