"""NTM: transporter and predictor, wired into the log-likelihood terms of a trajectory.

Symbols: B batch, T steps, K = T+1 levels ascending, N tokens, D token channels. The argument
`steps` is T of each example, [B]; y is the condition, see conditions.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from ntm_jax.core.config import ModelConfig
from ntm_jax.core.flow_matching import Posterior
from ntm_jax.core.predictor import Predictor
from ntm_jax.core.trajectory import LOG_2PI, log_normal
from ntm_jax.core.transformer import at_config_precision
from ntm_jax.core.transporter import TOLERANCE, Transporter


@flax.struct.dataclass
class Terms:
    """The terms of a factor's negative log-likelihood in nats (eq. 3.4), float32.

    [B] for one factor, or [B, T] for a trajectory. nll = quadratic + log_scale - log_det +
    constant, and log p(x_k | x_{k+1}) = -nll. misalignment, reconstruction and level are carried
    along and are not part of the NLL.
    """

    quadratic: jax.Array  # |z|^2 / 2
    log_scale: jax.Array  # sum of log sigma
    log_det: jax.Array  # log |det du_k/dx_k|
    constant: float  # N D / 2 log 2 pi
    # |mu_k - reference|^2 per dimension, with a reference (docs/concepts.md, section 7)
    misalignment: Any = 0.0
    level: Any = 0.0  # t_k, the target's level
    reconstruction: Any = 0.0  # of pixels whose noise at t_0 is learned, log_prob of core.pixels

    @property
    def nll(self):
        """Negative log-likelihood in nats with its constant, [B] or [B, T]."""
        return self.quadratic + self.log_scale - self.log_det + self.constant


class NTM(nn.Module):
    """A Normalizing Trajectory Model: p(x_0..x_T) = N(x_T; 0, I) prod_k p(x_k | x_{k+1})."""

    config: ModelConfig
    backbone: Any = None  # of the head `flow_matching`; see core.flow_matching

    def setup(self):
        c = self.config
        if c.transporter_blocks:
            self.transporter = Transporter(c)
        for name, network in c.condition.networks(c.width, c.tokens * c.dim).items():
            setattr(self, name, network)
        if c.head == "flow_matching":
            self.predictor = Posterior(c, self.backbone)
        elif c.head != "standard":
            self.predictor = Predictor(c)

    @at_config_precision
    def transport(self, x, t, steps, y):
        """x [B, N, D] at levels t [B] < 1 -> (u [B, N, D], log|det du/dx| [B])."""
        x = self.config.condition.centre(self, x, t, y)
        if not self.config.transporter_blocks:
            return x, jnp.zeros(x.shape[0])
        return self.transporter(x, t, steps, self._prepared(y))

    @at_config_precision
    def invert(self, u, t, steps, y, how="sequential", tolerance=TOLERANCE):
        """u [B, N, D] at levels t [B] < 1 -> (x [B, N, D], sweeps [B, blocks], log|det dx/du| [B]).

        x is exact to float32 rounding at full_precision. how: parallel or sequential; see
        core.transporter.
        """
        sweeps, log_det = jnp.zeros((u.shape[0], 0), jnp.int32), jnp.zeros(u.shape[0])
        if self.config.transporter_blocks:
            u, sweeps, log_det = self.transporter.inverse(
                u, t, steps, self._prepared(y), how, tolerance)
        return self.config.condition.uncentre(self, u, t, y), sweeps, log_det

    def predict(self, u, t, s, steps, y):
        """Mean and log-scale [B, N, D] of the latent at level s given u [B, N, D] at level t."""
        if self.config.head == "standard":
            return jnp.zeros_like(u), jnp.zeros_like(u)
        return self.predictor(u, t, s, steps, self._prepared(y))

    @at_config_precision
    def _prepared(self, y):
        return self.config.condition.prepare(self, y)

    def pair(self, x_s, x_t, s, t, top, steps, y, reference=None):
        """Terms [B] of log p(x_s | x_t) for consecutive levels, [B, N, D] each.

        Where top [B] is True, x_t is x_T, which is its own latent. reference: [B, N, D], compared
        with the means if given.
        """
        y = self._prepared(y)
        # Both levels as one batch. The transporter takes levels below 1, so x_T is given another,
        # and its result is not used.
        double = (x_s, s, steps, y), (x_t, jnp.where(top, s, t), steps, y)
        u, log_det = self.transport(*jax.tree.map(lambda *pair: jnp.concatenate(pair), *double))
        u_s, u_t = jnp.split(u, 2)
        u_t = jnp.where(top[:, None, None], x_t, u_t)
        predicted = self.predict(u_t, t, s, steps, y)
        return self._terms(u_s, log_det[: len(x_s)], *predicted, s, reference)

    def trajectory(self, xs, t, steps, y, reference=None):
        """Terms [B, T] of every factor of trajectories xs [B, K, N, D] at levels t [B, K].

        steps: [B]; y: the condition; reference: [B, T, N, D], compared with the means if given.
        """
        batch, count, y = xs.shape[0], xs.shape[1] - 1, self._prepared(y)
        low, repeated = _fold(t[:, :-1]), repeat((steps, y), count)
        u, log_det = self.transport(_fold(xs[:, :-1]), low, *repeated)
        us = jnp.concatenate([u.reshape(batch, count, *u.shape[1:]), xs[:, -1:]], 1)  # u_T = x_T
        mean, log_scale = map(_fold, self.gaussians(us, t, steps, y))
        reference = None if reference is None else _fold(reference)
        terms = self._terms(u, log_det, mean, log_scale, low, reference)
        return jax.tree.map(lambda a: a.reshape(batch, count) if jnp.ndim(a) else a, terms)

    __call__ = trajectory

    def gaussians(self, us, t, steps, y):
        """Means and log-scales [B, T, N, D] of u_0..u_{T-1} given the latents us [B, K, N, D]."""
        levels = us[:, 1:], t[:, 1:], t[:, :-1]
        return by_level(self.predict, levels, steps, self._prepared(y))

    def _terms(self, u, log_det, mean, log_scale, level, reference):
        z = (u - mean) * jnp.exp(-log_scale)
        misalignment = 0.0 if reference is None else jnp.mean(jnp.square(mean - reference), (1, 2))
        constant = u.shape[1] * u.shape[2] / 2 * LOG_2PI
        return Terms(jnp.sum(0.5 * z * z, (1, 2)), jnp.sum(log_scale, (1, 2)), log_det, constant,
                     misalignment, level)


def by_level(function, arrays, *rest):
    """function(*arrays, *rest) of T levels as one batch; each result is [B, T, ...].

    arrays: a tuple of [B, T, ...]; rest: trees of [B, ...], the same for all levels.
    """
    batch, count = arrays[0].shape[:2]
    found = function(*map(_fold, arrays), *repeat(rest, count))
    return jax.tree.map(lambda a: a.reshape(batch, count, *a.shape[1:]), found)


def _fold(a):
    """[B, T, ...] -> [B T, ...]."""
    return a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])


def repeat(tree, count: int):
    """Arrays [B, ...] -> [B count, ...], each example `count` times in turn."""
    return jax.tree.map(lambda a: jnp.repeat(a, count, 0), tree)


def full_precision(model):
    """The NTM or denoiser for reported likelihoods and exact inverses.

    The transporter runs in float32, and all float32 products at full precision.
    """
    return model.clone(config=dataclasses.replace(
        model.config, transporter_dtype=jnp.float32, precision="highest"))


def log_prior(x_T):
    """log N(x_T; 0, I) in nats: [B, N, D] -> [B]."""
    return jnp.sum(log_normal(x_T, 0.0, 1.0), (1, 2))
