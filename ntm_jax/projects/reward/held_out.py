"""The rewards of samples of held-out conditions, before and after post-training."""

import contextlib
import dataclasses

import jax
import numpy as np

from ntm_jax.data import pipeline
from ntm_jax.data.sources import Source
from ntm_jax.evaluation.statistics import mean_and_stderr
from ntm_jax.projects.reward import drawing
from ntm_jax.projects.reward.scorer import Scorer
from ntm_jax.runtime import sharding
from ntm_jax.runtime.run import Run
from ntm_jax.training.objectives import HeldOutScore, held_out_bound
from ntm_jax.training.reference_model import kept_reference


def scores(run: Run, source: Source, reference: dict | None = None) -> dict[str, np.ndarray]:
    """{name: [conditions]} of config.reward.samples samples each of held-out conditions.

    reward, diversity; with reference parameters also kl, in nats a trajectory. There are
    config.evaluate.num_samples samples, up to a batch; {} where these are 0 or there is no reward.
    The conditions are of records that are evenly spread over the split.
    """
    config, mesh = run.config, run.mesh
    wanted = config.evaluate.num_samples // config.reward.samples
    if not (config.reward.name and wanted):
        return {}
    sampler, scorer = drawing.sampler_of(run), Scorer(run, source)
    root = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)  # of no training step
    size = config.data.batch_size
    chosen = source.evenly_spread(-(-wanted // size) * size)
    batches = pipeline.evaluation_batches(source, config.data.patch_size, size,
                                          *sharding.share(mesh), chosen.tolist())
    first, names = (run.params, ()) if reference is None else (reference, ("divergence",))
    found = []
    with contextlib.closing(batches):
        for local in batches:
            batch = sharding.to_global(local, mesh)
            real = sharding.to_host(batch.pop("mask")) > 0
            with sharding.use(mesh):
                tokens, _, compared = drawing.draw(run.params, first, root, batch, sampler=sampler,
                                                   names=names)
            scored = scorer(tokens, batch)
            figures = {"reward": scored["rewards"].mean(1), "diversity": scored["distance"].mean(1)}
            if names:
                figures["kl"] = sharding.to_host(compared["divergence"]).sum(-1).mean(1)
            found.append({name: values[real] for name, values in figures.items()})
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def held_out_reward(run: Run, source: Source) -> HeldOutScore:
    """The bound, and the mean reward of held-out conditions, by which the best is chosen."""
    bound = held_out_bound(run, source)
    means = {name: float(np.mean(values)) for name, values in scores(run, source).items()}
    if not means:
        return bound
    scalars = {f"evaluate/{name}": value for name, value in means.items()}
    return HeldOutScore(-means["reward"], scalars | bound.scalars,
                        f"{bound.message}, reward {means['reward']:.4f}")


def measure(run: Run, source: Source, trajectories: int) -> dict:
    """Means and standard errors over held-out conditions of `scores`.

    Where the run's folder has the parameters of the model before post-training, also reward_before
    and diversity_before, of the same noise.
    """
    reference = kept_reference(run)
    result = {name: mean_and_stderr(values)
              for name, values in scores(run, source, reference).items()}
    if reference is not None:
        before = scores(dataclasses.replace(run, params=reference), source)
        result |= {f"{name}_before": mean_and_stderr(values) for name, values in before.items()}
    return result
