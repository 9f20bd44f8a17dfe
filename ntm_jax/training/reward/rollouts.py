"""Samples of the model that is trained, scored: what post-training learns from.

Symbols: P records of a batch, G samples of each; B = P G; T steps, K = T+1 levels; S factors that
learn; N tokens, D token channels.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.core import sampling, trajectory
from ntm_jax.core.model import NTM, Terms, exact, repeat
from ntm_jax.core.trajectory import Schedule, example_keys, per_example
from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.runtime import build, sharding
from ntm_jax.runtime.config import Config
from ntm_jax.runtime.config import Reward as Settings
from ntm_jax.runtime.run import Run
from ntm_jax.sampling import inverses
from ntm_jax.training.reward import policy
from ntm_jax.training.reward.scorer import Scorer

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
    first: int  # the levels that rollouts hold, first to last: those of S = last - first factors
    last: int
    inverse: str
    mesh: jax.sharding.Mesh

    @property
    def factors(self) -> int:
        """S, the factors that learn."""
        return self.last - self.first

    def held(self, levels):
        """Of arrays [B, K, ...] by level those that rollouts hold, [B, S+1, ...]."""
        return levels[:, self.first : self.last + 1]

    def levels(self, count: int):
        """The noise levels of rollouts, [count, S+1]."""
        return self.held(self.schedule.fixed_levels(self.steps, count))


def sampler_of(run: Run) -> RolloutSampler:
    """The sampler of a run's settings."""
    config = run.config
    first, last = config.reward.levels or (0, config.sample.steps)
    return RolloutSampler(
        run.model, run.schedule, config.sample.steps, config.reward.samples,
        config.reward.trains != "predictor", first, last, config.sample.inverse, run.mesh)


@functools.partial(jax.jit, static_argnames=("sampler", "part"))
def sample(params, root, batch, *, sampler: RolloutSampler, part: int):
    """Draws one of the PARTS of a batch's samples: (clean tokens, rollouts).

    Their shapes are [P, g, N, D] and [P, g, S+1, N, D]. Clean tokens are x_0 / (1 - t_0).
    """
    count = -(-sampler.samples // PARTS)
    count = min(count, sampler.samples - part * count)
    keys = example_keys(root, f"rollout {part}", batch["index"])
    keys = jax.vmap(lambda key: jax.random.split(key, count))(keys).reshape(-1)
    y = repeat(build.condition(sampler.model, batch), count)
    t = sampler.schedule.fixed_levels(sampler.steps, len(keys))
    us = sampling.sample_latents(sampler.model, params, keys, t, y)
    inverted = sampler.steps if sampler.through_transporter else 1  # levels of each sample
    model = exact(sampler.model)
    how = inverses.choose(sampler.inverse, model.config, inverted * len(us), sampler.mesh)
    if sampler.through_transporter:
        rollout = sampling.invert_trajectory(model, params, us, t, y, how)
        x_0 = rollout[:, 0]
    else:
        rollout, x_0 = us, sampling.invert_level(model, params, us, t, y, 0, how)
    tokens = x_0 / (1 - per_example(t[:, 0], x_0))
    found = tokens, sampler.held(rollout)
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
    found = trajectory.simulate(x, t, repeat(noise, 2))
    if not sampler.through_transporter:
        y = repeat(build.condition(sampler.model, batch), 2)
        found = sampling.transport_trajectory(exact(sampler.model), params, found, t, y)
    found = sampler.held(found)
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
    y = repeat(build.condition(sampler.model, batch), samples)
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
        tokens, parts = zip(*(sample(params, root, batch, sampler=sampler, part=part)
                              for part in range(PARTS)), strict=True)
        rollout = jnp.concatenate(parts, 1)
    return tokens, rollout, compare(params, reference, batch, rollout, sampler=sampler, names=names)


def compared(use: "RolloutUse", settings: Settings, logged: bool) -> tuple[str, ...]:
    """The arrays of `compare` that an objective and the log need for one set of samples."""
    names = use.arrays(settings)
    needed = settings.kl and use.needs_divergence
    return (*names, "divergence") if logged or needed else names


@dataclasses.dataclass(frozen=True)
class RolloutUse:
    """What an objective learns from rollouts.

    arrays(settings) -> the names of those of `compare` that its loss reads from a batch.
    weights(settings, rewards [P, G], bonus [P, G], future_divergence [P, G, S]) -> further arrays
      of a batch, [P, G, ...]. bonus: that of novelty. future_divergence: of each factor, the
      divergence from the reference of the factors that follow it, times config.reward.kl.
    needs_divergence: whether the weights depend on future_divergence; it is 0 otherwise.
    """

    arrays: Callable[[Settings], tuple[str, ...]]
    weights: Callable[[Settings, np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]]
    needs_divergence: bool


class Drawn(NamedTuple):
    """The samples of a batch before they are scored; the devices may still be drawing them."""

    batch: dict
    tokens: tuple  # clean tokens of each part; () for pairs
    rollout: Any
    compared: dict  # the arrays of `compare`
    logged: bool


class Rollouts:
    """Adds scored samples of a model to a batch: `begin` draws them, `finish` scores them.

    Sample g of a record is keyed by the step and the record's index, so it is the same on any mesh.
    Without a reward, the samples are a batch's images and the rejected ones. `reference` is to be
    set to the parameters that samples are compared with.

    Raises UserError where the reward does not go with the source.
    """

    def __init__(self, run: Run, source: Source, use: RolloutUse, reference: dict | None = None):
        self.run, self.reference, self.use = run, reference, use
        self.sampler = sampler_of(run)
        if not run.config.reward.name and REJECTED not in source.records[0]:
            raise UserError(f"config.reward.name is empty, and the records of {source.name} have "
                            f"no image `{REJECTED}`: name a reward, or give pairs of images")
        settings = run.config.reward
        self.scorer = Scorer(run, source, settings.workers) if settings.name else None
        self.names = use.arrays(settings)

    def close(self) -> None:
        """Ends the processes that score."""
        if self.scorer:
            self.scorer.close()

    def __call__(self, params, batch: dict, step: int, logged: bool = True) -> tuple[dict, dict]:
        """Draws and scores samples for the records of a batch; see `begin` and `finish`."""
        return self.finish(self.begin(params, batch, step, logged))

    def begin(self, params, batch: dict, step: int, logged: bool = True) -> Drawn:
        """Dispatches the drawing of samples for the records of a batch, and does not wait for it.

        Each part can be scored while the devices draw the next. logged: False gives no scalars.
        """
        run = self.run
        root = jax.random.fold_in(jax.random.key(run.config.seed), step)
        names = compared(self.use, run.config.reward, logged)
        with sharding.use(run.mesh):
            drawn = draw(params, self.reference, root, batch, sampler=self.sampler, names=names,
                         recorded_pairs=not self.scorer)
        return Drawn(batch, *drawn, logged)

    def finish(self, drawn: Drawn) -> tuple[dict, dict]:
        """Scores samples: (the batch extended by the arrays that the loss reads, scalars)."""
        settings, found = self.run.config.reward, drawn.compared
        scored = self._scored(drawn.tokens, drawn.batch, drawn.logged)
        rewards = scored["rewards"]
        divergences = sharding.to_host(found["divergence"]) if "divergence" in found else np.zeros(
            (*rewards.shape, self.sampler.factors), np.float32)
        future_divergence = settings.kl * (np.cumsum(divergences, -1) - divergences)
        scalars = _scalars(scored, divergences) if drawn.logged else {}
        weights = sharding.place(self.use.weights(
            settings, rewards, self._bonus(scored), future_divergence), self.run.mesh)
        kept = {name: found[name] for name in self.names}
        return drawn.batch | {"rollout": drawn.rollout} | kept | weights, scalars

    def _scored(self, tokens, batch: dict, logged: bool) -> dict:
        """The scores of the samples, as Scorer gives them; of pairs only rewards, 1 and 0."""
        if self.scorer:
            return self.scorer(tokens, batch, logged)
        return {"rewards": np.tile(np.array([1.0, 0.0]), (batch["index"].shape[0], 1))}

    def _bonus(self, scored: dict) -> np.ndarray:
        """The bonus of each sample for rare traits, [P, G]; see policy.rarity.

        Raises UserError if config.reward.novelty is positive and the reward gives no traits.
        """
        settings = self.run.config.reward
        if not settings.novelty:
            return np.zeros(scored["rewards"].shape, np.float32)
        if "traits" not in scored:
            raise UserError(f"config.reward.novelty is {settings.novelty}, and the reward "
                            f"{settings.name or 'of pairs'} gives no traits of samples: set it to "
                            "0, or return rewards.Scores with traits")
        return settings.novelty * policy.rarity(scored["traits"])


def _scalars(scored: dict, divergences: np.ndarray) -> dict[str, float]:
    """What is logged of scored samples; divergences: from the reference, [P, G, S] nats."""
    found, rewards = {"kl": float(divergences.sum(-1).mean())}, scored["rewards"]
    if "distance" not in scored:
        return found
    found = {"reward": float(rewards.mean())} | found
    found["diversity"] = float(scored["distance"].mean())
    names = scored.get("groups", np.empty(0))
    return found | {f"reward/{name}": float(rewards[names == name].mean())
                    for name in np.unique(names)}


def samples_of(config: Config) -> int:
    """G, the samples of each record, or the 2 images of a pair."""
    return config.reward.samples if config.reward.name else 2


def abstract(run: Run, use: RolloutUse) -> dict:
    """The shapes and shardings of the arrays that Rollouts adds to a batch, by name."""
    config, c, settings = run.config, run.model.config, run.config.reward
    group = config.data.batch_size, samples_of(config)
    count = sampler_of(run).factors
    latents = (*group, count, c.tokens, c.dim)
    shapes = {"rollout": (*group, count + 1, c.tokens, c.dim)}
    shapes |= {name: latents if name in ("reference_mean", "reference_log_scale")
               else (*group, count) for name in use.arrays(settings)}
    weights = use.weights(settings, np.zeros(group), np.zeros(group), np.zeros((*group, count)))
    shapes |= {name: value.shape for name, value in weights.items()}
    split = sharding.batch_sharding(run.mesh)
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
            for name, shape in shapes.items()}


def check(config: Config) -> None:
    """Raises UserError for a configuration that cannot be post-trained."""
    reward, train, model = config.reward, config.train, config.model
    if not config.init_from:
        raise UserError(f"config.init_from is empty: config.train.objective={train.objective} "
                        "improves a trained model; give its run, --config.init_from=WORKDIR")
    if reward.ahead and not reward.name:
        raise UserError("config.reward.ahead=True draws samples while others are scored, and "
                        "config.reward.name is empty: name a reward, or set ahead to False")
    levels, steps = reward.levels, config.sample.steps
    if levels and not (len(levels) == 2 and levels[0] < levels[1] <= steps):
        raise UserError(f"config.reward.levels is {levels}: expected the first and the last level, "
                        f"(0, {steps}) at most, or () for all")
    if levels and levels[1] < steps and reward.trains != "predictor":
        raise UserError(f"config.reward.levels is {levels}: where the transporter learns, the last "
                        f"level is pure noise, {steps}; or set config.reward.trains=predictor")
    if reward.trains != "predictor" and not model.transporter_blocks:
        raise UserError(f"config.reward.trains={reward.trains} needs a transporter, and "
                        "config.model.transporter_blocks is 0: set it to predictor")
    if train.align_weight:
        raise UserError(f"config.train.align_weight is {train.align_weight}: with "
                        f"config.train.objective={train.objective} config.reward.kl holds the "
                        "model near the first one; set align_weight to 0")
    for name in ("steps", "save_every", "evaluate_every"):
        if getattr(train, name) % reward.updates:
            raise UserError(f"config.train.{name} is {getattr(train, name)}: expected a multiple "
                            f"of config.reward.updates, {reward.updates}, since a run is saved "
                            "between samples")


def fixed_parts(config: Config, names) -> tuple[str, ...]:
    """Those of the parameters' first `names` that config.reward.trains leaves as they are."""
    parts = {"predictor": {"transporter"}, "transporter": set(names) - {"transporter"},
             "both": set()}
    return tuple(name for name in names if name in parts[config.reward.trains])
