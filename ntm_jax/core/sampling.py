"""Sampling: guidance, the predictor's steps from pure noise down, and the inverse.

See docs/concepts.md, section 6. Symbols: B batch, T steps, K = T+1 levels ascending, N tokens, D
token channels.
"""

import functools
import itertools
from typing import Any, cast

import jax
import jax.numpy as jnp

from ntm_jax.core.flow_matching import guidance_by_step
from ntm_jax.core.model import NTM, by_level, log_prior
from ntm_jax.core.trajectory import example_noise
from ntm_jax.core.transporter import TOLERANCE


def guide(mean_c, log_scale_c, mean_u, log_scale_u, w):
    """The Gaussian proportional to p_c^(1+w) p_u^(-w), elementwise, w >= 0 (C.5).

    It is exact where the conditional scale is the smaller one. Elsewhere the variance ratio is
    clipped at 1, which gives the mean (1+w) mu_c - w mu_u and the scale sigma_c. w = 0 changes
    nothing.
    """
    log_r = jnp.minimum(0, 2 * (log_scale_c - log_scale_u))
    precision = 1 - w * jnp.expm1(log_r)  # 1 + w - w r, which rounding cannot bring to 0
    mean = mean_c + w * jnp.exp(log_r) / precision * (mean_c - mean_u)
    return mean, log_scale_c - 0.5 * jnp.log(precision)


def draw_latents(model: NTM, params, keys, t, y, guidance: float | tuple[float, ...] = 0.0):
    """Latents u_0..u_T [B, K, N, D] of keys [B] at levels t [B, K], and the log-density of each.

    The log-densities are [B, K] in nats, of the Gaussian that u_k was drawn from; they add up to
    that of the latents.

    guidance: one scale w >= 0, or one for each transition, from u_{T-1} down to u_0. It needs a
    model trained with condition dropout. A transition with w = 0 is predicted once; the others
    twice, as one batch. Each step is then the product of the factors, unless the transporter, or
    the shift, sees y: the null prediction is trained on latents f(x; null), and gets latents
    f(x; y) here, an error of no definite direction or size.
    """
    c = model.config
    batch, count = t.shape[0], t.shape[1] - 1
    scales = guidance_by_step(guidance, count)
    noise = jnp.moveaxis(example_noise(keys, (count + 1, c.tokens, c.dim)), 1, 0)[::-1]
    steps = jnp.full(batch, count)

    def gaussian(*inputs) -> tuple[jax.Array, jax.Array]:
        return cast(Any, model.apply(params, *inputs, method=NTM.predict))

    def transition(u, inputs, guided: bool):
        t_above, t_below, w, noise = inputs
        conditional = u, t_above, t_below, steps, y
        if guided:
            unconditional = *conditional[:-1], c.condition.null_condition(y)
            both = jax.tree.map(lambda *pair: jnp.concatenate(pair), conditional, unconditional)
            mean, log_scale = gaussian(*both)
            mean, log_scale = guide(
                mean[:batch], log_scale[:batch], mean[batch:], log_scale[batch:], w)
        else:
            mean, log_scale = gaussian(*conditional)
        u = mean + jnp.exp(log_scale) * noise
        return u, (u, log_prior(noise) - jnp.sum(log_scale, (1, 2)))

    u = noise[0]
    parts = [(u[None], log_prior(u)[None])]
    down = t.T[::-1]
    transitions = down[:-1], down[1:], jnp.asarray(scales, jnp.float32), noise[1:]
    # one scan for each run of guided or unguided transitions: a schedule has few
    for guided, run in itertools.groupby(range(count), lambda i: bool(scales[i])):
        same = [*run]
        some = tuple(a[same[0] : same[-1] + 1] for a in transitions)
        u, part = jax.lax.scan(functools.partial(transition, guided=guided), u, some)
        parts.append(part)
    us, log_density = jax.tree.map(lambda *part: jnp.concatenate(part)[::-1], *parts)
    return jnp.moveaxis(us, 0, 1), log_density.T


def _by_level(method, model: NTM, params, a, t, y, **options):
    """A method's results [B, T, ...] for the levels 0..T-1 of a [B, K, N, D], as one batch."""
    apply = functools.partial(model.apply, params, method=method, **options)
    return by_level(apply, (a[:, :-1], t[:, :-1]), jnp.full(len(a), a.shape[1] - 1), y)


def invert_trajectory(model: NTM, params, us, t, y, inverse: str = "sequential"):
    """x_0..x_T [B, K, N, D] of latents us [B, K, N, D] at levels t [B, K]; x_T = u_T.

    inverse: parallel or sequential; see core.transporter.
    """
    return invert_with_log_det(model, params, us, t, y, inverse)[0]


def invert_with_log_det(model: NTM, params, us, t, y, inverse: str = "sequential"):
    """invert_trajectory's x_0..x_T [B, K, N, D], and log|det dx_k/du_k| [B, K], 0 at level T."""
    xs, _, log_det = _by_level(NTM.invert, model, params, us, t, y, how=inverse)
    return jnp.concatenate([xs, us[:, -1:]], 1), jnp.pad(log_det, ((0, 0), (0, 1)))


def invert_level(model: NTM, params, us, t, y, k: int, inverse: str = "sequential"):
    """Only x_k [B, N, D], k < T, of latents us [B, K, N, D] at levels t [B, K]."""
    steps = jnp.full(len(us), us.shape[1] - 1)
    return model.apply(params, us[:, k], t[:, k], steps, y, how=inverse, method=NTM.invert)[0]


def inverse_sweeps(model: NTM, params, us, t, y, tolerance: float = TOLERANCE):
    """The sweeps that the parallel inverse of us [B, K, N, D] takes, int32 [B, T, blocks].

    They end when nothing changes by more than tolerance. The last block is inverted first.
    """
    return _by_level(NTM.invert, model, params, us, t, y, how="parallel", tolerance=tolerance)[1]


def transport_trajectory(model: NTM, params, xs, t, y):
    """Latents u_0..u_T [B, K, N, D] of xs [B, K, N, D] at levels t [B, K]; u_T = x_T.

    The inverse of invert_trajectory.
    """
    us, _ = _by_level(NTM.transport, model, params, xs, t, y)
    return jnp.concatenate([us, xs[:, -1:]], 1)


def sample_with_log_prob(model: NTM, params, keys, t, y, guidance: float | tuple[float, ...] = 0.0,
                         inverse: str = "sequential"):
    """Trajectories x_0..x_T [B, K, N, D] of keys [B] at levels t [B, K], and their log-densities.

    y: condition. An image without denoising is x_0 / (1 - t_0). guidance: see draw_latents.

    The log-densities are [B, K] in nats: of x_k given x_{k+1} and y, and of x_T. Their sum is
    log p(x_0..x_T | y), or with guidance the log-density of the guided model. They come from the
    noise and from the inverse itself: the networks are not evaluated again.
    """
    us, log_density = draw_latents(model, params, keys, t, y, guidance)
    xs, log_det = invert_with_log_det(model, params, us, t, y, inverse)
    return xs, log_density - log_det
