"""Held-out errors of denoising."""

import jax
import numpy as np

from ntm_jax.core import denoising, trajectory
from ntm_jax.evaluation import measures
from tests.common import batch_of


def test_denoising_by_level(run, source):
    found = measures.denoising_errors(run, source)
    batch = batch_of(source, run.config, 20)
    x, t = batch["x"], np.tile(run.sampled_levels(), (20, 1))

    @jax.jit
    def denoised(root):
        keys = trajectory.example_keys(root, "evaluate", batch["index"])
        xs = trajectory.simulate(x, t, trajectory.example_noise(keys, (3, *x.shape[1:])))
        return denoising.denoise_levels(run.model, run.params, xs, t, batch["label"])

    clean = denoised(jax.random.key(run.config.seed))
    assert list(found) == list(clean)
    for name, values in clean.items():
        errors = np.square(np.asarray(values) - x[:, None]).mean((2, 3))
        np.testing.assert_allclose(found[name]["mean"], errors.mean(0), rtol=1e-4)
        stderr = errors.std(0, ddof=1) / np.sqrt(20)
        np.testing.assert_allclose(found[name]["stderr"], stderr, rtol=1e-3)
    noise = (t[0, :2] / (1 - t[0, :2])) ** 2
    np.testing.assert_allclose(found["as_it_is"]["mean"], noise, rtol=0.15)  # 1,280 draws
