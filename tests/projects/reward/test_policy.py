"""The mathematics of post-training, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ntm_jax.projects.reward import policy

RNG = np.random.default_rng(0)


def test_advantages_have_mean_0_and_deviation_1_in_a_group():
    rewards = RNG.random((5, 8))
    rewards[2] = 0.5
    found = policy.advantages(rewards, np.zeros((5, 8, 3)), True)
    assert found.shape == (5, 8, 3)
    np.testing.assert_allclose(found.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(found.std(1)[:, 0], [1, 1, 0, 1, 1], atol=1e-4)


@pytest.mark.parametrize("normalise", [True, False])
def test_equal_rewards_have_no_advantage(normalise):
    """The float32 mean of six times -87.3 is another number."""
    equal = np.full((1, 6), -87.3, np.float32)
    assert (policy.advantages(equal, np.zeros((1, 6, 2), np.float32), normalise) == 0).all()


def test_advantages_compare_a_sample_with_the_others_of_its_group():
    rewards, later = RNG.random((2, 4)), RNG.random((2, 4, 3))
    found = policy.advantages(rewards, later, False)
    value = rewards[..., None] - later
    for i in range(4):
        others = value[:, [j for j in range(4) if j != i]].mean(1)
        np.testing.assert_allclose(found[:, i], value[:, i] - others, rtol=1e-5)


def test_the_surrogate_is_clipped_where_that_lowers_it():
    log_ratio, one = jnp.log(jnp.array([[0.5, 1.0, 1.5]])), jnp.ones((1, 3))
    np.testing.assert_allclose(
        policy.clipped_surrogate(log_ratio, one, 0.2), [[0.5, 1, 1.2]], rtol=1e-6)
    np.testing.assert_allclose(
        policy.clipped_surrogate(log_ratio, -one, 0.2), [[-0.8, -1, -1.5]], rtol=1e-6)
    assert policy.clipped_share(log_ratio, 0.2) == pytest.approx(2 / 3)


def test_the_surrogate_of_a_ratio_beyond_float32_is_finite():
    log_ratio, advantage = jnp.full((1, 3), 100.0), jnp.array([[1.0, 0.0, -1.0]])
    value, gradient = jax.value_and_grad(
        lambda ratio: jnp.sum(policy.clipped_surrogate(ratio, advantage, 0.2)))(log_ratio)
    assert np.isfinite(value)
    np.testing.assert_array_equal(gradient, 0)


def test_gaussians_have_their_density_and_divergence():
    us = RNG.normal(size=(2, 3, 4, 5))
    mean, log_scale, other_mean, other_log_scale = 0.5 * RNG.normal(size=(4, 2, 2, 4, 5))
    found = policy.gaussian_nll(us, mean, log_scale)
    wanted = -scipy.stats.norm.logpdf(us[:, :-1], mean, np.exp(log_scale)).sum((2, 3))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    # The divergence is the mean of the log-ratio over samples of the first.
    noise = RNG.normal(size=(20_000, *mean.shape))
    sampled = mean + np.exp(log_scale) * noise
    ratios = (scipy.stats.norm.logpdf(sampled, mean, np.exp(log_scale))
              - scipy.stats.norm.logpdf(sampled, other_mean, np.exp(other_log_scale)))
    ratios = ratios.sum((3, 4))
    apart = policy.gaussian_divergence(mean, log_scale, other_mean, other_log_scale)
    np.testing.assert_array_less(
        np.abs(apart - ratios.mean(0)), 4 * ratios.std(0) / np.sqrt(len(noise)))
    assert float(apart.min()) > 1
    np.testing.assert_allclose(policy.gaussian_divergence(mean, log_scale, mean, log_scale), 0,
                               atol=1e-5)


def test_pairs_weigh_the_same_and_ties_nothing():
    rewards = np.array([[1.0, 0, 0], [1, 1, 1], [2, 1, 0]])
    nothing = np.zeros((3, 3))
    found = policy.pair_weights(rewards, nothing)
    assert found.sum() == pytest.approx(len(rewards))
    assert np.count_nonzero(found) == 2 + 0 + 3
    assert found[0, 0, 1] == found[2, 1, 2] > 0
    assert found[0, 1, 0] == 0
    assert policy.pair_weights(np.ones((3, 3)), nothing).sum() == 0


def test_a_rare_trait_adds_to_a_samples_pairs():
    """Of 3 traits, 8 samples show the first, one the second and none the third."""
    traits = np.zeros((3, 3, 3), bool)
    traits[..., 0] = True
    traits[1, 1] = [False, True, False]
    rarity = policy.rarity(traits)
    np.testing.assert_array_equal(np.argwhere(rarity), [[1, 1]])
    assert rarity[1, 1] == 1
    rewards = np.array([[1.0, 0, 0], [1, 1, 0], [0, 0, 0]])
    pair = 3 / 4  # of four pairs, with mean sum 1 over three conditions
    found = policy.pair_weights(rewards, 5 * rarity)
    np.testing.assert_allclose(found[1] / pair, [[0, 0, 1], [5, 0, 6], [0, 0, 0]])
    np.testing.assert_allclose(found[0] / pair, [[0, 1, 1], [0, 0, 0], [0, 0, 0]])
    assert policy.rarity(np.ones((2, 3, 4), bool)).max() == 0


def test_the_preference_loss_is_log_2_at_the_reference_and_falls_with_the_margin():
    weights = policy.pair_weights(np.array([[1.0, 0], [0, 1]]), np.zeros((2, 2)))
    compute = jax.jit(policy.preference_loss)
    loss, right = compute(np.zeros((2, 2)), weights, 0.3)
    assert loss == pytest.approx(np.log(2))
    assert right == 0
    gain = np.array([[2.0, -1], [5, 1]])
    loss, right = compute(gain, weights, 0.3)
    assert loss == pytest.approx(np.mean(np.log1p(np.exp([-0.9, 1.2]))))
    assert right == 0.5
    slope, _ = jax.jit(jax.grad(policy.preference_loss, has_aux=True))(gain, weights, 0.3)
    slope = np.asarray(slope)
    assert slope[0, 0] < 0 < slope[0, 1]
