"""Candidates of an image: their information by exact likelihoods, and which of them is kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core.model import exact
from ntm_jax.core.trajectory import example_keys, example_noise, simulate
from ntm_jax.errors import UserError
from ntm_jax.runtime import config
from ntm_jax.sampling import selection
from ntm_jax.sampling.options import override
from tests.common import alike


def test_information_is_the_difference_of_the_likelihoods_terms(run):
    """By all terms of whole trajectories, one trajectory at a time, on the same noise."""
    index, y = np.array([3, 8, 5], np.int32), np.array([1, 4, 9], np.int32)
    images = np.asarray(run.sample(3))
    found = selection.information(run, images, index, y, 3)
    x, t = run.spec.to_tokens(images), run.schedule.fixed_levels(2, 3)
    keys = example_keys(jax.random.key(3), "select", index)
    nll = jax.jit(lambda xs, y: exact(run.model).apply(run.params, xs, t, jnp.full(3, 2), y).nll)
    expected = []
    for number in range(selection.TRAJECTORIES):
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        xs = simulate(x, t, example_noise(own, (3, *x.shape[1:])))
        change = nll(xs, np.full(3, 10)) - nll(xs, y)  # 10 is the null class
        expected.append(np.asarray(change)[:, 1:].sum(1))  # all but the cleanest level
    assert np.abs(expected).min() > 1e-2
    np.testing.assert_allclose(found, np.mean(expected, 0), rtol=1e-3, atol=1e-3)


def test_the_candidate_with_the_most_information_is_kept(run):
    rng = np.random.default_rng(0)
    index, y = np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32)
    tokens = rng.uniform(-1, 1, (3, 3, run.spec.tokens, run.spec.dim)).astype(np.float32)
    other = rng.normal(size=(3, 3, 2))
    kept, nothing, beside = selection.select(
        run, index, y, 7, 3, lambda number: [tokens[number], None, other[number]])
    scores = [selection.information(run, run.spec.from_tokens(x), index, y, 7) for x in tokens]
    best = np.argmax(scores, 0)
    assert len(set(best)) > 1
    assert nothing is None
    assert alike(kept, tokens[best, index])
    assert alike(beside, other[best, index])


def test_an_image_is_the_same_in_any_batch(run):
    index = np.array([7, 2, 11])
    selected, first = (run.sample_at(index, candidates=count) for count in (3, 1))
    assert alike(run.sample_at(index[::-1], candidates=3), selected[::-1])
    same = [alike(*pair) for pair in zip(selected, first, strict=True)]
    assert 0 < sum(same) < 3  # where the first candidate, that of no selection, is the best


def test_another_run_may_be_the_judge(run):
    judge = dataclasses.replace(run, params=jax.tree.map(lambda a: -a, run.params))
    judged = dataclasses.replace(run, judge=judge)
    selected = judged.sample(3, candidates=3)
    assert not alike(selected, run.sample(3, candidates=3))
    assert alike(dataclasses.replace(run, judge=run).sample(3, candidates=3),
                 run.sample(3, candidates=3))
    assert alike(judged.sample(3), run.sample(3))  # nothing to select
    other = dataclasses.replace(run, spec=dataclasses.replace(run.spec, pixel_levels=256))
    with pytest.raises(UserError, match="the judge runs/tiny has pixel levels 256, and runs/tiny "
                                        "17: give a run of the same data"):
        selection.check_judge(run, other)


def test_selection_needs_a_condition_and_its_dropout(run):
    values = run.config.raw
    values["sample"]["candidates"] = 2
    assert config.read(values).sample.options.candidates == 2
    values["train"]["condition_dropout"] = 0.0
    with pytest.raises(UserError, match=r"config\.sample\.candidates needs a model trained with "
                                        "condition dropout"):
        config.read(values)
    values["model"]["condition"], values["sample"]["candidates"] = "none", 1
    with pytest.raises(UserError, match=r"candidates=2: .* the model has no condition"):
        override(config.read(values), candidates=2)
    without = dataclasses.replace(run, config=dataclasses.replace(
        run.config, train=dataclasses.replace(run.config.train, condition_dropout=0.0)))
    with pytest.raises(UserError, match="candidates=2, and the model of runs/tiny that selects "
                                        "among them was trained without condition dropout"):
        without.sample(2, candidates=2)


def test_a_selected_sample_has_no_trajectory_density(run):
    with pytest.raises(UserError, match="candidates=2: a sample that is selected among others "):
        run.sample(2, candidates=2, with_log_prob=True)
