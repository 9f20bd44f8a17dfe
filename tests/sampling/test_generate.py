"""Image i is the same image in any company, and what sampling writes."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from ntm_jax.api import Run
from ntm_jax.core import sampling
from ntm_jax.core.layers import Text
from ntm_jax.data import pipeline
from ntm_jax.errors import UserError
from ntm_jax.runtime import build, plots
from ntm_jax.sampling import generate
from ntm_jax.sampling.write import SampleRequest, parse_labels, write_samples
from ntm_jax.training import state
from tests.common import as_run, randomised, setup, tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")
SETTINGS = tiny_config(**{"sample.decoder": "inverse", "trajectory.t_min": 0.2})  # noisy enough for denoising to show


@pytest.fixture(scope="module")
def run():
    """A Run that no folder holds."""
    source, model, mesh = setup(SETTINGS)
    params = randomised(state.initialize(as_run(SETTINGS, model, mesh)).params)
    return Run(SETTINGS, pipeline.spec(source, 2), model, params, 4, mesh, "runs/tiny")


def same(one, other):
    """Equal but for pixels that rounding puts one level away, fewer than one in 50."""
    difference = np.abs(one.astype(int) - other.astype(int))
    return difference.max() <= 1 and (difference > 0).mean() < 0.02


def test_an_image_is_the_same_in_any_batch(run):
    images = run.sample(12)
    assert (images.shape, images.dtype) == ((12, 8, 8, 1), np.uint8)
    assert 0 < images.mean() < 16
    assert same(run.sample_at([7, 2, 11]), images[[7, 2, 11]])
    assert not same(images[0], images[10])  # of one class
    assert not same(run.sample_at([7, 2, 11], seed=1), images[[7, 2, 11]])


def test_labels_are_all_classes_in_turn_by_default(run):
    images = run.sample(12)
    assert same(run.sample(12, np.arange(12) % 10), images)
    assert same(run.sample_at([10, 11, 3], [0, 1, 3]), images[[10, 11, 3]])
    assert not same(run.sample_at([10, 11, 3], [5, 5, 5]), images[[10, 11, 3]])


def test_guidance_and_decoder_change_the_image(run):
    images = run.sample(3)
    assert not same(run.sample(3, guidance=2.0), images)
    assert not same(run.sample(3, decoder="score"), images)


@pytest.mark.parametrize(("inverse", "told"), [("parallel", {}), ("auto", {"inverse": "parallel"})])
def test_the_inverse_that_is_asked_for_is_taken(run, inverse, told, monkeypatch):
    """By the configuration or by the call; the images are the same, so what is run is looked at."""
    asked, invert = [], sampling.invert_level
    monkeypatch.setattr(sampling, "invert_level", lambda *arguments: asked.append(arguments[-1]) or invert(*arguments))
    settings = dataclasses.replace(SETTINGS, seed=9 + len(told), sample=dataclasses.replace(SETTINGS.sample, inverse=inverse))
    images = dataclasses.replace(run, config=settings).sample(3, **told)
    assert asked == ["parallel"]
    assert same(images, dataclasses.replace(run, config=settings).sample(3, inverse="sequential"))


def test_a_trajectory_runs_from_noise_to_the_image(run):
    clean, levels = generate.sample_at(as_run(run.config, run.model, run.mesh, run.params), np.arange(3), with_levels=True)
    assert levels.shape == (3, 3, 8, 8, 1)
    assert same(clean, run.sample(3))
    gaps = [np.abs(levels[:, k].astype(int) - clean).mean() for k in range(3)]
    assert gaps[2] < gaps[0]  # the last is the nearly clean one


def test_guidance_needs_condition_dropout(run):
    without = dataclasses.replace(SETTINGS, train=dataclasses.replace(SETTINGS.train, condition_dropout=0.0))
    with pytest.raises(UserError, match=r"guidance is 1\.5, and the model was trained without condition dropout"):
        generate.override(without, steps=None, guidance=1.5)
    with pytest.raises(UserError, match=r"guidance is \(0\.0, 1\.5\), and the model was trained without condition dropout"):
        generate.override(without, steps=None, guidance=(0.0, 1.5))
    generate.override(without, steps=None, guidance=0.0)
    generate.override(without, steps=None, guidance=(0.0, 0.0))
    generate.override(SETTINGS, steps=2, guidance=1.5)


def test_guidance_is_one_scale_for_each_step(run):
    assert [generate.parse_guidance(scales) for scales in (None, ["1.5"], ["1", "0"])] == [None, 1.5, (1.0, 0.0)]
    for wrong in (["a"], ["1", ""], ["nan", "1"]):
        with pytest.raises(UserError, match="--guidance takes a number, or one for each step"):
            generate.parse_guidance(wrong)
    for wrong in (-1.0, (1.0, -0.5)):
        with pytest.raises(UserError, match=r"guidance is .*: expected numbers that are not negative"):
            run.sample(2, guidance=wrong)
    with pytest.raises(UserError, match="guidance has 3 scales, and there are 2 steps: give one scale, or 2, from pure noise down"):
        run.sample(2, guidance=(1.0, 0.5, 0.0))
    scheduled = dataclasses.replace(SETTINGS, sample=dataclasses.replace(SETTINGS.sample, guidance=(1.0, 0.0)))
    with pytest.raises(UserError, match="guidance has 2 scales, and there are 3 steps"):  # of the configuration, which --steps changes
        generate.override(scheduled, steps=3, guidance=None)
    assert same(dataclasses.replace(run, config=scheduled).sample(3), run.sample(3, guidance=(1.0, 0.0)))
    assert not same(run.sample(3, guidance=(1.0, 0.0)), run.sample(3, guidance=(0.0, 1.0)))


def test_a_number_of_steps_that_was_not_trained_is_warned_of(run):
    with pytest.warns(UserWarning, match="3 steps were not trained, only 2"):
        generate.override(SETTINGS, steps=3, guidance=None)


def test_labels_of_the_flag():
    assert parse_labels(None, 10) is None
    np.testing.assert_array_equal(parse_labels(["3", "0", "9"], 10), [3, 0, 9])
    for wrong in ("10", "-1", "cat", "1.0", ""):
        with pytest.raises(UserError, match=f"label '{wrong}' is not a class of the model: expected 0 to 9"):
            parse_labels(["1", wrong], 10)
    with pytest.raises(UserError, match="expected none, since it is told of no classes"):
        parse_labels(["0"], 0)


def test_written_samples(run, tmp_path, capsys):
    out = tmp_path / "samples"
    write_samples(run, str(out), SampleRequest(11, 4, ["3", "5"]))
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"{i:02}.png" for i in range(11)] + ["grid.png", "samples.json", "samples.npz"]
    images = run.sample(11, np.resize([3, 5], 11))
    shown = (images * (255 / 16)).round().astype(np.uint8)
    with np.load(out / "samples.npz") as archive:
        arr_0, labels = archive["arr_0"], archive["arr_1"]
    assert (arr_0.shape, arr_0.dtype) == ((11, 8, 8, 3), np.uint8)
    assert np.abs(arr_0.astype(int) - shown).max() <= 16  # one level of 17
    np.testing.assert_array_equal(labels, np.resize([3, 5], 11))
    for i in range(11):
        with Image.open(out / f"{i:02}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), arr_0[i, ..., 0])
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (10 * 66 + 2, 2 * 66 + 2)
    assert f"11 images in {out}" in capsys.readouterr().out


def test_a_stopped_call_goes_on_bit_for_bit(run, tmp_path, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    write_samples(run, str(whole), SampleRequest(10, 4, save_trajectories=True))
    sample_at, calls = Run.sample_at, []

    def dies(self, index, *rest, **options):
        calls.append(list(index))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample_at(self, index, *rest, **options)

    monkeypatch.setattr(Run, "sample_at", dies)
    with pytest.raises(KeyboardInterrupt):
        write_samples(run, str(stopped), SampleRequest(10, 4, save_trajectories=True))
    assert not (stopped / "samples.npz").exists()
    with pytest.raises(UserError, match="holds samples of --num 10, and this call has 12: give another --out"):
        write_samples(run, str(stopped), SampleRequest(12, 4, save_trajectories=True))
    with pytest.raises(UserError, match="holds samples of --seed None, and this call has 1"):
        write_samples(run, str(stopped), SampleRequest(10, 4, save_trajectories=True, seed=1))
    other = dataclasses.replace(run, params=randomised(run.params, seed=3))
    with pytest.raises(UserError, match="holds samples of checksum"):
        write_samples(other, str(stopped), SampleRequest(10, 4, save_trajectories=True))
    write_samples(run, str(stopped), SampleRequest(10, 4, save_trajectories=True))
    assert calls[2:] == [[4, 5, 6, 7], [8, 9]]
    assert "10 images in" in capsys.readouterr().out
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in stopped.iterdir())
    for name in ("samples.npz", "trajectories.npz"):
        with np.load(whole / name) as one, np.load(stopped / name) as other:
            np.testing.assert_array_equal(one["arr_0"], other["arr_0"])
    with np.load(whole / "trajectories.npz") as levels:
        assert levels["arr_0"].shape == (10, 3, 8, 8, 1)
    write_samples(run, str(stopped), SampleRequest(10, 4, save_trajectories=True))  # again: nothing to do
    assert len(calls) == 4
    assert "10 of them found there" in capsys.readouterr().out


def test_a_folder_that_is_not_empty_is_left_alone(run, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="is there and not empty"):
        write_samples(run, str(tmp_path), SampleRequest(2, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="label 'x' is not a class"):
        write_samples(run, str(tmp_path / "new"), SampleRequest(2, 2, ["x"]))
    assert not (tmp_path / "new").exists()


def test_latents_and_texts():
    """A model of texts shows the held-out ones in turn, or those that it is given, and returns latents as they are."""
    settings = tiny_config(**{
        "data.source": "mock:4x4x3,text=3x8", "data.patch_size": 1, "model.condition": "text", "sample.guidance": 1.0})
    source, _, mesh = setup(settings)
    spec = pipeline.spec(source, 1)
    model = build.make_model(settings, spec)
    run = Run(settings, spec, model, randomised(state.initialize(as_run(settings, model, mesh)).params), 0, mesh, "runs/text")
    images = run.sample(3)
    assert (images.shape, images.dtype) == ((3, 4, 4, 3), np.float32)
    text = Text(*(np.stack([source.records[i][name] for i in range(3)]) for name in ("text", "text_mask")))
    np.testing.assert_allclose(run.sample(3, text), images, atol=1e-5)
    assert np.abs(run.sample(3, Text(text.states[::-1], text.mask[::-1])) - images)[0].max() > 1e-3
    shown = plots.displayable(images, 0)
    assert (shown.shape, shown.dtype) == ((3, 4, 4, 3), np.uint8)
    assert shown.std() > 10
    assert np.isfinite(run.log_prob(images, text, trajectories=1)).all()
    for wrong in (None, [1, 2, 3], Text(text.states[:2], text.mask)):
        with pytest.raises(UserError, match="the model is told texts"):
            run.log_prob(images, wrong)
