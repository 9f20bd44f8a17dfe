"""The teacher, or the reference model, of a run, kept once in WORKDIR/frozen.

The learned denoiser distils its teacher's score denoising into one pass over its latent u_0
(docs/concepts.md, section 8). The teacher is kept in the form of a run's folder, which a resume,
sampling and evaluation read.

A fine-tuned model's means are aligned with those of its flow-matching network (docs/concepts.md,
section 7), which is kept in the dtype that it computes in. A post-trained model is compared with
the model that it starts from.
"""

import dataclasses

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import multihost_utils

from ntm_jax.errors import UserError
from ntm_jax.export.read import load_run
from ntm_jax.runtime import build, config_file
from ntm_jax.runtime import config as configuration
from ntm_jax.runtime.checkpoint import Checkpoints, latest_step
from ntm_jax.runtime.run import FROZEN, Run, different_data
from ntm_jax.training import pixels
from ntm_jax.training.objectives import Objective
from ntm_jax.training.state import State

ABOVE = ".."  # config.teacher of a denoiser in its teacher's own folder
SHARED = (  # settings that a denoiser shares with its teacher
    "data.source", "data.patch_size", "data.image_size", "trajectory.t_min", "trajectory.schedule",
    "trajectory.shift", "trajectory.steps", "sample.steps", "model.condition", "model.data_std")


def load_distilled(run: Run, objective: Objective) -> Run | None:
    """The teacher of a denoiser's run: config.teacher's, or that of its workdir if it resumes.

    Of a config.teacher that is itself a denoiser's run, the teacher of that run. None for an
    objective that needs none. Raises UserError where it does not fit the run's settings and data.
    """
    if "teacher" not in objective.needs:
        return None
    where = run.config.teacher
    if where == ABOVE:
        where = str(epath.Path(run.workdir).parent)
    if latest_step(run.workdir) is not None:
        where = f"{run.workdir}/{FROZEN}"
    teacher = load_run(where)
    if teacher.denoiser:  # by itself it is neither sampled by the denoiser nor guided as that is
        step, config = teacher.denoiser.teacher_step, teacher.config
        assert step is not None  # every run of a denoiser has it
        config = config.with_sampling(decoder="inverse", guidance=0.0)
        teacher = dataclasses.replace(teacher, config=config, step=step, denoiser=None)
    check_teacher(run, teacher)
    return teacher


def prepare(run: Run, objective: Objective, current: State, teacher: Run | None,
            new: bool) -> dict | None:
    """Keeps a run's teacher or reference model in WORKDIR/frozen, and returns its parameters.

    Of a denoiser, those of its teacher. With config.train.align_weight, those of the flow-matching
    network that the run starts from. Of an objective that needs a reference, those of the model
    that the run starts from. None for other runs. new: the run has no checkpoint, and what lies in
    the folder is another's. All processes call it.
    """
    aligned = bool(run.config.train.align_weight)
    if not (teacher or aligned or "reference" in objective.needs):
        return None
    if new:
        folder = epath.Path(run.workdir) / FROZEN
        if jax.process_index() == 0 and folder.exists():
            folder.rmtree()
        multihost_utils.sync_global_devices("frozen models removed")
        if teacher:
            save_teacher(teacher, run.workdir)
        else:
            params = current.params
            if aligned:
                params = {"params": copy(params["params"]["backbone"], run.config.model.dtype)}
            with Checkpoints(folder) as checkpoints:
                checkpoints.save(0, params, {})
    return teacher.params if teacher else kept_reference(run)


def save_teacher(teacher: Run, workdir: str) -> None:
    """Saves the teacher in WORKDIR/frozen."""
    folder = f"{workdir}/{FROZEN}"
    assert teacher.params is not None  # it was trained
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(teacher.step, {"ema": {"params": teacher.params["params"]}}, {})
    pixels.save(teacher, folder)
    if jax.process_index() == 0:
        config_file.write(folder, teacher.config, teacher.spec)


def check_teacher(run: Run, teacher: Run) -> None:
    """Raises UserError where the settings or data of a denoiser are not its teacher's."""
    config = run.config
    mine, theirs = (configuration.flatten(c.raw) for c in (config, teacher.config))
    for key in SHARED:
        if mine[key] != theirs[key]:
            raise UserError(f"config.{key} is {mine[key]}, and {theirs[key]} in the teacher "
                            f"{config.teacher}: they must be the same")
    guidance = config.sample.guidance
    if configuration.guided(guidance) and not teacher.config.train.condition_dropout:
        raise UserError(f"config.sample.guidance is {guidance}, and the teacher {config.teacher} "
                        "was trained without condition dropout: set it to 0, or give a teacher "
                        "trained with config.train.condition_dropout=0.1")
    different = different_data(run, teacher)
    if different:
        name, own, others = different
        raise UserError(f"the teacher {config.teacher} has {name} {others or 'none'}, and "
                        f"{config.data.source} {own or 'none'}: give a teacher of the same data")


def copy(tree, dtype=None):
    """A copy, in another dtype if given.

    A step donates its arguments, so no two of them may share arrays.
    """
    copied = jax.jit(lambda tree: jax.tree.map(lambda a: jnp.copy(a).astype(dtype or a.dtype),
                                               tree),
                     out_shardings=jax.tree.map(lambda a: a.sharding, tree))
    return copied(tree)


def abstract_reference(run: Run) -> dict:
    """The shapes of the reference parameters with their shardings."""
    params = build.abstract_params(run.model, run.mesh)
    if not run.config.train.align_weight:
        return params
    dtype = jnp.dtype(run.config.model.dtype)
    return {"params": jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, dtype, sharding=a.sharding),
        params["params"]["backbone"])}


def kept_reference(run: Run) -> dict | None:
    """The reference parameters in a run's folder; None where there are none, as in an export."""
    folder = epath.Path(run.workdir) / FROZEN
    if not run.workdir or not folder.exists():
        return None
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(abstract_reference(run), 0, partial=True)[1]
