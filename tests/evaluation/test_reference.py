"""Files of reference statistics: what is written is read again, what does not fit is refused."""

import dataclasses

import numpy as np
import pytest

from ntm_jax.data import sources
from ntm_jax.errors import UserError
from ntm_jax.evaluation import evaluate, features, image_scores, reference
from ntm_jax.evaluation.evaluate import EvaluationOptions
from ntm_jax.evaluation.statistics import FeatureStatistics
from tests.common import tiny_config
from tests.evaluation.conftest import SETTINGS


@pytest.fixture(scope="module")
def images():
    """Images [40, 2, 3, 1] of 17 levels."""
    return np.random.default_rng(0).integers(17, size=(40, 2, 3, 1), dtype=np.uint8)


@pytest.mark.parametrize(("content", "message"), [
    ({}, r"cannot be used \('mu is not a file in the archive'\): expected an \.npz with mu"),
    ({"mu": np.zeros(3), "sigma": np.eye(3)}, r"shapes \(3,\) and \(3, 3\), .* 6 dimensions"),
    ({"mu": np.zeros(6), "sigma": np.full((6, 6), np.nan)}, "numbers that are not finite"),
    ({"mu": np.zeros(6), "sigma": np.eye(6), "digest": np.str_("0123")},
     "is of features of digest '0123', and these are [0-9a-f]{16}"),
    ({"mu": np.array([{}] * 6), "sigma": np.eye(6)}, "Object arrays cannot be loaded"),
    ({"mu": np.zeros(6), "sigma": np.eye(6), "arr_0": np.full((5, 2, 3, 1), 255, np.uint8)},
     r"arr_0 of uint8 \(5, 2, 3, 1\) up to 255, and the data's are uint8 .* up to 16"),
])
def test_files_of_something_else_are_refused(content, message, images, tmp_path):
    path = str(tmp_path / "reference.npz")
    np.savez(path, **content)
    with pytest.raises(UserError, match=f"^config.evaluate.reference={path} .*{message}") as error:
        reference.read(path, features.pixels(17), images[:1], 17)
    assert "\n" not in str(error.value)


def test_statistics_and_images_are_read_as_written(images, tmp_path):
    extractor, path = features.pixels(17), tmp_path / "reference.npz"
    written = FeatureStatistics.of(extractor(images))
    reference.write(str(path), written, extractor)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"npz exists: give a new file \(nothing was overwritten\)"):
        reference.write(str(path), written, extractor)
    assert path.read_bytes() == before
    with np.load(path) as content:
        arrays = dict(content)
    np.testing.assert_allclose(arrays["sigma"], np.cov(extractor(images), rowvar=False), rtol=1e-6)
    found = reference.read(str(path), extractor, images[:1], 17)
    for own, read in zip(written.gaussian(), found.gaussian(), strict=True):
        np.testing.assert_allclose(own.T @ own, read.T @ read, rtol=1e-6)
    assert not len(found.kept)
    np.savez(path, **arrays, arr_0=images[:10])
    kept = reference.read(str(path), extractor, images[:1], 17).kept
    np.testing.assert_array_equal(kept, extractor(images[:10]))


def test_a_reference_takes_the_place_of_the_training_images(run, source, images, tmp_path):
    """The distances are the same, and what needs the images themselves is left out."""
    settings = tiny_config(**SETTINGS | {"evaluate.num_samples": 20, "evaluate.features": "pixels"})
    run, path = dataclasses.replace(run, config=settings), str(tmp_path / "reference.npz")
    train, evaluated = sources.open_source("digits", "train[:200]"), settings.evaluate
    own = image_scores.compare_with(run, evaluated, train, source)
    reference.write(path, own.real, own.extractor)
    other = image_scores.compare_with(
        run, dataclasses.replace(evaluated, reference=path), train, source)
    first, second = (image_scores.feature_scores(run, each) for each in (own, other))
    for name in ("frechet", "frechet_stderr"):
        assert second[name] == pytest.approx(first[name], rel=1e-6), name
    assert other.frechet_held_out == pytest.approx(own.frechet_held_out, rel=1e-6)
    missing = {f"{name}{end}" for name in ("kid", "precision", "recall") for end in ("", "_stderr")}
    assert first.keys() - second.keys() == missing
    assert own.described()["real_images"] == 200
    assert other.described()["reference"] == path
    for options, message in (
            ({"write_reference": path}, r"--write_reference=.* exists: give a new file"),
            ({"reference": path, "write_reference": "new"}, "training images, .* give one of them"),
            ({"reference": path, "features": "none"}, "--reference is of features, and none are")):
        with pytest.raises(UserError, match=message):
            evaluate.evaluate(run, EvaluationOptions(**options))


def test_real_images_are_read_in_order_and_spread_evenly(run):
    train = sources.open_source("digits", "train[:50]")
    found = np.concatenate(list(image_scores.recorded(run, train, batch=7)))
    np.testing.assert_array_equal(found, [train.records[i]["image"] for i in range(50)])
    (few,) = image_scores.recorded(run, train, 3)
    np.testing.assert_array_equal(few, found[[0, 24, 49]])
