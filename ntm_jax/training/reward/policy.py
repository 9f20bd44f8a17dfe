"""The policy gradient of a model whose steps are a stochastic policy with exact densities.

An NTM's T steps are T actions: x_k is drawn from p(x_k | x_{k+1}), whose density is exact, the
transporter included. So the importance ratio of two sets of parameters is exact, and no other
policy stands in for the model.

Symbols: P conditions, G samples of each; B = P G; T steps.
"""

import jax
import jax.numpy as jnp

EPSILON = 1e-6  # beside the deviation of a group's rewards


def advantages(rewards):
    """Rewards [P, G] less their group's mean, over its deviation; 0 where all are equal.

    Source: GRPO, arXiv 2402.03300.
    """
    centred = rewards - jnp.mean(rewards, 1, keepdims=True)
    return centred / (jnp.std(rewards, 1, keepdims=True) + EPSILON)


def log_ratio(nll, old_nll):
    """log p_new(x_k | x_{k+1}) - log p_old(x_k | x_{k+1}), [B, T] nats, of NLLs [B, T]."""
    return old_nll - nll


def clipped_surrogate(log_ratio, advantage, clip: float):
    """PPO's clipped objective of every factor, [B, T], to be maximised.

    log_ratio: [B, T] nats; advantage: [B]. Where the ratio is 1, its gradient is that of
    advantage * log p(x_k | x_{k+1}). Source: arXiv 1707.06347, eq. 7.
    """
    ratio, advantage = jnp.exp(log_ratio), advantage[:, None]
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)


def clipped_share(log_ratio, clip: float):
    """The share of factors whose ratio lies outside [1 - clip, 1 + clip]."""
    return jnp.mean(jnp.abs(jnp.expm1(log_ratio)) > clip)


def freeze(params, names):
    """The parameters, of which the subtrees of these names have no gradient."""
    trained = {name: jax.lax.stop_gradient(tree) if name in names else tree
               for name, tree in params["params"].items()}
    return params | {"params": trained}
