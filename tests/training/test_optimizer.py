"""The learning rate's end points, the warm-up of the EMA, and the clipping before AdamW."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntm_jax.training import state
from ntm_jax.training.step import update_ema
from tests.common import tiny_config

SETTINGS = dataclasses.replace(tiny_config().optimizer, learning_rate=1e-3, min_learning_rate=1e-5,
                               warmup_steps=10, clip=1.0, weight_decay=0.1)


def test_the_rate_rises_from_0_to_the_peak_and_falls_to_the_floor():
    rate = [float(state.learning_rate(SETTINGS, 100)(step)) for step in (0, 5, 10, 55, 100, 1000)]
    middle = (1e-3 + 1e-5) / 2
    np.testing.assert_allclose(rate, [0, 5e-4, 1e-3, middle, 1e-5, 1e-5], rtol=1e-5, atol=1e-12)


def test_the_ema_warms_up():
    ema, params = {"a": jnp.zeros(3)}, {"a": jnp.ones(3)}
    # min(d, (1 + n) / (10 + n))
    for step, decay in ((0, 0.1), (1, 2 / 11), (90, 0.91), (10_000, 0.99)):
        average = update_ema(ema, params, jnp.int32(step), 0.99)
        np.testing.assert_allclose(average["a"], np.full(3, 1 - decay), rtol=1e-5)
    np.testing.assert_array_equal(update_ema(params, params, jnp.int32(3), 0.99)["a"], 1)


def test_a_step_is_adamw_of_the_clipped_gradient():
    params, gradient = {"a": np.full(4, 2.0)}, {"a": np.array([30.0, -40.0, 0.0, 0.0])}
    made = state.optimizer(SETTINGS, 100)
    current, update = jax.jit(made.init)(params), jax.jit(made.update)
    # b1 = 0.9, b2 = 0.95, and the norm 50 is clipped to 1.
    first = (0.1 * gradient["a"] / 50, 0.05 * (gradient["a"] / 50) ** 2)
    updates, current = update(gradient, current, params)
    np.testing.assert_array_equal(updates["a"], 0)  # the rate starts at 0
    adam = next(s for s in current[1] if isinstance(s, optax.ScaleByAdamState))
    np.testing.assert_allclose(adam.mu["a"], first[0], rtol=1e-5)
    np.testing.assert_allclose(adam.nu["a"], first[1], rtol=1e-5)
    updates, _ = update(gradient, current, params)
    # The same gradient twice: Adam's update is its sign.
    expected = -1e-4 * (np.sign(gradient["a"]) + 0.1 * 2)
    np.testing.assert_allclose(updates["a"], expected, rtol=1e-4)
