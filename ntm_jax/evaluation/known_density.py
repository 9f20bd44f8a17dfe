"""The learned density compared with the true one, where it is known at every noise level."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.core import likelihood, trajectory
from ntm_jax.core.model import exact
from ntm_jax.core.trajectory import Schedule
from ntm_jax.data import pipeline
from ntm_jax.data.sources import Source
from ntm_jax.evaluation import plots, scoring
from ntm_jax.evaluation.statistics import mean_and_stderr
from ntm_jax.runtime import sharding
from ntm_jax.runtime.run import Run

SIDE = 64  # points a side of a picture of densities
TRAJECTORIES = 16  # a point


def compare_with_true_density(run: Run, source: Source, scored: dict) -> dict:
    """The true mean log-density of the records' x_0, and how far each bound lies from it, in nats.

    source: one with log_density.
    """
    assert source.log_density is not None
    config = run.config
    batches = pipeline.evaluation_batches(source, config.data.patch_size, len(source.records), 0, 1)
    batch, t_min = next(batches), config.trajectory.t_min
    x_0 = scoring.noised(jax.random.key(config.seed), batch["x"],
                         jnp.full(len(batch["x"]), t_min), batch["index"])
    true = source.log_density(np.asarray(x_0, np.float64).reshape(len(x_0), -1), t_min)
    return {"log_density": mean_and_stderr(true)} | {
        name: mean_and_stderr(scored[name] - true) for name in scoring.BOUNDS}


@functools.partial(jax.jit, static_argnames=("schedule", "model", "steps", "level", "trajectories"))
def _log_density(params, root, batch, *, schedule: Schedule, model, steps, level, trajectories):
    points = batch["x"]
    t = schedule.fixed_levels(steps, len(points))[:, level:]
    keys = trajectory.example_keys(root, f"density/{level}", batch["index"])

    def draw(number):
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        noise = trajectory.example_noise(own, (t.shape[1] - 1, *points.shape[1:]))
        return trajectory.extend(points, t, noise)

    def terms(xs):
        return model.apply(params, xs, t, jnp.full(len(points), steps),
                           jnp.zeros(len(points), jnp.int32))

    return likelihood.weigh(terms, draw, points, t, 0, trajectories)["importance_weighted"]


def log_density(run: Run, points: np.ndarray, level: int, trajectories: int = TRAJECTORIES):
    """The importance-weighted lower bound on the log-density at points of level k < T, in nats.

    points: [n, D] in the data's dimensions -> [n].
    """
    x = np.asarray(points, np.float32).reshape(-1, run.model.config.tokens, run.model.config.dim)
    batch = sharding.place({"x": x, "index": np.arange(len(x), dtype=np.int32)}, run.mesh)
    with sharding.use(run.mesh):
        result = _log_density(
            run.params, jax.random.key(run.config.seed), batch, schedule=run.schedule,
            model=exact(run.model), steps=run.config.evaluation_steps, level=level,
            trajectories=trajectories)
    return sharding.to_host(result)[: len(points)]


def picture(run: Run, source: Source, path) -> None:
    """Draws the true and the learned density of the plane at every level below pure noise."""
    assert source.log_density is not None
    t, extent = run.evaluated_levels()[:-1], source.planar_extent
    side = np.linspace(-extent, extent, SIDE)
    points = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    learned = [np.exp(log_density(run, points, k)) for k in range(len(t))]
    true = [np.exp(source.log_density(points, level)) for level in t]
    if jax.process_index() == 0:
        true, learned = (np.stack(a).reshape(-1, SIDE, SIDE) for a in (true, learned))
        plots.density_picture(true, learned, t, extent, path)
