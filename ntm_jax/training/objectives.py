"""What training minimises: the table that config.train.objective chooses from.

An objective owns its loss, its held-out measure, the label of its loss, what it needs and what it
requires of a configuration. It is found once and passed on. A new one is one entry here, or a call
of `register` in a module that --import names.

Symbols: B batch, T steps, N tokens, D token channels.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntm_jax.core import denoising, flow_matching, trajectory
from ntm_jax.core.model import NTM, Terms, repeat
from ntm_jax.core.pixels import PixelLikelihood
from ntm_jax.core.trajectory import Schedule, example_keys
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.evaluation import measures, scoring
from ntm_jax.evaluation.report import NAMES, summarize
from ntm_jax.registry import Registry
from ntm_jax.runtime import build
from ntm_jax.runtime.config import Config, Model, decoder
from ntm_jax.runtime.run import Run


@dataclasses.dataclass(frozen=True)
class LossContext:
    """What a loss is made from, besides parameters and examples. Static."""

    run: Run
    config: Config
    model: Any  # NTM, or the Predictor that becomes a denoiser
    schedule: Schedule  # the noise levels of trajectories
    pixels: PixelLikelihood  # the noise at t_0; of a denoiser, its teacher's
    teacher: NTM | None  # from which a denoiser learns
    frozen_modules: tuple[str, ...]  # top-level names of parameters that do not learn
    mean_level_power: float  # the mean of t_k^level_weight_power over the evaluated levels


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """One step's randomness and examples: root, the step's key, and the batch, keyed by record."""

    root: jax.Array
    batch: dict
    steps: int  # T of this step's trajectories
    step: Any  # the number of the training step, for annealed weights

    def keys(self, name: str):
        """Keys [B] of the inputs called `name`."""
        return example_keys(self.root, name, self.batch["index"])

    def t_min(self, schedule: Schedule):
        """t_0 [B], uniform in the schedule's training range."""
        low, high = schedule.t_min_range
        return jax.vmap(lambda key: jax.random.uniform(key, (), minval=low, maxval=high))(
            self.keys("t_min"))

    def condition(self, model, dropout: float):
        """The examples' condition, replaced by the null condition with probability `dropout`."""
        y = model.config.condition.stack(self.batch)
        if not dropout:
            return y
        drop = jax.vmap(lambda key: jax.random.bernoulli(key, dropout))(self.keys("dropout"))
        return jax.tree.map(
            lambda given, absent: jnp.where(trajectory.per_example(drop, given), absent, given),
            y, model.config.condition.null_condition(y))


def _reference_mean(context: LossContext, reference, x, s, t, y):
    """The reference's means at levels s [B] of x [B, N, D] at levels t [B]; None without alignment.

    reference: the parameters of the flow-matching model that the run started from.
    """
    if not context.config.train.align_weight:
        return None
    velocity, _ = context.model.backbone.apply(reference, x, t, y)
    return flow_matching.posterior_mean(x, velocity, s, t)


def trajectory_terms(context: LossContext, params, inputs: StepInputs, reference=None) -> Terms:
    """Terms [B, T] of all factors of one trajectory an example (algorithm 1)."""
    x, steps, model = inputs.batch["x"], inputs.steps, context.model
    t = context.schedule.levels(steps, inputs.t_min(context.schedule))
    y = inputs.condition(model, context.config.train.condition_dropout)
    noise = trajectory.example_noise(inputs.keys("noise"), (steps + 1, *x.shape[1:]))
    xs = context.pixels.simulate(params, x, t, noise)
    upper, high, low = (a.reshape(-1, *a.shape[2:]) for a in (xs[:, 1:], t[:, 1:], t[:, :-1]))
    repeated = repeat(y, steps)
    means = _reference_mean(context, reference, upper, low, high, repeated)
    means = None if means is None else means.reshape(len(x), steps, *x.shape[1:])
    terms = model.apply(params, xs, t, jnp.full(len(x), steps), y, means)
    if context.pixels.kind != "learned":
        return terms
    return terms.replace(
        reconstruction=context.pixels.log_prob(params, x, xs[:, 0], t[:, 0], y))


def pair_terms(context: LossContext, params, inputs: StepInputs, reference=None) -> Terms:
    """Terms [B, 1] of one random consecutive pair an example, of a random number of steps each."""
    x, schedule = inputs.batch["x"], context.schedule
    t_min = inputs.t_min(schedule)
    y = inputs.condition(context.model, context.config.train.condition_dropout)

    def draw(name, high):
        return jax.vmap(lambda key, h: jax.random.randint(key, (), 0, h))(inputs.keys(name), high)

    choices = jnp.asarray(schedule.steps)
    steps = choices[draw("steps", jnp.full(len(x), len(choices)))]
    k = draw("pair", steps)
    s, t = (schedule.level(k + i, steps, t_min) for i in (0, 1))
    noise = trajectory.example_noise(inputs.keys("noise"), (2, *x.shape[1:]))
    xs = context.pixels.simulate(params, x, jnp.stack([s, t], 1), noise)
    means = _reference_mean(context, reference, xs[:, 1], s, t, y)
    terms = context.model.apply(params, xs[:, 0], xs[:, 1], s, t, k + 1 == steps, steps, y, means,
                              method=NTM.pair)
    return jax.tree.map(lambda a: a[:, None] if jnp.ndim(a) else a, terms)


def _likelihood_loss(terms_of: Callable) -> Callable:
    """The loss of terms_of's terms: the negative log-likelihood without its constant (eq. 3.4).

    Where the noise at t_0 is learned, the negative bound on log p(x): it has the reconstruction.
    """
    def loss(context: LossContext, params, inputs: StepInputs, reference=None):
        c, train = context.model.config, context.config.train
        terms, dimensions = terms_of(context, params, inputs, reference), c.tokens * c.dim
        metrics = {name: jnp.mean(getattr(terms, name), 0) / dimensions
                   for name in ("log_det", "log_scale", "quadratic")}
        value = jnp.mean(metrics["quadratic"] + metrics["log_scale"] - metrics["log_det"])
        metrics["loss"] = value
        if train.level_weight_power:
            nll = terms.quadratic + terms.log_scale - terms.log_det
            weighted = jnp.mean(terms.level**train.level_weight_power * nll)
            value = weighted / context.mean_level_power / dimensions
        if context.pixels.kind == "learned":
            metrics["reconstruction"] = jnp.mean(terms.reconstruction) / dimensions
            share = metrics["reconstruction"] / terms.nll.shape[1]  # a mean over the levels, too
            value, metrics["loss"] = value - share, metrics["loss"] - share
        if train.align_weight:
            metrics["misalignment"] = jnp.mean(terms.misalignment, 0)
            weight = optax.cosine_decay_schedule(train.align_weight, train.steps)
            value += weight(inputs.step) * jnp.mean(metrics["misalignment"])
        return value, metrics

    return loss


def velocity_loss(context: LossContext, params, inputs: StepInputs, reference=None):
    """The squared error of the velocity at one level an example, uniform along the schedule."""
    x, model = inputs.batch["x"], context.model
    y = inputs.condition(model, context.config.train.condition_dropout)
    t = context.schedule.level_at_fraction(jax.vmap(jax.random.uniform)(inputs.keys("level")))
    noise = trajectory.example_noise(inputs.keys("noise"), x.shape[1:])
    backbone_params = flow_matching.backbone_params(params)
    errors = flow_matching.velocity_errors(model.backbone, backbone_params, x, noise, t, y)
    value = jnp.mean(errors)
    return value, {"loss": value}


def denoiser_loss(context: LossContext, params, inputs: StepInputs, reference=None):
    """The squared error of the denoiser to the teacher's score denoising.

    reference: the teacher's parameters.
    """
    assert context.teacher is not None
    x, y = inputs.batch["x"], context.model.config.condition.stack(inputs.batch)
    t = context.schedule.fixed_levels(context.config.sample.steps, len(x))  # also the teacher's
    errors = denoising.denoiser_errors(
        context.model, params, context.teacher, reference, context.pixels, inputs.keys("noise"), x,
        t, y)
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


def held_out_velocity(run: Run, source: Source) -> HeldOutScore:
    """The error of the velocity, over config.evaluate.trajectories levels a record."""
    error = measures.velocity_error(run, source, run.config.evaluate.trajectories)
    return _score_of_error("velocity_error", "error of the velocity", error)


def held_out_denoiser(run: Run, source: Source) -> HeldOutScore:
    """The error of the denoiser to its target, for a run with a denoiser."""
    error = measures.denoiser_errors(run, source)["to_target"]
    return _score_of_error("mse", "error to the target", error)


def _score_of_error(name: str, what: str, error: dict[str, float]) -> HeldOutScore:
    mean, stderr = error["mean"], error["stderr"]
    return HeldOutScore(mean, {f"evaluate/{name}": mean},
                        f"held-out {what} {mean:.6f} ± {stderr:.6f}")


def check_flow(config: Config) -> None:
    """Raises UserError for a configuration that does not train a flow-matching network alone."""
    model = config.model
    if model.head != "flow_matching" or model.transporter_blocks:
        raise UserError(f"config.train.objective={config.train.objective} trains a backbone alone: "
                        "expected config.model.head=flow_matching and "
                        "config.model.transporter_blocks=0, found "
                        f"{model.head} and {model.transporter_blocks}")


def check_pairs(config: Config) -> None:
    """Raises UserError for a configuration that pairs of levels cannot train."""
    if config.model.pixel_likelihood == "learned":
        raise UserError("config.model.pixel_likelihood=learned trains on the bound of whole "
                        "trajectories: expected config.train.objective=end_to_end, or another "
                        "pixel likelihood, such as network")


class Extension:
    """What an objective may add to every batch before its steps, such as samples of the model.

    This one adds nothing, and others override it.

    updates: the steps that are taken on a batch, between which a run is not saved.
    ahead: whether the next batch is begun before this one is finished, so that the devices work
    while the host does.
    """

    updates: int = 1
    ahead: bool = False

    def __init__(self, run: Run, source: Source):
        """Raises UserError where the run's settings do not go with its training data."""

    def begin(self, params, reference, batch: dict, step: int, logged: bool):
        """Dispatches the devices' work for a batch without waiting for it; `finish` gets its value.

        params: those of `step`. reference: see Objective. logged: whether scalars of this batch
        are logged.
        """
        return batch

    def finish(self, pending) -> tuple[dict, dict[str, float]]:
        """(the batch with its further arrays, scalars to log)."""
        return pending, {}

    def to_save(self, pending) -> dict:
        """The arrays that a checkpoint keeps of a batch that is begun and not finished."""
        return {}

    def abstract(self, names: tuple[str, ...]) -> dict:
        """The shapes and shardings of those arrays of `to_save`."""
        return {}

    def restore(self, saved: dict, batch: dict, logged: bool):
        """What `begin` returned before these arrays were saved, for the same batch."""
        raise NotImplementedError

    def pictures(self, run: Run, reference, held_out: Source) -> list[str]:
        """Draws pictures of a trained run; their paths."""
        return []

    def close(self) -> None:
        """Ends what the extension keeps open."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss, with the measures, labels and checks that belong to it.

    loss(context, params, inputs, reference) -> (the value that is minimised, metrics). params: the
    variables of the model, those that do not learn among them. metrics has
    "loss", the value that is reported, and may have log_det, log_scale, quadratic and misalignment,
    [T] each by level; other single numbers are logged under their names. reference: the parameters
    of what the objective needs, "teacher" or "reference", or of the flow-matching model with whose
    means the model's are aligned; None for other runs.
    held_out(run, source) -> HeldOutScore, during training.
    check(config) raises UserError for a configuration that the objective cannot train.
    needs: what the loss reads besides a batch. "trajectory": all levels of each example, of
    inputs.steps steps; others always get the largest number of steps. "teacher": the run of
    config.teacher. "reference": the parameters that the run started from.
    trains: "ntm", whose config.sample.steps are among config.trajectory.steps; "velocity", from
    which an NTM can start and whose ODE any number of steps solves; or "denoiser".
    measure(run, source, trajectories) -> {name: mean and stderr}, added to evaluation.json, where
    trajectories is their number for each record; None adds nothing.
    frozen_modules(config, names) -> those of the parameters' top-level names that do not learn.
    extend(run, source) -> what adds arrays to batches; see Extension.
    """

    loss: Callable
    held_out: Callable[[Run, Source], HeldOutScore] = held_out_bound
    label: str = "training loss (nats per dimension)"
    check: Callable[[Config], None] = lambda config: None
    needs: tuple[str, ...] = ()
    trains: str = "ntm"
    measure: Callable[[Run, Source, int], dict] | None = None
    frozen_modules: Callable[[Config, Iterable[str]], tuple[str, ...]] = lambda config, names: ()
    extend: Callable[[Run, Source], Extension] = Extension


def measure_velocity(run: Run, source: Source, trajectories: int) -> dict:
    """The error of the velocity, as evaluation.json has it."""
    return {"velocity_error": measures.velocity_error(run, source, trajectories)}


SQUARED = "training loss (mean squared error)"
trajectory_loss = _likelihood_loss(trajectory_terms)
OBJECTIVES: Registry[Objective] = Registry("config.train.objective", {
    "end_to_end": Objective(trajectory_loss, needs=("trajectory",)),
    "pairwise": Objective(_likelihood_loss(pair_terms), check=check_pairs),
    "flow_matching": Objective(velocity_loss, held_out_velocity, SQUARED, check_flow,
                               trains="velocity", measure=measure_velocity),
    "flow_map": "ntm_jax.projects.densities.objective:OBJECTIVE",
    "policy_gradient": "ntm_jax.projects.reward.policy_gradient:OBJECTIVE",
    "preference": "ntm_jax.projects.reward.preference:OBJECTIVE",
    "denoiser": Objective(
        denoiser_loss, held_out_denoiser, SQUARED, needs=("teacher",), trains="denoiser"),
})
register = OBJECTIVES.register


def find(name: str) -> Objective:
    """The objective of a name. Raises UserError if there is none."""
    return OBJECTIVES.find(name)[0]


def loss_context(run: Run, objective: Objective, teacher: Run | None = None) -> LossContext:
    """The context of a run's loss; teacher: the run that a denoiser learns from."""
    names = build.abstract_params(run.model, run.mesh)["params"]
    power = run.config.train.level_weight_power
    mean = float(np.mean(run.evaluated_levels()[:-1] ** power)) if power else 1.0
    frozen = objective.frozen_modules(run.config, names)
    if "pixels" in names and objective.loss is not trajectory_loss:  # which alone is the bound
        frozen = *frozen, "pixels"
    return LossContext(run, run.config, run.model, run.schedule, (teacher or run).pixels,
                       teacher and teacher.model, frozen, mean)


def checked(config: Config) -> Objective:
    """The objective of a configuration. Raises UserError where they do not go together."""
    train, name = config.train, config.train.objective
    objective = find(name)
    if ("teacher" in objective.needs) != bool(config.teacher):
        raise UserError(f"config.teacher is {config.teacher!r}, config.train.objective {name}: a "
                        "denoiser, and nothing else, has a teacher; give --config.teacher=WORKDIR "
                        "of the run to distil")
    objective.check(config)
    if config.model.backbone != Model.backbone and config.model.head != "flow_matching":
        raise UserError(f"config.model.backbone={config.model.backbone} is the network of "
                        f"config.model.head=flow_matching, found {config.model.head}: set that "
                        f"head, or config.model.backbone={Model.backbone}")
    if train.distil_steps and (objective.trains != "ntm" or config.model.head == "standard"):
        raise UserError(f"config.train.distil_steps is {train.distil_steps}: a denoiser is "
                        f"distilled of an NTM, and config.train.objective={name} with "
                        f"config.model.head={config.model.head} trains none; set it to 0")
    if decoder(config.sample.decoder).solves_ode and objective.trains != "velocity":
        raise UserError(f"config.sample.decoder={config.sample.decoder} solves the ODE of a "
                        "flow-matching model: expected a decoder such as inverse or score, or "
                        "another config.train.objective")
    # a denoiser has its teacher's steps, and an ODE is solved in any number of them
    if objective.trains == "ntm" and config.sample.steps not in config.trajectory.steps:
        expected = " or ".join(map(str, config.trajectory.steps))
        raise UserError(f"config.sample.steps is {config.sample.steps}, and the run trains "
                        f"trajectories of {expected} steps: set config.sample.steps={expected}")
    aligns_means = config.model.head == "flow_matching" and objective.trains != "velocity"
    if train.align_weight and not (aligns_means and config.init_from):
        raise UserError(f"config.train.align_weight is {train.align_weight}: it holds a model with "
                        "config.model.head=flow_matching near the flow-matching model that "
                        "config.init_from names; give both, or align_weight 0")
    return objective
