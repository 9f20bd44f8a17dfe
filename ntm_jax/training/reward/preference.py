"""The loss of config.train.objective=preference: direct preference optimisation and an anchor.

The likelihood of a trajectory is exact, so the loss is that of arXiv 2305.18290 itself. A diffusion
model has to bound it (Diffusion-DPO, arXiv 2311.12908).

Symbols: P records of a batch, G samples of each.
"""

from collections.abc import Callable

import jax.numpy as jnp

from ntm_jax.errors import UserError
from ntm_jax.runtime.config import Config
from ntm_jax.training.reward import drawing, policy, rollouts
from ntm_jax.training.reward.rollouts import RolloutUse
from ntm_jax.training.reward.settings import Reward


def _arrays(settings: Reward) -> tuple[str, ...]:
    return ("reference_nll",)


def _weights(settings: Reward, rewards, bonus, future_divergence) -> dict:
    return {"pair_weight": policy.pair_weights(rewards, bonus)}


USE = RolloutUse(_arrays, _weights, needs_divergence=False)


def loss_with(anchor: Callable) -> Callable:
    """The loss of pairs, plus config.reward.anchor times `anchor`, the loss on the data.

    It is divided by config.reward.kl and the dimensions, so that its gradient has the size of that
    of a likelihood per dimension.
    """
    def loss(setup, params, draws, reference=None):
        settings, batch, c = setup.reward, draws.batch, setup.model.config
        params = policy.without_gradient(params, setup.fixed_parts)
        found = drawing.densities(setup.sampler, params, batch, batch["rollout"])
        nll = found["nll"].reshape(batch["reference_nll"].shape)
        gain = jnp.sum(policy.log_ratio(nll, batch["reference_nll"]), -1)
        lost, right = policy.preference_loss(gain, batch["pair_weight"], settings.kl)
        value, metrics = anchor(setup, params, draws, reference)
        total = settings.anchor * value + lost / (settings.kl * c.tokens * c.dim)
        return total, metrics | {"preference_loss": lost, "preference_accuracy": right}

    return loss


def check(config: Config) -> None:
    """Raises UserError for a configuration that preferences cannot train."""
    if not config.reward.kl:
        raise UserError("config.reward.kl is 0: config.train.objective=preference needs the weight "
                        "of the divergence from the reference model, DPO's beta, such as 0.1")
    rollouts.check(config)
