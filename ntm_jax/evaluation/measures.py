"""Held-out errors of denoising and of velocities, each a mean with its standard error over records.

Symbols: B batch, N tokens, D token channels.
"""

import functools

import jax
import jax.numpy as jnp

from ntm_jax.core import denoising, flow_matching, trajectory
from ntm_jax.core.model import full_precision
from ntm_jax.core.pixels import PixelLikelihood
from ntm_jax.core.trajectory import Schedule
from ntm_jax.core.transformer import precision
from ntm_jax.data.sources import Source
from ntm_jax.evaluation import scoring
from ntm_jax.evaluation.statistics import mean_and_stderr
from ntm_jax.runtime.run import Run


@functools.partial(jax.jit, static_argnames=("schedule", "model", "pixels", "steps", "percentile"))
def _denoising_errors(params, root, batch, *, schedule: Schedule, model, pixels: PixelLikelihood,
                      steps, percentile):
    x, y = batch["x"], model.config.condition.stack(batch)
    keys = trajectory.example_keys(root, "evaluate", batch["index"])
    t = schedule.fixed_levels(steps, len(x))
    noise = trajectory.example_noise(keys, (t.shape[1], *x.shape[1:]))
    xs, x = pixels.simulate(params, x, t, noise), pixels.embed(params, x)
    variance = pixels.variance(params, xs[:, 0], t[:, 0], y)
    found = denoising.denoise_levels(model, params, xs, t, y, percentile, variance)
    return {name: jnp.mean(jnp.square(clean - x[:, None]), (2, 3)) for name, clean in found.items()}


def denoising_errors(run: Run, source: Source) -> dict:
    """Squared errors to the data, per dimension, of score denoising records noised once each.

    Returns {formula of denoising.denoise_levels: lists `mean` and `stderr` by level, clean to
    noisy}.
    """
    config = run.config
    compute = functools.partial(
        _denoising_errors, run.params, schedule=run.schedule, model=full_precision(run.model),
        pixels=run.pixels, steps=config.evaluation_steps, percentile=config.sample.percentile)
    found = scoring.per_record(run, source, compute)
    figures = {name: [mean_and_stderr(v) for v in values.T] for name, values in found.items()}
    return {name: {key: [figure[key] for figure in by_level] for key in ("mean", "stderr")}
            for name, by_level in figures.items()}


@functools.partial(jax.jit, static_argnames=("schedule", "model", "pixels", "steps", "denoiser"))
def _denoiser_errors(params, denoiser_params, root, batch, *, schedule: Schedule, model,
                     pixels: PixelLikelihood, steps, denoiser):
    x, y = batch["x"], model.config.condition.stack(batch)
    keys = trajectory.example_keys(root, "evaluate", batch["index"])
    return denoising.denoiser_errors(
        full_precision(denoiser), denoiser_params, model, params, pixels, keys, x,
        schedule.fixed_levels(steps, len(x)), y)


def denoiser_errors(run: Run, source: Source) -> dict:
    """Figures of denoising.denoiser_errors for a run with a denoiser, one trajectory a record."""
    assert run.denoiser is not None
    compute = functools.partial(
        _denoiser_errors, run.params, run.denoiser.params, schedule=run.schedule, model=run.model,
        pixels=run.pixels, steps=run.config.sample.steps, denoiser=run.denoiser.module)
    found = scoring.per_record(run, source, compute)
    return {name: mean_and_stderr(values) for name, values in found.items()}


@functools.partial(jax.jit, static_argnames=("schedule", "model", "draws"))
def _velocity_errors(params, root, batch, *, schedule: Schedule, model, draws):
    x, y = batch["x"], model.config.condition.stack(batch)
    keys = trajectory.example_keys(root, "evaluate/velocity", batch["index"])

    def add(total, number):
        own = trajectory.draw_keys(keys, number)
        share = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0)))(own)
        t = schedule.level_at_fraction((number + share) / draws)
        with precision(model.config.precision):
            return total + flow_matching.velocity_errors(
                model.backbone, flow_matching.backbone_params(params), x,
                trajectory.example_noise(own, x.shape[1:]), t, y), None

    return {"velocity": jax.lax.scan(add, jnp.zeros(len(x)), jnp.arange(draws))[0] / draws}


def velocity_error(run: Run, source: Source, draws: int) -> dict:
    """Mean squared error per dimension of a flow-matching model's velocity.

    draws: the number of levels a record, spread evenly.
    """
    compute = functools.partial(_velocity_errors, run.params, schedule=run.schedule,
                                model=full_precision(run.model), draws=draws)
    return mean_and_stderr(scoring.per_record(run, source, compute)["velocity"])
