"""The teacher of a learned denoiser (method, section 8), kept in the denoiser's workdir.

The denoiser distils the teacher's score denoising into one pass over its latent u_0. The teacher is
kept once, in WORKDIR/frozen, in the form of a run's folder, which a resume, sampling and evaluation
read.
"""

import jax
from etils import epath

from ntm_jax.errors import UserError
from ntm_jax.export.read import load_run
from ntm_jax.runtime import config as configuration
from ntm_jax.runtime import config_file
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.runtime.run import Run

SHARED = (  # settings that a denoiser shares with its teacher
    "data.source", "data.patch_size", "data.image_size", "trajectory.t_min", "trajectory.schedule",
    "trajectory.shift", "trajectory.steps", "sample.steps", "model.condition", "model.data_std")


def load_teacher(run: Run) -> Run:
    """The teacher of a denoiser's run, from its workdir, or from config.teacher before it is saved.

    Raises UserError where it does not fit the run's settings and data.
    """
    kept = has_teacher(run.workdir)
    teacher = load_run(f"{run.workdir}/frozen" if kept else run.config.teacher)
    check_teacher(run, teacher)
    return teacher


def save_teacher(teacher: Run, workdir: str) -> None:
    """Saves the teacher in WORKDIR/frozen, unless it is there."""
    if has_teacher(workdir):
        return
    folder = f"{workdir}/frozen"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(teacher.step, {"ema": teacher.params}, {})
    if jax.process_index() == 0:
        # Written last; its presence marks the copy as complete.
        config_file.write(folder, teacher.config, teacher.spec)


def has_teacher(workdir: str) -> bool:
    """Whether a workdir holds a complete teacher."""
    return (epath.Path(workdir) / "frozen" / "config.json").exists()


def check_teacher(run: Run, teacher: Run) -> None:
    """Raises UserError where the settings or data of a denoiser are not its teacher's."""
    config, spec = run.config, run.spec
    mine, theirs = (configuration.flatten(c.raw) for c in (config, teacher.config))
    for key in SHARED:
        if mine[key] != theirs[key]:
            raise UserError(f"config.{key} is {mine[key]}, and {theirs[key]} in the teacher "
                            f"{config.teacher}: they must be the same")
    if spec.image_shape != teacher.spec.image_shape:
        raise UserError(f"{config.data.source} has images of shape {spec.image_shape}, and the "
                        f"teacher {config.teacher} learned others, {teacher.spec.image_shape}")
