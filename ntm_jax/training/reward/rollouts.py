"""Samples of the model that is trained, scored: what a policy gradient learns from.

Symbols: P records of a batch, G samples of each; B = P G; K = T+1 levels, N tokens, D token
channels; H, W, C image height, width, channels.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.core import sampling
from ntm_jax.core.model import NTM, Terms, exact, repeat
from ntm_jax.core.trajectory import Schedule, example_keys, per_example
from ntm_jax.data import transforms
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.runtime import build, sharding
from ntm_jax.runtime.run import Run
from ntm_jax.training.reward import policy, rewards

PARTS = 2  # into which the samples are split: one is scored while the next is made


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The static arguments of a rollout."""

    model: NTM
    schedule: Schedule
    steps: int
    samples: int
    whole: bool  # trajectories x_k, through the transporter; otherwise its latents u_k


@functools.partial(jax.jit, static_argnames=("sampler", "part"))
def sample(params, root, batch, *, sampler: Sampler, part: int):
    """Draws one of the PARTS of a batch's samples; returns (clean tokens [P, g, N, D], a dict).

    The dict holds what the loss needs: rollout [P, g, K, N, D], and old_nll [P, g, T], the negative
    log-likelihood of every factor under the parameters that drew it, in nats.
    """
    count = -(-sampler.samples // PARTS)
    count = min(count, sampler.samples - part * count)
    keys = example_keys(root, f"rollout {part}", batch["index"])
    keys = jax.vmap(lambda key: jax.random.split(key, count))(keys).reshape(-1)
    y = repeat(build.condition(sampler.model, batch), count)
    t = sampler.schedule.fixed_levels(sampler.steps, len(keys))
    model = exact(sampler.model)
    us = sampling.sample_latents(model, params, keys, t, y)
    if sampler.whole:
        rollout = sampling.invert_trajectory(model, params, us, t, y)
        x_0 = rollout[:, 0]
    else:
        rollout, x_0 = us, sampling.invert_level(model, params, us, t, y, 0)
    old = terms(sampler.model, params, rollout, t, y, sampler.whole)
    tokens = x_0 / (1 - per_example(t[:, 0], x_0))
    grouped = {"rollout": rollout, "old_nll": old.nll}
    return jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]), (tokens, grouped))


def terms(model: NTM, params, rollout, t, y, whole: bool):
    """Terms [B, T] of rollouts [B, K, N, D], trajectories if `whole` and latents otherwise."""
    method = NTM.trajectory if whole else NTM.latents
    steps = jnp.full(len(rollout), rollout.shape[1] - 1)
    return cast(Terms, model.apply(params, rollout, t, steps, y, method=method))


def abstract(run: Run) -> dict:
    """The shapes and shardings of the arrays that Rollouts adds to a batch, by name."""
    config, c = run.config, run.model.config
    group = config.data.batch_size, config.reward.samples
    shapes = {"rollout": (*group, config.sample.steps + 1, c.tokens, c.dim),
              "old_nll": (*group, config.sample.steps), "reward": group, "advantage": group}
    sharding_ = sharding.batch_sharding(run.mesh)
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding_)
            for name, shape in shapes.items()}


class Rollouts:
    """Adds scored samples of the present parameters to a batch.

    Sample g of a record is keyed by the step and the record's index, so it is the same on any mesh.
    Raises UserError where the reward does not go with the source.
    """

    def __init__(self, run: Run, source: Source):
        config = run.config
        self._run, self._source = run, source
        self._reward = rewards.find(config.reward.name, source)
        self._sampler = Sampler(run.model, run.schedule, config.sample.steps, config.reward.samples,
                                config.reward.trains != "predictor")

    def __call__(self, params, batch: dict, step: int) -> dict[str, Any]:
        """The batch with rollout, old_nll, reward and advantage, [P, G, ...] each.

        All parts are dispatched before the first is scored, so that devices work while the host
        scores.
        """
        run = self._run
        root = jax.random.fold_in(jax.random.key(run.config.seed), step)
        with sharding.use(run.mesh):
            parts = [sample(params, root, batch, sampler=self._sampler, part=part)
                     for part in range(PARTS)]
        given = self._conditions(batch)
        scores = np.concatenate([self._score(tokens, given) for tokens, _ in parts], 1)
        advantages = np.asarray(policy.advantages(scores))
        scored = sharding.place({"reward": scores, "advantage": advantages}, run.mesh)
        with sharding.use(run.mesh):
            joined = jax.tree.map(lambda *a: jnp.concatenate(a, 1), *(found for _, found in parts))
        return batch | joined | scored

    def _conditions(self, batch: dict) -> list:
        """The captions, or the labels, of a batch's records, [P]."""
        if self._source.captions is not None and self._run.model.config.text_width:
            return [self._source.captions[int(i)] for i in sharding.to_host(batch["index"])]
        return sharding.to_host(batch["label"]).tolist()

    def _score(self, tokens, given: list) -> np.ndarray:
        """Rewards [P, g] of tokens [P, g, N, D]. Raises UserError where they are not numbers."""
        spec, name = self._run.spec, self._run.config.reward.name
        values = sharding.to_host(tokens)
        count = values.shape[1]
        images = transforms.unpatchify(values.reshape(-1, *values.shape[2:]), spec.image_shape,
                                       spec.patch_size)
        if spec.pixel_levels:
            images = transforms.unscale(images, spec.pixel_levels)
        found = np.asarray(self._reward(images, [one for one in given for _ in range(count)]),
                           np.float32)
        if found.shape != (len(images),) or not np.isfinite(found).all():
            raise UserError(f"config.reward.name={name} gave an array of shape {found.shape}: "
                            f"expected {len(images)} finite numbers, one for each image")
        return found.reshape(-1, count)
