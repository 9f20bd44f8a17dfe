"""p(x | x_0) is fitted to the training data once, kept beside the checkpoints and loaded again."""

import dataclasses
import sys

import jax
import numpy as np
import optax
import pytest

from ntm_jax.core import trajectory
from ntm_jax.data import sources
from ntm_jax.errors import UserError
from ntm_jax.runtime import build
from ntm_jax.runtime.run import new_pixel_params, pixel_params
from ntm_jax.training import optimizers, pixels
from tests.common import bits, new_run, python, tiny_config

STEPS = 24


def main(out):
    """Writes the network that is fitted on all devices."""
    np.savez(out, *jax.tree.leaves(pixels.fit(unfitted()).params))


def unfitted(**changes):
    """A digits' run with a network as p(x | x_0), in no folder."""
    return new_run(tiny_config(**{
        "model.pixel_likelihood": "network", "train.pixel_likelihood_steps": STEPS, **changes}))


def digits(split: str):
    """Images [n, 8, 8, 1] of 0 to 16, and their labels [n]."""
    records = sources.open_source("digits", split).records
    return [np.stack([record[name] for record in records]) for name in ("image", "label")]


@pytest.fixture(scope="module")
def fitted():
    return pixels.fit(unfitted())


def test_the_histogram_is_a_count_by_hand():
    found = pixels.fit(unfitted(**{"model.pixel_likelihood": "histogram"}))
    images, _ = digits("train")
    patches = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
    counts = 1 + (patches[..., None] == np.arange(17)).sum(0)
    np.testing.assert_allclose(
        found.params["pixels"]["log_prior"], np.log(counts / counts.sum(-1)[..., None]), rtol=1e-6)
    assert pixels.fit(unfitted(**{"model.pixel_likelihood": "bayes"})).params == {}


@pytest.mark.slow
def test_a_network_gives_fewer_bits_to_held_out_images_than_the_histogram(fitted):
    images, labels = digits("test")
    x, t_0 = fitted.spec.to_tokens(images), np.full(len(images), 0.03, np.float32)
    keys = trajectory.example_keys(jax.random.key(1), "pixels", np.arange(len(images)))

    @jax.jit
    def nats(params):
        noise = trajectory.example_noise(keys, x.shape[1:])
        x_0 = trajectory.noise_first_level(x, t_0, noise)
        return -fitted.pixels.log_prob(params, x, x_0, t_0, labels).mean()

    new = jax.jit(lambda: build.initial_pixel_params(
        fitted.pixels, fitted.spec, jax.random.key(0)))()
    histogram = {"pixels": new | {"log_prior": fitted.params["pixels"]["log_prior"]}}
    assert nats(fitted.params) < nats(histogram)


@pytest.mark.slow
def test_a_network_that_gains_nothing_on_held_out_records_stays_as_it_began(monkeypatch):
    monkeypatch.setattr(optimizers, "make", lambda *_: optax.sgd(100.0))
    run = unfitted(**{"train.pixel_likelihood_steps": 2})
    new = jax.jit(lambda: build.initial_pixel_params(
        run.pixels, run.spec, jax.random.key(run.config.seed)))()
    assert bits(pixels.fit(run).params["pixels"]["network"]) == bits(new["network"])


def test_a_run_keeps_its_own_and_a_new_run_in_the_folder_replaces_it(tmp_path, monkeypatch):
    run, made = dataclasses.replace(unfitted(), workdir=str(tmp_path)), []
    params = new_pixel_params(run)

    def fit(run, progress):
        made.append(jax.tree.map(lambda a: a + len(made), params))
        return dataclasses.replace(run, params=made[-1])

    monkeypatch.setattr(pixels, "fit", fit)
    for new, number in ((True, 1), (False, 1), (True, 2)):
        assert bits(pixels.prepare(run, new, False).params) == bits(made[-1])
        assert len(made) == number
        assert bits(pixel_params(run, str(tmp_path))) == bits(made[-1])
    (tmp_path / "pixels").rename(tmp_path / "lost")
    with pytest.raises(UserError, match="pixels is missing, which holds p"):
        pixel_params(run, str(tmp_path))


@pytest.mark.slow
def test_eight_devices_fit_the_same_network(fitted, tmp_path):
    python(__file__, tmp_path / "out.npz", devices=8)
    with np.load(tmp_path / "out.npz") as found:
        for one, other in zip(found.values(), jax.tree.leaves(fitted.params), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    main(sys.argv[1])
