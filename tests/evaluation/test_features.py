"""Extractors of features: what they compute, their digests, and what they refuse."""

import sys

import numpy as np
import pytest

from ntm_jax.data import sources
from ntm_jax.errors import UserError
from ntm_jax.evaluation import features, statistics
from ntm_jax.evaluation.features import inception, make_extractor, pixels
from ntm_jax.evaluation.statistics import FeatureStatistics
from ntm_jax.runtime import sharding
from ntm_jax.runtime.config import Mesh
from tests.evaluation.common import random_inception


def images_of(source, count=None):
    """The images and labels of the first `count` records of a source."""
    records = [source.records[i] for i in range(count or len(source.records))]
    return np.stack([r["image"] for r in records]), np.array([r["label"] for r in records])


@pytest.fixture(scope="module")
def train():
    return sources.open_source("digits", "train")


@pytest.fixture(scope="module")
def cnn(train):
    return features.cnn(train)


def test_pixels():
    images = np.random.default_rng(0).integers(17, size=(100, 3, 4, 3)).astype(np.uint8)
    extractor = pixels(17)
    np.testing.assert_allclose(extractor(images), images.reshape(100, 36) / 16, rtol=1e-6)
    assert (extractor.name, extractor.proxy, len(extractor.digest)) == ("pixels", True, 16)
    assert extractor.digest == pixels(17).digest != pixels(256).digest


def test_the_classifier_separates_digits_from_other_images(train, cnn, monkeypatch):
    images, labels = images_of(sources.open_source("digits", "test"))
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(images.reshape(len(images), -1), axis=1).reshape(images.shape)
    noise = rng.integers(17, size=images.shape).astype(np.uint8)
    found = {"held-out": cnn(images), "noise": cnn(noise), "shuffled": cnn(shuffled)}
    assert found["held-out"].shape == (297, 64)
    assert found["held-out"].dtype == np.float32
    assert (cnn.name, cnn.proxy, len(cnn.digest)) == ("cnn", True, 16)
    real = cnn(images_of(train)[0])
    held_out, noise, shuffled = (statistics.feature_scores(
        *map(FeatureStatistics.of, (real, found[name]))) for name in found)
    assert held_out["frechet"] < 0.1 * min(noise["frechet"], shuffled["frechet"])
    assert min(held_out["precision"], held_out["recall"]) > 0.8
    assert held_out["kid"] < 0.1 * min(noise["kid"], shuffled["kid"])
    assert max(noise["precision"], shuffled["precision"]) < 0.2
    classify = features._classify
    monkeypatch.setattr(features, "_classify", lambda *arguments: classify(*arguments)[::-1])
    assert (cnn(images).argmax(-1) == labels).mean() >= 0.95  # logits in place of features


def test_extractors_that_cannot_be_made_are_refused(train, tmp_path, monkeypatch):
    unlabelled = sources.open_source("mock:8x8x1,levels=4", "train")
    with pytest.raises(UserError, match=r"learns classes from pixels, and mock:8.* has no classes"):
        make_extractor("cnn", unlabelled, 17)
    with pytest.raises(UserError, match="needs its weights: give --inception_weights=FILE of"):
        make_extractor("inception", train, 17)
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pth").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"/weights\.pth is read with torch, .*: pip install -e"):
        make_extractor("inception", train, 17, str(tmp_path / "weights.pth"))


# Inception, where torch is installed.


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights."""
    state = random_inception()
    import torch

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many threads on a busy machine wait for one another
    yield path
    torch.set_num_threads(threads)


def test_inception_is_torch_fidelitys(weights, tmp_path, monkeypatch):
    import safetensors.torch
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr(features, "_PER_DEVICE", 1)
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    copied, mesh = tmp_path / "weights.safetensors", sharding.make_mesh(Mesh())
    safetensors.torch.save_file(torch.load(weights, weights_only=True), copied)
    rng = np.random.default_rng(0)
    colour = rng.integers(256, size=(2, 33, 51, 3)).astype(np.uint8)
    gray = rng.integers(17, size=(1, 299, 299, 1)).astype(np.uint8)
    shown = np.repeat(np.round(gray * (255 / 16)).astype(np.uint8), 3, -1)
    first, second = inception(str(weights), mesh), inception(str(copied), mesh, 17)
    assert (first.name, first.proxy, len(first.digest)) == ("inception", False, 16)
    assert first.digest == second.digest
    for ours, images, same in ((first, colour, colour), (second, gray, shown)):
        expected = theirs(torch.from_numpy(same.transpose(0, 3, 1, 2).copy()))[0].numpy()
        found = ours(images)
        assert (found.shape, found.dtype) == (expected.shape, np.float32)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * expected.max())
        assert expected.std(0).max() > 0.01 * expected.max() or len(images) == 1
    with pytest.raises(UserError, match=r"1 or 3 channels, and these have 2: set config\.evaluate"):
        first(colour[..., :2])


class Code:
    """Unpickling it runs code: a file appears."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_inception_runs_nothing_in_a_file(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"fc.weight": Code(tmp_path / "ran")}, tmp_path / "code.pth")
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "other.pth")
    (tmp_path / "text.safetensors").write_text("weights")
    for name in ("code.pth", "other.pth", "text.safetensors"):
        with pytest.raises(UserError, match=rf"/{name} cannot be used .*: expected https://") as e:
            inception(str(tmp_path / name), None)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "ran").exists()
