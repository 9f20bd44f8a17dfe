"""Runs loaded from workdirs, and what they compute."""

import dataclasses
import re

import numpy as np
import pytest

import ntm_jax
from ntm_jax.data import pipeline, sources
from ntm_jax.errors import UserError
from ntm_jax.evaluation import scoring
from ntm_jax.runtime import config, config_file
from ntm_jax.training import state
from ntm_jax.training.pixels import fit
from tests.common import ROOT, bits, randomised
from tests.export.common import SETTINGS


@pytest.fixture(scope="module")
def loaded(workdir):
    run = ntm_jax.load(str(workdir))
    return dataclasses.replace(run, config=run.config.with_evaluation(batch_size=5))


@pytest.fixture(scope="module")
def source():
    return sources.open_source("digits", "test[:20]")


def test_the_average_of_the_latest_step_is_loaded(workdir):
    run = ntm_jax.load(str(workdir))
    assert (run.step, run.config, run.spec.image_shape) == (4, SETTINGS, (8, 8, 1))
    new = state.initialize(run).params
    counted = {"pixels": fit(run).params["pixels"]}
    assert bits(run.params) == bits(randomised(new, 4) | counted)
    assert bits(ntm_jax.load(str(workdir), step=2).params) == bits(randomised(new, 2) | counted)
    named = ntm_jax.load(f"{workdir}/checkpoints/2")
    assert (named.step, named.workdir) == (2, str(workdir))
    assert bits(named.params) == bits(randomised(new, 2) | counted)
    assert bits(ntm_jax.load(str(workdir), raw=True).params) == bits(new | counted)


def test_log_prob_and_its_terms_by_level_are_the_scores_of_records(loaded, source):
    records = [source.records[i] for i in range(20)]
    images, labels = (np.stack([r[name] for r in records]) for name in ("image", "label"))
    table = scoring.score_records(loaded, source, 3)
    expected = table["importance_weighted"]
    found = loaded.log_prob(images, labels, trajectories=3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    seven = loaded.log_prob(images[:7], labels[:7], trajectories=3)  # the last batch is padded
    np.testing.assert_allclose(seven, expected[:7], rtol=1e-5)
    other = loaded.log_prob(images, labels, trajectories=3, seed=1)
    assert np.abs(other - expected).min() > 0
    bits_per_dim = loaded.bits_per_dim(images, labels, trajectories=3)
    np.testing.assert_allclose(bits_per_dim, -expected / 64 / np.log(2), rtol=1e-5)
    terms = loaded.log_prob_by_level(images, labels, trajectories=3)
    np.testing.assert_array_equal(terms.log_prob, found)
    np.testing.assert_allclose(terms.nll, table["nll"], rtol=1e-4, atol=1e-3)
    assert terms.rate.shape == terms.nll.shape == (20, 2)
    np.testing.assert_allclose(terms.bound, table["bound"], rtol=1e-5)


def test_the_recipe_for_outliers_scores_every_image(loaded, monkeypatch):
    page = (ROOT / "docs/howto/outliers.md").read_text()
    monkeypatch.setattr(ntm_jax, "load", lambda folder: loaded)
    names = {"images": np.full((5, 8, 8, 1), 16, np.uint8)}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        if "condition_std" not in block:  # of arrays, in tests/test_arrays.py
            exec(block, names)
    likelihood, *scores = (names[name] for name in ("log_p", "unlikely", "atypical", "by_level"))
    assert likelihood.shape == (20,)  # the held-out images
    assert [(score.shape, np.isfinite(score).all()) for score in scores] == [((5,), True)] * 3
    per_class = [loaded.log_prob(names["held_out"], label, 4, 0) for label in range(10)]
    np.testing.assert_allclose(np.exp(likelihood - likelihood.max()),
                               np.exp(per_class - likelihood.max()).mean(0), rtol=1e-4)
    assert names["outliers"].dtype == bool


def test_images_and_labels_that_do_not_fit_are_refused(loaded):
    with pytest.raises(UserError, match=r"images have shape \(2, 8, 8\): expected \[n, 8, 8, 1\]"):
        loaded.log_prob(np.zeros((2, 8, 8)), 3)
    with pytest.raises(UserError, match=r"label \[3, 10\] .*: expected the number of a class, 0"):
        loaded.log_prob(np.zeros((2, 8, 8, 1)), [3, 10])


def test_missing_runs_and_steps_are_refused(workdir, source, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .*: it has 2, 4"):
        ntm_jax.load(str(workdir), step=3)
    with pytest.raises(UserError, match="holds no run"):
        ntm_jax.load(str(tmp_path))
    config_file.write(str(tmp_path), SETTINGS, pipeline.spec(source, 2))
    with pytest.raises(UserError, match="there is no checkpoint in"):
        ntm_jax.load(str(tmp_path))


def test_a_run_of_more_devices_is_loaded_on_the_present_ones(workdir, source, tmp_path):
    more = dataclasses.replace(SETTINGS, mesh=config.Mesh(1, -1, 4, 2, 1))
    config_file.write(str(tmp_path), more, pipeline.spec(source, 2))
    for name in ("checkpoints", "pixels"):
        (tmp_path / name).symlink_to(workdir / name)
    assert ntm_jax.load(str(tmp_path)).step == 4
