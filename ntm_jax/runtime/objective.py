"""What a training step minimises, and the step itself: one jitted function, from state and batch to the next state and metrics.

Symbols: B batch, T steps, N tokens, D token channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntm_jax.core import flow_matching, trajectory
from ntm_jax.core.layers import null
from ntm_jax.core.model import NTM
from ntm_jax.runtime import distill, flops, optimizer, sharding, state
from ntm_jax.runtime.config import Config


def _draws(config: Config, model: NTM, root, batch):
    """Per-example keys for the noise, t_min [B], and the condition, dropped here and there to null: keyed by record."""
    index, y = batch["index"], state.condition(model, batch)
    low, high = config.trajectory.t_min_range
    t_min = jax.vmap(lambda key: jax.random.uniform(key, (), minval=low, maxval=high))(state.example_keys(root, "t_min", index))
    if config.train.condition_dropout:
        drop = jax.vmap(lambda key: jax.random.bernoulli(key, config.train.condition_dropout))(state.example_keys(root, "dropout", index))
        nothing = null(y, model.config.num_classes)
        y = jax.tree.map(lambda told, untold: jnp.where(trajectory.per_example(drop, told), untold, told), y, nothing)
    return state.example_keys(root, "noise", index), t_min, y


def _reference(config: Config, model: NTM, frozen, x, s, t, y):
    """What the frozen flow-matching model says of the means at levels s [B] of x [B, N, D] at levels t [B]; None where nobody asks."""
    if not config.train.align_weight:
        return None
    return flow_matching.posterior_mean(x, model.backbone.apply(frozen, x, t, y)[0], s, t)


def end_to_end(config: Config, model: NTM, params, root, batch, steps: int, frozen=None):
    """Terms [B, T] of all T factors of one trajectory an example (algorithm 1); steps is T, frozen as of make_step."""
    x = batch["x"]
    keys, t_min, y = _draws(config, model, root, batch)
    t = state.levels(config, model, steps, t_min)
    xs = trajectory.simulate(x, t, trajectory.example_noise(keys, (steps + 1, *x.shape[1:])))
    upper, high, low = (a.reshape(-1, *a.shape[2:]) for a in (xs[:, 1:], t[:, 1:], t[:, :-1]))
    reference = _reference(config, model, frozen, upper, low, high, jax.tree.map(lambda a: jnp.repeat(a, steps, 0), y))
    reference = None if reference is None else reference.reshape(len(x), steps, *x.shape[1:])
    return model.apply(params, xs, t, jnp.full(len(x), steps), y, reference)


def pairwise(config: Config, model: NTM, params, root, batch, steps: int, frozen=None):
    """Terms [B, 1] of one random consecutive pair an example, of a number of steps drawn per example; the argument steps is unused."""
    del steps
    x, index = batch["x"], batch["index"]
    keys, t_min, y = _draws(config, model, root, batch)

    def draw(name, high):
        return jax.vmap(lambda key, h: jax.random.randint(key, (), 0, h))(state.example_keys(root, name, index), high)

    steps = jnp.asarray(config.trajectory.steps)[draw("steps", jnp.full(len(x), len(config.trajectory.steps)))]
    k = draw("pair", steps)
    s, t = (trajectory.level(k + i, steps, t_min, config.trajectory.schedule, config.shift(model.config.tokens)) for i in (0, 1))
    noise = trajectory.example_noise(keys, (2, *x.shape[1:]))
    xs = trajectory.simulate(x, jnp.stack([s, t], 1), noise)
    reference = _reference(config, model, frozen, xs[:, 1], s, t, y)
    terms = model.apply(params, xs[:, 0], xs[:, 1], s, t, k + 1 == steps, steps, y, reference, method=NTM.pair)
    return jax.tree.map(lambda a: a[:, None] if jnp.ndim(a) else a, terms)


def velocity(config: Config, model: NTM, params, root, batch, steps=None, frozen=None):
    """Squared errors [B] of the velocity that the model's backbone gives, at one level an example, uniform in the schedule's steps; the
    last two arguments are unused."""
    del steps, frozen
    x = batch["x"]
    keys, _, y = _draws(config, model, root, batch)
    t = state.levels_at(config, model, jax.vmap(jax.random.uniform)(state.example_keys(root, "level", batch["index"])))
    noise = trajectory.example_noise(keys, x.shape[1:])
    return flow_matching.velocity_errors(model.backbone, flow_matching.backbone_params(params), x, noise, t, y)


OBJECTIVES = {"end_to_end": end_to_end, "pairwise": pairwise, "flow_matching": velocity}


def make_step(config: Config, model, mesh, teacher=None):
    """The training step (state, batch, steps, frozen, whole) -> (state, metrics), steps static: jitted, the state donated.

    metrics: loss in nats per dimension without the constant (eq. 3.4), grad_norm, whether the new parameters
    are all finite, and each term's mean by level in nats per dimension, [T]. With a teacher, a load.Run, the model is a denoiser, the loss
    its mean squared error, there are no terms, and frozen are the teacher's parameters. Flow matching has no terms either. With
    config.train.align_weight frozen are the parameters of the flow-matching model that the run starts from, and the distance of the
    means to its, misalignment by level, is minimised too, its weight falling to 0 (method, section 7). With config.train.level_power p
    a factor counts t_k^p, over the mean of that at the evaluated levels; loss is told without.

    whole, of a job of several processes: [devices], sharding.told of whether a process has its share of the batch. Where one has not, the
    state stays as it was on all, and so says metrics["whole"].
    """
    update = optimizer.make(config.optimizer, config.train.steps)
    dimensions, parts = model.config.tokens * model.config.dim, config.train.accumulate

    power = config.train.level_power
    mean_power = np.mean(state.evaluated_levels(config, model)[:-1] ** power) if power else 1.0
    align = optax.cosine_decay_schedule(config.train.align_weight, config.train.steps)

    def loss(params, frozen, root, batch, steps, number):
        """What is minimised, and what is told of it, {name: value}."""
        if teacher:
            keys, y = state.example_keys(root, "noise", batch["index"]), state.condition(model, batch)
            found = distill.errors(teacher.config, model, params, teacher.model, frozen, keys, batch["x"], y)
            value = jnp.mean(found["to_target"])
            return value, {"loss": value}
        terms = OBJECTIVES[config.train.objective](config, model, params, root, batch, steps, frozen)
        if config.train.objective == "flow_matching":
            value = jnp.mean(terms)
            return value, {"loss": value}
        told = {name: jnp.mean(getattr(terms, name), 0) / dimensions for name in ("log_det", "log_scale", "quadratic")}
        told["loss"] = value = jnp.mean(told["quadratic"] + told["log_scale"] - told["log_det"])
        if power:
            value = jnp.mean(terms.level**power * (terms.quadratic + terms.log_scale - terms.log_det)) / mean_power / dimensions
        if config.train.align_weight:
            told["misalignment"] = jnp.mean(terms.misalignment, 0)
            value += align(number) * jnp.mean(told["misalignment"])
        return value, told

    def gradients(params, frozen, root, batch, *rest):
        """(what is told, gradient) of a batch, in config.train.accumulate parts; noise is keyed by record, so the parts do not show."""
        evaluate = jax.grad(loss, has_aux=True)
        if parts == 1:
            return evaluate(params, frozen, root, batch, *rest)[::-1]
        # Every parts-th example, not a run of them: each device keeps the examples that it holds.
        split = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(len(a) // parts, parts, *a.shape[1:]), 1, 0), batch)

        def add(total, part):
            return jax.tree.map(jnp.add, total, evaluate(params, frozen, root, part, *rest)[::-1]), None

        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(
            lambda: evaluate(params, frozen, root, jax.tree.map(lambda a: a[0], split), *rest)[::-1]))
        return jax.tree.map(lambda a: a / parts, jax.lax.scan(add, zeros, split)[0])

    # Left to XLA, the new state comes out sharded otherwise than the old: the second step would compile anew, and donate in vain.
    homes = jax.tree.map(lambda a: a.sharding, state.abstract(config, model, mesh))

    @functools.partial(jax.jit, static_argnames="steps", donate_argnums=0, out_shardings=(homes, sharding.replicated(mesh)))
    def step(current: state.State, batch, steps: int, frozen=None, whole=None):
        root = jax.random.fold_in(jax.random.key(config.seed), current.step)
        told, gradient = gradients(current.params, frozen, root, batch, steps, current.step)
        with jax.named_scope("optimizer"):
            updates, opt_state = update.update(gradient, current.opt_state, current.params)
            params = optax.apply_updates(current.params, updates)
            ema = optimizer.update_ema(current.ema, params, current.step, config.optimizer.ema_decay)
            finite = jnp.stack([jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(params)]).all()
            metrics = {"grad_norm": optax.tree.norm(gradient), "finite": finite} | told
            new = state.State(current.step + 1, params, opt_state, ema)
            if whole is not None:
                metrics["whole"] = jnp.all(whole)
                new = jax.tree.map(lambda made, old: jnp.where(metrics["whole"], made, old), new, current)
        return new, metrics

    return step


def flops_of_step(config: Config, model, step, current, batch, mesh, teacher=None, frozen=None) -> int:
    """The model's FLOPs in a step at the largest T, of all devices: of the same mathematics with nothing recomputed.

    step: make_step's of the same arguments. Where it recomputes nothing it is counted itself, and so traced once for both.
    """
    plain = state.plain(model)
    if teacher or plain != model:
        step = make_step(config, plain, mesh, dataclasses.replace(teacher, model=state.plain(teacher.model)) if teacher else None)
    with sharding.use(mesh):
        return flops.of_jaxpr(step.trace(current, batch, max(config.trajectory.steps), frozen, None).jaxpr.jaxpr)  # as it is called


def steps_of(config: Config, step: int) -> int:
    """The number of levels T of an end-to-end step, drawn on the host from the seed and the step: shapes are static."""
    choices = config.trajectory.steps
    return choices[0] if len(choices) == 1 else int(np.random.default_rng((config.seed, step)).choice(choices))
