"""Scored samples of the model that is trained: what post-training learns from.

Symbols: P records of a batch, G samples of each; S factors that learn; N tokens, D token channels.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax.data.sources import Source
from ntm_jax.errors import UserError
from ntm_jax.projects.reward import held_out, policy
from ntm_jax.projects.reward.drawing import PARTS, REJECTED, draw, sampler_of
from ntm_jax.projects.reward.scorer import Scorer
from ntm_jax.projects.reward.settings import Reward
from ntm_jax.runtime import sharding
from ntm_jax.runtime.config import Config
from ntm_jax.runtime.run import Run
from ntm_jax.training import pictures
from ntm_jax.training.objectives import Extension, Objective


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """What an objective learns from rollouts.

    arrays(settings) -> the names of those of `drawing.compare` that its loss reads from a batch.
    weights(settings, rewards [P, G], bonus [P, G], future_divergence [P, G, S]) -> further arrays
      of a batch, [P, G, ...]. bonus: those of diversity and novelty. future_divergence: of each
      factor, the divergence from the reference of the factors that follow it, times
      config.reward.kl.
    needs_divergence: whether the weights depend on future_divergence; it is 0 otherwise.
    """

    arrays: Callable[[Reward], tuple[str, ...]]
    weights: Callable[[Reward, np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]]
    needs_divergence: bool

    def __call__(self, run: Run, source: Source) -> "Rollouts":
        """The extension of a run's batches."""
        return Rollouts(run, source, self)

    def needed_arrays(self, settings: Reward, logged: bool) -> tuple[str, ...]:
        """The names of the arrays of `drawing.compare` that a batch and its log need."""
        names = self.arrays(settings)
        needed = settings.kl and self.needs_divergence
        return (*names, "divergence") if logged or needed else names

    def abstract(self, run: Run) -> dict:
        """The shapes and shardings of the arrays that Rollouts adds to a batch, by name."""
        config, settings = run.config, run.config.reward
        group, factors = (config.data.batch_size, samples_of(config)), sampler_of(run).factors
        one, by_factor = np.zeros(group), np.zeros((*group, factors))
        weights = self.weights(settings, one, one, by_factor)
        found = abstract_samples(run, ("rollout", *self.arrays(settings)))
        return found | {name: found["rollout"].update(shape=a.shape) for name, a in weights.items()}

    def abstract_ahead(self, run: Run) -> dict:
        """Those of another batch's samples that the devices hold with config.reward.prefetch."""
        if not run.config.reward.prefetch:
            return {}
        parts = (f"tokens_{part}" for part in range(PARTS))
        return abstract_samples(run, ("index", "rollout", *parts, *self.needed_arrays(
            run.config.reward, logged=True)))

    def drawing(self, run: Run) -> tuple[Callable, dict, int]:
        """(`draw`, jitted; its options in a cycle that is logged; a batch's number of samples)."""
        settings = run.config.reward
        options = {"sampler": sampler_of(run), "recorded_pairs": not settings.name,
                   "names": self.needed_arrays(settings, logged=True)}
        return _draw, options, run.config.data.batch_size * samples_of(run.config)


# The devices hold what the program does not read, such as the reference's transporter.
_draw = jax.jit(draw, static_argnames=("sampler", "names", "recorded_pairs"), keep_unused=True)


def objective(loss: Callable, check: Callable[[Config], None], spec: RolloutSpec) -> Objective:
    """The objective of a loss that learns from rollouts."""
    return Objective(loss, held_out.held_out_reward, check=check, needs=("trajectory", "reference"),
                     measure=held_out.measure, frozen_modules=frozen_modules, extend=spec)


class Samples(NamedTuple):
    """The samples of a batch that are not scored yet; the devices may still be drawing them.

    arrays: "rollout", those of `compare`, and the clean tokens of each part, "tokens_0" and so on.
    """

    batch: dict
    arrays: dict
    logged: bool


@functools.partial(jax.jit, static_argnames="mesh")
def _rows(arrays, rows, *, mesh):
    split = sharding.batch_sharding(mesh)
    return jax.lax.with_sharding_constraint(jax.tree.map(lambda a: a[rows], arrays), split)


class Rollouts(Extension):
    """Adds scored samples of a model to a batch: `begin` draws them, `finish` scores them.

    Sample g of a record is keyed by the step and the record's index, so it is the same on any mesh,
        within rounding.
    Without a reward, the samples are a batch's images and the rejected ones.

    Raises UserError where the reward does not go with the source.
    """

    def __init__(self, run: Run, source: Source, spec: RolloutSpec):
        self.run, self.spec, self.sampler = run, spec, sampler_of(run)
        if not run.config.reward.name and REJECTED not in source.records[0]:
            raise UserError(f"config.reward.name is empty, and the records of {source.name} have "
                            f"no image `{REJECTED}`: name a reward, or give pairs of images")
        settings = run.config.reward
        self.updates, self.ahead = settings.updates, settings.prefetch
        self.scorer = Scorer(run, source, settings.workers) if settings.name else None

    def close(self) -> None:
        """Ends the processes that score."""
        if self.scorer:
            self.scorer.close()

    def begin(self, params, reference, batch: dict, step: int, logged: bool = True) -> Samples:
        """Dispatches the drawing of samples for the records of a batch, and does not wait for it.

        Each part can be scored while the devices draw the next. logged: False gives no scalars.
        """
        run = self.run
        root = jax.random.fold_in(jax.random.key(run.config.seed), step)
        names = self.spec.needed_arrays(run.config.reward, logged)
        with sharding.use(run.mesh):
            tokens, rollout, found = draw(
                params, reference, root, batch, sampler=self.sampler, names=names,
                recorded_pairs=not self.scorer)
        parts = {f"tokens_{part}": a for part, a in enumerate(tokens)}
        return Samples(batch, {"rollout": rollout} | found | parts, logged)

    def to_save(self, pending: Samples) -> dict:
        """The arrays of the samples, with the index of the record of each row."""
        return pending.arrays | {"index": pending.batch["index"]}

    def abstract(self, names: Iterable[str]) -> dict:
        """The shapes and shardings of those arrays of `to_save`."""
        return abstract_samples(self.run, names)

    def restore(self, saved: dict, batch: dict, logged: bool) -> Samples:
        """Samples that a checkpoint holds (`to_save`), for the same records in any order.

        The rows of a batch depend on the number of processes. Raises UserError if the records are
        others.
        """
        before, now = sharding.to_host((saved["index"], batch["index"]))
        rows = np.argsort(before, kind="stable")[np.argsort(np.argsort(now, kind="stable"))]
        if (before[rows] != now).any():
            raise UserError("the checkpoint's samples are of other records than the next batch: "
                            "resume with the data that the run began with")
        arrays = {name: a for name, a in saved.items() if name != "index"}
        logged = logged and "divergence" in arrays  # absent if config.train.log_every was another
        return Samples(batch, _rows(arrays, rows, mesh=self.run.mesh), logged)

    def finish(self, pending: Samples) -> tuple[dict, dict[str, float]]:
        """Scores samples: (the batch extended by the arrays that the loss reads, scalars)."""
        settings, found = self.run.config.reward, pending.arrays
        scored = self._scored(pending)
        rewards = scored["rewards"]
        divergences = sharding.to_host(found["divergence"]) if "divergence" in found else np.zeros(
            (*rewards.shape, self.sampler.factors), np.float32)
        future_divergence = settings.kl * (np.cumsum(divergences, -1) - divergences)
        scalars = _scalars(scored, divergences) if pending.logged else {}
        weights = sharding.place(self.spec.weights(
            settings, rewards, self._bonus(scored), future_divergence), self.run.mesh)
        kept = {name: found[name] for name in ("rollout", *self.spec.arrays(settings))}
        return pending.batch | kept | weights, scalars

    def pictures(self, run: Run, reference, held_out: Source) -> list[str]:
        """Draws samples before and after post-training."""
        return [pictures.draw_change(run, reference, held_out)]

    def _scored(self, samples: Samples) -> dict[str, Any]:
        """The scores of the samples, as Scorer gives them; of pairs only rewards, 1 and 0."""
        if not self.scorer:
            return {"rewards": np.tile(np.array([1.0, 0.0]), (samples.batch["index"].shape[0], 1))}
        parts = [samples.arrays[f"tokens_{part}"] for part in range(PARTS)]
        detailed = samples.logged or bool(self.run.config.reward.diversity)
        return self.scorer(parts, samples.batch, detailed)

    def _bonus(self, scored: dict) -> np.ndarray:
        """The bonus of each sample, [P, G]: for its distance to the others, and for rare traits.

        See scorer.mean_distances and policy.rarity.
        """
        settings, bonus = self.run.config.reward, np.zeros(scored["rewards"].shape, np.float32)
        if settings.diversity:
            bonus += settings.diversity * scored["distance"]
        if settings.novelty:
            bonus += settings.novelty * policy.rarity(scored["traits"])
        return bonus


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


def abstract_samples(run: Run, names: Iterable[str]) -> dict:
    """The shapes and shardings of the arrays of Rollouts.to_save that have these names."""
    c, size, count = run.model.config, run.config.data.batch_size, sampler_of(run).factors
    group, tokens = samples_of(run.config), (c.tokens, c.dim)
    shapes = {"index": (size,), "rollout": (size, group, count + 1, *tokens)}
    shapes |= dict.fromkeys(("reference_mean", "reference_log_scale"),
                            (size, group, count, *tokens))
    parts = np.array_split(np.arange(group), PARTS)  # the first ones are larger
    shapes |= {f"tokens_{part}": (size, len(own), *tokens) for part, own in enumerate(parts)}
    split = sharding.batch_sharding(run.mesh)
    return {name: jax.ShapeDtypeStruct(
        shapes.get(name, (size, group, count)), jnp.int32 if name == "index" else jnp.float32,
        sharding=split) for name in names}


def check(config: Config) -> None:
    """Raises UserError for a configuration that cannot be post-trained."""
    reward, train, model = config.reward, config.train, config.model
    if not config.init_from:
        raise UserError(f"config.init_from is empty: config.train.objective={train.objective} "
                        "improves a trained model; give its run, --config.init_from=WORKDIR")
    levels, steps = reward.levels, config.sample.steps
    if levels and not (len(levels) == 2 and levels[0] < levels[1] <= steps):
        raise UserError(f"config.reward.levels is {levels}: expected the first and the last level, "
                        f"(0, {steps}) at most, or () for all")
    if levels and levels[1] < steps and reward.trainable != "predictor":
        raise UserError(f"config.reward.levels is {levels}: where the transporter learns, the last "
                        f"level is pure noise, {steps}; or set config.reward.trainable=predictor")
    if reward.trainable != "predictor" and not model.transporter_blocks:
        raise UserError(f"config.reward.trainable={reward.trainable} needs a transporter, and "
                        "config.model.transporter_blocks is 0: set it to predictor")
    for name in ("steps", "save_every", "evaluate_every"):
        if getattr(train, name) % reward.updates:
            raise UserError(f"config.train.{name} is {getattr(train, name)}: expected a multiple "
                            f"of config.reward.updates, {reward.updates}, since a run is saved "
                            "between samples")


def frozen_modules(config: Config, names: Iterable[str]) -> tuple[str, ...]:
    """Those of the parameters' first `names` that config.reward.trainable leaves as they are."""
    parts = {"predictor": {"transporter"}, "transporter": set(names) - {"transporter"},
             "both": set()}
    return tuple(name for name in names if name in parts[config.reward.trainable])
