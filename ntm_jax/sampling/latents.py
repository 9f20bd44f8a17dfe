"""Latents of data, and data of latents: the transporter and its inverse at all levels.

Symbols: n images; B batch, K levels ascending, N tokens, D token channels.
"""

import functools

import jax
import numpy as np

from ntm_jax.core import sampling
from ntm_jax.core.model import full_precision
from ntm_jax.core.pixels import PixelLikelihood
from ntm_jax.core.trajectory import Schedule, example_keys, example_noise
from ntm_jax.errors import UserError
from ntm_jax.runtime import sharding
from ntm_jax.runtime.config import Sample
from ntm_jax.runtime.run import Run, checked_seed
from ntm_jax.sampling import decoders
from ntm_jax.sampling.decoders import Sampler
from ntm_jax.sampling.generate import sampler_of


@functools.partial(jax.jit, static_argnames=("model", "pixels", "schedule", "steps"))
def _encoded(params, root, x, index, y, *, model, pixels: PixelLikelihood, schedule: Schedule,
             steps: int):
    t = schedule.fixed_levels(steps, len(x))
    noise = example_noise(example_keys(root, "encode", index), (steps + 1, *x.shape[1:]))
    xs = pixels.simulate(params, x, t, noise)
    return sampling.transport_trajectory(model, params, xs, t, y)


@functools.partial(jax.jit, static_argnames=("sampler", "with_levels"))
def _decoded(params, us, y, denoiser_params, *, sampler: Sampler, with_levels: bool):
    decode = decoders.find(sampler.options.decoder).decode
    assert decode is not None  # see below
    x, xs, _ = decode(sampler, params, us, y, denoiser_params, with_levels)
    return x, xs if with_levels else None


def encode_tokens(run: Run, x, index, condition, seed: int | None = None) -> np.ndarray:
    """Latents u_0..u_T [n, K, N, D] of clean tokens x [n, N, D] on a condition, float32.

    They are those of one trajectory of each example, whose noise is keyed by the seed, the run's by
    default, and its index [n].
    """
    placed = sharding.place((x, np.asarray(index, np.int32), condition), run.mesh)
    root = jax.random.key(checked_seed(run, seed))
    with sharding.use(run.mesh):
        us = _encoded(run.params, root, *placed, model=full_precision(run.model),
                      pixels=run.pixels, schedule=run.schedule, steps=run.config.evaluation_steps)
    return sharding.to_host(us)[: len(x)]


def decode_latents(run: Run, us, condition, options: Sample, with_levels: bool = False):
    """(clean tokens [n, N, D], levels x_0..x_T [n, K, N, D]) of latents us [n, K, N, D].

    levels: None unless with_levels. Raises UserError for a decoder that starts from no latents, or
    that the run cannot use.
    """
    if decoders.find(options.decoder).decode is None:
        raise UserError(f"decoder={options.decoder} makes data of noise without latents: take "
                        "inverse or score")
    sampler, denoiser_params = sampler_of(run, options)
    placed = sharding.place((us, condition), run.mesh)
    with sharding.use(run.mesh):
        found = _decoded(run.params, *placed, denoiser_params, sampler=sampler,
                         with_levels=with_levels)
    return jax.tree.map(lambda a: sharding.to_host(a)[: len(us)], found)
