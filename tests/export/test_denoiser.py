"""The export of a run with a learned denoiser, in all its uses."""

import json

import numpy as np
import pytest
from flax import traverse_util

import ntm_jax
from tests.common import bits
from tests.export.common import assert_close, assert_same_numbers, program, run_script


@pytest.mark.slow
def test_programs_with_a_learned_denoiser(denoised):
    run, folder = denoised
    sampler, parameters = program(folder, "sampler")
    denoiser = {"denoiser": run.denoiser.params["params"]}
    assert bits(traverse_util.unflatten_dict(parameters, sep="/")) == bits(run.params | denoiser)
    index = np.arange(5, dtype=np.int32)
    expected = run.sample_at(index, index % 3, seed=3)
    images = sampler.call(parameters, np.uint32(3), index, index % 3)
    assert_close(images, expected)
    # The transporter's parameters do not matter: only predictor and denoiser make the images.
    without = {name: np.full_like(a, np.nan) if name.startswith("params/transporter/") else a
               for name, a in parameters.items()}
    again = sampler.call(without, np.uint32(3), index, index % 3)
    np.testing.assert_array_equal(again, images)
    unguided = run.sample_at(index, index % 3, seed=3, guidance=0.0)
    assert np.abs(expected - unguided).max() > 1e-3
    log_likelihood, _ = program(folder, "log_likelihood")
    found = log_likelihood.call(parameters, np.uint32(0), index, expected, index % 3)
    nats = run.log_prob(expected, index % 3, trajectories=2)
    np.testing.assert_allclose(found, nats, rtol=1e-6)
    about = json.loads((folder / "config.json").read_text())
    assert (about["step"], about["teacher_step"]) == (6, 4)
    assert about["config"]["sample"]["guidance"] == [0.5, 0.0]


@pytest.mark.slow
def test_the_export_of_a_denoisers_run_is_that_run(denoised):
    run, folder = denoised
    found = ntm_jax.load(str(folder))
    assert (found.config, found.spec, found.step) == (run.config, run.spec, 6)
    own, expected = found.denoiser, run.denoiser
    assert (own.teacher_step, own.config) == (4, expected.config)
    assert own.module.config == expected.module.config
    assert bits(own.params) == bits(expected.params)
    assert_same_numbers(found, run, np.arange(5) % 3)


@pytest.mark.slow
def test_the_script_with_a_learned_denoiser(denoised):
    """Latents are printed as the autoencoder made them, before they were normalised."""
    run, folder = denoised
    printed, images = run_script(folder, "5", "3")
    assert printed == "5 images float32[4, 4, 2] in samples.npz\n"
    index = np.arange(5)
    expected = run.sample_at(index, index % 3, seed=3)
    tolerance = 4e-6 * np.abs(expected).max()
    np.testing.assert_allclose(images, expected * (0.5, 4) + (1, -2), atol=tolerance)
