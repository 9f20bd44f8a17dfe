"""The denoiser that an NTM's run distils of itself in the end, in WORKDIR/denoiser.

That folder is an ordinary run of objective=denoiser, with settings of its own, checkpoints and
metrics; its teacher is the run that holds it. See docs/concepts.md, section 8.
"""

import dataclasses

import jax
from etils import epath
from jax.experimental import multihost_utils

from ntm_jax.errors import UserError
from ntm_jax.runtime.checkpoint import latest_step
from ntm_jax.runtime.config import Config, Model
from ntm_jax.runtime.run import DENOISER, FROZEN, Run
from ntm_jax.training.reference_model import ABOVE


def settings(config: Config) -> Config:
    """The configuration of the denoiser of an NTM's run: a predictor of the same sizes.

    It learns at the run's learning rate, with the weight decay of experiments/digits_denoiser.py.
    """
    steps = config.train.distil_steps
    return dataclasses.replace(
        config, init_from="", teacher=ABOVE,
        model=dataclasses.replace(
            config.model, transporter_blocks=0, transporter_layers=1, double_layers=0,
            head=Model.head, backbone=Model.backbone, pixel_likelihood=Model.pixel_likelihood),
        train=dataclasses.replace(
            config.train, objective="denoiser", steps=steps, distil_steps=0, evaluate_every=0,
            score_every=0, patience=0, condition_dropout=0.0, align_weight=0.0,
            level_weight_power=0.0),
        optimizer=dataclasses.replace(
            config.optimizer, weight_decay=1e-4,
            warmup_steps=min(config.optimizer.warmup_steps, steps // 4)),
        sample=dataclasses.replace(config.sample, decoder="denoiser"))


def discard_others(run: Run) -> str:
    """Removes a denoiser in WORKDIR/denoiser that is not of the run's step; returns that folder.

    run: at step 0, the run begins, and any denoiser is another's. All processes call it.

    Raises UserError where the denoiser has taken more steps than config.train.distil_steps.
    """
    folder, most = epath.Path(run.workdir) / DENOISER, run.config.train.distil_steps
    of_step, step = latest_step(folder / FROZEN), latest_step(folder)
    if of_step is not None and of_step != run.step:
        if jax.process_index() == 0:
            folder.rmtree()
        multihost_utils.sync_global_devices("denoiser removed")
    elif step is not None and step > most:
        raise UserError(f"config.train.distil_steps is {most}, and {folder} holds step {step}: "
                        "raise it, or remove that folder to distil anew")
    return str(folder)
