"""Objectives: what they refuse, what a step draws, and what each estimates."""

import functools
import re

import jax
import numpy as np
import pytest

from ntm_jax.core import likelihood, trajectory
from ntm_jax.errors import UserError
from ntm_jax.runtime.run import abstract_pixel_params
from ntm_jax.training import objectives, state
from ntm_jax.training.objectives import StepInputs
from tests.common import (
    as_run,
    batch_of,
    configured,
    new_run,
    objective_of,
    randomised,
    setup,
    tiny_config,
)

TERMS = ("quadratic", "log_scale", "log_det")


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("digits", {"train.objective": "denoiser", "train.condition_dropout": 0.0},
     "a denoiser, and nothing else, has a teacher; give --config.teacher=WORKDIR of the run to"),
    ("digits_finetune", {"init_from": ""},
     "align_weight is 2.5: it holds a model with config.model.head=flow_matching near "),
    ("digits", {"train.objective": "pairwise"},
     "pixel_likelihood=learned trains on the bound of whole trajectories: expected config.train."),
])
def test_what_an_objective_cannot_train_is_refused(name, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        configured(name, changes)


DRAWS = tiny_config(**{
    "trajectory.steps": (2, 4), "trajectory.t_min_range": (0.02, 0.04),
    "train.condition_dropout": 0.3})


def test_conditions_are_dropped_one_by_one_and_t_min_is_uniform():
    model = new_run(DRAWS).model
    label = np.arange(4000, dtype=np.int32) % 10
    batch = {"index": np.arange(4000, dtype=np.int32), "label": label}
    inputs = StepInputs(jax.random.key(3), batch, 2, 0)
    condition = np.asarray(inputs.condition(model, DRAWS.train.condition_dropout))
    dropped = condition == 10
    assert abs(dropped.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4000)
    np.testing.assert_array_equal(condition[~dropped], label[~dropped])
    # Neighbours are independent, within 3 sigma.
    assert abs(np.corrcoef(dropped[:-1], dropped[1:])[0, 1]) < 0.05
    t_min = np.sort(inputs.t_min(DRAWS.schedule(model.config.tokens)))
    assert 0.02 <= t_min[0] < 0.0201
    assert 0.0399 < t_min[-1] < 0.04
    distance = np.abs((t_min - 0.02) / 0.02 - np.arange(4000) / 4000).max()
    assert distance < 1.63 / np.sqrt(4000)  # Kolmogorov-Smirnov at 1%


@functools.cache
def compiled(terms_of, setup):
    return jax.jit(lambda params, root, batch, steps: terms_of(
        setup, params, StepInputs(root, batch, steps, 0)), static_argnums=3)


@pytest.fixture(scope="module")
def examples():
    """(a setup, random parameters, a batch of 256)."""
    settings = tiny_config(**{"evaluate.split": "train[:256]", "trajectory.steps": (2, 4)})
    source, model, mesh = setup(settings)
    run = as_run(DRAWS, model, mesh)
    params = randomised(state.initialize(run).params)
    return objectives.loss_context(run, objective_of(run)), params, batch_of(source, DRAWS, 256)


@pytest.mark.parametrize("terms_of", [objectives.trajectory_terms, objectives.pair_terms])
def test_draws_follow_the_record_and_not_its_row(examples, terms_of):
    setup, params, batch = examples
    order = np.random.default_rng(0).permutation(256)
    reordered = {name: values[order] for name, values in batch.items()}
    function, root = compiled(terms_of, setup), jax.random.key(1)
    terms, permuted = (function(params, root, b, 2) for b in (batch, reordered))
    for name in TERMS:
        found, expected = getattr(permuted, name), getattr(terms, name)[order]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)  # sums over 64 dimensions
    other = function(params, jax.random.key(2), batch, 2)
    assert np.abs(other.quadratic - terms.quadratic).min() > 0


def test_pairs_estimate_the_trajectory_without_bias(examples):
    setup, params, batch = examples
    pair, whole = (compiled(terms_of, setup) for terms_of in (
        objectives.pair_terms, objectives.trajectory_terms))
    roots = [jax.random.key(i) for i in range(12)]
    functions = {"pairs": (pair, 0), "two": (whole, 2), "four": (whole, 4)}
    found = {key: [jax.device_get(function(params, root, batch, steps)) for root in roots]
             for key, (function, steps) in functions.items()}
    for name in TERMS:
        pairs, two, four = (
            np.concatenate([np.mean(getattr(terms, name), 1) / 64 for terms in found[key]])
            for key in ("pairs", "two", "four"))
        trajectories = (two + four) / 2  # T is 2 or 4 with equal chance
        error = np.hypot(pairs.std(), trajectories.std()) / np.sqrt(len(pairs))
        assert abs(pairs.mean() - trajectories.mean()) < 4 * error, name
        # The error is small enough to show a bias.
        distinguished = error < 0.1 * abs(two.mean() - four.mean())
        assert distinguished or error < 0.02 * abs(pairs.mean()), name


def test_learned_noise_is_trained_on_the_bound_and_post_training_leaves_it():
    """The gradient of the loss is that of the mean log-weight, which evaluation computes."""
    run = new_run(tiny_config(**{"model.pixel_likelihood": "learned"}))
    params, rng = randomised(state.initialize(run).params), np.random.default_rng(0)
    shapes, steps = abstract_pixel_params(run), 2
    fixed = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)
    context, batch = objectives.loss_context(run, objective_of(run)), batch_of(
        run.config.data.open("train"), run.config, 8)
    inputs = StepInputs(jax.random.key(1), batch, steps, 0)

    def log_weight(params):
        x, model = inputs.batch["x"], run.model
        y = inputs.condition(model, run.config.train.condition_dropout)
        t = run.schedule.levels(steps, inputs.t_min(run.schedule))
        noise = trajectory.example_noise(inputs.keys("noise"), (steps + 1, *x.shape[1:]))
        xs = run.pixels.simulate(params | fixed, x, t, noise)
        terms = model.apply(params, xs, t, np.full(8, steps), y)
        given = run.pixels.log_prob(params | fixed, x, xs[:, 0], t[:, 0], y)
        parts = likelihood.contributions(terms, xs, t, None, given)
        return -likelihood.log_weight(parts).mean() / (steps * x[0].size)

    def loss(params):
        return objectives.trajectory_loss(context, params | fixed, inputs)[0]

    found, expected = (jax.jit(jax.grad(one))(params) for one in (loss, log_weight))
    for name, gradient in found["params"]["pixels"].items():
        assert np.abs(gradient).max() > 1e-2, name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
                 found["params"], expected["params"])
    assert context.frozen_modules == ()
    post = objectives.loss_context(run, objectives.find("policy_gradient"))
    assert "pixels" in post.frozen_modules
