"""Flow matching: the velocity network, its loss, ODE solvers, and an NTM's head over it.

The head `flow_matching` makes any flow-matching network the predictor of an NTM (docs/concepts.md,
section 7).

Symbols: B batch, K levels ascending, N tokens, D token channels, W width; x_t = (1-t) x + t eps,
with velocity v = eps - x.

A backbone is a module from (x_t [B, N, D], t [B], condition y) to (velocity [B, N, D] in float32,
last hidden states [B, N, W]). Velocity is one; backbones/ holds others. An unconditional one
ignores y.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ntm_jax.core import trajectory
from ntm_jax.core.config import ModelConfig
from ntm_jax.core.predictor import Trunk, bounded
from ntm_jax.core.trajectory import per_example
from ntm_jax.core.transformer import Modulation, at_config_precision, dense


class Velocity(Trunk):
    """The predictor's transformer as a flow-matching network.

    A new one is exact for independent Gaussian data of mean 0 and deviation data_std.
    """

    @nn.compact
    def __call__(self, x, t, y):
        """A backbone; see the module's docstring."""
        c, t_ = self.config, per_example(t, x)
        variance, _ = self.spread(t_)
        hidden = self.hidden(x / jnp.sqrt(variance), (t,), False, None, y)
        project = dense(c.dim, ("embed", None), c.dtype, "project", scale=0)
        value = project(hidden).astype(jnp.float32)
        linear = (t_ - (1 - t_) * c.data_std**2) / variance
        return linear * x - c.data_std / jnp.sqrt(variance) * value, hidden


class Posterior(nn.Module):
    """The head `flow_matching`: mean A u + B (u - t v) and scale C exp(delta).

    delta is a projection of the backbone's last hidden states, zero at first. The backbone depends
    on t alone; s enters as a modulation of the projected states.
    """

    config: ModelConfig
    backbone: nn.Module

    @nn.compact
    @at_config_precision
    def __call__(self, u, t, s, steps, y):
        """u [B, N, D] at level t [B] -> mean and log-scale [B, N, D] at level s [B] < t."""
        returned = self.backbone(u, t, y)
        shapes = [a.shape for a in jax.tree.leaves(returned)]
        if len(shapes) != 2 or shapes[0] != u.shape or shapes[1][:-1] != u.shape[:2]:
            raise ValueError(
                f"the backbone {type(self.backbone).__name__} returns arrays of shapes {shapes}: "
                f"expected a velocity {u.shape} and hidden states {(*u.shape[:2], 'width')}")
        velocity, hidden = returned
        condition = Modulation(
            hidden.shape[-1], len(self.config.steps) > 1, rows=2, name="condition")
        shift, scale = jnp.moveaxis(condition((t, s), steps, None)[:, :, None], 1, 0)
        project = dense(self.config.dim, ("embed", None), jnp.float32, "project", scale=0)
        delta = project(hidden * (1 + scale) + shift)
        deviation = trajectory.posterior(per_example(s, u), per_example(t, u))[2]
        return posterior_mean(u, velocity, s, t), jnp.log(deviation) + bounded(delta)


def posterior_mean(x, velocity, s, t):
    """Mean A x + B (x - t v) of q(x_s | x_t = x) at the clean image implied by the velocity.

    x and velocity: [B, N, D]; s and t: [B].
    """
    s, t = per_example(s, x), per_example(t, x)
    a, b, _ = trajectory.posterior(s, t)
    return a * x + b * (x - t * velocity)


def backbone_params(params):
    """The backbone's parameters, as it takes them, of a model with the head `flow_matching`."""
    return {"params": params["params"]["backbone"]}


def velocity_errors(backbone, params, x, noise, t, y):
    """Mean squared error of the velocity per dimension, [B]: the flow-matching loss.

    Source: Lipman et al., arXiv 2210.02747.

    x and noise: [B, N, D]; t: [B].
    """
    velocity, _ = backbone.apply(params, trajectory.noise_first_level(x, t, noise), t, y)
    return jnp.mean(jnp.square(velocity - (noise - x)), (1, 2))


def guidance_by_step(guidance: float | tuple[float, ...], steps: int) -> tuple[float, ...]:
    """One guidance scale for each step, from pure noise down."""
    return guidance if isinstance(guidance, tuple) else (guidance,) * steps


def solve(backbone, noise, t, y, null_condition=None, guidance: float | tuple[float, ...] = 0.0,
          heun: bool = False):
    """Solves dx/dt = v from noise [B, N, D] down the levels t [B, K], t_0 = 0 for clean images.

    It takes Euler's steps, of one pass each, or Heun's second-order steps, of two. With guidance
    w > 0, v = v_c + w (v_c - v_u), where v_u has null_condition; both run in one batch. w is one
    number, or one for each step, from pure noise down.

    backbone(x, t, y) -> (v, hidden states). Returns [B, K, N, D].
    """
    batch, count = len(noise), t.shape[1] - 1
    scales = guidance_by_step(guidance, count)
    guided = any(scales)

    def velocity(x, t, w):
        if not guided:
            return backbone(x, t, y)[0]
        both = jax.tree.map(lambda *pair: jnp.concatenate(pair), (x, t, y), (x, t, null_condition))
        conditional, unconditional = jnp.split(backbone(*both)[0], [batch])
        return conditional + w * (conditional - unconditional)

    def step(x, levels):
        s, t, w = levels
        length, slope = per_example(s - t, x), velocity(x, t, w)
        down = x + length * slope
        if heun:
            down = x + length * (slope + velocity(down, s, w)) / 2
        return down, down

    ladder = jnp.flip(t.T, 0)
    _, xs = jax.lax.scan(step, noise, (ladder[1:], ladder[:-1], jnp.asarray(scales)))
    return jnp.moveaxis(jnp.concatenate([jnp.flip(xs, 0), noise[None]]), 0, 1)
