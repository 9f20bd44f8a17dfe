"""Extractors of features: what they compute, their digests, and what they refuse."""

import sys

import numpy as np
import pytest

from ntm_jax.data import sources
from ntm_jax.errors import UserError
from ntm_jax.evaluation import features, statistics
from ntm_jax.evaluation.features import inception, make_extractor, pixels


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
    held_out, noise, shuffled = (statistics.feature_scores(real, found[name]) for name in found)
    assert held_out["frechet"] < 0.1 * min(noise["frechet"], shuffled["frechet"])
    assert min(held_out["precision"], held_out["recall"]) > 0.8
    assert max(noise["precision"], shuffled["precision"]) < 0.2
    classify = features._classify
    monkeypatch.setattr(features, "_classify", lambda *arguments: classify(*arguments)[::-1])
    assert (cnn(images).argmax(-1) == labels).mean() >= 0.95  # logits in place of features


def test_extractors_that_cannot_be_made_are_refused(train, monkeypatch):
    unlabelled = sources.open_source("mock:8x8x1,levels=4", "train")
    with pytest.raises(UserError, match=r"learns classes from pixels, and mock:8.* has no classes"):
        make_extractor("cnn", unlabelled)
    with pytest.raises(UserError, match="needs its weights: give --inception_weights=FILE, https:"):
        make_extractor("inception", train)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"needs torch-fidelity, which is not installed: pip inst"):
        make_extractor("inception", train, "weights.pth")


# Inception, where torch is installed.


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights for the real network, scaled so that activations do not vanish."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        state = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    generator = torch.Generator().manual_seed(0)
    for array in state.values():
        if array.ndim == 4:
            array.normal_(0, (2 / array[0].numel()) ** 0.5, generator=generator)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many threads on a busy machine wait for one another
    yield path
    torch.set_num_threads(threads)


def test_inception_is_torch_fidelitys(weights, tmp_path, train):
    import safetensors.torch
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    colour = np.random.default_rng(0).integers(256, size=(1, 8, 8, 3)).astype(np.uint8)
    gray = images_of(train, 1)[0]
    shown = np.concatenate(
        [colour, np.repeat(np.round(gray * (255 / 16)).astype(np.uint8), 3, -1)])
    expected = theirs(torch.from_numpy(shown).permute(0, 3, 1, 2))[0].numpy()
    largest = np.abs(expected).max()
    copied = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(torch.load(weights, weights_only=True), copied)
    extractors = [inception(str(weights)), make_extractor("inception", train, str(weights)),
                  inception(str(copied))]
    assert len({e.digest for e in extractors[:2]}) == 1 < len({e.digest for e in extractors})
    first = extractors[0]
    assert (first.name, first.proxy, len(first.digest)) == ("inception", False, 16)
    for ours, images, row in zip(extractors, (colour, gray, colour), (0, 1, 0), strict=True):
        found = ours(images)
        assert (found.shape, found.dtype, np.isfinite(found).all()) == ((1, 2048), np.float32, True)
        np.testing.assert_allclose(found[0], expected[row], rtol=1e-5, atol=1e-5 * largest)
    assert np.abs(expected[:1] - expected[1:]).max(1).min() > 0.01 * largest


class Code:
    """Unpickling it runs code: a file appears."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_inception_runs_nothing_in_a_file(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch_fidelity")
    torch.save({"fc.weight": Code(tmp_path / "ran")}, tmp_path / "code.pth")
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "other.pth")
    (tmp_path / "text.safetensors").write_text("weights")
    for name in ("code.pth", "other.pth", "text.safetensors"):
        with pytest.raises(UserError, match=rf"/{name} cannot be used .*: expected https://") as e:
            inception(str(tmp_path / name))
        assert "\n" not in str(e.value)
    assert not (tmp_path / "ran").exists()
