"""The rows of a benchmark that only post-training has: samples of the model, and their rewards.

Their items are samples. They take the first training batch, as in a step whose scalars are not
logged.
"""

import contextlib
import dataclasses
import functools

import jax

from ntm_jax.analysis.cases import Case, Setting
from ntm_jax.runtime import build, flops, sharding
from ntm_jax.training.reward import drawing, rollouts
from ntm_jax.training.reward.rollouts import Rollouts
from ntm_jax.training.step import check_batch


@dataclasses.dataclass(frozen=True)
class _RolloutBenchmark:
    """The rollouts of an untrained run, whose parameters are also the reference, and a batch."""

    setting: Setting
    rollouts: Rollouts
    batch: dict  # global arrays

    def draw(self, params, root, batch, model=None):
        """Clean tokens, rollouts and their comparison; model: another form of the run's."""
        found, config = self.rollouts, self.setting.run.config
        sampler = dataclasses.replace(found.sampler, model=model or found.sampler.model)
        return drawing.draw(
            params, params, root, batch, sampler=sampler, recorded_pairs=not found.scorer,
            names=rollouts.compared(found.use, config.reward, logged=False))

    @property
    def inputs(self) -> tuple:
        return self.setting.params, jax.random.key(0), self.batch

    def drawn(self):
        with sharding.use(self.setting.run.mesh):
            return self.draw(*self.inputs)

    @property
    def items(self) -> int:
        config = self.setting.run.config
        return config.data.batch_size * rollouts.samples_of(config)

    def flops(self) -> int:
        plain = build.plain(self.setting.run.model)
        with sharding.use(self.setting.run.mesh):
            return flops.count(functools.partial(self.draw, model=plain), *self.inputs)


def _rollout_benchmark(setting: Setting) -> _RolloutBenchmark | None:
    """None for a run that is not post-trained."""
    if not setting.rollout_use:
        return None
    assert setting.source is not None  # of training rows
    check_batch(setting.run.config, setting.run.mesh)
    params = setting.params  # initialises new ones before worker processes start
    batch = sharding.to_global(setting.batch_of_training(), setting.run.mesh)
    made = Rollouts(setting.run, setting.source, setting.rollout_use, params)
    return _RolloutBenchmark(setting, made, batch)


def _rollouts(setting: Setting) -> Case | None:
    """The samples of a batch and their comparison with the reference, without scores."""
    benchmark = _rollout_benchmark(setting)
    return benchmark and Case(benchmark.drawn, benchmark.items, flops=benchmark.flops(),
                              close=benchmark.rollouts.close)


def _scoring(setting: Setting) -> Case | None:
    """The scores of samples that are ready; None where a batch has pairs in place of samples."""
    benchmark = _rollout_benchmark(setting)
    if not benchmark or not benchmark.rollouts.scorer:
        return None
    scorer, tokens = benchmark.rollouts.scorer, jax.block_until_ready(benchmark.drawn()[0])
    size = sum(sharding.to_local(part).nbytes for part in tokens)
    return Case(lambda: scorer(tokens, benchmark.batch, detailed=False), benchmark.items,
                bytes=size, close=scorer.close)


def _rollouts_and_scoring(setting: Setting) -> Case | None:
    """What training does between updates.

    One part of the samples is scored while the next is drawn; with config.reward.ahead all are
    scored while those of the next batch are drawn.
    """
    benchmark = _rollout_benchmark(setting)
    if not benchmark or not benchmark.rollouts.scorer:
        return None
    found = benchmark.rollouts
    begin = functools.partial(found.begin, setting.params, benchmark.batch, 0, logged=False)
    drawn = [begin()] if setting.run.config.reward.ahead else []

    def scored():
        drawn.append(begin())
        return found.finish(drawn.pop(0))[0], [samples.arrays for samples in drawn]

    return Case(scored, benchmark.items, flops=benchmark.flops(), close=found.close)


def batch_with_rollouts(setting: Setting) -> dict:
    """The training batch with its rollouts, on the devices."""
    benchmark = _rollout_benchmark(setting)
    assert benchmark  # of a run that is post-trained
    with contextlib.closing(benchmark.rollouts):
        return benchmark.rollouts(setting.params, benchmark.batch, 0, logged=False)[0]


REWARD = {"rollouts": _rollouts, "scoring": _scoring, "rollouts and scoring": _rollouts_and_scoring}
