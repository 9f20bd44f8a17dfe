"""The predictor: new ones in closed form, and the dependence on text."""

import numpy as np
import pytest

from ntm_jax.core.conditions import Text
from ntm_jax.data.conditions.text import TextCondition

LEVELS = [(1.0, 0.75), (1.0, 0.02), (0.5, 0.265), (0.265, 0.02), (0.05, 0.001)]  # t, s


def ask(model, t, s):
    """A prediction of the latent at s from random latents at t: (u, mean, log-scale)."""
    xs, _, steps, label = model.inputs()
    return xs[:, 1], *model.predict(xs[:, 1], np.full(2, t, np.float32), np.full(2, s, np.float32),
                                    steps, label)


def gaussian_posterior(t, s, r):
    """Coefficient and deviation of p(x_s | x_t) for data N(0, r^2), in float64.

    It conditions the joint Gaussian of both levels.
    """
    variance = {v: (1 - v) ** 2 * r**2 + v**2 for v in (s, t)}
    covariance = (1 - s) * (1 - t) * r**2 + s**2 * (1 - t) / (1 - s)
    gain = covariance / variance[t]
    return gain, np.sqrt(variance[s] - gain * covariance)


@pytest.mark.parametrize("r", [0.7, 0.2])
@pytest.mark.parametrize(("t", "s"), LEVELS)
def test_a_new_preconditioned_predictor_is_exact_for_gaussian_data(tiny, t, s, r):
    u, mean, log_scale = ask(tiny(new=True, transporter_blocks=0, data_std=r), t, s)
    gain, deviation = gaussian_posterior(t, s, r)
    # a few float32 operations; 1 - t rounds to float32 before it is squared
    np.testing.assert_allclose(mean, gain * u, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_scale, np.full_like(u, np.log(deviation)), atol=1e-5)


def test_a_new_direct_predictor_is_standard_normal(tiny):
    _, mean, log_scale = ask(tiny(new=True, transporter_blocks=0, head="direct"), 0.5, 0.25)
    assert not mean.any()
    assert not log_scale.any()


@pytest.fixture(scope="module")
def with_text(tiny):
    """A predictor with text of width 5, its inputs, and two texts, of 3 and 2 tokens of 4."""
    random = tiny(condition=TextCondition(5))
    xs, t, steps, _ = random.inputs()
    rng = np.random.default_rng(0)
    text = Text(rng.normal(size=(2, 4, 5)).astype(np.float32), np.arange(4) < np.array([[3], [2]]))
    return random, (xs[:, -1], t[:, -1], t[:, -2], steps), text


def test_predictions_depend_on_text_and_not_on_its_padding(with_text):
    random, inputs, text = with_text
    mean, _ = random.predict(*inputs, text)
    padding, token = text.states.copy(), text.states.copy()
    # not a constant, which the layer norm takes away
    other = np.random.default_rng(1).normal(size=5)
    padding[0, 3] += other
    padding[1, 2:] += other
    token[:, 1] += other
    np.testing.assert_array_equal(random.predict(*inputs, text._replace(states=padding))[0], mean)
    assert (np.abs(random.predict(*inputs, text._replace(states=token))[0] - mean).max((1, 2))
            > 1e-3).all()
    assert mean.shape == inputs[0].shape


def test_the_null_caption_is_one_learned_token(with_text):
    random, inputs, text = with_text
    empty = TextCondition(5).null_condition(text)
    mean, _ = random.predict(*inputs, empty)
    assert np.isfinite(mean).all()
    np.testing.assert_array_equal(
        random.predict(*inputs, empty._replace(states=text.states + 1))[0], mean)
    moved = random.weights["predictor"] | {
        "null_text": random.weights["predictor"]["null_text"] + np.arange(16) % 3}
    other = type(random)(random.module,
                         random.weights | {"predictor": moved}).predict(*inputs, empty)[0]
    assert (np.abs(other - mean).max((1, 2)) > 1e-4).all()
