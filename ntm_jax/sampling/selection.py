"""Selects the candidate of an image with the largest conditional log-likelihood ratio.

The model's own likelihood is the judge; there is no reward and no classifier. The information that
the condition y gives about an image is estimated by the mean over a few trajectories of

    log p(x_1..x_T | y) - log p(x_1..x_T), in nats,

where x_1..x_T are noisier versions of the image by the forward process, and the second density is
that of the null condition: both are exact for one trajectory. Images that do not show their
condition have little of it. The cleanest level, x_0, is left out, unless T = 1: there the densities
of fine detail, which say nothing about the condition, differ by more than those of what the image
shows. See docs/howto/sample.md.

Symbols: n images; B batch, K levels, T steps, N tokens, D token channels.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.core.model import NTM, Terms, full_precision
from ntm_jax.core.pixels import PixelLikelihood
from ntm_jax.core.trajectory import Schedule, draw_keys, example_keys, example_noise
from ntm_jax.errors import UserError, check_count
from ntm_jax.runtime import sharding
from ntm_jax.runtime.run import Run, different_data
from ntm_jax.sampling import decoders

TRAJECTORIES = 4  # of each candidate; more of them select hardly better


@dataclasses.dataclass(frozen=True)
class Selection:
    """How many candidates each sample is selected from, and whose likelihood selects it.

    stop_nats: the information in nats with which a candidate is kept without looking at further
    ones; None compares all of them.
    """

    candidates: int
    judge: Run
    stop_nats: float | None = None


@functools.partial(jax.jit, static_argnames=("model", "pixels", "schedule", "steps"))
def _information(params, root, index, x, y, *, model: NTM, pixels: PixelLikelihood,
                 schedule: Schedule, steps: int):
    """The information [B] of y about clean tokens x [B, N, D], a mean over trajectories.

    The noise is keyed by index, so that all candidates of an image have the same.
    """
    t, count = schedule.fixed_levels(steps, len(x)), jnp.full(len(x), steps)
    keys = example_keys(root, "select", index)
    first = min(1, steps - 1)

    def nll(xs, condition):
        terms = cast(Terms, model.apply(params, xs, t[:, first:], count, condition))
        return terms.nll.sum(1)

    def add(total, number):
        noise = example_noise(draw_keys(keys, number), (t.shape[1], *x.shape[1:]))
        xs = pixels.simulate(params, x, t, noise)[:, first:]
        return total + nll(xs, model.config.condition.null_condition(y)) - nll(xs, y), None

    total, _ = jax.lax.scan(add, jnp.zeros(len(x)), jnp.arange(TRAJECTORIES))
    return total / TRAJECTORIES


def information(judge: Run, images, index, y, seed: int) -> np.ndarray:
    """The information of conditions about images by a run's likelihood, [n] float32, nats.

    images: [n, H, W, C], integers 0..V-1 or float32 latents, or rows [n, D] of an array; y: labels
    [n], Text or Vector. index: [n], of the noise.
    """
    arguments = sharding.place((index, judge.spec.to_tokens(images), y), judge.mesh)
    with sharding.use(judge.mesh):
        found = _information(
            judge.params, jax.random.key(seed), *arguments, model=full_precision(judge.model),
            pixels=judge.pixels, schedule=judge.schedule, steps=judge.config.evaluation_steps)
    return sharding.to_host(found)[: len(images)]


def select(run: Run, index, y, seed: int, draw: Callable) -> list:
    """The parts of the selected candidate of each of the n images.

    It is the first one that reaches stop_nats, or else the one with the most.

    draw(number): the parts of all images' candidates of that number, arrays [n, ...] or None, of
    which the first are tokens. y: the conditions of the images. A candidate that is not finite is
    kept only where none is.
    """
    chosen: Selection = run.selection
    stop_nats = np.inf if chosen.stop_nats is None else chosen.stop_nats
    best, most = draw(0), np.full(len(index), -np.inf)
    for number in range(chosen.candidates):
        if (most >= stop_nats).all():
            break
        parts = draw(number) if number else best
        found = information(chosen.judge, run.spec.from_tokens(parts[0]), index, y, seed)
        better = (found > most) & (most < stop_nats)  # False for NaN
        most = np.where(better, found, most)
        best = [kept if part is None else
                np.where(better.reshape(-1, *[1] * (part.ndim - 1)), part, kept)
                for part, kept in zip(parts, best, strict=True)]
    return best


def best_of(run: Run, candidates: int, judge: Run | None = None,
            stop_nats: float | None = None) -> Run:
    """The run with samples that are selected, each from so many candidates; see api.Run.best_of.

    Raises UserError for a judge that has no likelihood, no null condition, or other data.
    """
    check_count("candidates", candidates)
    if candidates == 1 and (judge or stop_nats is not None):
        raise UserError(f"candidates is {candidates}: expected at least 2 to select from, or 1 "
                        "without judge and stop_nats")
    if candidates == 1:
        return run
    judge = judge or run
    if decoders.find(judge.config.sample.decoder).solves_ode:
        raise UserError(f"{judge.workdir} solves an ODE and has no trajectory likelihood to select "
                        "by: give an NTM of the same data as judge")
    if not judge.config.train.condition_dropout:
        raise UserError(f"{judge.workdir} was trained without condition dropout and knows no null "
                        "condition to select by: give as judge a run trained with "
                        "config.train.condition_dropout above 0")
    different = different_data(run, judge, own_units=True)
    if different:
        name, mine, theirs = different
        raise UserError(f"the judge {judge.workdir} has {name} {theirs or 'none'}, and "
                        f"{run.workdir} {mine or 'none'}: give a run of the same data")
    return dataclasses.replace(run, selection=Selection(candidates, judge, stop_nats))
