"""The folder that sampling writes, in one go or resumed."""

import dataclasses

import jax
import numpy as np
import pytest

from ntm_jax.data.autoencoder import open_autoencoder
from ntm_jax.errors import UserError
from ntm_jax.sampling import generate
from ntm_jax.sampling.write import SampleRequest, write_samples
from ntm_jax.training import loop
from tests.common import assert_shows, new_run, pixels, randomised, tiny_config
from tests.data.common import write_autoencoder


def test_labels_are_names_or_numbers_of_classes(run):
    def found(labels, run=run):
        return run.condition.validate(len(labels), labels).tolist()

    assert found(["3", "0", "9"]) == [3, 0, 9]
    for wrong in ("10", "cat"):
        with pytest.raises(UserError, match=f"label '{wrong}' is not a class of the model: "
                                            "expected 0 to 9"):
            found(["1", wrong])
    names = ("zero", "one", "0", *(f"class {i}" for i in range(3, 10)))
    named = dataclasses.replace(run, spec=dataclasses.replace(run.spec, class_names=names))
    assert found(["one", "0", "4"], named) == [1, 2, 4]  # a name goes before a number
    assert named.condition.validate(3, "one").tolist() == [1, 1, 1]
    with pytest.raises(UserError, match=r"expected zero, one, 0, class 3, .*class 9, or 0 to 9"):
        found(["two"], named)


def test_written_samples(run, tmp_path, capsys):
    out, labels = tmp_path / "samples", np.resize([3, 5], 12)
    write_samples(run, str(out), SampleRequest(11, 3, ["3", "5"]))
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"{i:02}.png" for i in range(11)] + ["grid.png", "samples.json", "samples.npz"]
    images = run.sample(12, labels)[:11]
    with np.load(out / "samples.npz") as archive:
        arr_0, arr_1 = archive["arr_0"], archive["arr_1"]
    assert (arr_0.shape, arr_0.dtype) == ((11, 8, 8, 3), np.uint8)
    assert_shows(arr_0, images)
    np.testing.assert_array_equal(arr_1, labels[:11])
    for i in range(11):
        np.testing.assert_array_equal(pixels(out / f"{i:02}.png"), arr_0[i, ..., 0])
    assert pixels(out / "grid.png").shape == (2 * 66 + 2, 10 * 66 + 2)
    assert f"11 images in {out}" in capsys.readouterr().out


def test_a_stopped_call_is_resumed_bit_for_bit(run, tmp_path, monkeypatch, capsys):
    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "stopped"
    request = SampleRequest(8, 3, save_trajectories=True)
    write_samples(run, str(uninterrupted), request)
    sample_at, calls = generate.sample_at, []

    def interrupted(run, index, *rest):
        calls.append(list(index))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample_at(run, index, *rest)

    monkeypatch.setattr(generate, "sample_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_samples(run, str(stopped), request)
    assert not (stopped / "samples.npz").exists()
    other = dataclasses.replace(run, params=randomised(run.params, seed=3))
    guided = dataclasses.replace(run, config=run.config.with_sampling(guidance=2.0))
    for asker, changes, message in (
            (run, {"num": 12}, "--num 8, and this call has 12: give another --out"),
            (guided, {}, "--guidance 0.0, and this call has 2.0"), (other, {}, "checksum")):
        with pytest.raises(UserError, match=f"holds samples of {message}"):
            write_samples(asker, str(stopped), dataclasses.replace(request, **changes))
    write_samples(run, str(stopped), request)
    assert calls == [[0, 1, 2], [3, 4, 5], [3, 4, 5], [6, 7]]
    assert "8 images in" in capsys.readouterr().out
    names = sorted(path.name for path in uninterrupted.iterdir())
    assert sorted(path.name for path in stopped.iterdir()) == names
    for name in ("samples.npz", "trajectories.npz"):
        with np.load(uninterrupted / name) as one, np.load(stopped / name) as two:
            np.testing.assert_array_equal(one["arr_0"], two["arr_0"])
    with np.load(uninterrupted / "trajectories.npz") as levels:
        assert levels["arr_0"].shape == (8, 3, 8, 8, 1)
    write_samples(run, str(stopped), request)  # there is nothing left to do
    assert len(calls) == 4


def test_latents_are_decoded(tmp_path, monkeypatch):
    """By the configuration's autoencoder or the call's, once the data's mean and std are undone."""
    write_autoencoder(tmp_path / "vae")
    source = {"data.source": "mock:4x4x3,levels=0,classes=2", "data.patch_size": 1}
    new = new_run(tiny_config(**source))
    spec = dataclasses.replace(new.spec, mean=(0.5, 0, -1), std=(2, 1, 0.5))
    run, name = dataclasses.replace(new, spec=spec, params={}), f"kl:{tmp_path}/vae"
    latents = np.random.default_rng(0).normal(size=(6, 4, 4, 3)).astype(np.float32)
    monkeypatch.setattr(generate, "sample_at", lambda run, index, *_: latents[index])
    write_samples(run, str(tmp_path / "decoded"), SampleRequest(6, 4, autoencoder=name))
    with np.load(tmp_path / "decoded/samples.npz") as archive:
        images = archive["arr_0"]
    assert (images.shape, images.dtype) == ((6, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(pixels(tmp_path / "decoded/5.png"), images[5])
    kl = open_autoencoder(name)
    expected = jax.jit(kl.decode)(kl.params, latents * np.float32(spec.std) + np.float32(spec.mean))
    assert np.abs(np.clip(127.5 * expected + 127.5, 0, 255) - images).max() < 0.51
    configured = dataclasses.replace(run, config=run.config.with_sampling(autoencoder=name))
    np.testing.assert_array_equal(generate.pictures_at(configured, np.arange(6)), images)
    assert generate.pictures_at(run, np.arange(6)).dtype == np.float32  # as they are
    write_samples(configured, str(tmp_path / "decoded"), SampleRequest(6, 4))  # the same call


def test_an_autoencoder_of_other_data_is_refused_before_anything_is_made(run, tmp_path):
    write_autoencoder(tmp_path / "vae")
    name = f"kl:{tmp_path}/vae"
    with pytest.raises(UserError, match=r"decodes latents, and the run is of pixels: leave it out"):
        write_samples(run, str(tmp_path / "out"), SampleRequest(2, autoencoder=name))
    other = tiny_config(**{"data.source": "mock:4x4x5,levels=0,classes=2", "data.patch_size": 1,
                           "evaluate.split": "test", "sample.autoencoder": name})
    with pytest.raises(UserError, match=r"latents of 3 channels, and the run's have 5: it is"):
        loop.train(other, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_refused_and_unchanged(run, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="exists and is not empty: choose a new --out"):
        write_samples(run, str(tmp_path), SampleRequest(2, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match="label 'x' is not a class"):
        write_samples(run, str(tmp_path / "new"), SampleRequest(2, 2, ["x"]))
    assert not (tmp_path / "new").exists()
