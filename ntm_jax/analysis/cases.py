"""What the rows of a benchmark start from and give: a run's setting, and a case to time.

Symbols: B batch, K levels, N tokens, D token channels.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from ntm_jax.core import sampling
from ntm_jax.core.denoising import make_denoiser
from ntm_jax.core.model import full_precision
from ntm_jax.core.trajectory import example_keys
from ntm_jax.data import pipeline
from ntm_jax.data.sources import Source
from ntm_jax.runtime import sharding
from ntm_jax.runtime.run import Denoiser, Run
from ntm_jax.training import objectives, state
from ntm_jax.training.objectives import Objective


@dataclasses.dataclass(frozen=True)
class Setting:
    """The input of the rows: a run with its parameters, or an untrained run with its data."""

    run: Run
    batch: int  # images sampled at a time
    source: Source | None = None  # training data
    held_out: Source | None = None

    @functools.cached_property
    def objective(self) -> Objective:
        """The run's objective."""
        return objectives.find(self.run.config.train.objective)

    @property
    def solves_ode(self) -> bool:
        """Whether the run is a flow-matching model, whose sampler solves an ODE."""
        return self.objective.trains == "velocity"

    @functools.cached_property
    def params(self):
        """The run's parameters, or new ones, which change no rate except the sweeps."""
        return self.run.params or state.initialize(self.run).ema

    @functools.cached_property
    def denoiser(self) -> Denoiser:
        """The run's denoiser, or a new one as large as the predictor."""
        if self.run.denoiser:
            return self.run.denoiser
        module = make_denoiser(self.run.model)
        params = state.initialize(dataclasses.replace(self.run, model=module)).ema
        return Denoiser(module, params, None, None)

    @functools.cached_property
    def drawn(self) -> tuple:
        """Inputs of the sampler's parts, indices, condition, t [B, K] and u_0..u_T [B, K, N, D]."""
        run, params = self.run, self.params  # initialises new ones outside the mesh's context
        index = np.arange(self.batch, dtype=np.int32)
        index, y = sharding.place((index, run.default_condition(index)), run.mesh)
        with sharding.use(run.mesh):
            t, us = latents(params, jax.random.key(0), index, y, schedule=run.schedule,
                             model=full_precision(run.model), options=run.config.sample)
        return index, y, t, us

    def batches(self) -> pipeline.TrainIterator:
        config = self.run.config
        assert self.source is not None  # of training rows
        return pipeline.train_iterator(
            self.source, config.data.patch_size, config.data.batch_size, config.seed,
            config.data.workers, *sharding.share(self.run.mesh))


@dataclasses.dataclass(frozen=True)
class Case:
    """The work of one row: once() does it and returns arrays to wait for."""

    once: Callable
    items: int  # of all processes
    flops: int | None = None  # of all devices; None if memory bandwidth is the limit
    bytes: int = 0  # of this process, if memory bandwidth is the limit
    least: int = 1  # calls in a run, at least: more than a full queue could answer at once
    close: Callable = lambda: None
    facts: dict = dataclasses.field(default_factory=dict)  # further entries of the row


@functools.partial(jax.jit, static_argnames=("schedule", "model", "options"))
def latents(params, root, index, y, *, schedule, model, options):
    """The predictor's part of sampling: (t [B, K], u_0..u_T [B, K, N, D])."""
    t = schedule.fixed_levels(options.steps, len(index))
    keys = example_keys(root, "sample", index)
    return t, sampling.draw_latents(model, params, keys, t, y, options.guidance)[0]
