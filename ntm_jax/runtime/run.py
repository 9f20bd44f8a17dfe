"""The typed run: a configuration with its data's shape, model, parameters, step, mesh and folder.

Sampling, evaluation, export and training take a Run in place of these one by one. api.Run adds what
a notebook calls on it.
"""

import dataclasses
import numbers
from typing import Any

import jax
import numpy as np

from ntm_jax.core.denoising import make_denoiser
from ntm_jax.core.pixels import PixelLikelihood
from ntm_jax.core.predictor import Predictor
from ntm_jax.core.trajectory import Schedule
from ntm_jax.data import conditions
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.errors import UserError, abbreviate
from ntm_jax.runtime import arithmetic, build, checkpoint, config_file, sharding
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.runtime.config import AUTO, Config, Mesh, decoder

# Folders in a workdir: of a teacher or a reference, see training.reference_model; of the parameters
# of p(x | x_0), see training.pixels; of the run's own denoiser, see training.distillation.
FROZEN, PIXELS, DENOISER = "frozen", "pixels", "denoiser"


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """The learned denoiser of a run, whose model and params are its teacher's."""

    module: Predictor
    params: dict
    config: Config | None  # the denoiser's own configuration, which has its sizes
    teacher_step: int | None
    step: int | None  # of its own training


@dataclasses.dataclass(frozen=True)
class Run:
    """A model at a step of its training, on all devices."""

    config: Config
    spec: DataSpec
    model: Any  # NTM, or Predictor while a denoiser is trained
    params: dict | None  # the EMA unless `raw`, with core.pixels'; None before training
    step: int
    mesh: jax.sharding.Mesh
    workdir: str = ""
    raw: bool = False
    denoiser: Denoiser | None = None
    selection: Any = None  # a sampling.selection.Selection of samples, if they are selected

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.workdir!r}, step={self.step})"  # not its parameters

    @property
    def schedule(self) -> Schedule:
        """The noise levels of the model's trajectories."""
        return self.config.schedule(self.model.config.tokens)

    @property
    def condition(self) -> conditions.Kind:
        """The kind of condition of the model."""
        return conditions.find(self.config.model.condition)(self.spec)

    @property
    def pixels(self) -> PixelLikelihood:
        """p(x | x_0) of the run's data."""
        return build.pixel_likelihood(self.config, self.spec, self.model)

    @property
    def bounded(self) -> PixelLikelihood | None:
        """p(x | x_0) in bounds; None for continuous data, whose noised density they bound."""
        return self.pixels if self.spec.pixel_levels else None

    def default_condition(self, index, split: str | None = None) -> Any:
        """The condition of these image indices where nobody gives one.

        The classes in turn, or the texts or vectors of the records of a split in turn; the held-out
        split by default.
        """
        return self.condition.default(
            index, self.config.data, split or self.config.evaluate.split)

    def evaluated_levels(self) -> np.ndarray:
        """The levels [K] of evaluation, from t_min to 1."""
        return self._levels(self.config.evaluation_steps, self.schedule.t_min)

    def sampled_levels(self) -> np.ndarray:
        """The levels [K] of sampling: those of evaluation, or an ODE's, from 0 to 1."""
        if decoder(self.config.sample.decoder).solves_ode:
            return self._levels(self.config.sample.steps, 0)
        return self.evaluated_levels()

    def _levels(self, steps: int, t_min: float) -> np.ndarray:
        return np.asarray(_compiled_levels(self.schedule, steps, np.full(1, t_min, np.float32)))[0]


# One program, not one for each operation.
_compiled_levels = jax.jit(Schedule.levels, static_argnums=(0, 1))


def checked_seed(run: Run, seed: int | None) -> int:
    """The seed, or where it is None the configuration's.

    Raises UserError for one that is not a whole number of 32 bits.
    """
    seed = run.config.seed if seed is None else seed
    if not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**32:
        raise UserError(f"seed is {abbreviate(seed)}: expected a whole number, 0 to 2^32 - 1")
    return int(seed)


def different_data(run: Run, other: Run, own_units: bool = False) -> tuple[str, Any, Any] | None:
    """(name, the run's, the other's) of the first property in which the data of two runs differ.

    None where one model can take the images and conditions of the other. own_units: arrays are
    handed over in their own units, and may be normalised differently.
    """
    kinds = run.config.model.condition, other.config.model.condition
    if kinds[0] != kinds[1]:
        return "condition", *kinds
    normalised = () if own_units and run.spec.columns else ("mean", "std")
    for name in ("data_shape", "pixel_levels", *normalised, *run.condition.shared):
        mine, theirs = getattr(run.spec, name), getattr(other.spec, name)
        if mine != theirs:
            return name, mine, theirs
    return None


def untrained(config: Config, spec: DataSpec, mesh, workdir: str = "") -> Run:
    """The run that a configuration starts, before it has parameters; without a decoder `auto`.

    Raises UserError where the model does not fit the data.
    """
    model = build.make_model(config, spec, arithmetic.choose(mesh, spec.tokens))
    model = make_denoiser(model) if config.teacher else model
    return Run(config.without_auto(), spec, model, None, 0, mesh, workdir)


def run_mesh(config: Mesh):
    """A run's mesh on the present devices; all of them along data if they are too few for it."""
    inferred = -1 in (config.fsdp, config.tensor, config.sequence)
    try:
        return sharding.make_mesh(config if inferred else dataclasses.replace(config, data=-1))
    except UserError:
        return sharding.make_mesh(Mesh(slices=1, data=-1, fsdp=1, tensor=1, sequence=1))


def with_denoiser(teacher: Run, run: Run) -> Run:
    """The teacher with the denoiser that `run` trained.

    It is sampled and evaluated as that run is configured, and has its step and folder.
    """
    config = dataclasses.replace(teacher.config, sample=run.config.sample,
                                 evaluate=run.config.evaluate, seed=run.config.seed)
    assert run.params is not None  # the denoiser was trained
    denoiser = Denoiser(run.model, run.params, run.config, teacher.step, run.step)
    return dataclasses.replace(teacher, config=config, step=run.step, workdir=run.workdir,
                               raw=run.raw, denoiser=denoiser)


def with_own_denoiser(run: Run, auto: bool) -> Run:
    """The run with the denoiser in WORKDIR/denoiser; see training.distillation.

    auto: whether config.sample.decoder is auto, which then is the denoiser. The run is returned as
    it is where its denoiser has not taken all its steps, or was distilled from another step.
    """
    steps, folder = run.config.train.distil_steps, f"{run.workdir}/{DENOISER}"
    if not steps or run.raw or checkpoint.latest_step(folder) != steps or (
            checkpoint.latest_step(f"{folder}/{FROZEN}") != run.step):
        return run
    config, spec = config_file.load(folder)
    own = untrained(config, spec, run.mesh, folder)
    _, params = restore_params(own, config, settings=config_file.fixed(config, spec))
    denoiser = Denoiser(own.model, params, config, run.step, steps)
    return dataclasses.replace(
        run, denoiser=denoiser,
        config=run.config.with_sampling(decoder="denoiser") if auto else run.config)


def restore_params(run: Run, config: Config, step: int | None = None, raw: bool = False,
                   folder=None, settings: dict | None = None) -> tuple[int, dict]:
    """(step, parameters) of a checkpoint of a model like run.model: its EMA, or the raw ones.

    folder: the workdir to read, run.workdir by default; config: of the run there. step: by default
    the latest, or with config.train.patience the best. settings: see Checkpoints.
    """
    which = "params" if raw else "ema"
    expected = build.abstract_params(run.model, run.mesh)
    with Checkpoints(folder or run.workdir, settings=settings) as checkpoints:
        if step is None and config.train.patience:
            step = checkpoints.best()
        step, found, _ = checkpoints.restore({which: expected}, step, partial=True)
        return step, found[which]


def pixel_params(run: Run, workdir: str) -> dict:
    """{"pixels": the parameters of p(x | x_0)} in a workdir; {} for a kind that has none.

    Raises UserError if they are missing or damaged.
    """
    expected = abstract_pixel_params(run)
    if not expected:
        return {}
    with Checkpoints(f"{workdir}/{PIXELS}") as checkpoints:
        if checkpoints.latest() is None:
            raise UserError(f"{workdir}/{PIXELS} is missing, which holds p(x | x_0): copy it from "
                            "where the run was trained, as checkpoints and config.json")
        return checkpoints.restore(expected)[1]


def new_pixel_params(run: Run) -> dict:
    """New parameters like `pixel_params`, with a flat histogram."""
    pixels, key = run.pixels, jax.random.key(run.config.seed)
    shapes = abstract_pixel_params(run)
    if not shapes:
        return {}
    make = jax.jit(lambda key: {"pixels": build.initial_pixel_params(pixels, run.spec, key)},
                   out_shardings=jax.tree.map(lambda a: a.sharding, shapes))
    return make(key)


def abstract_pixel_params(run: Run) -> dict:
    """The shapes of `pixel_params` with their shardings, replicated."""
    shapes = build.abstract(
        lambda: build.initial_pixel_params(run.pixels, run.spec, jax.random.key(0)),
        run.model, run.mesh)
    return {"pixels": shapes} if shapes else {}


def load_workdir(workdir: str, step: int | None = None, raw: bool = False) -> Run:
    """The run in a workdir, or in WORKDIR/checkpoints/STEP, at `step`; see restore_params.

    raw: with the raw parameters in place of their EMA. Raises UserError if there is no run, or its
    files are damaged.
    """
    folder, named = checkpoint.locate(workdir)
    if named is not None and step is None:
        workdir, step = str(folder), named
    config, spec = config_file.load(workdir)
    run = untrained(config, spec, run_mesh(config.mesh), str(workdir))
    step, params = restore_params(run, config, step, raw, settings=config_file.fixed(config, spec))
    if not config.teacher:
        params = params | pixel_params(run, str(folder))
    run = dataclasses.replace(run, params=params, step=step, raw=raw)
    if config.teacher:
        return with_denoiser(load_workdir(f"{workdir}/{FROZEN}"), run)
    return with_own_denoiser(run, auto=config.sample.decoder == AUTO)


def one_condition(label, condition):
    """A label or another condition, whichever is given."""
    if label is not None and condition is not None:
        raise UserError("a label and another condition are given: expected one of them")
    return label if condition is None else condition
