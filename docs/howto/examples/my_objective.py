"""An objective: train.objective=robust."""

import jax.numpy as jnp

from ntm_jax.training import objectives


def robust_loss(context, params, inputs, reference=None):
    """The negative log-likelihood of a trajectory, with examples that fit badly counted less."""
    terms = objectives.trajectory_terms(context, params, inputs, reference)
    dimensions = context.model.config.tokens * context.model.config.dim
    nll = jnp.mean(terms.nll, 1) / dimensions
    return jnp.mean(jnp.arcsinh(nll)), {"loss": jnp.mean(nll)}


objectives.register("robust", objectives.Objective(robust_loss, needs=("trajectory",)))
