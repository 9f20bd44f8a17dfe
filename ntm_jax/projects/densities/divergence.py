"""The divergence of a velocity, and the likelihood of the ODE that it drives.

Symbols: B batch, K levels ascending, N tokens, D token channels.
"""

import jax
import jax.numpy as jnp

from ntm_jax.core.trajectory import log_normal, per_example


def rademacher(keys, count: int, shape):
    """Probes of Hutchinson's estimator, random signs [count, B, *shape] from keys [B]."""
    signs = jax.vmap(lambda key: jax.random.rademacher(key, (count, *shape), jnp.float32))(keys)
    return jnp.moveaxis(signs, 1, 0)


def value_and_divergence(velocity, x, probes=None):
    """v [B, N, D] and div v [B] of a function velocity(x) at x [B, N, D].

    The exact divergence takes N D Jacobian-vector products. With probes [P, B, N, D] of mean 0 and
    covariance I it is Hutchinson's unbiased estimate, of P products (Grathwohl et al., arXiv
    1810.01367).
    """
    size = x.shape[1] * x.shape[2]
    exact = probes is None
    directions = jnp.eye(size).reshape(size, 1, *x.shape[1:]) if exact else probes
    value, product = jax.linearize(velocity, x)

    def add(total, direction):
        direction = jnp.broadcast_to(direction, x.shape)
        return total + jnp.sum(direction * product(direction), (1, 2)), None

    total, _ = jax.lax.scan(add, jnp.zeros(len(x)), directions)
    return value, total if exact else total / len(directions)


def ode_log_density(backbone, x, t, y, heun: bool = False, probes=None):
    """The log-density in nats, [B], that the ODE dx/dt = v gives to x [B, N, D] of level t_0.

    log p(x) = log N(x_T; 0, I) + integral of div v dt from t_0 to 1 along the solution that starts
    at x (Chen et al., arXiv 1806.07366). It is the density of the model's x_{t_0}, not of clean
    data, and equals it in the limit of many steps only: with few steps it is neither a bound nor a
    density, since the sum of divergences is not the log-determinant of the steps taken.

    t: levels [B, K] ascending to 1. It takes K - 1 Euler steps of one evaluation each, or Heun's
    second-order steps of two. backbone(x, t, y) -> (v, hidden states). probes: [P, B, N, D], the
    same at every step, for Hutchinson's estimate; None computes the divergence exactly.
    """
    def rates(x, t):
        return value_and_divergence(lambda x: backbone(x, t, y)[0], x, probes)

    def step(carry, levels):
        x, log_det = carry
        low, high = levels
        length, (slope, divergence) = high - low, rates(x, low)
        up = x + per_example(length, x) * slope
        if heun:
            other, other_divergence = rates(up, high)
            slope, divergence = (slope + other) / 2, (divergence + other_divergence) / 2
            up = x + per_example(length, x) * slope
        return (up, log_det + length * divergence), None

    (last, log_det), _ = jax.lax.scan(step, (x, jnp.zeros(len(x))), (t.T[:-1], t.T[1:]))
    return jnp.sum(log_normal(last, 0.0, 1.0), (1, 2)) + log_det
