"""A run read back as one object."""

import dataclasses

import numpy as np
import pytest

import ntm_jax
from ntm_jax.data import pipeline
from ntm_jax.errors import UserError
from ntm_jax.evaluation import scoring
from ntm_jax.runtime import config, config_file
from ntm_jax.training import state
from tests.common import as_run, bits, randomised, setup, tiny_config, write_run

pytestmark = pytest.mark.usefixtures("quick_compilation")
SETTINGS = tiny_config(**{"sample.decoder": "inverse"})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run's folder with two checkpoints."""
    return write_run(tmp_path_factory.mktemp("run"), SETTINGS)


@pytest.fixture(scope="module")
def run(workdir):
    return ntm_jax.load(str(workdir))


def test_the_average_of_the_latest_step_is_loaded(workdir, run):
    assert (run.step, run.config, run.spec.image_shape) == (4, SETTINGS, (8, 8, 1))
    new = state.initialize(as_run(SETTINGS, run.model, run.mesh)).params
    assert bits(run.params) == bits(randomised(new, 4))
    assert bits(ntm_jax.load(str(workdir), step=2).params) == bits(randomised(new, 2))
    folder = ntm_jax.load(f"{workdir}/checkpoints/2")
    assert (folder.step, folder.workdir, bits(folder.params)) == (2, str(workdir), bits(randomised(new, 2)))
    assert bits(ntm_jax.load(str(workdir), raw=True).params) == bits(new)


def test_log_prob_is_the_importance_weighted_bound(run):
    source, _, _ = setup(SETTINGS)
    records = [source.records[i] for i in range(20)]
    images, labels = np.stack([r["image"] for r in records]), np.array([r["label"] for r in records])
    expected = scoring.score_records(as_run(run.config, run.model, run.mesh, run.params), source, 3)["importance_weighted"]
    found = run.log_prob(images, labels, trajectories=3)
    assert found.shape == (20,)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(run.log_prob(images[:3], labels[:3], trajectories=3), expected[:3], rtol=1e-5)
    assert np.abs(run.log_prob(images, labels, trajectories=3, seed=1) - expected).min() > 0
    np.testing.assert_allclose(run.bits_per_dim(images, labels, trajectories=3), -expected / 64 / np.log(2), rtol=1e-5)


def test_what_log_prob_cannot_score_is_refused(run):
    with pytest.raises(UserError, match=r"images have shape \(2, 8, 8\): expected \[n, 8, 8, 1\]"):
        run.log_prob(np.zeros((2, 8, 8)))
    with pytest.raises(UserError, match="labels run from 3 to 10: expected 0 to 9"):
        run.log_prob(np.zeros((2, 8, 8, 1)), [3, 10])
    with pytest.raises(UserError, match=r"label"):
        run.log_prob(np.zeros((2, 8, 8, 1)), [1, 2, 3])
    with pytest.raises(UserError, match=r"label"):
        run.log_prob(np.zeros((2, 8, 8, 1)))  # the model is conditional: whose likelihood is not said


def test_sample(run):
    images = run.sample(3)
    assert (images.shape, images.dtype) == ((3, 8, 8, 1), np.uint8)
    assert images.max() <= 16
    np.testing.assert_array_equal(images, run.sample(3, [0, 1, 2]))
    assert (images != run.sample(3, 5)).any()


def test_what_is_not_there_is_refused(workdir, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .*: it has 2, 4"):
        ntm_jax.load(str(workdir), step=3)
    with pytest.raises(UserError, match="holds no run"):
        ntm_jax.load(str(tmp_path))
    source, _, _ = setup(SETTINGS)
    config_file.write(str(tmp_path), SETTINGS, pipeline.spec(source, 2))
    with pytest.raises(UserError, match="there is no checkpoint in"):
        ntm_jax.load(str(tmp_path))


def test_a_run_of_more_devices_is_loaded_on_those_there_are(workdir, tmp_path):
    source, _, _ = setup(SETTINGS)
    more = dataclasses.replace(SETTINGS, mesh=config.Mesh(1, 8, 1, 1, 1))
    config_file.write(str(tmp_path), more, pipeline.spec(source, 2))
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    assert ntm_jax.load(str(tmp_path)).step == 4
    config_file.write(str(tmp_path), dataclasses.replace(SETTINGS, mesh=config.Mesh(1, -1, 4, 2, 1)), pipeline.spec(source, 2))
    assert ntm_jax.load(str(tmp_path)).step == 4
