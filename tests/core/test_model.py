"""The model's factors: normalised densities, each of two levels, the same in pairs and batches."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core.model import NTM
from ntm_jax.data.conditions.vector import VectorCondition
from tests.core.conftest import RICH, Bound

TERMS = ("quadratic", "log_scale", "log_det")


@pytest.fixture(scope="module")
def asked(random):
    """Trajectories of three steps, so that a level lies between two others."""
    return random.inputs(steps=3)


@pytest.fixture(scope="module")
def terms(random, asked):
    return random(*asked)


def pair_inputs(asked, k):
    """Arguments of NTM.pair for the factor k of every example."""
    xs, t, steps, label = asked
    top = np.full(len(xs), k == xs.shape[1] - 2)
    return xs[:, k], xs[:, k + 1], t[:, k], t[:, k + 1], top, steps, label


def assert_terms(found, expected, rtol=2e-5):
    for name in TERMS:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=rtol,
                                   atol=1e-5, err_msg=name)


def test_a_factor_is_a_gaussian_of_the_latent_times_the_jacobian(tiny, asked):
    with jax.enable_x64(True):
        model = tiny(**RICH | {
            "transporter_blocks": 2, "positions": "learned", "head": "direct", "scan": True,
            "dtype": jnp.float64, "transporter_dtype": jnp.float64})
        xs, t, steps, label = asked._replace(xs=asked.xs.astype(np.float64))

        @jax.jit
        @functools.partial(jax.jacfwd, has_aux=True)
        def latent(x, t):
            u, _ = model.transport(x, t, steps, label)
            return u, u

        for k in range(xs.shape[1] - 1):
            jacobian, u_s = jax.device_get(latent(xs[:, k], t[:, k]))
            u_t = xs[:, k + 1] if k == xs.shape[1] - 2 else latent(xs[:, k + 1], t[:, k + 1])[1]
            mean, log_scale = model.predict(u_t, t[:, k + 1], t[:, k], steps, label)
            density = -0.5 * ((u_s - mean) / np.exp(log_scale)) ** 2 - log_scale - 0.5 * math.log(
                2 * math.pi)
            matrices = (jacobian[i, :, :, i].reshape(density[i].size, -1) for i in range(len(xs)))
            log_det = [np.linalg.slogdet(matrix).logabsdet for matrix in matrices]
            log_p = density.sum((1, 2)) + log_det
            # Log-scales are rounded to float32 and multiply |z|^2, of some tens, by twice their
            # error.
            np.testing.assert_allclose(-model.pair(*pair_inputs((xs, t, steps, label), k)).nll,
                                       log_p, rtol=1e-5)


def test_a_shift_by_the_condition_leaves_a_model_of_the_rest(tiny):
    """The trajectory of x has the terms of that of x - W y - b; nothing is shifted without y."""
    model = tiny(condition=VectorCondition(3, layers=1, shift=True), transporter_blocks=1)
    unshifted = VectorCondition(3, layers=1)
    rest = Bound(NTM(dataclasses.replace(model.config, condition=unshifted)),
                 {name: own for name, own in model.weights.items() if name != "shift"})
    assert "features" in model.weights  # and another width than y, so that all parts read them
    xs, t, steps, y = model.inputs()
    shift = y.values @ model.weights["shift"]["kernel"] + model.weights["shift"]["bias"]
    shift = (shift * y.given[:, None]).reshape(len(xs), 1, *xs.shape[2:])
    assert abs(shift[0]).max() > 0.1
    assert not shift[1].any()
    assert_terms(model(xs, t, steps, y), rest(xs - (1 - t)[..., None, None] * shift, t, steps, y))
    latent = model.transport(xs[:, 0], t[:, 0], steps, y)[0]
    np.testing.assert_allclose(model.invert(latent, t[:, 0], steps, y)[0], xs[:, 0], atol=1e-5)


def test_a_factor_integrates_to_one(tiny):
    random = tiny(**RICH | {"grid": (1, 2), "dim": 1})
    xs, t, steps, label = random.inputs(steps=3)
    width, count = 0.2, 80
    axis = width * (np.arange(count) - (count - 1) / 2)
    points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, *xs.shape[2:]).astype(np.float32)
    for k in (1, 2):
        given = (a[:1] for a in pair_inputs((xs, t, steps, label), k)[1:])
        density = np.exp(-np.asarray(random.pair(points, *(np.repeat(a, len(points), 0)
                                                           for a in given)).nll, np.float64))
        assert density.reshape(count, count)[[0, -1]].max() < 1e-6  # the grid holds it all
        # A sum over a grid is exact for a smooth density, with a spacing of .2 and deviations of at
        # least .2; what differs is float32 rounding.
        assert density.sum() * width**2 == pytest.approx(1, abs=1e-3)


def test_no_factor_depends_on_another_level_or_example(random, asked, terms):
    xs, *rest = asked
    # The levels k and k+1 that a term of factor k depends on: log sigma only on the input's, the
    # log-det only on the target's.
    own = {"quadratic": (0, 1), "log_scale": (1,), "log_det": (0,)}
    step = np.random.default_rng(0).normal(size=xs.shape[2:])
    for i, j in np.ndindex(xs.shape[:2]):
        moved = xs.copy()
        moved[i, j] += step
        found = random(moved, *rest)
        for name, (other, k) in itertools.product(TERMS, np.ndindex(terms.log_det.shape)):
            change = abs(getattr(found, name)[other, k] - getattr(terms, name)[other, k])
            if other == i and j - k in own[name]:
                assert change > 1e-3, (name, k, j)
            else:
                assert change == 0, (name, k, j)


def test_pairs_of_a_batch_are_columns_of_their_trajectories(random, asked, terms):
    for low, high in ((0, 0), (1, 1), (0, 2)):  # the levels of the two examples
        pairs = (pair_inputs(asked, k) for k in (low, high))
        found = random.pair(*(np.stack([a[0], b[1]]) for a, b in zip(*pairs, strict=True)))
        for name in TERMS:
            own = getattr(terms, name)
            # float32 sums in another order
            np.testing.assert_allclose(
                getattr(found, name), [own[0, low], own[1, high]], rtol=2e-5, atol=1e-5)


def test_terms_are_float32_when_the_networks_are_bfloat16(tiny, asked):
    low = tiny(**RICH, dtype=jnp.bfloat16, transporter_dtype=jnp.bfloat16)
    terms = jax.eval_shape(low.module.apply, low.params, *asked)
    assert all(getattr(terms, name).dtype == jnp.float32 for name in TERMS)
