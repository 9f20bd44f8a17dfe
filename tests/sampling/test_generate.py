"""Sampled images: keyed by seed and index, on conditions, with checked options."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ntm_jax.core.transformer.conditions import Text
from ntm_jax.errors import UserError
from ntm_jax.runtime import plots
from ntm_jax.sampling import generate
from ntm_jax.sampling.options import override, parse_guidance
from tests.common import alike, as_run, random_run, setup, tiny_config


def sampled_by(run, **settings):
    """The run with other settings of sampling in its configuration."""
    return dataclasses.replace(run, config=run.config.with_sampling(**settings))


def test_an_image_is_the_same_in_any_batch(run):
    images = run.sample(12)
    assert (images.shape, images.dtype) == ((12, 8, 8, 1), np.uint8)
    assert 0 < images.mean() < 16
    assert alike(run.sample_at([7, 2, 11]), images[[7, 2, 11]])
    assert not alike(images[0], images[10])  # of the same class
    assert not alike(run.sample_at([7, 2, 11], seed=1), images[[7, 2, 11]])


def test_labels_are_all_classes_in_turn_by_default(run):
    images = run.sample(12)
    assert alike(run.sample(12, np.arange(12) % 10), images)
    assert alike(run.sample_at([10, 11, 3], [0, 1, 3]), images[[10, 11, 3]])
    assert not alike(run.sample_at([10, 11, 3], [5, 5, 5]), images[[10, 11, 3]])


def test_guidance_and_decoder_change_the_image(run):
    images = run.sample(3)
    assert not alike(run.sample(3, guidance=2.0), images)
    assert not alike(run.sample(3, decoder="score"), images)


@pytest.mark.parametrize(("rows", "slices"), [
    (1, 1), (32, 1), (64, 2), (100, 4), (33, 3), (500, 20), (8, 1), (37, 1), (997, 1)])
def test_a_cpu_denoises_in_slices(run, rows, slices):
    """Those of 2,048 tokens have 32 trajectories of 4 levels of 16 tokens, and at least 8."""
    options = dataclasses.replace(run.config.sample, steps=4)
    sampler = generate.Sampler(run.model, run.schedule, options, run.mesh)
    assert sampler.slices(rows) == slices
    many = dataclasses.replace(sampler, options=dataclasses.replace(options, steps=1000))
    assert many.slices(rows) == rows
    for mesh in (None, devices("tpu"), devices("cpu", "cpu")):
        assert dataclasses.replace(sampler, mesh=mesh).slices(rows) == 1


def test_slices_are_denoised_as_the_whole_batch_is(run):
    xs = np.random.default_rng(0).normal(size=(64, 5, 16, 4)).astype(np.float32)
    t, y = run.schedule.fixed_levels(4, 64), np.arange(64) % 10
    options = dataclasses.replace(run.config.sample, steps=4)
    sliced, whole = (
        jax.jit(generate.Sampler(run.model, run.schedule, options, mesh).score_denoise)(
            run.params, xs, t, y) for mesh in (run.mesh, None))
    np.testing.assert_allclose(sliced, whole, atol=1e-5)


def devices(*platforms: str):
    """A mesh of devices, as far as Sampler.slices reads it."""
    return SimpleNamespace(size=len(platforms), devices=SimpleNamespace(
        flat=[SimpleNamespace(platform=platform) for platform in platforms]))


def test_a_trajectory_runs_from_noise_to_the_image(run):
    clean, levels = generate.sample_at(run, np.arange(3), with_levels=True)
    assert levels.shape == (3, 3, 8, 8, 1)
    assert alike(clean, run.sample(3))
    gaps = [np.abs(levels[:, k].astype(int) - clean).mean() for k in range(3)]
    assert gaps[2] < gaps[0]  # the last level is the nearly clean one


def test_guidance_needs_condition_dropout(run):
    train = dataclasses.replace(run.config.train, condition_dropout=0.0)
    without = dataclasses.replace(run.config, train=train)
    for guidance, printed in ((1.5, r"1\.5"), ((0.0, 1.5), r"\(0\.0, 1\.5\)")):
        message = (rf"guidance is {printed}, and the model was trained without condition dropout: "
                   "sample with guidance 0")
        with pytest.raises(UserError, match=message):
            override(without, guidance=guidance)
    assert override(without, guidance=0.0).guidance == 0.0
    assert override(without, guidance=(0.0, 0.0)).guidance == (0.0, 0.0)
    assert override(run.config, steps=2, guidance=1.5).guidance == 1.5


def test_guidance_is_one_scale_or_one_for_each_step(run):
    with pytest.raises(UserError, match="guidance has 3 scales, and there are 2 steps: give one "
                                        "scale, or 2, from pure noise down"):
        run.sample(2, guidance=(1.0, 0.5, 0.0))
    for wrong in (-1.0, (1.0, -0.5)):
        with pytest.raises(UserError, match=r"guidance is .*-.*: expected at least 0"):
            run.sample(2, guidance=wrong)
    scheduled = sampled_by(run, guidance=(0.0, 1.0))
    with pytest.raises(UserError, match="guidance has 2 scales, and there are 3 steps"):
        override(scheduled.config, steps=3, guidance=None)  # the configuration's scales
    guided = run.sample(3, guidance=(0.0, 1.0))
    assert alike(scheduled.sample(3), guided)
    assert not alike(guided, run.sample(3))


def test_guidance_of_the_flag():
    found = [parse_guidance(scales) for scales in (None, ["1.5"], ["1", "0"])]
    assert found == [None, 1.5, (1.0, 0.0)]
    for wrong in (["a"], ["1", ""]):
        with pytest.raises(UserError, match="--guidance takes a number, or one for each step"):
            parse_guidance(wrong)


def test_an_untrained_number_of_steps_is_warned_of(run):
    with pytest.warns(UserWarning, match="3 steps were not trained, only 2: expect worse images"):
        override(run.config, steps=3, guidance=None)


def test_steps_whose_levels_would_not_ascend_are_refused(run):
    """The first shifted level of 64 steps is 1/64, below t_min, and its posterior's C was NaN."""
    trajectory = dataclasses.replace(run.config.trajectory, schedule="shifted", shift=0.0)
    shifted = dataclasses.replace(run.config, trajectory=trajectory)
    with pytest.raises(UserError, match=r"steps is 64: the first level of so many steps, 0\.015"):
        override(shifted, steps=64)
    assert override(shifted, steps=64, decoder="euler").steps == 64  # its levels start at 0


@pytest.mark.parametrize(("option", "message"), [
    ({"inverse": "paralel"}, r"config\.sample\.inverse is 'paralel': expected one of auto, "),
    ({"decoder": "scores"}, r"config\.sample\.decoder .scores. is not known: expected one of "),
    ({"steps": 0}, r"config\.sample\.steps is 0: expected at least 1"),
    ({"steps": 2.0}, r"sample\.steps is 2\.0, of type float: expected int"),
    ({"percentile": 101}, r"config\.sample\.percentile is 101\.0: expected at least 0 and"),
    ({"temperature": 0.7}, r"sample\.temperature is not a setting; expected one of num, "),
])
def test_a_wrong_option_is_named(run, option, message):
    with pytest.raises(UserError, match=message):
        run.sample(2, **option)


def test_scales_of_guidance_may_be_a_list(run):
    for scales in ([1.0, 0.0], np.array([1.0, 0.0]), (np.float32(1), 0)):
        assert override(run.config, guidance=scales).guidance == (1.0, 0.0)
    assert override(run.config, steps=np.int64(2)).steps == 2


def test_the_number_of_images_does_not_compile_another_sampler(run):
    one, other = (dataclasses.replace(run.config.sample, num=num) for num in (1, 2))
    assert (one, hash(one)) == (other, hash(other))


def test_a_label_that_is_no_class_is_refused(run):
    with pytest.raises(UserError, match="is given: expected the number of a class, 0 to 9"):
        run.sample(3, 2.7)
    without = dataclasses.replace(run, config=dataclasses.replace(
        run.config, model=dataclasses.replace(run.config.model, condition="none")))
    with pytest.raises(UserError, match="label 3 is given, and the model has no classes"):
        without.sample(1, 3)


@pytest.mark.parametrize(("images", "message"), [
    (np.full((1, 8, 8, 1), 0.5), "images are float64 of values from 0.0 to 0.5: expected integers"),
    (np.full((1, 8, 8, 1), 255, np.uint8), "of values from 0 to 255: expected integers 0 to 16"),
    (np.full((1, 8, 8, 1), -1), "of values from -1 to 0: expected integers 0 to 16"),
    (7, r"images have shape \(\): expected \[n, 8, 8, 1\]")])
def test_images_of_other_values_have_no_likelihood(run, images, message):
    with pytest.raises(UserError, match=message):
        run.log_prob(images, 3)


def test_arguments_that_pixels_or_classes_do_not_have_are_refused(run):
    images = np.zeros((1, 8, 8, 1), np.uint8)
    with pytest.raises(UserError, match="noised is True, and runs/tiny is a model of pixels"):
        run.log_prob(images, 3, noised=True)
    with pytest.raises(UserError, match="label and condition are both given"):
        run.bits_per_dim(images, 3, condition=[1.0])


@pytest.mark.slow
def test_latents_on_texts():
    """Texts are the held-out ones in turn, or given ones; latents are returned as they are."""
    settings = tiny_config(**{
        "data.source": "mock:4x4x3,text=3x8", "data.patch_size": 1, "model.condition": "text",
        "sample.guidance": 1.0})
    source, model, mesh = setup(settings)
    run = random_run(as_run(settings, model, mesh))
    images = run.sample(3)
    assert (images.shape, images.dtype) == ((3, 4, 4, 3), np.float32)
    records = [source.records[i] for i in range(3)]
    text = Text(*(np.stack([r[name] for r in records]) for name in ("text", "text_mask")))
    np.testing.assert_allclose(run.sample(3, text), images, atol=1e-5)
    turned = Text(text.states[::-1], text.mask[::-1])
    assert np.abs(run.sample(3, turned) - images)[0].max() > 1e-3
    shown = plots.displayable(images, 0)
    assert (shown.shape, shown.dtype) == ((3, 4, 4, 3), np.uint8)
    assert shown.std() > 10
    assert np.isfinite(run.log_prob(images, text, trajectories=1)).all()
    for wrong in (None, [1, 2, 3], Text(text.states[:2], text.mask)):
        with pytest.raises(UserError, match=r"conditioned on text: give label=run\.text"
                                            r"\(captions\), with one caption, or one for each of "
                                            r"the 3 images, or your own Text\(states \[3, M, 8\]"):
            run.log_prob(images, wrong)
