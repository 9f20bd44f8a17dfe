"""What training minimises: the table that config.train.objective chooses from.

An objective owns its loss, its held-out measure, the label of its loss and what it requires of a
configuration. No other file compares an objective's name. A new one is one entry here, or a call of
`register` in a module that --import names.

Symbols: B batch, T steps, N tokens, D token channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntm_jax import decoders
from ntm_jax.backbones import flow_map
from ntm_jax.core import denoising, flow_matching, trajectory
from ntm_jax.core.denoising import Teacher
from ntm_jax.core.model import NTM, Terms, repeat
from ntm_jax.core.trajectory import Schedule, example_keys
from ntm_jax.core.transformer.conditions import null
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.evaluation import known_density, measures, scoring
from ntm_jax.evaluation.report import NAMES, summarize
from ntm_jax.registry import Registry
from ntm_jax.runtime import build
from ntm_jax.runtime.config import Config, Model, Train
from ntm_jax.runtime.run import Run
from ntm_jax.training.frozen import kept_reference
from ntm_jax.training.reward import drawing, held_out, policy_gradient, preference, rollouts


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a loss is made from, besides parameters and examples. Static."""

    model: Any  # NTM, or the Predictor that becomes a denoiser
    schedule: Schedule
    train: Train  # the section config.train
    mean_level_power: Any = 1.0  # the mean of t_k^level_power over the evaluated levels
    teacher: Teacher | None = None
    reward: Any = None  # the section config.reward
    sampler: drawing.RolloutSampler | None = None  # of post-training
    fixed_parts: tuple[str, ...] = ()  # the first names of parameters that do not learn


def setup(run: Run, teacher: Run | None = None) -> Setup:
    """The setup of a run's loss; teacher: the run that a denoiser learns from."""
    power = run.config.train.level_power
    mean = np.mean(run.evaluated_levels()[:-1] ** power) if power else 1.0
    made = Setup(run.model, run.schedule, run.config.train, mean, teacher and teacher.as_teacher)
    if not find(run.config.train.objective).rollout_use:
        return made
    return dataclasses.replace(made, reward=run.config.reward, sampler=drawing.sampler_of(run),
                               fixed_parts=fixed_parts(run))


def fixed_parts(run: Run) -> tuple[str, ...]:
    """The first names of the parameters that do not learn; () unless a run is post-trained."""
    if not find(run.config.train.objective).rollout_use:
        return ()
    names = build.abstract_params(run.model, run.mesh)["params"]
    return rollouts.fixed_parts(run.config, names)


@dataclasses.dataclass(frozen=True)
class Draws:
    """One step's randomness and examples: root, the step's key, and the batch, keyed by record."""

    root: jax.Array
    batch: dict
    steps: int  # T of this step's trajectories
    step: Any  # the number of the training step, for annealed weights

    def keys(self, name: str):
        """Keys [B] of the draws called `name`."""
        return example_keys(self.root, name, self.batch["index"])

    def t_min(self, schedule: Schedule):
        """t_0 [B], uniform in the schedule's training range."""
        low, high = schedule.t_min_range
        return jax.vmap(lambda key: jax.random.uniform(key, (), minval=low, maxval=high))(
            self.keys("t_min"))

    def condition(self, model, dropout: float):
        """The examples' condition, replaced by the null condition with probability `dropout`."""
        y = build.condition(model, self.batch)
        if not dropout:
            return y
        drop = jax.vmap(lambda key: jax.random.bernoulli(key, dropout))(self.keys("dropout"))
        null_condition = null(y, model.config.num_classes)
        return jax.tree.map(
            lambda given, absent: jnp.where(trajectory.per_example(drop, given), absent, given),
            y, null_condition)


def _reference_mean(setup: Setup, reference, x, s, t, y):
    """The reference's means at levels s [B] of x [B, N, D] at levels t [B]; None without alignment.

    reference: the parameters of the flow-matching model that the run started from.
    """
    if not setup.train.align_weight:
        return None
    velocity, _ = setup.model.backbone.apply(reference, x, t, y)
    return flow_matching.posterior_mean(x, velocity, s, t)


def trajectory_terms(setup: Setup, params, draws: Draws, reference=None) -> Terms:
    """Terms [B, T] of all factors of one trajectory an example (algorithm 1)."""
    x, steps, model = draws.batch["x"], draws.steps, setup.model
    t_min, y = draws.t_min(setup.schedule), draws.condition(model, setup.train.condition_dropout)
    t = setup.schedule.levels(steps, t_min)
    noise = trajectory.example_noise(draws.keys("noise"), (steps + 1, *x.shape[1:]))
    xs = trajectory.simulate(x, t, noise)
    upper, high, low = (a.reshape(-1, *a.shape[2:]) for a in (xs[:, 1:], t[:, 1:], t[:, :-1]))
    repeated = repeat(y, steps)
    means = _reference_mean(setup, reference, upper, low, high, repeated)
    means = None if means is None else means.reshape(len(x), steps, *x.shape[1:])
    return model.apply(params, xs, t, jnp.full(len(x), steps), y, means)


def pair_terms(setup: Setup, params, draws: Draws, reference=None) -> Terms:
    """Terms [B, 1] of one random consecutive pair an example, of a random number of steps each."""
    x, schedule = draws.batch["x"], setup.schedule
    t_min, y = draws.t_min(schedule), draws.condition(setup.model, setup.train.condition_dropout)

    def draw(name, high):
        return jax.vmap(lambda key, h: jax.random.randint(key, (), 0, h))(draws.keys(name), high)

    choices = jnp.asarray(schedule.steps)
    steps = choices[draw("steps", jnp.full(len(x), len(choices)))]
    k = draw("pair", steps)
    s, t = (schedule.level(k + i, steps, t_min) for i in (0, 1))
    noise = trajectory.example_noise(draws.keys("noise"), (2, *x.shape[1:]))
    xs = trajectory.simulate(x, jnp.stack([s, t], 1), noise)
    means = _reference_mean(setup, reference, xs[:, 1], s, t, y)
    terms = setup.model.apply(params, xs[:, 0], xs[:, 1], s, t, k + 1 == steps, steps, y, means,
                              method=NTM.pair)
    return jax.tree.map(lambda a: a[:, None] if jnp.ndim(a) else a, terms)


def _likelihood_loss(terms_of: Callable) -> Callable:
    """The loss of terms_of's terms: the negative log-likelihood without its constant (eq. 3.4)."""
    def loss(setup: Setup, params, draws: Draws, reference=None):
        c, train = setup.model.config, setup.train
        terms, dimensions = terms_of(setup, params, draws, reference), c.tokens * c.dim
        metrics = {name: jnp.mean(getattr(terms, name), 0) / dimensions
                   for name in ("log_det", "log_scale", "quadratic")}
        value = jnp.mean(metrics["quadratic"] + metrics["log_scale"] - metrics["log_det"])
        metrics["loss"] = value
        if train.level_power:
            nll = terms.quadratic + terms.log_scale - terms.log_det
            weighted = jnp.mean(terms.level**train.level_power * nll)
            value = weighted / setup.mean_level_power / dimensions
        if train.align_weight:
            metrics["misalignment"] = jnp.mean(terms.misalignment, 0)
            weight = optax.cosine_decay_schedule(train.align_weight, train.steps)
            value += weight(draws.step) * jnp.mean(metrics["misalignment"])
        return value, metrics

    return loss


def velocity_loss(setup: Setup, params, draws: Draws, reference=None):
    """The squared error of the velocity at one level an example, uniform along the schedule."""
    x, model = draws.batch["x"], setup.model
    y = draws.condition(model, setup.train.condition_dropout)
    t = setup.schedule.level_at_fraction(jax.vmap(jax.random.uniform)(draws.keys("level")))
    noise = trajectory.example_noise(draws.keys("noise"), x.shape[1:])
    backbone_params = flow_matching.backbone_params(params)
    errors = flow_matching.velocity_errors(model.backbone, backbone_params, x, noise, t, y)
    value = jnp.mean(errors)
    return value, {"loss": value}


def flow_map_loss(setup: Setup, params, draws: Draws, reference=None):
    """The joint self-distillation of velocity and divergence; see backbones.flow_map.errors.

    Levels are uniform between t_min and 1. Intervals are those of 2^i equal steps, i = 0..FINEST.
    """
    x, model = draws.batch["x"], setup.model
    y = draws.condition(model, setup.train.condition_dropout)
    t_min = draws.t_min(setup.schedule)

    def uniform(name):
        return jax.vmap(jax.random.uniform)(draws.keys(name))

    count = 2.0 ** jnp.floor(uniform("count") * (flow_map.FINEST + 1))
    place = jnp.floor(uniform("place") * count)
    times = [t_min + (1 - t_min) * share
             for share in (uniform("level"), place / count, (place + 1) / count)]
    noise = trajectory.example_noise(draws.keys("noise"), (2, *x.shape[1:]))
    probes = flow_matching.rademacher(draws.keys("probes"), 1, x.shape[1:])
    found = flow_map.errors(
        model.backbone, flow_matching.backbone_params(params), x, jnp.moveaxis(noise, 1, 0), probes,
        (times[0], times[1:]), y)
    metrics = {name: jnp.mean(value) for name, value in found.items()}
    value = sum(metrics[f"{name}velocity"] + flow_map.DIVERGENCE_WEIGHT
                * metrics[f"{name}divergence"] for name in ("", "average_"))
    return value, metrics | {"loss": value}


def denoiser_loss(setup: Setup, params, draws: Draws, reference=None):
    """The squared error of the denoiser to the teacher's score denoising.

    reference: the teacher's parameters.
    """
    assert setup.teacher is not None
    y = build.condition(setup.model, draws.batch)
    errors = denoising.denoiser_errors(setup.model, params, setup.teacher, reference,
                                       draws.keys("noise"), draws.batch["x"], y)
    value = jnp.mean(errors["to_target"])
    return value, {"loss": value}


@dataclasses.dataclass(frozen=True)
class HeldOutScore:
    """A held-out measure during training: `value` chooses the best checkpoint, lower is better."""

    value: float
    scalars: dict[str, float]  # to log
    message: str  # to print


def held_out_bound(run: Run, source: Source) -> HeldOutScore:
    """The bound on the likelihood with one trajectory a record."""
    result = summarize(scoring.score_records(run, source, trajectories=1), run.spec, 1)
    unit = next(name for name in NAMES if name in result)
    bound = result[unit]["bound"]
    by_level = {f"evaluate/nll/level_{k}": value
                for k, value in enumerate(result["trajectory_nll"]["by_level"])}
    return HeldOutScore(bound["mean"], {f"evaluate/{unit}": bound["mean"]} | by_level,
                        f"held-out bound {bound['mean']:.4f} ± {bound['stderr']:.4f} {NAMES[unit]}")


def held_out_reward(run: Run, source: Source) -> HeldOutScore:
    """The bound, and the mean reward of held-out conditions, by which the best is chosen."""
    bound = held_out_bound(run, source)
    means = {name: float(np.mean(values)) for name, values in held_out.scores(run, source).items()}
    if not means:
        return bound
    scalars = bound.scalars | {f"evaluate/{name}": value for name, value in means.items()}
    return HeldOutScore(-means["reward"], scalars,
                        f"{bound.message}, reward {means['reward']:.4f}")


def held_out_velocity(run: Run, source: Source) -> HeldOutScore:
    """The error of the velocity, over config.evaluate.trajectories levels a record."""
    error = measures.velocity_error(run, source, run.config.evaluate.trajectories)
    return HeldOutScore(
        error["mean"], {"evaluate/velocity_error": error["mean"]},
        f"held-out error of the velocity {error['mean']:.5f} ± {error['stderr']:.5f}")


def held_out_denoiser(run: Run, source: Source) -> HeldOutScore:
    """The error of the denoiser to its target, for a run with a denoiser."""
    error = measures.denoiser_errors(run, source)["to_target"]
    return HeldOutScore(
        error["mean"], {"evaluate/mse": error["mean"]},
        f"held-out error to the target {error['mean']:.6f} ± {error['stderr']:.6f}")


def _no_check(config: Config) -> None:
    """Accepts every configuration."""


def _check_flow(config: Config) -> None:
    model = config.model
    if model.head != "posterior" or model.transporter_blocks:
        raise UserError(f"config.train.objective={config.train.objective} trains a backbone alone: "
                        "expected config.model.head=posterior and "
                        "config.model.transporter_blocks=0, found "
                        f"{model.head} and {model.transporter_blocks}")


def _check_flow_map(config: Config) -> None:
    _check_flow(config)
    if config.model.backbone != "flow_map":
        raise UserError("config.train.objective=flow_map trains config.model.backbone=flow_map, "
                        f"found {config.model.backbone}")


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss, with the measures, labels and checks that belong to it.

    loss(setup, params, draws, reference) -> (the value that is minimised, metrics). metrics has
    "loss", the value that is reported, and may have log_det, log_scale, quadratic and misalignment,
    [T] each by level; other single numbers are logged under their names. reference: the parameters
    of the teacher, of the flow-matching model with whose means the model's are aligned, or of the
    model before post-training; None for other runs.
    held_out(run, source) -> HeldOutScore, during training.
    measure(run, source, trajectories) -> {name: mean and stderr}, added to evaluation.json, where
    trajectories is their number for each record; None adds nothing.
    estimators(run, trajectories) -> estimators of the log-density, compared with a known one; see
    evaluation.known_density.
    check(config) raises UserError for a configuration that the objective cannot train.
    config.sample.steps are among config.trajectory.steps, unless trains_velocity or needs_teacher.
    """

    loss: Callable
    held_out: Callable[[Run, Source], HeldOutScore] = held_out_bound
    loss_label: str = "training loss (nats per dimension)"
    check: Callable[[Config], None] = _no_check
    measure: Callable[[Run, Source, int], dict] | None = None
    estimators: Callable = known_density.bounds
    whole_trajectories: bool = False  # a step holds all levels of an example, of draws.steps steps
    has_levels: bool = True  # the loss has a factor for each level, which train.level_power weights
    trains_velocity: bool = False  # an NTM can start from the model, and its ODE be solved
    needs_teacher: bool = False  # config.teacher, the run to distil
    rollout_use: rollouts.RolloutUse | None = None  # of scored samples, added to batches


def _measure_reward(run: Run, source: Source, trajectories: int) -> dict:
    return held_out.measure(run, source, kept_reference(run))


def _measure_velocity(run: Run, source: Source, trajectories: int) -> dict:
    return {"velocity_error": measures.velocity_error(run, source, trajectories)}


SQUARED = "training loss (mean squared error)"
OBJECTIVES = Registry("config.train.objective", Objective, {
    "end_to_end": Objective(_likelihood_loss(trajectory_terms), whole_trajectories=True),
    "pairwise": Objective(_likelihood_loss(pair_terms)),
    "flow_matching": Objective(
        velocity_loss, held_out_velocity, SQUARED, _check_flow, _measure_velocity,
        known_density.solutions, has_levels=False, trains_velocity=True),
    "flow_map": Objective(
        flow_map_loss, held_out_velocity, SQUARED, _check_flow_map, _measure_velocity,
        known_density.flow_map_estimates, has_levels=False, trains_velocity=True),
    "policy_gradient": Objective(
        policy_gradient.loss_with(_likelihood_loss(trajectory_terms)), held_out_reward,
        whole_trajectories=True, check=policy_gradient.check, measure=_measure_reward,
        rollout_use=policy_gradient.USE),
    "preference": Objective(
        preference.loss_with(_likelihood_loss(trajectory_terms)), held_out_reward,
        whole_trajectories=True, check=preference.check, measure=_measure_reward,
        rollout_use=preference.USE),
    "denoiser": Objective(
        denoiser_loss, held_out_denoiser, SQUARED, has_levels=False, needs_teacher=True),
})


def register(name: str, objective: Objective) -> None:
    """Adds an objective for config.train.objective=name. Raises UserError if the name is taken."""
    OBJECTIVES.register(name, objective)


def find(name: str) -> Objective:
    """The objective of a name. Raises UserError if there is none."""
    return OBJECTIVES.find(name)[0]


def checked(config: Config) -> Objective:
    """The objective of a configuration. Raises UserError where they do not go together."""
    train, name = config.train, config.train.objective
    objective = find(name)
    if objective.needs_teacher != bool(config.teacher):
        raise UserError(f"config.teacher is {config.teacher!r}, config.train.objective {name}: a "
                        "denoiser, and nothing else, has a teacher; give --config.teacher=WORKDIR "
                        "of the run to distil")
    if train.level_power and not objective.has_levels:
        raise UserError(f"config.train.level_power is {train.level_power}: it weights the levels "
                        f"of a trajectory, and config.train.objective={name} has none; set it to 0")
    objective.check(config)
    if config.model.backbone != Model.backbone and config.model.head != "posterior":
        raise UserError(f"config.model.backbone={config.model.backbone} is the network of "
                        f"config.model.head=posterior, found {config.model.head}: set that head, "
                        f"or config.model.backbone={Model.backbone}")
    check_decoder(config, config.sample.decoder)
    free = objective.trains_velocity or objective.needs_teacher  # whose steps the teacher has
    if not free and config.sample.steps not in config.trajectory.steps:
        expected = " or ".join(map(str, config.trajectory.steps))
        raise UserError(f"config.sample.steps is {config.sample.steps}, and the run trains "
                        f"trajectories of {expected} steps: set config.sample.steps={expected}")
    aligns_means = config.model.head == "posterior" and not objective.trains_velocity
    if train.align_weight and not (aligns_means and config.init_from):
        raise UserError(f"config.train.align_weight is {train.align_weight}: it holds a model with "
                        "config.model.head=posterior near the flow-matching model that "
                        "config.init_from names; give both, or align_weight 0")
    return objective


def check_decoder(config: Config, decoder: str, name: str = "config.sample.decoder") -> None:
    """Raises UserError for a decoder that solves an ODE, where the objective trains no velocity.

    name: what the error calls the decoder.
    """
    solves_ode = decoders.find(decoder).solves_ode
    if solves_ode and not find(config.train.objective).trains_velocity:
        names = decoders.DECODERS.names
        others = ", ".join(name for name in names if not decoders.find(name).solves_ode)
        raise UserError(f"{name}={decoder} solves the ODE of a flow-matching model: expected a "
                        f"decoder of {others}, or another config.train.objective")
