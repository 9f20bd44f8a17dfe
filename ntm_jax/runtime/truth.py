"""What was learned beside what is true, for data of two dimensions whose density is known at every noise level (data.synthetic)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.core import likelihood, trajectory
from ntm_jax.data.sources import Source
from ntm_jax.runtime import plots, sharding, state
from ntm_jax.runtime.config import Config

EXTENT = 3.0  # densities are drawn on [-EXTENT, EXTENT]^2
SIDE = 64  # points a side
TRAJECTORIES = 16  # a point


@functools.partial(jax.jit, static_argnames=("config", "model", "level", "trajectories"))
def _log_density(params, root, batch, *, config: Config, model, level, trajectories):
    points, steps = batch["x"], config.evaluation_steps
    t = state.levels(config, model, steps, jnp.full(len(points), config.trajectory.t_min))[:, level:]
    keys = state.example_keys(root, f"density/{level}", batch["index"])

    def draw(number):
        noise = trajectory.example_noise(jax.vmap(jax.random.fold_in, (0, None))(keys, number), (t.shape[1] - 1, *points.shape[1:]))
        return trajectory.extend(points, t, noise)

    scores = likelihood.weigh(model, params, draw, points, t, steps, jnp.zeros(len(points), jnp.int32), 0, trajectories)
    return scores["importance_weighted"]


def log_density(run, points: np.ndarray, level: int, trajectories: int = TRAJECTORIES) -> np.ndarray:
    """The importance-weighted lower bound on a run's log-density at points [n, 2] of level k < T, nats, [n]."""
    x = np.asarray(points, np.float32).reshape(-1, run.model.config.tokens, run.model.config.dim)
    batch = sharding.place({"x": x, "index": np.arange(len(x), dtype=np.int32)}, run.mesh)
    with sharding.use(run.mesh):
        result = _log_density(run.params, jax.random.key(run.config.seed), batch, config=run.config, model=state.exact(run.model),
                              level=level, trajectories=trajectories)
    return sharding.to_host(result)[: len(points)]


def picture(run, source: Source, path) -> None:
    """Draws the true and the learned density at every level below pure noise."""
    t = state.evaluated_levels(run.config, run.model)[:-1]
    side = np.linspace(-EXTENT, EXTENT, SIDE)
    points = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    learned = [np.exp(log_density(run, points, k)) for k in range(len(t))]
    true = [np.exp(source.log_density(points, level)) for level in t]
    if jax.process_index() == 0:
        grids = (np.stack(a).reshape(-1, SIDE, SIDE) for a in (true, learned))
        plots.density_picture(*grids, t, EXTENT, path)
