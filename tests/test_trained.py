"""Trained weights: the inverse's rounding on 256 tokens, at every level of real trajectories."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntm_jax
from ntm_jax.core import trajectory
from ntm_jax.core.model import NTM
from ntm_jax.training import loop
from tests.common import batch_of, tiny_config, without_an_ending


@pytest.mark.slow
def test_inverse_of_trained_weights(tmp_path, monkeypatch):
    without_an_ending(monkeypatch)
    config = tiny_config(**{
        "data.image_size": 16, "data.patch_size": 1, "data.batch_size": 3,
        "model.positions": "rotary", "model.transporter_blocks": 2, "train.steps": 20,
        "optimizer.learning_rate": 4e-3, "train.save_every": 20,
        "trajectory.steps": (2,), "sample.steps": 2})
    loop.train(config, str(tmp_path), progress=False)
    run = ntm_jax.load(str(tmp_path), raw=True)
    assert run.model.config.tokens == 256

    batch = batch_of(config.data.open(config.data.split), config, 3)
    t, noise = run.schedule.fixed_levels(2, 3), jax.random.normal(jax.random.key(0), (3, 3, 256, 1))
    xs = trajectory.simulate(batch["x"], t, noise)[:, :2].reshape(6, 256, 1)
    arguments = t[:, :2].reshape(-1), jnp.full(6, 2), jnp.repeat(batch["label"], 2)
    us, _ = jax.jit(functools.partial(run.model.apply, method=NTM.transport))(
        run.params, xs, *arguments)
    assert float(jnp.max(jnp.abs(us - xs))) > 0.1  # the transporter has learned something
    errors = {}
    for how in ("sequential", "parallel"):
        back, sweeps, _ = jax.jit(lambda u, how=how: run.model.apply(
            run.params, u, *arguments, how=how, method=NTM.invert))(us)
        # float32 rounding of values of order 1 through 2 x 256 steps; how much weights amplify it
        # depends on the machine that trained them.
        np.testing.assert_allclose(back, xs, atol=3e-5)
        errors[how] = float(jnp.max(jnp.abs(back - xs)))
    assert errors["parallel"] <= 2 * errors["sequential"]
    assert int(jnp.max(sweeps)) < 64  # a quarter of the tokens: the point of it
