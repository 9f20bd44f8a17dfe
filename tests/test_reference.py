"""The likelihood in float32 against tests/reference.py, and the reference against a closed form.

The models are small ones, and a checkpoint of random parameters or of your own run:
WORKDIR=runs/digits pytest tests/test_reference.py.
"""

import dataclasses
import functools
import math
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import ntm_jax
from ntm_jax.core import likelihood, trajectory
from ntm_jax.core.config import ModelConfig
from ntm_jax.core.model import NTM
from ntm_jax.core.pixels import PixelLikelihood
from ntm_jax.data import sources
from ntm_jax.data.conditions.label import ClassCondition
from ntm_jax.runtime import cpu_arithmetic
from tests import reference
from tests.common import batch_of, tiny_config, write_run
from tests.core.conftest import TINY

BASE = TINY | {"dim": 3, "steps": (3,)}
MODELS = {
    "rotary_wide": {
        "width": 544, "head_size": 136, "transporter_width": 272, "mlp_ratio": 1},
    "classes_learned_grouped_scanned": {
        "condition": ClassCondition(3, True), "positions": "learned", "kv_heads": 2, "head_size": 4,
        "width": 24, "transporter_layers": 2, "predictor_layers": 2, "scan": True,
        "arithmetic": cpu_arithmetic.arithmetic(tokens=6)},
    "direct_several_steps": {
        "head": "direct", "steps": (2, 4), "kv_heads": 1, "predictor_layers": 2,
        "positions": "learned", "transporter_blocks": 3, "transporter_width": 32, "grid": (3, 1)},
    "no_transporter": {
        "transporter_blocks": 0, "condition": ClassCondition(2), "positions": "learned",
        "steps": (1, 2)},
}
# Relative to the total, or to a tenth of its terms' sizes where these cancel to less. Float32
# rounds each number to 6e-8, and some tens to hundreds of such roundings, also of the angles
# 1000 t, lie between the inputs and a total.
RELATIVE = 1e-5


def difference(found, expected, sizes):
    """The largest difference relative to the expected totals; see RELATIVE.

    sizes: the sums of their terms' absolute values.
    """
    return np.max(np.abs(np.float64(found) - expected) / np.maximum(np.abs(expected), 0.1 * sizes))


@functools.cache
def weights(config: ModelConfig, new: bool = False) -> dict:
    """Random parameters that make no term trivial, with kernels that keep the size of their input.

    new: without projections, as in a new model.
    """
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name, size = path[-1].key, 0.1
        if name == "kernel":
            # Otherwise log-scales saturate and roundings grow without bound.
            small = {"project": 0 if new else 0.5, "modulation": 0.1}
            size = small.get(path[-2].key, 1) / math.sqrt(leaf.shape[-2])
        elif new and path[-2].key == "project":
            size = 0
        return ((name == "scale") + size * rng.normal(size=leaf.shape)).astype(np.float32)

    shape = (1, config.steps[0] + 1, config.tokens, config.dim)
    arguments = jnp.zeros(shape), jnp.zeros(shape[:2]), jnp.zeros(1), jnp.zeros(1, int)
    return jax.tree_util.tree_map_with_path(
        fill, nn.unbox(jax.eval_shape(NTM(config).init, jax.random.key(0), *arguments))["params"])


def compare(model, params, x, t, steps, label, pixel_levels):
    """Asserts that jax and the reference agree on trajectories of x [B, N, D] at levels t [K].

    They are compared in the terms, the NLL by level and log w.
    """
    shifts = np.linspace(np.arange(len(x)) * 0.003, 0, len(t), axis=1, dtype=np.float32)
    t = np.tile(np.float32(t), (len(x), 1)) + shifts  # other levels for each example
    shape = len(x), t.shape[1], *x.shape[1:]
    noise = np.random.default_rng(1).normal(size=shape).astype(np.float32)

    @jax.jit
    def run(params, x):
        xs = trajectory.simulate(x, t, noise)
        terms = model.apply({"params": params}, xs, t, jnp.full(len(x), steps), label)
        contributions = {0: likelihood.contributions(terms, xs, t)}
        if pixel_levels:
            decoded = PixelLikelihood("binned", pixel_levels).log_prob(
                {}, x, xs[:, 0], t[:, 0], None)
            contributions[pixel_levels] = likelihood.contributions(terms, xs, t, x, decoded)
        return xs, terms, terms.nll, contributions

    xs, terms, nll, contributions = jax.device_get(run(params, x))
    config = model.config
    factors = [reference.trajectory_nll(params, config, xs[b], t[b], steps, label[b])
               for b in range(len(x))]
    sizes = np.array([[sum(map(abs, factor.values())) for factor in example]
                      for example in factors])  # [B, T]
    for name in ("quadratic", "log_scale", "log_det"):
        expected = np.array([[factor[name] for factor in example] for example in factors])
        np.testing.assert_array_less(np.abs(getattr(terms, name) - expected), RELATIVE * sizes,
                                     err_msg=name)
    expected = np.array([[reference.nll(factor) for factor in example] for example in factors])
    differences = {"nll": difference(nll, expected, sizes)}
    for v, parts in contributions.items():
        parts = [np.float64(v).reshape(len(x), -1) for v in parts.values()]
        found, size = sum(v.sum(1) for v in parts), sum(np.abs(v).sum(1) for v in parts)
        expected = [reference.log_weight(params, config, xs[b], x[b], t[b], steps, label[b], v)
                    for b in range(len(x))]
        name = f"log_weight_{'pixels' if v else 'latents'}"
        differences[name] = difference(found, np.array(expected), size)
    print("largest relative differences:",
          {name: f"{value:.1e}" for name, value in differences.items()})
    assert max(differences.values()) < RELATIVE, differences


@pytest.mark.parametrize("name", MODELS)
def test_small_models(name):
    config = ModelConfig(**BASE | MODELS[name])
    steps, classes = config.steps[-1], config.condition.width
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 6, (3, config.tokens, config.dim))  # 0 and 5 are the open bins
    label = np.arange(3) % (classes + 1)  # the last is the null class
    compare(NTM(config), weights(config), np.float32(2 * pixels / 5 - 1),
            np.linspace(0.05, 1, steps + 1), steps, label, 6)


@pytest.mark.slow
def test_a_checkpoint(tmp_path):
    run = ntm_jax.load(os.environ.get("WORKDIR") or write_run(tmp_path, tiny_config()))
    config = run.config
    source = sources.open_source(config.data.source, config.evaluate.split, config.data.image_size)
    # A network in bfloat16 has that rounding, 4e-3, in its likelihood.
    exact = dataclasses.replace(
        run.model.config, dtype=jnp.float32, transporter_dtype=jnp.float32)
    model = run.model.clone(config=exact)
    batch, steps = batch_of(source, config, 4), config.sample.steps
    t = np.asarray(run.schedule.fixed_levels(steps, 1))[0]
    compare(model, jax.device_get(run.params)["params"], batch["x"], t, steps, batch["label"],
            source.pixel_levels)


def test_the_mean_weight_of_gaussian_pixels_is_their_probability():
    """x_0 / (1 - t_0) plus the decoder's noise is Gaussian: the bins' probabilities are known."""
    config = ModelConfig(
        **BASE | {"transporter_blocks": 0, "steps": (2,), "grid": (1, 1), "dim": 1})
    params = weights(config, new=True)  # exact for N(0, data_std^2) data
    t = np.array([0.3, 0.6, 1.0])
    deviation = math.sqrt((1 - t[0]) ** 2 * config.data_std**2 + 2 * t[0] ** 2) / (1 - t[0])
    # eight deviations of x_0: the trapezoidal rule is exact to 1e-12
    grid, step = np.linspace(-4.5, 4.5, 61, retstep=True)
    found = []
    for x in np.linspace(-1, 1, 5):
        mean = 0.0  # of w over q(x_0 | x); x_1 and x_2 do not matter, as the model is exact
        for x_0 in grid:
            xs = np.array([x_0, 0.4, -0.9])[:, None, None]
            log_w = reference.log_weight(params, config, xs, np.full((1, 1), x), t, 2, 0, 5)
            mean += step * math.exp(log_w + norm.logpdf(x_0, (1 - t[0]) * x, t[0]))
        found.append(mean)
    edges = np.array([-np.inf, -0.75, -0.25, 0.25, 0.75, np.inf])
    # float64, and the rule above
    np.testing.assert_allclose(found, np.diff(norm.cdf(edges / deviation)), rtol=1e-9)
