"""Candidates of an image: their information by exact likelihoods, and which of them is kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core.model import full_precision
from ntm_jax.core.trajectory import example_keys, example_noise, simulate
from ntm_jax.errors import UserError
from ntm_jax.sampling import generate, selection
from ntm_jax.sampling.write import SampleRequest
from tests.common import alike


@pytest.mark.parametrize(("steps", "first"), [
    (2, 1), pytest.param(1, 0, marks=pytest.mark.slow)])
def test_information_is_the_difference_of_the_likelihoods_terms(run, steps, first):
    """By all terms of whole trajectories, one trajectory at a time, on the same noise."""
    run = dataclasses.replace(run, config=run.config.with_sampling(steps=steps))
    index, y = np.array([3, 8, 5], np.int32), np.array([1, 4, 9], np.int32)
    images = np.random.default_rng(0).integers(0, 17, (3, 8, 8, 1), np.uint8)
    found = selection.information(run, images, index, y, 3)
    x, t = run.spec.to_tokens(images), run.schedule.fixed_levels(steps, 3)

    @jax.jit
    def nll(number, y):
        keys = example_keys(jax.random.key(3), "select", index)
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        xs = simulate(x, t, example_noise(own, (steps + 1, *x.shape[1:])))
        terms = full_precision(run.model).apply(run.params, xs, t, jnp.full(3, steps), y)
        return terms.nll[:, first:].sum(1)  # all but the cleanest level

    expected = [nll(number, np.full(3, 10)) - nll(number, y)  # 10 is the null class
                for number in range(selection.TRAJECTORIES)]
    assert np.min(np.abs(expected)) > 1e-2
    # Sums of a hundred terms in float32, whose order differs.
    np.testing.assert_allclose(found, np.mean(expected, 0), rtol=1e-4, atol=1e-4)


def test_the_candidate_with_the_most_information_is_kept(run):
    rng = np.random.default_rng(2)  # whose candidates are not all best at one number
    index, y = np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32)
    tokens = rng.uniform(-1, 1, (3, 3, run.spec.tokens, run.spec.dim)).astype(np.float32)
    other = rng.normal(size=(3, 3, 2))
    selecting = run.best_of(3)
    kept, nothing, beside = selection.select(
        selecting, index, y, 7, lambda number: [tokens[number], None, other[number]])
    scores = [selection.information(run, run.spec.from_tokens(x), index, y, 7) for x in tokens]
    best = np.argmax(scores, 0)
    assert len(set(best)) > 1
    assert nothing is None
    assert alike(kept, tokens[best, index])
    assert alike(beside, other[best, index])


FOUND = [[1.0, 2.0, 0.0], [3.0, 9.0, 1.0], [4.0, 9.0, 0.5]]


@pytest.mark.parametrize(("found", "stop_nats", "kept"), [
    (FOUND, 2.0, [1, 0, 1]),  # the first one with enough
    (FOUND[:2], 1.0, [0, 0, 1]),  # the third are not even drawn once all images have enough
    ([[np.nan, np.nan], [1.0, np.nan], [0.0, 2.0]], None, [1, 2])])
def test_candidates_are_kept_by_their_information(run, monkeypatch, found, stop_nats, kept):
    left = iter(found)
    monkeypatch.setattr(selection, "information", lambda *_: np.array(next(left)))
    parts = np.arange(3)[:, None, None, None] + np.zeros((len(kept), run.spec.tokens, run.spec.dim))
    numbers, = selection.select(run.best_of(3, stop_nats=stop_nats), np.arange(len(kept)), None, 0,
                                lambda i: [parts[i]])
    assert numbers[:, 0, 0].tolist() == kept


def test_an_image_is_the_same_in_any_batch(run):
    index, best = np.array([7, 2, 11]), run.best_of(3)
    selected, first = (r.sample_at(index) for r in (best, run))
    assert alike(best.sample_at(index[::-1]), selected[::-1])
    same = [alike(*pair) for pair in zip(selected, first, strict=True)]
    assert 0 < sum(same) < 3  # where the first candidate, that of no selection, is the best
    programs = generate.generate_tokens._cache_size()
    run.best_of(2).sample_at(index)
    assert generate.generate_tokens._cache_size() == programs  # of any number of candidates


def test_another_run_may_be_the_judge(run):
    judge = dataclasses.replace(run, params=jax.tree.map(lambda a: -a, run.params))
    selected = run.best_of(3, judge).sample(3)
    assert not alike(selected, run.best_of(3).sample(3))
    assert alike(run.best_of(3, run).sample(3), run.best_of(3).sample(3))
    assert run.best_of(1) == run


def test_what_cannot_be_selected_is_refused(run, tmp_path):
    solved = dataclasses.replace(run, config=run.config.with_sampling(decoder="heun"))
    with pytest.raises(UserError, match="runs/tiny solves an ODE and has no traje"):
        solved.best_of(2)
    message = "a sample that is selected among candidates does not have the density of"
    with pytest.raises(UserError, match=message):
        run.best_of(2).write_samples(str(tmp_path / "out"), SampleRequest(2, log_prob=True))
    assert not (tmp_path / "out").exists()
