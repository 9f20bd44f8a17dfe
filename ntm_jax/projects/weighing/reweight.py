"""Samples weighted to a target density, and its normalising constant.

A sample x comes with its trajectory x_0..x_T from p(x_0..x_T | y) p(x | x_0), where p(x | x_0) is
the Gaussian decoder of the likelihood's bound. With an unnormalised target f(x) the weight is

    w = f(x) q(x_0..x_T | x) / (p(x_0..x_T | y) p(x | x_0)),

where q is the forward process. q is normalised for every x, so the mean of w is an unbiased
estimate of the integral of f, whatever the model. See docs/howto/arrays.md. Symbols: n samples,
D dimensions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.core import sampling, trajectory
from ntm_jax.core.model import full_precision, log_prior
from ntm_jax.core.trajectory import example_keys, example_noise, per_example
from ntm_jax.errors import UserError, check_count
from ntm_jax.runtime import sharding
from ntm_jax.runtime.config import Sample
from ntm_jax.runtime.run import Run, checked_seed, one_condition
from ntm_jax.sampling.generate import Sampler, check_density, override

BATCH = 2000  # samples drawn at once


@dataclasses.dataclass(frozen=True)
class Reweighted:
    """Samples with the weights that correct them to a target.

    samples: [n, D] of an array in its own units, or latents [n, H, W, C].
    log_weights: [n] float64, nats; -inf where the target is 0.
    resampled: samples drawn from these with probabilities proportional to their weights, [n, ...].
    """

    samples: np.ndarray
    log_weights: np.ndarray
    resampled: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        """The weights, normalised to sum 1, [n]."""
        return _normalised(self.log_weights)

    @property
    def effective_sample_size(self) -> float:
        """(sum w)^2 / sum w^2, between 1 and n."""
        return float(1 / np.sum(self.weights**2))

    @property
    def log_evidence(self) -> float:
        """log of the mean weight. Its exponential is unbiased; it is itself too low on average."""
        top = self.log_weights.max()
        return float(top + np.log(np.mean(np.exp(self.log_weights - top))))

    @property
    def relative_error(self) -> float:
        """The standard error of the evidence as a share of it, about that of log_evidence.

        nan for one sample, which does not show it.
        """
        n = len(self.log_weights)
        if n == 1:
            return math.nan
        return math.sqrt(max(n / self.effective_sample_size - 1, 0) / (n - 1))

    @property
    def evidence(self) -> float:
        """The mean weight, an unbiased estimate of the target's integral.

        Where its log is below about -745 it is 0, and above 709 inf: take log_evidence.
        """
        return float(np.exp(self.log_evidence))

    @property
    def evidence_stderr(self) -> float:
        """The standard error of `evidence`; nan for one sample."""
        return self.evidence * self.relative_error


def _normalised(log_weights: np.ndarray) -> np.ndarray:
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


@functools.partial(jax.jit, static_argnames="sampler")
def _draw(params, root, index, y, *, sampler: Sampler):
    """Tokens x [B, N, D] of p(x | x_0), and log q(x_0..x_T | x) - log p(x_0..x_T, x | y), [B]."""
    model, options = sampler.model, sampler.options
    t = sampler.schedule.fixed_levels(options.steps, len(index))
    xs, log_density = sampling.sample_with_log_prob(
        model, params, example_keys(root, "sample", index), t, y, options.guidance,
        sampler.inverse(len(index) * options.steps))
    t_0 = per_example(t[:, 0], xs[:, 0])
    noise = example_noise(example_keys(root, "reweight", index), xs.shape[2:])
    x = (xs[:, 0] + t_0 * noise) / (1 - t_0)
    forward = jnp.sum(trajectory.log_reverse(xs, t, x), 1) + log_prior(xs[:, -1])
    decoded = sampler.pixels.log_prob(params, x, xs[:, 0], t[:, 0], y)
    return x, forward - jnp.sum(log_density, 1) - decoded


def reweight(run: Run, log_target: Callable, *, condition=None, label=None, n: int = 1000,
             seed: int | None = None, steps: int | None = None, guidance=None,
             inverse: str | None = None) -> Reweighted:
    """n samples of a run on one condition, with weights that correct them to a target density.

    log_target: a function of the samples, rows [n, D] of an array in its own units, float64, or
    latents [n, H, W, C], that returns the log of an unnormalised density, [n], -inf where it is 0:
    in inference from simulations the prior times the likelihood. condition, label: one for all
    samples, such as a vector [E] or the text of one caption. steps, guidance, inverse: as in
    Run.sample.

    Returns the samples, their log-weights, draws from the weighted samples, the effective sample
    size, and an unbiased estimate of the target's integral with its standard error. Raises
    UserError for n below 1, a model of pixels, an ODE's solver, samples that are selected, several
    conditions, and a target whose values are no log-densities.
    """
    condition = run.condition.validate(1, one_condition(label, condition))
    options = override(run.config, steps=steps, guidance=guidance, inverse=inverse)
    check_count("n", n)
    if run.spec.pixel_levels:
        raise UserError("the run has pixels: expected a model of continuous data, whose samples "
                        "have a density")
    check_density(run, options)
    seed = checked_seed(run, seed)
    x, log_ratio = _draw_all(run, condition, n, options, seed)
    samples = run.spec.from_tokens(x)
    values = np.asarray(log_target(samples.copy()), np.float64)  # it may change them
    if values.shape != (n,) or np.isnan(values).any() or np.isposinf(values).any():
        raise UserError(f"log_target returned {list(values.shape)}, with {np.isnan(values).sum()} "
                        f"NaN and {np.isposinf(values).sum()} inf: expected the log-density of "
                        f"each of the {n} samples, [{n}]")
    # A sample that diverged has no density, and needs none where the target is 0.
    log_weights = np.where(np.isneginf(values), -np.inf, values + log_ratio + run.spec.log_unit)
    if np.isnan(log_weights).any() or np.isneginf(log_weights).all():
        raise UserError(f"{np.isfinite(log_weights).sum()} of {n} samples have a finite weight: "
                        "train the run for longer, lower the guidance, or give the target's own "
                        "condition")
    chosen = systematic(_normalised(log_weights), n, np.random.default_rng(seed))
    return Reweighted(samples, log_weights, samples[chosen])


def _draw_all(run: Run, condition, n: int, options: Sample, seed: int):
    """(tokens [n, N, D], log-ratios [n] float64), in batches of one size."""
    sampler = Sampler(full_precision(run.model), run.schedule, options, run.mesh, run.pixels)
    root, size = jax.random.key(seed), min(n, BATCH)
    y = jax.tree.map(lambda a: np.repeat(a, size, 0), condition)
    parts = []
    for start in range(0, n, size):
        # The last batch is as large as the others, so that nothing is compiled for it.
        index = np.arange(start, start + size)
        placed = sharding.place((index.astype(np.int32), y), run.mesh)
        with sharding.use(run.mesh):
            found = _draw(run.params, root, *placed, sampler=sampler)
        parts.append([a[:size] for a in sharding.to_host(found)])
    x, log_ratio = (np.concatenate(part)[:n] for part in zip(*parts, strict=True))
    return x, log_ratio.astype(np.float64)


def systematic(weights: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Indices [count] drawn by weights w [n] of sum 1: each count x w times, rounded up or down."""
    places = (random.random() + np.arange(count)) / count
    return np.minimum(np.searchsorted(np.cumsum(weights), places), len(weights) - 1)
