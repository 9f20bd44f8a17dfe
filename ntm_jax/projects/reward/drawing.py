"""Draws samples of the model that is trained, and compares their densities with the reference's.

Symbols: P records of a batch, G samples of each; B = P G; T steps, K = T+1 levels; S factors that
learn; N tokens, D token channels.
"""

import dataclasses
import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from ntm_jax.core import sampling, trajectory
from ntm_jax.core.model import NTM, Terms, full_precision, repeat
from ntm_jax.core.pixels import PixelLikelihood
from ntm_jax.core.trajectory import Schedule, example_keys, per_example
from ntm_jax.projects.reward import policy
from ntm_jax.runtime.run import Run
from ntm_jax.sampling import inverses

PARTS = 2  # into which the samples are split: one is scored while the next is made
REJECTED = "rejected"  # the key of a batch's images that lost a comparison with its images x


@dataclasses.dataclass(frozen=True)
class RolloutSampler:
    """The static arguments of rollouts."""

    model: NTM
    schedule: Schedule
    steps: int
    samples: int
    through_transporter: bool  # rollouts are trajectories x_k; otherwise they are latents u_k
    first: int  # the levels of rollouts, first to last: those of S = last - first factors
    last: int
    inverse: str
    pixels: PixelLikelihood
    mesh: jax.sharding.Mesh

    @property
    def factors(self) -> int:
        """S, the factors that learn."""
        return self.last - self.first

    def trained_levels(self, levels):
        """The levels of rollouts, [B, S+1, ...], of arrays [B, K, ...] by level."""
        return levels[:, self.first : self.last + 1]

    def levels(self, count: int):
        """The noise levels of rollouts, [count, S+1]."""
        return self.trained_levels(self.schedule.fixed_levels(self.steps, count))


def sampler_of(run: Run) -> RolloutSampler:
    """The sampler of a run's settings."""
    config = run.config
    first, last = config.reward.levels or (0, config.sample.steps)
    return RolloutSampler(
        run.model, run.schedule, config.sample.steps, config.reward.samples,
        config.reward.trainable != "predictor", first, last, config.sample.inverse, run.pixels,
        run.mesh)


@functools.partial(jax.jit, static_argnames=("samples", "part"))
def _keys(root, index, *, samples: int, part: int):
    """The keys [P, g] of one of the PARTS of each record's samples; the first is the larger one."""
    count = -(-samples // PARTS)
    count = min(count, samples - part * count)
    return jax.vmap(lambda key: jax.random.split(key, count))(
        example_keys(root, f"rollout {part}", index))


@functools.partial(jax.jit, static_argnames="sampler")
def sample(params, keys, batch, *, sampler: RolloutSampler):
    """Draws samples of a batch by their keys [P, g]: (clean tokens, rollouts).

    Their shapes are [P, g, N, D] and [P, g, S+1, N, D]. Clean tokens are x_0 / (1 - t_0), or the
    values with the nearest means. Parts of one size share a program.
    """
    count, keys = keys.shape[1], keys.reshape(-1)
    y = repeat(sampler.model.config.condition.stack(batch), count)
    t = sampler.schedule.fixed_levels(sampler.steps, len(keys))
    us, _ = sampling.draw_latents(sampler.model, params, keys, t, y)
    inverted = sampler.steps if sampler.through_transporter else 1  # levels of each sample
    model = full_precision(sampler.model)
    how = inverses.choose(sampler.inverse, model.config, inverted * len(us), sampler.mesh)
    if sampler.through_transporter:
        rollout = sampling.invert_trajectory(model, params, us, t, y, how)
        x_0 = rollout[:, 0]
    else:
        rollout, x_0 = us, sampling.invert_level(model, params, us, t, y, 0, how)
    tokens = sampler.pixels.nearest(params, x_0 / (1 - per_example(t[:, 0], x_0)))
    found = tokens, sampler.trained_levels(rollout)
    return jax.tree.map(lambda a: _split(a.reshape(-1, count, *a.shape[1:])), found)


@functools.partial(jax.jit, static_argnames="sampler")
def recorded(params, root, batch, *, sampler: RolloutSampler):
    """Rollouts [P, 2, S+1, N, D] of a batch's images, the preferred ones and then the rejected.

    They are trajectories of the forward process with the same noise for both.
    """
    c, count = sampler.model.config, sampler.steps + 1
    noise = trajectory.example_noise(example_keys(root, "pair", batch["index"]),
                                     (count, c.tokens, c.dim))
    x = jnp.stack([batch["x"], batch[REJECTED]], 1).reshape(-1, c.tokens, c.dim)
    t = sampler.schedule.fixed_levels(sampler.steps, len(x))
    found = sampler.pixels.simulate(params, x, t, repeat(noise, 2))
    if not sampler.through_transporter:
        y = repeat(sampler.model.config.condition.stack(batch), 2)
        found = sampling.transport_trajectory(full_precision(sampler.model), params, found, t, y)
    found = sampler.trained_levels(found)
    return _split(found.reshape(-1, 2, *found.shape[1:]))


def _split(a):
    """An array [P, ...] in equal parts on the devices that split a batch."""
    return nn.with_logical_constraint(a, ("batch", *(None for _ in a.shape[1:])))


def flat(a):
    """[P, G, ...] -> [B, ...]."""
    return a.reshape(-1, *a.shape[2:])


def densities(sampler: RolloutSampler, params, batch: dict, rollout) -> dict[str, Any]:
    """`nll` [B, S], of every factor of rollouts [P, G, S+1, N, D], in nats.

    Of latents also `mean` and `log_scale` [B, S, N, D] of their Gaussians.
    """
    samples, us = rollout.shape[1], flat(rollout)
    y = repeat(sampler.model.config.condition.stack(batch), samples)
    arguments = us, sampler.levels(len(us)), jnp.full(len(us), sampler.steps), y
    if sampler.through_transporter:
        return {"nll": cast(Terms, sampler.model.apply(params, *arguments)).nll}
    mean, log_scale = cast(Any, sampler.model.apply(params, *arguments, method=NTM.gaussians))
    return {"nll": policy.gaussian_nll(us, mean, log_scale), "mean": mean, "log_scale": log_scale}


def divergence(found: dict, reference: dict):
    """The divergence of every factor from the reference's, [B, S] nats, of densities of rollouts.

    Of latents it is that of the Gaussians, exactly. Of trajectories it is the log-ratio, whose mean
    over the model's samples is the divergence.
    """
    if "mean" not in found:
        return policy.log_ratio(found["nll"], reference["nll"])
    return policy.gaussian_divergence(found["mean"], found["log_scale"], reference["mean"],
                                      reference["log_scale"])


@functools.partial(jax.jit, static_argnames=("sampler", "names"))
def compare(params, reference, batch, rollout, *, sampler: RolloutSampler, names: tuple[str, ...]):
    """The arrays of these names, [P, G, S, ...], of rollouts under two sets of parameters.

    old_nll, reference_nll; divergence; of latents reference_mean and reference_log_scale. What is
    not named is not computed.
    """
    old, first = (densities(sampler, p, batch, rollout) for p in (params, reference))
    found = {"old_nll": old["nll"], "divergence": divergence(old, first)}
    found |= {f"reference_{name}": value for name, value in first.items()}
    shape = rollout.shape[:2]
    return {name: _split(found[name].reshape(*shape, *found[name].shape[1:])) for name in names}


def draw(params, reference, root, batch, *, sampler: RolloutSampler, names: tuple[str, ...],
         recorded_pairs: bool = False):
    """Rollouts of a batch and their comparison: (clean tokens of each part, rollouts, `compare`'s).

    recorded_pairs: rollouts are those of a batch's images, and there are no tokens. Each part is a
    program of its own, so that it can be read while the next is made; jitted, draw is one.
    """
    if recorded_pairs:
        tokens, rollout = (), recorded(params, root, batch, sampler=sampler)
    else:
        keys = (_keys(root, batch["index"], samples=sampler.samples, part=part)
                for part in range(PARTS))
        tokens, parts = zip(*(sample(params, own, batch, sampler=sampler) for own in keys),
                            strict=True)
        rollout = jnp.concatenate(parts, 1)
    return tokens, rollout, compare(params, reference, batch, rollout, sampler=sampler, names=names)
