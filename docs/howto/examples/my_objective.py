"""An objective: train.objective=robust."""

import jax.numpy as jnp
import numpy as np

from ntm_jax.evaluation import scoring, statistics
from ntm_jax.training import objectives


def robust_loss(context, params, inputs, reference=None):
    """The negative log-likelihood of a trajectory, with examples that fit badly counted less."""
    terms = objectives.trajectory_terms(context, params, inputs, reference)
    dimensions = context.model.config.tokens * context.model.config.dim
    nll = jnp.mean(terms.nll, 1) / dimensions
    return jnp.mean(jnp.arcsinh(nll)), {"loss": jnp.mean(nll)}


def measure(run, source, trajectories):
    """The held-out loss with its standard error over records, for evaluation.json."""
    nll = scoring.score_records(run, source, trajectories)["nll"].mean(1)  # nats [records]
    nll /= run.spec.tokens * run.spec.dim
    return {"robust": statistics.mean_and_stderr(np.arcsinh(nll))}


def held_out(run, source):
    """The same with one trajectory a record, for metrics.jsonl and the choice of a checkpoint."""
    value = measure(run, source, 1)["robust"]["mean"]
    return objectives.HeldOutScore(value, {"evaluate/robust": value}, f"robust {value:.4f}")


objectives.register("robust", objectives.Objective(
    robust_loss, held_out, needs=("trajectory",), measure=measure))
