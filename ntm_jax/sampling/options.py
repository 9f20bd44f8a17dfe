"""Options of sampling that a call gives instead of the configuration's."""

import dataclasses
import warnings

import numpy as np

from ntm_jax import typed
from ntm_jax.errors import UserError
from ntm_jax.runtime.config import Config, Sample, check_guidance, check_steps, guided
from ntm_jax.runtime.run import Run
from ntm_jax.sampling import decoders


def override(config: Config, **given) -> Sample:
    """The configuration's options of sampling with the given ones that are not None.

    Raises UserError for an option that is unknown, or whose value its setting does not take, for
    guidance of another length than the steps, or that the model was not trained for, and for more
    steps than t_min allows. Warns of a number of steps that it was not trained with.
    """
    given = {name: np.asarray(value).tolist() for name, value in given.items()
             if value is not None}
    values = dataclasses.asdict(config.sample) | given
    options = typed.parse_dataclass(Sample, values, "config.sample")
    guidance, steps, own = options.guidance, options.steps, config.sample
    check_guidance("guidance", guidance, steps)
    if guidance != own.guidance and guided(guidance) and not config.train.condition_dropout:
        raise UserError(f"guidance is {guidance}, and the model was trained without condition "
                        "dropout: sample with guidance 0")
    if decoders.find(options.decoder).solves_ode:
        return options
    check_steps("steps", steps, config.trajectory)
    trained = config.trajectory.steps
    if steps != own.steps and steps not in trained:
        warnings.warn(f"{steps} steps were not trained, only {', '.join(map(str, trained))}: "
                      "expect worse images", stacklevel=2)
    return options


def check_decoder(run: Run, decoder: str) -> None:
    """Raises UserError for a decoder that needs a denoiser, or a velocity, that the run lacks."""
    needs = decoders.find(decoder)
    if needs.solves_ode and (run.model.backbone is None or run.model.config.transporter_blocks):
        raise UserError(f"decoder={decoder} solves the ODE of a flow-matching model, and this run "
                        "is not one: take inverse or score")
    if needs.needs_denoiser and not run.denoiser:
        raise UserError(f"decoder={decoder} needs a denoiser, and this run has none: give as "
                        "--workdir the run of one, trained with config.train.objective=denoiser "
                        "and --config.teacher")


def parse_guidance(scales) -> float | tuple[float, ...] | None:
    """Texts -> one guidance scale, or a tuple with one for each step; None without texts.

    Raises UserError for a text that is not a number; `override` refuses one that is not finite.
    """
    if not scales:
        return None
    try:
        scales = tuple(float(scale) for scale in scales)
    except ValueError:
        raise UserError("--guidance takes a number, or one for each step, such as "
                        "1,0.5,0,0") from None
    return scales[0] if len(scales) == 1 else scales
