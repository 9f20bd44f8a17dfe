"""The training step: gradient, learning rate, EMA, a batch in parts or incomplete, drawing T."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ntm_jax.runtime import sharding
from ntm_jax.runtime.config import Optimizer
from ntm_jax.training import objectives, optimizers, state
from ntm_jax.training.objectives import StepInputs
from ntm_jax.training.step import make_step, steps_of, update_ema
from tests.common import as_run, batch_of, bits, norm, objective_of, random_run, setup, tiny_config


def begin(settings):
    """(the source, a run, its state at step 1, with random numbers as parameters)."""
    source, model, mesh = setup(settings)
    run = random_run(as_run(settings, model, mesh))
    abstract = state.abstract(run)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract)  # of the optimizer
    current = zeros.replace(params=run.params, ema=run.params, step=np.int32(1))
    return source, run, jax.device_put(current, jax.tree.map(lambda a: a.sharding, abstract))


@pytest.mark.slow
def test_a_batch_in_parts_makes_the_same_step_and_one_that_lacks_a_part_changes_nothing():
    found = []
    for parts in (1, 4):
        settings = tiny_config(**{"train.accumulate": parts})
        source, run, current = begin(settings)
        batch = sharding.to_global(batch_of(source, settings, 16), run.mesh)
        step, before = make_step(run, objective_of(run)), jax.device_get(current)
        homes = jax.tree.map(lambda a: a.sharding, state.abstract(run))
        for complete in (True, False) if parts == 1 else (True,):
            flag = sharding.flag_by_process(complete, run.mesh)
            with sharding.use(run.mesh):
                new, metrics = step(jax.device_put(before, homes), batch, 2, None, flag)
            assert bool(metrics["batch_complete"]) is complete
            assert (bits(new) == bits(before)) is not complete
            if complete:
                found.append(jax.device_get((metrics, new.opt_state)))
    for whole, parts in zip(*map(jax.tree.leaves, found), strict=True):
        # float32 sums in another order, relative to the largest entry: single ones cancel
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


@pytest.mark.slow
def test_levels_are_weighted_by_a_power_of_their_noise():
    """The step's gradient is that of sum_k w_k NLL_k; the reported loss is without the weights.

    w_k = t_k^2 over the mean of t_k^2.
    """
    settings = tiny_config(**{
        "train.level_weight_power": 2.0, "optimizer.clip": 1e9, "trajectory.t_min": 0.04,
        "trajectory.t_min_range": (0.04, 0.04)})
    source, run, current = begin(settings)
    batch, steps = batch_of(source, settings, 16), settings.evaluation_steps
    draws = StepInputs(jax.random.fold_in(jax.random.key(settings.seed), 1), batch, steps, 1)
    weight = run.evaluated_levels()[:-1] ** 2
    weight /= weight.mean()
    objective = objective_of(run)
    of_run, step = objectives.loss_context(run, objective), make_step(run, objective)

    def loss(params, weight):
        terms = objectives.trajectory_terms(of_run, params, draws)
        return jnp.mean(weight[None] * (terms.nll - terms.constant)) / 64

    gradient = jax.jit(jax.value_and_grad(loss))
    _, weighted = jax.device_get(gradient(current.params, weight))
    unweighted_loss, unweighted = jax.device_get(
        gradient(current.params, np.ones(steps, np.float32)))
    assert abs(norm(weighted) / norm(unweighted) - 1) > 0.1
    with sharding.use(run.mesh):
        _, metrics = step(current, batch, steps)
    np.testing.assert_allclose(metrics["grad_norm"], norm(weighted), rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], unweighted_loss, rtol=1e-5)


def test_the_number_of_steps_is_drawn_from_the_seed_and_the_step():
    settings = tiny_config(**{"trajectory.steps": (2, 4, 8)})

    def drawn_steps(settings):
        return [steps_of(settings, objective_of(settings), step) for step in range(300)]

    drawn = drawn_steps(settings)
    assert drawn == drawn_steps(settings)
    assert all(70 < drawn.count(steps) < 130 for steps in (2, 4, 8))
    other = tiny_config(seed=1, **{"trajectory.steps": (2, 4, 8)})
    assert drawn != drawn_steps(other)
    pairs = tiny_config(**{"trajectory.steps": (2, 8, 4), "train.objective": "pairwise"})
    assert set(drawn_steps(pairs)) == {8}  # it draws T for each example


def test_the_rate_rises_from_0_to_the_peak_and_then_takes_its_schedule():
    steps, rise, low, half = np.array([0, 5, 10, 40, 55, 100, 999]), [0, 5e-4, 1e-3], 1e-5, 5.05e-4
    for schedule, after in (("cosine", [7.525e-4, half, low, low]), ("constant", [1e-3] * 4),
                            ("linear", [6.7e-4, half, low, low])):
        settings = Optimizer(schedule=schedule, learning_rate=1e-3, min_learning_rate=low,
                             warmup_steps=10)
        found = jax.jit(optimizers.learning_rate(settings, 100))(steps)
        np.testing.assert_allclose(found, rise + after, rtol=1e-5, atol=1e-12)


def test_the_ema_warms_up():
    for step, decay in ((0, 0.1), (1, 2 / 11), (90, 0.91), (10_000, 0.99)):  # (1 + n) / (10 + n)
        average = update_ema(jnp.zeros(3), jnp.ones(3), jnp.int32(step), 0.99)
        np.testing.assert_allclose(average, np.full(3, 1 - decay), rtol=1e-5)


def test_a_step_is_adamw_of_the_clipped_gradient():
    settings = Optimizer(learning_rate=1e-4, warmup_steps=1, clip=1.0, weight_decay=0.1)
    params, gradient = {"a": jnp.full(4, 2.0)}, {"a": jnp.array([30.0, -40.0, 0.0, 0.0])}
    transform = optimizers.make(settings, 100)
    update = jax.jit(transform.update)
    updates, current = update(gradient, transform.init(params), params)
    np.testing.assert_array_equal(updates["a"], 0)  # the rate starts at 0
    adam = next(s for s in current[1] if isinstance(s, optax.ScaleByAdamState))
    # b1 = 0.9, b2 = 0.95, and the norm 50 is clipped to 1
    np.testing.assert_allclose(adam.mu["a"], 0.1 * gradient["a"] / 50, rtol=1e-5)
    np.testing.assert_allclose(adam.nu["a"], 0.05 * (gradient["a"] / 50) ** 2, rtol=1e-5)
    updates, _ = update(gradient, current, params)
    # The same gradient twice: Adam's update is its sign.
    np.testing.assert_allclose(updates["a"], -1e-4 * (np.sign(gradient["a"]) + 0.2), rtol=1e-4)


def test_muon_makes_each_layers_matrix_orthogonal_and_leaves_the_rest_to_adamw():
    """Not the stack of layers, nor embeddings and biases."""
    settings = Optimizer(name="muon", learning_rate=1e-2, warmup_steps=0, weight_decay=0)
    rng, shapes = np.random.default_rng(0), {"kernel": (3, 4, 6), "bias": (3, 6)}
    params = {"embed": {"kernel": rng.normal(size=(4, 6))},
              "stack": {name: rng.normal(size=shape) for name, shape in shapes.items()}}
    transform = optimizers.make(settings, 100)
    updates, _ = jax.jit(transform.update)(params, transform.init(params), params)
    for of_adam in (updates["embed"]["kernel"], updates["stack"]["bias"]):  # a sign, at first
        np.testing.assert_allclose(np.abs(of_adam), np.abs(of_adam).max(), rtol=1e-4)
    singular = np.linalg.svd(updates["stack"]["kernel"])[1] / (1e-2 * 0.2 * 6**0.5)
    np.testing.assert_array_less(np.abs(singular - 1), 0.4)  # five iterations reach 0.6 to 1.3
