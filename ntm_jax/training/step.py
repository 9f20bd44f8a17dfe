"""The training step: one jitted function from state and batch to the next state and metrics.

Symbols: B batch, T steps, N tokens, D token channels.
"""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntm_jax.errors import UserError
from ntm_jax.runtime import sharding
from ntm_jax.runtime.config import Config
from ntm_jax.runtime.run import Run
from ntm_jax.training import objectives, optimizers, state
from ntm_jax.training.objectives import LossContext, Objective, StepInputs
from ntm_jax.training.state import State


def make_step(run: Run, objective: Objective, teacher: Run | None = None):
    """The jitted step(state, batch, steps, reference, batch_complete, fixed) -> (state, metrics).

    steps, the T of the trajectories, is static; the state is donated. metrics: those of the
    objective's loss, grad_norm, learning_rate, and finite, whether all new parameters are.
    reference: see Objective. teacher: the run that a denoiser learns from.

    batch_complete: in a job of several processes, sharding.flag_by_process of whether a process has
    its share of the batch. Where one lacks its share, the state stays unchanged everywhere, and
    metrics["batch_complete"] is False.

    fixed: the variables of the model that do not learn, run.pixel_params's.
    """
    config = run.config
    optimizer = optimizers.make(config.optimizer, config.train.steps)
    learning_rate = optimizers.learning_rate(config.optimizer, config.train.steps)
    context = objectives.loss_context(run, objective, teacher)
    gradients = _gradients(context, objective)
    # XLA would choose shardings for the new state other than the old one's: the second step would
    # compile again, and donation would save nothing.
    of_state = jax.tree.map(lambda a: a.sharding, state.abstract(run))
    shardings = of_state, sharding.replicated(run.mesh)

    @functools.partial(jax.jit, static_argnames="steps", donate_argnums=0, out_shardings=shardings)
    def step(current: State, batch, steps: int, reference=None, batch_complete=None, fixed=None):
        root = jax.random.fold_in(jax.random.key(config.seed), current.step)
        inputs = StepInputs(root, batch, steps, current.step)
        metrics, gradient = gradients(current, inputs, reference, fixed or {})
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradient, current.opt_state, current.params)
            params = cast(dict, optax.apply_updates(current.params, updates))
            # Weight decay has moved those that have no gradient.
            frozen = {name: current.params["params"][name] for name in context.frozen_modules}
            params = {"params": params["params"] | frozen}
            ema = update_ema(current.ema, params, current.step, config.optimizer.ema_decay)
            metrics = {"grad_norm": optax.tree.norm(gradient), "finite": _finite(params)} | metrics
            metrics["learning_rate"] = learning_rate(current.step)
            new = State(current.step + 1, params, opt_state, ema)
            if batch_complete is not None:
                # A sum, since XLA refuses to compile some reductions of booleans for GPUs.
                complete = jnp.sum(batch_complete) == batch_complete.size
                metrics["batch_complete"] = complete
                new = jax.tree.map(lambda made, old: jnp.where(complete, made, old), new, current)
        return new, metrics

    return step


def _gradients(context: LossContext, objective: Objective):
    """A function (state, inputs, reference, fixed) -> (metrics, gradient) of a batch.

    The batch is taken in config.train.accumulate parts; noise is keyed by record, so the number of
    parts does not change the result.
    """
    parts = context.config.train.accumulate

    def evaluate(current: State, inputs: StepInputs, reference, fixed: dict):
        def loss(params):
            return objective.loss(context, params | fixed, inputs, reference)

        return jax.grad(loss, has_aux=True)(current.params)[::-1]

    if parts == 1:
        return evaluate

    def accumulated(current: State, inputs: StepInputs, reference, fixed: dict):
        # A part is every parts-th example, so that each device keeps the examples that it holds.
        split = jax.tree.map(
            lambda a: jnp.moveaxis(a.reshape(len(a) // parts, parts, *a.shape[1:]), 1, 0),
            inputs.batch)

        def part(batch):
            return evaluate(current, dataclasses.replace(inputs, batch=batch), reference, fixed)

        def add(total, batch):
            return jax.tree.map(jnp.add, total, part(batch)), None

        shapes = jax.eval_shape(lambda: part(jax.tree.map(lambda a: a[0], split)))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return jax.tree.map(lambda a: a / parts, jax.lax.scan(add, zeros, split)[0])

    return accumulated


def update_ema(ema, params, step, decay: float):
    """The moving average (EMA) of parameters after step n = `step`, counted from 0.

    The decay warms up as min(decay, (1 + n) / (10 + n)).
    """
    n = step.astype(jnp.float32)
    warmed = jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda average, value: warmed * average + (1 - warmed) * value, ema, params)


def _finite(tree):
    """Whether all numbers of a tree are finite.

    The products of a tree's numbers with 0 sum to 0 or to NaN. XLA multiplies and sums in one pass,
    where comparisons would be written to memory as integers first.
    """
    zeros = [jnp.sum(a * 0) for a in jax.tree.leaves(tree)]
    return jnp.sum(jnp.stack(zeros)) == 0


def steps_of(config: Config, objective: Objective, step: int) -> int:
    """T of a training step, drawn from the seed on the host, since shapes are static.

    The largest one for an objective whose shapes do not depend on T.
    """
    choices = config.trajectory.steps
    if len(choices) == 1 or "trajectory" not in objective.needs:
        return max(choices)
    return int(np.random.default_rng((config.seed, step)).choice(choices))


def check_batch(config: Config, mesh) -> None:
    """Raises UserError if the batch does not divide over the mesh and config.train.accumulate."""
    size, parts = config.data.batch_size, config.train.accumulate
    shards = sharding.batch_shards(mesh)
    if size % (shards * parts):
        raise UserError(f"config.data.batch_size is {size}: expected a multiple of "
                        f"{shards * parts}, data x fsdp = {shards} times config.train.accumulate = "
                        f"{parts}")
