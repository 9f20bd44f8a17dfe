"""Decoders map noise to clean tokens: the table that config.sample.decoder chooses from.

`inverse`, `score` and `denoiser` draw the trajectory of an NTM and differ in the last step; of
pixels `inverse` takes the mode of p(x | x_0). `euler` and `heun` solve the ODE of a flow-matching
model. A new decoder is one entry here or a call of `register`.

Symbols: B batch, T steps, K = T+1 levels ascending, N tokens, D token channels.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ntm_jax.core import denoising, flow_matching, sampling
from ntm_jax.core.model import NTM, full_precision
from ntm_jax.core.pixels import PixelLikelihood
from ntm_jax.core.predictor import Predictor
from ntm_jax.core.trajectory import Schedule, example_noise
from ntm_jax.core.transformer import precision
from ntm_jax.registry import Registry
from ntm_jax.runtime.config import Sample
from ntm_jax.sampling import inverses

SLICE_TOKENS = 2048  # of all levels of the trajectories that a CPU denoises at a time


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The static arguments of sampling, for which the jitted function compiles once."""

    model: NTM  # see core.model.full_precision
    schedule: Schedule
    options: Sample
    mesh: jax.sharding.Mesh | None  # of the inverse `auto`; see inverses.choose
    pixels: PixelLikelihood
    denoiser: Predictor | None = None  # of a decoder that needs one

    def inverse(self, rows: int) -> str:
        """The inverse of this many latents of all devices: parallel or sequential."""
        return inverses.choose(self.options.inverse, self.model.config, rows, self.mesh)

    def slices(self, rows: int) -> int:
        """In how many slices this many trajectories are denoised, one after the other.

        On one CPU they have up to SLICE_TOKENS tokens, so that activations stay in a core's cache,
        or a quarter where the batch has no larger divisor. 1 on other devices.
        """
        if self.mesh is None or self.mesh.size > 1 or self.mesh.devices.flat[0].platform != "cpu":
            return 1
        most = max(SLICE_TOKENS // (self.model.config.tokens * self.options.steps), 1)
        sizes = range(max(most // 4, 1), most + 1)
        return rows // max((size for size in sizes if rows % size == 0), default=rows)

    def score_denoise(self, params, xs, t, y):
        """denoising.score_denoise of trajectories xs [B, K, N, D] at levels t, slice by slice."""
        def denoise(part):
            xs, t, y = part
            return denoising.score_denoise(
                self.model, params, xs, t, y, self.options.percentile,
                self.pixels.variance(params, xs[:, 0], t[:, 0], y))

        count = self.slices(len(xs))
        if count == 1:
            return denoise((xs, t, y))
        parts = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), (xs, t, y))
        return jax.lax.map(denoise, parts).reshape(xs[:, 0].shape)


class Decoded(NamedTuple):
    """What a decoder draws, or makes of latents.

    x: clean tokens [B, N, D]. xs: the levels x_0..x_T [B, K, N, D], None where nothing needs them.
    log_density: of each level [B, K], those of core.sampling.sample_with_log_prob; it is that of
    the latents where xs is None, and None for an ODE. Of given latents, log|det du_k/dx_k| alone.
    """

    x: jax.Array
    xs: jax.Array | None
    log_density: Any


class Trajectory(NamedTuple):
    """The trajectory of an NTM, which a decoder turns into clean tokens.

    us: latents u_0..u_T [B, K, N, D]. xs: levels x_0..x_T [B, K, N, D], None where nothing needs
    them. t: [B, K]. y: condition.
    """

    us: jax.Array
    xs: jax.Array | None
    t: jax.Array
    y: Any


@dataclasses.dataclass(frozen=True)
class Decoder:
    """One way to make clean tokens.

    draw(sampler, params, keys, y, denoiser_params, with_levels) -> Decoded, of keys [B] and their
    condition y. denoiser_params: None unless needs_denoiser.
    decode(sampler, params, us, y, denoiser_params, with_levels) -> Decoded, of given latents
    u_0..u_T [B, K, N, D]; None without latents. `from_trajectory` makes both functions for an NTM.
    needs_levels: it has the levels anyway, so that asking for them costs nothing; its evaluation
    measures how well every level is denoised.
    needs_denoiser: only a run with a learned denoiser has it.
    solves_ode: it needs a network that was trained as a velocity. Its levels start at 0, and its
    samples have no density.
    """

    draw: Callable[..., Decoded]
    decode: Callable[..., Decoded] | None = None
    needs_levels: bool = False
    needs_denoiser: bool = False
    solves_ode: bool = False


def from_trajectory(clean: Callable, needs_levels: bool = False, **facts) -> Decoder:
    """A decoder that draws the trajectory of an NTM, and then makes clean tokens of it.

    clean(sampler, params, trajectory, denoiser_params) -> [B, N, D]. needs_levels: it uses
    trajectory.xs. facts: other fields of Decoder.
    """
    def decode(sampler: Sampler, params, us, y, denoiser_params, with_levels: bool) -> Decoded:
        t = sampler.schedule.fixed_levels(sampler.options.steps, len(us))
        xs, log_det = None, 0.0
        if with_levels or needs_levels:
            how = sampler.inverse(len(us) * sampler.options.steps)
            xs, log_det = sampling.invert_with_log_det(sampler.model, params, us, t, y, how)
        x = clean(sampler, params, Trajectory(us, xs, t, y), denoiser_params)
        return Decoded(x, xs, -log_det)

    def draw(sampler: Sampler, params, keys, y, denoiser_params, with_levels: bool) -> Decoded:
        t = sampler.schedule.fixed_levels(sampler.options.steps, len(keys))
        us, log_density = sampling.draw_latents(
            sampler.model, params, keys, t, y, sampler.options.guidance)
        x, xs, log_det = decode(sampler, params, us, y, denoiser_params, with_levels)
        return Decoded(x, xs, log_density + log_det)

    return Decoder(draw, decode, needs_levels, **facts)


def _inverse(sampler: Sampler, params, trajectory: Trajectory, denoiser_params):
    us, xs, t, y = trajectory
    x_0 = xs[:, 0] if xs is not None else sampling.invert_level(
        sampler.model, params, us, t, y, 0, sampler.inverse(len(us)))
    return sampler.pixels.mode(params, x_0, t[:, 0], y)


def _score(sampler: Sampler, params, trajectory: Trajectory, denoiser_params):
    _, xs, t, y = trajectory
    return sampler.pixels.nearest(params, sampler.score_denoise(params, xs, t, y))


def _denoiser(sampler: Sampler, params, trajectory: Trajectory, denoiser_params):
    us, _, t, y = trajectory
    denoiser, steps = full_precision(sampler.denoiser), sampler.options.steps
    found = denoising.denoise(denoiser, denoiser_params, us[:, 0], t[:, 0], steps, y)
    return sampler.pixels.nearest(params, found)


def _solve(sampler: Sampler, params, keys, y, denoiser_params, with_levels: bool,
           heun: bool) -> Decoded:
    config, options = sampler.model.config, sampler.options
    noise = example_noise(keys, (config.tokens, config.dim))
    t = sampler.schedule.levels(options.steps, jnp.zeros(len(keys)))
    with precision(config.precision):
        xs = flow_matching.solve(
            functools.partial(sampler.model.backbone.apply, flow_matching.backbone_params(params)),
            noise, t, y, config.condition.null_condition(y), options.guidance, heun)
    return Decoded(xs[:, 0], xs, None)


DECODERS: Registry[Decoder] = Registry("config.sample.decoder", {
    "inverse": from_trajectory(_inverse),
    "score": from_trajectory(_score, needs_levels=True),
    "denoiser": from_trajectory(_denoiser, needs_denoiser=True),
    "euler": Decoder(functools.partial(_solve, heun=False), solves_ode=True),
    "heun": Decoder(functools.partial(_solve, heun=True), solves_ode=True),
})
register = DECODERS.register


def find(name: str) -> Decoder:
    """The decoder of a name. Raises UserError if there is none."""
    return DECODERS.find(name)[0]
