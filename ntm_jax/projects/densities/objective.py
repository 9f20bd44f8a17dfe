"""The objective `flow_map`: a flow-matching network that also learns maps between noise levels."""

import jax
import jax.numpy as jnp

from ntm_jax.core import flow_matching, trajectory
from ntm_jax.projects.densities import flow_map
from ntm_jax.projects.densities.divergence import rademacher
from ntm_jax.training import objectives
from ntm_jax.training.objectives import LossContext, StepInputs


def loss(context: LossContext, params, inputs: StepInputs, reference=None):
    """The joint self-distillation of velocity and divergence; see flow_map.errors.

    Levels are uniform between t_min and 1. Intervals are those of 2^i equal steps, i = 0..FINEST.
    """
    x, model = inputs.batch["x"], context.model
    y = inputs.condition(model, context.config.train.condition_dropout)
    t_min = inputs.t_min(context.schedule)

    def uniform(name):
        return jax.vmap(jax.random.uniform)(inputs.keys(name))

    count = 2.0 ** jnp.floor(uniform("count") * (flow_map.FINEST + 1))
    place = jnp.floor(uniform("place") * count)
    times = [t_min + (1 - t_min) * share
             for share in (uniform("level"), place / count, (place + 1) / count)]
    noise = trajectory.example_noise(inputs.keys("noise"), (2, *x.shape[1:]))
    probes = rademacher(inputs.keys("probes"), 1, x.shape[1:])
    found = flow_map.errors(
        model.backbone, flow_matching.backbone_params(params), x, jnp.moveaxis(noise, 1, 0), probes,
        (times[0], times[1:]), y)
    metrics = {name: jnp.mean(value) for name, value in found.items()}
    value = sum(metrics[f"{name}velocity"] + flow_map.DIVERGENCE_WEIGHT
                * metrics[f"{name}divergence"] for name in ("", "average_"))
    return value, metrics | {"loss": value}


OBJECTIVE = objectives.Objective(
    loss, objectives.held_out_velocity, objectives.SQUARED, objectives.check_flow,
    trains="velocity", measure=objectives.measure_velocity)
