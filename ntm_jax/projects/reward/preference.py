"""The objective `preference`: direct preference optimisation and an anchor.

The likelihood of a trajectory is exact, so the loss is that of arXiv 2305.18290 itself. A diffusion
model has to bound it (Diffusion-DPO, arXiv 2311.12908).

Symbols: P records of a batch, G samples of each.
"""

import jax.numpy as jnp

from ntm_jax.errors import UserError
from ntm_jax.projects.reward import drawing, policy, rollouts
from ntm_jax.projects.reward.settings import Reward
from ntm_jax.runtime.config import Config
from ntm_jax.training.objectives import LossContext, StepInputs, trajectory_loss


def _arrays(settings: Reward) -> tuple[str, ...]:
    return ("reference_nll",)


def _weights(settings: Reward, rewards, bonus, future_divergence) -> dict:
    return {"pair_weight": policy.pair_weights(rewards, bonus)}


def loss(context: LossContext, params, inputs: StepInputs, reference=None):
    """The loss of pairs, plus config.reward.data_loss_weight times the likelihood loss of the data.

    It is divided by config.reward.kl and the dimensions, so that its gradient has the size of that
    of a likelihood per dimension.
    """
    settings, batch, c = context.config.reward, inputs.batch, context.model.config
    params = policy.without_gradient(params, context.frozen_modules)
    found = drawing.densities(drawing.sampler_of(context.run), params, batch, batch["rollout"])
    nll = found["nll"].reshape(batch["reference_nll"].shape)
    gain = jnp.sum(policy.log_ratio(nll, batch["reference_nll"]), -1)
    lost, right = policy.preference_loss(gain, batch["pair_weight"], settings.kl)
    value, metrics = trajectory_loss(context, params, inputs, reference)
    total = settings.data_loss_weight * value + lost / (settings.kl * c.tokens * c.dim)
    return total, metrics | {"preference_loss": lost, "preference_accuracy": right}


def check(config: Config) -> None:
    """Raises UserError for a configuration that preferences cannot train."""
    if not config.reward.kl:
        raise UserError("config.reward.kl is 0: config.train.objective=preference needs the weight "
                        "of the divergence from the reference model, DPO's beta, such as 0.1")
    rollouts.check(config)


OBJECTIVE = rollouts.objective(
    loss, check, rollouts.RolloutSpec(_arrays, _weights, needs_divergence=False))
