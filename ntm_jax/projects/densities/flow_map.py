"""A flow map that predicts its own change of log-density in few steps (F2D2, arXiv 2512.02636).

From x_t the network predicts, for any s >= t, the average velocity u and the average divergence D
of the ODE dx/dt = v between t and s. A step is x_s = x_t + (s - t) u, and the estimate of the
log-density is log N(x_T; 0, I) + sum (s - t) D. At s = t the map is a velocity, so the network is
also a backbone of flow matching.

D is learned by regression: nothing ties it to the Jacobian of the steps that are taken, so the
estimate is neither a bound nor a normalised density.

Symbols: B batch, N tokens, D token channels, W width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ntm_jax.backbones import Backbone
from ntm_jax.core import trajectory
from ntm_jax.core.predictor import Trunk
from ntm_jax.core.trajectory import per_example
from ntm_jax.core.transformer import dense
from ntm_jax.projects.densities.divergence import value_and_divergence

FINEST = 6  # an interval of training is 2^-i of the whole, i = 0..FINEST
DIVERGENCE_WEIGHT = 0.1  # of the squared error of the divergence per dimension, beside velocity's


def _log1p_ratio(z):
    """log(1 + z) / z, with its limit at z = 0."""
    small = jnp.abs(z) < 1e-3
    return jnp.where(small, 1 - z / 2 + z * z / 3, jnp.log1p(z) / jnp.where(small, 1, z))


class FlowMap(Trunk):
    """The predictor's transformer as a flow map with a predicted divergence.

    A new one is exact, in any number of steps, for independent Gaussian data of mean 0 and
    deviation data_std.
    """

    @nn.compact
    def average(self, x, t, s, y):
        """x [B, N, D] at t [B] <= s [B] -> u [B, N, D], D [B], last hidden states [B, N, W]."""
        c, t_, s_ = self.config, per_example(t, x), per_example(s, x)
        variance, target = self.spread(t_)[0], self.spread(s_)[0]
        change = t_ + s_ - c.data_std**2 * (2 - t_ - s_)  # (target - variance) / (s - t)
        hidden = self.hidden(x / jnp.sqrt(variance), (t, s), False, None, y)
        project = dense(c.dim + 1, ("embed", None), c.dtype, "project", scale=0)
        output = project(hidden).astype(jnp.float32)
        slope = change / (jnp.sqrt(variance) * (jnp.sqrt(variance) + jnp.sqrt(target)))
        average = slope * x - c.data_std / jnp.sqrt(variance) * output[..., :-1]
        rate = change / (2 * variance) * _log1p_ratio((s_ - t_) * change / variance)
        divergence = c.dim * (c.tokens * rate[:, 0, 0] - jnp.sum(output[..., -1], 1))
        return average, divergence, hidden

    def __call__(self, x, t, y):
        """A backbone: the velocity, which is the average over no time; see core.flow_matching."""
        velocity, _, hidden = self.average(x, t, t, y)
        return velocity, hidden


def errors(backbone, params, x, noise, probes, times, y):
    """Squared errors per dimension, [B] each, of the joint self-distillation (Shortcut-F2D2).

    velocity, divergence: at one level, to eps - x, and to Hutchinson's estimate for the network's
    own velocity. average_velocity, average_divergence: over one interval, to the mean over its two
    halves, the second from where the first ends. No gradient flows through targets but the first.

    x [B, N, D]; noise [2, B, N, D]; probes [P, B, N, D]; times: a level [B], and the ends (low,
    high) [B] of an interval.
    """
    def average(params, x, t, s):
        return backbone.apply(params, x, t, s, y, method="average")[:2]

    def error(found, target):
        target = jax.lax.stop_gradient(target)
        return jnp.mean(jnp.square(found - target), tuple(range(1, found.ndim)))

    level, (low, high) = times
    fixed, dimensions = jax.lax.stop_gradient(params), x.shape[1] * x.shape[2]
    x_t = trajectory.noise_first_level(x, level, noise[0])
    velocity, divergence = average(params, x_t, level, level)
    _, own = value_and_divergence(
        lambda x: average(fixed, x, level, level)[0], x_t, probes)

    x_low, middle = trajectory.noise_first_level(x, low, noise[1]), (low + high) / 2
    first, first_divergence = average(fixed, x_low, low, middle)
    x_middle = x_low + per_example(middle - low, x) * first
    second, second_divergence = average(fixed, x_middle, middle, high)
    whole, whole_divergence = average(params, x_low, low, high)
    return {
        "velocity": error(velocity, noise[0] - x),
        "divergence": error(divergence, own) / dimensions**2,
        "average_velocity": error(whole, (first + second) / 2),
        "average_divergence": error(
            whole_divergence, (first_divergence + second_divergence) / 2) / dimensions**2}


def log_density(backbone, params, x, t, y):
    """F2D2's estimate of the log-density in nats, [B], at x [B, N, D] of level t_0.

    t: levels [B, K] ascending to 1; K - 1 evaluations of the network.
    """
    def step(carry, levels):
        x, log_det = carry
        low, high = levels
        average, divergence, _ = backbone.apply(params, x, low, high, y, method="average")
        length = high - low
        return (x + per_example(length, x) * average, log_det + length * divergence), None

    (last, log_det), _ = jax.lax.scan(step, (x, jnp.zeros(len(x))), (t.T[:-1], t.T[1:]))
    return jnp.sum(trajectory.log_normal(last, 0.0, 1.0), (1, 2)) + log_det


BACKBONE = Backbone(lambda config, extra, attention: FlowMap(config))
