"""Sampled images: keyed by seed and index, on conditions, with checked options."""

import dataclasses

import jax
import numpy as np
import pytest

from ntm_jax.errors import UserError
from ntm_jax.evaluation import scoring
from ntm_jax.runtime import sharding
from ntm_jax.sampling import generate
from ntm_jax.sampling.generate import override
from tests.common import alike


def test_an_image_is_the_same_in_any_batch(run):
    images = run.sample(12)
    assert (images.shape, images.dtype) == ((12, 8, 8, 1), np.uint8)
    assert 0 < images.mean() < 16
    assert alike(run.sample_at([7, 2, 11]), images[[7, 2, 11]])
    assert not alike(images[0], images[10])  # of the same class
    assert not alike(run.sample_at([7, 2, 11], seed=1), images[[7, 2, 11]])


def test_a_smaller_n_compiles_nothing_and_gives_the_first_images_bit_for_bit(run):
    def compiled():
        return generate.generate_tokens._cache_size(), scoring.bounds_of_batch._cache_size()

    programs = compiled()
    images = run.sample(16, percentile=99.0)  # programs of no other test
    nats = run.log_prob(images, np.arange(16) % 10, trajectories=3)
    for n in (5, 4, 3, 2):
        np.testing.assert_array_equal(run.sample(n, percentile=99.0), images[:n])
    for n in (5, 2):
        found = run.log_prob(images[:n], np.arange(n), trajectories=3)
        np.testing.assert_array_equal(found, nats[:n])
    assert np.subtract(compiled(), programs).tolist() == [1, 1]


@pytest.mark.parametrize(("shards", "limit", "counts", "sizes"), [
    (1, 100, (5, 3, 9, 4, 100, 60, 1000), (8, 8, 16, 8, 100, 100, 100)),
    (3, 10, (2, 5, 3, 11), (3, 9, 3, 12))])
def test_a_batch_is_the_smallest_that_ran_or_a_power_of_two(shards, limit, counts, sizes):
    mesh = jax.sharding.AbstractMesh((shards, 1), ("data", "fsdp"))
    for count, size in zip(counts, sizes, strict=True):
        batches = list(sharding.padded_batches(count, limit, mesh, "a test"))
        assert {len(batch) for batch in batches} == {size}
        assert (np.concatenate(batches)[:count] == np.arange(count)).all()
    next(sharding.padded_batches(limit // 3, limit, mesh, "another"))  # as if memory ran out
    assert len(next(sharding.padded_batches(1, limit, mesh, "another"))) == shards


def test_labels_are_all_classes_in_turn_by_default(run):
    images = run.sample(12)
    assert alike(run.sample(12, np.arange(12) % 10), images)
    assert alike(run.sample_at([10, 11, 3], [0, 1, 3]), images[[10, 11, 3]])
    assert not alike(run.sample_at([10, 11, 3], [5, 5, 5]), images[[10, 11, 3]])


def test_slices_are_denoised_as_the_whole_batch_is(run):
    xs = np.random.default_rng(0).normal(size=(64, 5, 16, 4)).astype(np.float32)
    t, y = run.schedule.fixed_levels(4, 64), np.arange(64) % 10
    options = dataclasses.replace(run.config.sample, steps=4)
    sliced, whole = (
        jax.jit(generate.Sampler(
            run.model, run.schedule, options, mesh, run.pixels).score_denoise)(
                run.params, xs, t, y) for mesh in (run.mesh, None))
    # float32 rounding of numbers up to ten
    np.testing.assert_allclose(sliced, whole, rtol=1e-5, atol=1e-5)


def test_a_trajectory_runs_from_noise_to_the_image(run):
    clean, levels = generate.sample_at(run, np.arange(3), with_levels=True)
    assert levels.shape == (3, 3, 8, 8, 1)
    assert alike(clean, run.sample(3))
    gaps = [np.abs(levels[:, k].astype(int) - clean).mean() for k in range(3)]
    assert gaps[2] < gaps[0]  # the last level is the nearly clean one


def test_guidance_is_one_scale_or_one_for_each_step(run):
    guided = run.sample(3, guidance=(0.0, 1.0))
    assert not alike(guided, run.sample(3))
    config = run.config.with_sampling(guidance=(0.0, 1.0))
    assert alike(dataclasses.replace(run, config=config).sample(3), guided)
    for scales in ([1.0, 0.0], np.array([1.0, 0.0]), (np.float32(1), 0)):
        assert override(run.config, guidance=scales).guidance == (1.0, 0.0)


def test_options_that_do_not_fit_the_model_are_refused(run):
    train = dataclasses.replace(run.config.train, condition_dropout=0.0)
    undropped = dataclasses.replace(run.config, train=train)
    trajectory = dataclasses.replace(run.config.trajectory, schedule="shifted", shift=0.0)
    shifted = dataclasses.replace(run.config, trajectory=trajectory)
    for config, options, message in (
            (run.config, {"decoder": "scores"}, "config.sample.decoder 'scores' is not known"),
            (run.config, {"steps": 3, "guidance": (1, 0)}, "2 scales, and there are 3 steps"),
            (undropped, {"guidance": (0, 1.5)}, "the model was trained without condition dropout"),
            # The first level is 1/64, below t_min, and the posterior's C was NaN.
            (shifted, {"steps": 64}, r"steps is 64: level 1 of so many steps, 0\.015")):
        with pytest.raises(UserError, match=message):
            override(config, **options)
    assert override(undropped, guidance=(0.0, 0.0)).guidance == (0.0, 0.0)
    assert override(shifted, steps=64, decoder="euler").steps == 64  # its levels start at 0
