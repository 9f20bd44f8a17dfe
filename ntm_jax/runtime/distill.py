"""The learned denoiser (method, section 8): a frozen teacher's own score denoising, distilled into one pass over its latent u_0.

The denoiser is a Predictor of its own width and depth, asked for the clean image: level s = 0 given u_0 at the teacher's t_min. The teacher
is kept once, as a run's folder of its own in WORKDIR/frozen, which a resume, sampling and evaluation read.
"""

import dataclasses

import jax
import jax.numpy as jnp
from etils import epath

from ntm_jax.core import trajectory
from ntm_jax.core.denoising import score_denoise
from ntm_jax.core.model import NTM
from ntm_jax.core.predictor import Predictor
from ntm_jax.errors import UserError
from ntm_jax.runtime import config as configuration
from ntm_jax.runtime import state
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.runtime.config import Config


def make_denoiser(model: NTM) -> Predictor:
    """The denoiser of a configuration's model, of which only the predictor is taken."""
    return Predictor(dataclasses.replace(model.config, transporter_blocks=0), model.attention)


def denoise(denoiser: Predictor, params, u_0, t_0, steps: int, y):
    """g(u_0, y): latents [B, N, D] at levels t_0 [B] -> clean tokens [B, N, D]."""
    return denoiser.apply(params, u_0, t_0, jnp.zeros_like(t_0), jnp.full(len(u_0), steps), y)[0]


def errors(config: Config, denoiser: Predictor, params, teacher: NTM, frozen, keys, x, y):
    """Mean squared errors a dimension of examples x [B, N, D], each with one trajectory of its own: dict of [B].

    to_target: of the denoiser to the teacher's score denoising of the trajectory, its loss; to_data: to x; target_to_data: of the target.
    config: the teacher's.
    """
    teacher, steps = state.exact(teacher), config.sample.steps
    t = state.levels(config, teacher, steps, jnp.full(len(x), config.trajectory.t_min))
    xs = trajectory.simulate(x, t, trajectory.example_noise(keys, (steps + 1, *x.shape[1:])))
    target = jax.lax.stop_gradient(score_denoise(teacher, frozen, xs, t, y))
    u_0, _ = teacher.apply(frozen, xs[:, 0], t[:, 0], jnp.full(len(x), steps), y, method=NTM.transport)
    found = denoise(denoiser, params, u_0, t[:, 0], steps, y)
    pairs = {"to_target": (found, target), "to_data": (found, x), "target_to_data": (target, x)}
    return {name: jnp.mean(jnp.square(a - b), (1, 2)) for name, (a, b) in pairs.items()}


def freeze(run, workdir: str) -> None:
    """Keeps a run's model in WORKDIR/frozen, in the form of a run's folder."""
    folder = f"{workdir}/frozen"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(run.step, {"ema": run.params}, {})
    if jax.process_index() == 0:
        configuration.write(folder, run.config, run.spec)  # last: where it is, the rest is


def frozen(workdir: str) -> bool:
    """Whether a workdir holds its frozen teacher."""
    return (epath.Path(workdir) / "frozen" / "config.json").exists()


def check_teacher(config: Config, spec, teacher) -> None:
    """UserError where a denoiser's configuration does not go with its teacher's."""
    mine, theirs = (configuration.flatten(c.raw) for c in (config, teacher.config))
    for key in ("data.source", "data.patch_size", "data.image_size", "trajectory.t_min", "trajectory.schedule", "trajectory.shift",
                "trajectory.steps", "sample.steps", "model.condition", "model.data_std"):
        if mine[key] != theirs[key]:
            raise UserError(f"config.{key} is {mine[key]}, and {theirs[key]} in the teacher {config.teacher}: they must be the same")
    if spec.image_shape != teacher.spec.image_shape:
        raise UserError(f"{config.data.source} has images of shape {spec.image_shape}, and the teacher {config.teacher} learned others, "
                        f"{teacher.spec.image_shape}")
