"""The mathematics of post-training: a model whose steps are a stochastic policy of exact densities.

An NTM's T steps are T actions: x_k is drawn from p(x_k | x_{k+1}), whose density is exact, the
transporter included. So the importance ratio of two sets of parameters is exact, and no other
policy stands in for the model.

Symbols: P conditions, G samples of each; B = P G; T steps; N tokens, D token channels.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.core.trajectory import LOG_2PI

EPSILON = 1e-6  # beside the deviation of a group's rewards


def advantages(rewards: np.ndarray, future_divergence: np.ndarray, normalise: bool) -> np.ndarray:
    """The advantages of every factor, [P, G, T] float32, of rewards [P, G].

    future_divergence: [P, G, T], what is taken from a sample's reward in a factor: the weighted
    divergence of the factors that follow it. A group's mean is taken from both. Where rewards are
    normalised, they are divided by their group's deviation (GRPO, arXiv 2402.03300). Otherwise the
    mean is that of a group's other samples, so that the gradient is unbiased (arXiv 2402.14740).
    """
    # The mean of equal numbers of single precision is theirs in double precision only.
    rewards, future_divergence = rewards.astype(np.float64), future_divergence.astype(np.float64)
    count = rewards.shape[1]
    centred = rewards - np.mean(rewards, 1, keepdims=True)
    if normalise:
        centred = centred / (np.std(rewards, 1, keepdims=True) + EPSILON)
    found = centred[..., None] - (future_divergence - np.mean(future_divergence, 1, keepdims=True))
    return (found if normalise else found * count / (count - 1)).astype(np.float32)


def log_ratio(nll, old_nll):
    """log p_new(x_k | x_{k+1}) - log p_old(x_k | x_{k+1}), [B, T] nats, of NLLs [B, T]."""
    return old_nll - nll


def clipped_surrogate(log_ratio, advantage, clip: float):
    """PPO's clipped objective of every factor, [B, T], to be maximised.

    log_ratio: [B, T] nats; advantage: [B, T]. Where the ratio is 1, its gradient is that of
    advantage * log p(x_k | x_{k+1}). Source: arXiv 1707.06347, eq. 7.
    """
    # Beyond e^20, which is clipped, the gradient of an infinite ratio would be NaN.
    ratio = jnp.exp(jnp.minimum(log_ratio, 20.0))
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)


def clipped_share(log_ratio, clip: float):
    """The share of factors whose ratio lies outside [1 - clip, 1 + clip]."""
    return jnp.mean(jnp.abs(jnp.expm1(log_ratio)) > clip)


def gaussian_nll(us, mean, log_scale):
    """-log p(u_k | u_{k+1}), [B, T] nats, of latents [B, T+1, N, D].

    mean, log_scale: of the Gaussians, [B, T, N, D].
    """
    z = (us[:, :-1] - mean) * jnp.exp(-log_scale)
    return jnp.sum(0.5 * (z * z + LOG_2PI) + log_scale, (2, 3))


def gaussian_divergence(mean, log_scale, other_mean, other_log_scale):
    """KL(p || other), [B, T] nats, of Gaussians [B, T, N, D]."""
    variance = jnp.exp(2 * (log_scale - other_log_scale))
    shift = jnp.square((mean - other_mean) * jnp.exp(-other_log_scale))
    return jnp.sum(0.5 * (variance + shift - 1) + other_log_scale - log_scale, (2, 3))


def rarity(traits: np.ndarray) -> np.ndarray:
    """1 / n for a sample with a trait that n samples show, [P, G], of traits [P, G, K] bool.

    It is 0 for a sample without a rare trait: one that fewer samples show than half the mean over
    the traits. The largest counts where a sample has several.
    """
    shown = np.sum(traits, (0, 1))
    rare = np.where(shown < np.mean(shown) / 2, 1 / np.maximum(shown, 1), 0)
    return np.max(traits * rare, -1).astype(np.float32)


def pair_weights(rewards: np.ndarray, bonus: np.ndarray) -> np.ndarray:
    """The weight [P, G, G] of every pair in which sample i is better than sample j.

    Pairs with a higher reward weigh the same, and the mean over P of their sum is 1. A higher bonus
    [P, G] adds the difference, in units of the weight of such a pair.
    """
    better = (rewards[:, :, None] > rewards[:, None, :]).astype(np.float32)
    rarer = np.maximum(bonus[:, :, None] - bonus[:, None, :], 0)
    return (better + rarer) * (len(rewards) / max(better.sum(), 1))


def preference_loss(gain, weights, beta: float):
    """(the loss of direct preference optimisation, the share of pairs in their right order).

    gain: [P, G], log p(trajectory) - log p_reference(trajectory) in nats; weights: [P, G, G], see
    pair_weights; beta: the weight of the divergence from the reference in the objective whose
    optimum the loss has. It is log 2 where the model is the reference. Source: arXiv 2305.18290,
    eq. 7.
    """
    margin = beta * (gain[:, :, None] - gain[:, None, :])
    return (jnp.sum(weights * jax.nn.softplus(-margin)) / len(gain),
            jnp.sum(weights * (margin > 0)) / len(gain))


def without_gradient(params, names):
    """The parameters, of which the subtrees of these names have no gradient."""
    trained = {name: jax.lax.stop_gradient(tree) if name in names else tree
               for name, tree in params["params"].items()}
    return params | {"params": trained}
