"""Trained weights: the inverse's rounding on 256 tokens, at every level of real trajectories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core import trajectory
from ntm_jax.core.model import NTM
from ntm_jax.data import pipeline
from ntm_jax.runtime import build, sharding
from ntm_jax.training import state
from ntm_jax.training.step import make_step, steps_of
from tests.common import as_run, objective_of, tiny_config


@pytest.mark.slow
def test_inverse_of_trained_weights():
    config = tiny_config(**{
        "data.image_size": 16, "data.patch_size": 1, "data.batch_size": 3,
        "model.positions": "rotary", "model.transporter_blocks": 2, "train.steps": 20,
        "optimizer.learning_rate": 4e-3,
        "trajectory.steps": (4,), "sample.steps": 4})
    source = config.data.open(config.data.split)
    spec, mesh = pipeline.spec(source, config.data.patch_size), sharding.make_mesh(config.mesh)
    model = build.make_model(config, spec)
    assert model.config.tokens == 256
    run = as_run(config, model, mesh)
    current, step = state.initialize(run), make_step(run, objective_of(run))
    batches = pipeline.train_iterator(
        source, config.data.patch_size, config.data.batch_size, config.seed, config.data.workers)
    for n in range(config.train.steps):
        with sharding.use(mesh):
            batch = sharding.to_global(next(batches), mesh)
            current, metrics = step(current, batch, steps_of(config, objective_of(config), n))
    batches.close()
    assert float(np.max(np.abs(metrics["log_det"]))) > 0.05  # the transporter has learned something

    t, noise = run.schedule.fixed_levels(4, 3), jax.random.normal(jax.random.key(0), (3, 5, 256, 1))
    xs = trajectory.simulate(batch["x"], t, noise)[:, :4].reshape(12, 256, 1)
    arguments = t[:, :4].reshape(-1), jnp.full(12, 4), jnp.repeat(batch["label"], 4)
    us, _ = model.apply(current.params, xs, *arguments, method=NTM.transport)
    assert float(jnp.max(jnp.abs(us - xs))) > 0.1
    errors = {}
    for how in ("sequential", "parallel"):
        back, sweeps, _ = jax.jit(lambda u, how=how: model.apply(
            current.params, u, *arguments, how=how, method=NTM.invert))(us)
        # float32 rounding of values of order 1 through 2 x 256 steps; how much weights amplify it
        # depends on the machine that trained them.
        np.testing.assert_allclose(back, xs, atol=3e-5)
        errors[how] = float(jnp.max(jnp.abs(back - xs)))
    assert errors["parallel"] <= 2 * errors["sequential"]
    assert int(jnp.max(sweeps)) < 64  # a quarter of the tokens: the point of it
