"""The loss of config.train.objective=policy_gradient: a clipped policy gradient and an anchor.

Symbols: P records of a batch, G samples of each; B = P G; T steps.
"""

from collections.abc import Callable

import jax.numpy as jnp

from ntm_jax.core.model import repeat
from ntm_jax.errors import UserError
from ntm_jax.runtime import build
from ntm_jax.runtime.config import Config
from ntm_jax.training.reward import policy, rollouts

FROZEN = {"predictor": ("transporter",), "transporter": ("predictor",), "both": ()}


def frozen(config: Config) -> tuple[str, ...]:
    """The parts of the model that config.reward.trains leaves as they are."""
    return FROZEN[config.reward.trains]


def loss_with(anchor: Callable) -> Callable:
    """The loss of rollouts, plus config.reward.anchor times `anchor`, the loss on the data."""
    def loss(setup, params, draws, reference=None):
        settings, batch, c = setup.reward, draws.batch, setup.model.config
        samples, count = batch["old_nll"].shape[1:]
        params = policy.freeze(params, FROZEN[settings.trains])

        def flat(a):  # [P, G, ...] -> [B, ...]
            return a.reshape(-1, *a.shape[2:])

        y = repeat(build.condition(setup.model, batch), samples)
        t = setup.schedule.fixed_levels(count, len(batch["index"]) * samples)
        found = rollouts.terms(setup.model, params, flat(batch["rollout"]), t, y,
                               settings.trains != "predictor")
        ratio = policy.log_ratio(found.nll, flat(batch["old_nll"]))
        gain = policy.clipped_surrogate(ratio, flat(batch["advantage"]), settings.clip)
        value, metrics = anchor(setup, params, draws, reference)
        total = settings.anchor * value - jnp.mean(gain) / (c.tokens * c.dim)
        return total, metrics | {
            "reward": jnp.mean(batch["reward"]),
            "clipped": policy.clipped_share(ratio, settings.clip)}

    return loss


def check(config: Config) -> None:
    """Raises UserError for a configuration that a policy gradient cannot train."""
    reward, train = config.reward, config.train
    if not reward.name:
        raise UserError("config.reward.name is empty: config.train.objective=policy_gradient needs "
                        "what it maximises, such as --config.reward.name=shapes")
    if not config.init_from:
        raise UserError("config.init_from is empty: a policy gradient improves a trained model; "
                        "give its run, --config.init_from=WORKDIR")
    if config.model.head == "posterior" or (
            reward.trains != "predictor" and not config.model.transporter_blocks):
        raise UserError(f"config.reward.trains={reward.trains} needs a transporter, and the "
                        "predictor a head of its own: found config.model.transporter_blocks="
                        f"{config.model.transporter_blocks}, head={config.model.head}")
    for name in ("steps", "save_every", "evaluate_every"):
        if getattr(train, name) % reward.updates:
            raise UserError(f"config.train.{name} is {getattr(train, name)}: expected a multiple "
                            f"of config.reward.updates, {reward.updates}, since a run is saved "
                            "between samples")
