"""Rollouts: the same on any mesh, scored in this process or in others, and what is logged."""

import dataclasses

import jax
import numpy as np
import pytest

from ntm_jax.core.trajectory import simulate
from ntm_jax.data import sources
from ntm_jax.errors import UserError
from ntm_jax.projects.reward import rewards, scorer
from ntm_jax.projects.reward.scorer import Scorer
from ntm_jax.projects.scenes import shapes
from ntm_jax.runtime import sharding
from tests.common import objective_of
from tests.projects.reward.common import (
    first_batch,
    made,
    rolled,
    with_objective,
    with_reward,
)


def test_the_mean_distance_of_samples():
    images = np.zeros((2, 3, 4, 4, 1), np.uint8)
    images[0, 0] = 16
    expected = [[1, 0.5, 0.5], [0, 0, 0]]
    np.testing.assert_allclose(scorer.mean_distances(images, 17), expected)
    np.testing.assert_allclose(scorer.mean_distances(images / 16.0, 0), expected)


def test_scores_that_are_not_finite_are_refused(run):
    tokens, found = jax.numpy.zeros((4, 2, 16, 4)), Scorer(run, run.config.data.open("train"))
    found._reward = lambda images, _: np.full(8, np.nan)
    with pytest.raises(UserError, match=r"^config\.reward\.name=brightness .*, 0 of them finite"):
        found([tokens, tokens], first_batch(run))


def test_worker_processes_score_the_same(run):
    batch = first_batch(run)
    source = run.config.data.open("train")
    tokens = np.random.default_rng(0).normal(size=(4, 3, 16, 4))
    parts = [jax.numpy.asarray(tokens), jax.numpy.asarray(tokens[:, :2])]
    here, there = Scorer(run, source), Scorer(run, source, 1)
    try:
        rewarded = here(parts, batch)["rewards"]
        np.testing.assert_array_equal(rewarded, there(parts, batch)["rewards"])
    finally:
        there.close()


def test_rows_of_an_array_are_scored_in_their_own_units(run):
    spec = dataclasses.replace(run.spec, image_shape=(1, 2, 1), patch_size=1, pixel_levels=0,
                               columns=2, mean=(5.0, -100.0), std=(0.5, 30.0),
                               condition_mean=(3.0,), condition_std=(2.0,))
    config = dataclasses.replace(
        run.config, model=dataclasses.replace(run.config.model, condition="vector"))
    run = dataclasses.replace(run, spec=spec, config=config)
    tokens = np.random.default_rng(0).normal(size=(4, 3, 2, 1)).astype(np.float32)
    given = {"index": np.arange(4), "label": np.full(4, -1, np.int32),
             "condition": np.arange(4, dtype=np.float32)[:, None]}
    found = Scorer(run, run.config.data.open("train"))
    found._reward = lambda rows, vectors: rows @ [1.0, 0.01] + np.stack(vectors)[:, 0]
    scored = found([jax.numpy.asarray(tokens)], sharding.to_global(given, run.mesh))
    rows = tokens[..., 0] * spec.std + spec.mean
    vectors = np.array([3, 5, 7, 9])[:, None]
    np.testing.assert_allclose(scored["rewards"], rows @ [1.0, 0.01] + vectors, rtol=1e-5)
    # Distances stay in standardised units, in which all columns count alike.
    expected = scorer.mean_distances(tokens, 0)
    np.testing.assert_allclose(scored["distance"], expected, rtol=1e-5)


@pytest.mark.parametrize("trains", ["predictor", "both"])
def test_recorded_pairs_are_trajectories_of_the_same_noise(run, trains):
    run = with_objective(run, "preference", trainable=trains, kl=0.1, name="")
    rejected = np.zeros((4, 16, 4), np.float32)
    batch, scalars = rolled(run, rejected=rejected)
    assert batch["rollout"].shape == (4, 2, 3, 16, 4)
    assert scalars == {"kl": pytest.approx(0, abs=1e-3)}
    np.testing.assert_array_equal(batch["pair_weight"], np.tile([[0, 1], [0, 0]], (4, 1, 1)))
    if trains == "both":
        without_noise = jax.jit(
            lambda x: simulate(x, run.schedule.fixed_levels(2, 4), np.zeros((4, 3, 16, 4))))
        images = [np.asarray(without_noise(x)) for x in (batch["x"], rejected)]
        found = np.asarray(batch["rollout"])
        np.testing.assert_allclose(found[:, 0] - images[0], found[:, 1] - images[1], atol=1e-5)
    with pytest.raises(UserError, match="have no image `rejected`: name a reward, or give pairs"):
        objective_of(run).extend(run, run.config.data.open("train"))


def test_the_scores_of_shapes_have_tasks(run):
    source = sources.open_source("shapes", "test[:8]")
    images = np.stack([source.records[i]["image"] for i in range(8)])
    found = rewards.find("shapes", source)(images, list(source.captions))
    np.testing.assert_array_equal(found.rewards, 1)
    # Pairs of a colour and a shape count where the caption leaves colours open.
    open_colours = [not any(word in shapes.COLOURS for word in caption.split())
                    for caption in source.captions]
    np.testing.assert_array_equal(found.traits.any(1), open_colours)
    assert found.traits.shape == (8, 24)
    assert found.traits.sum(1).max() <= 4
    assert set(found.groups) == {"single_object", "two_object", "counting", "colors", "position",
                                 "color_attr"}


def test_samples_that_differ_from_the_others_or_have_rare_traits_are_favoured(run, monkeypatch):
    """The first sample of a batch alone shows the second trait, and no reward differs."""
    def score(images, conditions):
        first = (np.arange(len(images)) == 0) & (len(calls) == 0)
        calls.append(images)
        return rewards.Scores(np.ones(len(images)), traits=np.stack([~first, first], 1))

    calls, run = [], with_objective(
        run, "policy_gradient", diversity=2.0, novelty=5.0, normalise=False)
    monkeypatch.setattr(rewards, "of_run", lambda config: score)
    drawing = made(run)
    samples = drawing.begin(run.params, run.params, first_batch(run), 0, logged=False)
    tokens = [np.asarray(samples.arrays[f"tokens_{part}"]) for part in range(2)]
    images = run.spec.from_tokens(np.concatenate(tokens, 1))
    bonus = 2 * scorer.mean_distances(images, run.spec.pixel_levels)
    bonus[0, 0] += 5
    others = (bonus.sum(1, keepdims=True) - bonus) / (bonus.shape[1] - 1)
    advantage = np.asarray(drawing.finish(samples)[0]["advantage"])
    np.testing.assert_allclose(advantage[..., 0], bonus - others, atol=1e-6)
    assert np.abs(advantage[1:]).max() > 0.01


def test_a_classifier_is_kept_in_its_file(run, tmp_path, monkeypatch):
    source, file = run.config.data.open("train"), str(tmp_path / "digits.safetensors")
    images = np.stack([source.records[i]["image"] for i in range(70)])
    labels = [source.records[i]["label"] for i in range(70)]
    first = rewards.find(f"classifier:{file}", source)(images, labels)
    assert (np.exp(first.rewards) > 0.5).mean() > 0.95
    monkeypatch.setattr("ntm_jax.evaluation.features.fit_classifier", None)
    again = rewards.find(f"classifier:{file}", source)(images, labels)
    np.testing.assert_array_equal(first.rewards, again.rewards)
    assert first.groups[0] == f"class_{labels[0]}"
    folder = dataclasses.replace(source, name="folder:/here")
    with pytest.raises(UserError, match="of digits, whose classes are not those of folder"):
        rewards.find(f"classifier:{file}", folder)


@pytest.mark.parametrize(("trains", "levels"), [
    ("predictor", (0, 1)), pytest.param("both", (1, 2), marks=pytest.mark.slow)])
def test_a_range_of_levels_has_the_densities_of_all(run, trains, levels):
    whole = with_reward(run, trainable=trains)
    all_levels, one = rolled(whole)[0], rolled(with_reward(whole, levels=levels))[0]
    first, last = levels
    np.testing.assert_array_equal(one["rollout"], all_levels["rollout"][:, :, first : last + 1])
    for name in ("old_nll", "advantage"):
        assert one[name].shape == (4, 4, 1)
        np.testing.assert_allclose(one[name], all_levels[name][..., first:last], rtol=1e-5)
