"""The objective `policy_gradient`: a clipped policy gradient and an anchor.

Symbols: P records of a batch, G samples of each; B = P G; S factors that learn.
"""

import jax
import jax.numpy as jnp

from ntm_jax.projects.reward import drawing, policy, rollouts
from ntm_jax.projects.reward.drawing import flat
from ntm_jax.projects.reward.settings import Reward
from ntm_jax.training.objectives import LossContext, StepInputs, trajectory_loss


def _arrays(settings: Reward) -> tuple[str, ...]:
    """Old densities are not needed where all ratios are 1: in the first update on new samples."""
    old = ("old_nll",) if settings.updates > 1 or settings.prefetch else ()
    if not settings.kl:
        return old
    latents = ("reference_mean", "reference_log_scale")
    return (*old, *(latents if settings.trainable == "predictor" else ("reference_nll",)))


def _weights(settings: Reward, rewards, bonus, future_divergence) -> dict:
    return {"advantage": policy.advantages(rewards + bonus, future_divergence, settings.normalise)}


def loss(context: LossContext, params, inputs: StepInputs, reference=None):
    """The loss of rollouts, plus reward.data_loss_weight times the likelihood loss of data."""
    settings, batch, c = context.config.reward, inputs.batch, context.model.config
    sampler = drawing.sampler_of(context.run)
    params = policy.without_gradient(params, context.frozen_modules)
    found = drawing.densities(sampler, params, batch, batch["rollout"])
    nll = found["nll"]
    old = flat(batch["old_nll"]) if "old_nll" in batch else jax.lax.stop_gradient(nll)
    ratio = policy.log_ratio(nll, old)
    gain = policy.clipped_surrogate(ratio, flat(batch["advantage"]), settings.clip)
    objective = jnp.mean(_level_weights(sampler, context.config.train.level_weight_power) * gain)
    if settings.kl:
        objective -= settings.kl * jnp.mean(_penalty(found, batch))
    value, metrics = trajectory_loss(context, params, inputs, reference)
    total = settings.data_loss_weight * value - objective / (c.tokens * c.dim)
    return total, metrics | {"clipped": policy.clipped_share(ratio, settings.clip)}


def _level_weights(sampler: drawing.RolloutSampler, power: float):
    """t_k^power of every factor [S], with mean 1."""
    weights = sampler.levels(1)[:, :-1] ** power
    return weights / jnp.mean(weights)


def _penalty(found: dict, batch: dict):
    """The divergence from the reference, [B, S] nats, or what has its gradient.

    Of latents it is exact. Of trajectories it is half the squared log-ratio, whose gradient is the
    divergence's in the mean over samples of the present parameters; its value is not. In further
    updates on the same samples, and with config.reward.prefetch, its gradient is that for older
    samples.
    """
    first = {name: flat(batch[f"reference_{name}"]) for name in ("nll", "mean", "log_scale")
             if f"reference_{name}" in batch}
    divergences = drawing.divergence(found, first)
    return divergences if "mean" in found else 0.5 * jnp.square(divergences)


OBJECTIVE = rollouts.objective(
    loss, rollouts.check, rollouts.RolloutSpec(_arrays, _weights, needs_divergence=True))
