"""Image scores against torch-fidelity's, closed forms and cases made by hand; the features they are of, and what is refused."""

import dataclasses
import json
import pickle
import sys
import warnings
import zipfile

import numpy as np
import pytest
import scipy.linalg
import sklearn.metrics

from ntm_jax.data import sources
from ntm_jax.errors import UserError
from ntm_jax.evaluation import features, statistics
from ntm_jax.evaluation.features import cnn, inception, make_extractor, pixels
from tests.common import python

SHAPES = [(150, 100, 20, 1), (50, 70, 64, 2), (90, 90, 5, 3), (40, 25, 100, 4), (30, 200, 1, 5)]  # n, m, d, seed
PROGRAM = """
import json, jax, numpy as np
from ntm_jax.data import sources
from ntm_jax.runtime import quality
extractor = quality.cnn(sources.open_source("digits", "train"))
features = extractor(np.arange(16 * 64).reshape(16, 8, 8, 1).astype(np.uint8) % 17)
print(json.dumps([jax.device_count(), extractor.digest, features.tolist()]))
"""


def correlated(n, m, d, seed, dtype=np.float64):
    """Two sets of correlated features, one a little off the other."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) / np.sqrt(d)
    real, generated = rng.normal(size=(n, d)) @ mix, rng.normal(size=(m, d)) @ (mix + 0.1 * rng.normal(size=(d, d))) + 0.3
    return real.astype(dtype), generated.astype(dtype)


def exactly(mean, covariance, n=200, seed=0):
    """Features [n, d] of just this sample mean and unbiased sample covariance."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    white = np.linalg.qr(x - x.mean(0))[0] * np.sqrt(n - 1)
    features = white @ np.linalg.cholesky(covariance).T + mean
    np.testing.assert_allclose(np.cov(features, rowvar=False), covariance, rtol=1e-9, atol=1e-9)
    return features


def images_of(source, count=None):
    records = [source.records[i] for i in range(count or len(source.records))]
    return np.stack([r["image"] for r in records]), np.array([r["label"] for r in records])


@pytest.fixture(scope="module")
def train():
    return sources.open_source("digits", "train")


@pytest.fixture(scope="module")
def cnn(train):
    return cnn(train)


# The scores.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_frechet_is_torch_fidelitys(shape, dtype):
    torch, metric_fid = pytest.importorskip("torch"), pytest.importorskip("torch_fidelity.metric_fid")
    real, generated = correlated(*shape, dtype)
    if shape[2] == 1:  # torch-fidelity takes a covariance of one feature for a number
        real, generated = (np.pad(x, ((0, 0), (0, 1))) for x in (real, generated))
    statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (real, generated)]
    theirs = metric_fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert theirs > 0.01
    assert statistics.frechet(real, generated) == pytest.approx(theirs, rel=1e-3)


def test_frechet_is_the_closed_form_of_two_gaussians():
    rng = np.random.default_rng(7)
    means, roots = rng.normal(size=(2, 6)), rng.normal(size=(2, 6, 6))
    covariances = [a @ a.T + 0.1 * np.eye(6) for a in roots]
    expected = (np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1])
                - 2 * np.trace(scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real))
    ours = statistics.frechet(exactly(means[0], covariances[0]), exactly(means[1], covariances[1], 300, 1))
    assert ours == pytest.approx(expected, rel=1e-6)
    a, b = exactly([0, 0], np.diag([4.0, 1])), exactly([3, 0], np.diag([1.0, 25]), seed=1)
    assert statistics.frechet(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (1 - 5) ** 2, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_frechet_is_symmetric_and_zero_on_equal_sets(shape):
    real, generated = correlated(*shape)
    assert statistics.frechet(generated, real) == pytest.approx(statistics.frechet(real, generated), rel=1e-9)
    assert 0 <= statistics.frechet(real, real[::-1]) < 1e-9
    assert statistics.frechet(real, real + 0.5) == pytest.approx(shape[2] / 4, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_are_torch_fidelitys(shape, neighbours):
    torch, metric_prc = pytest.importorskip("torch"), pytest.importorskip("torch_fidelity.metric_prc")
    real, generated = correlated(*shape)
    options = dict(prc_neighborhood=neighbours, prc_batch_size=64, save_cpu_ram=True, verbose=False)
    theirs = metric_prc.prc_features_to_metric(torch.from_numpy(generated), torch.from_numpy(real), **options)
    ours = statistics.precision_recall(real, generated, neighbours)
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def test_precision_and_recall_by_hand():
    real = np.array([[0.0], [1], [3], [10]])  # balls of the nearest neighbour: 1, 1, 2, 7
    generated = np.array([[-1.0], [2.5], [4], [17.5], [100]])  # and of these: 3.5, 1.5, 1.5, 13.5, 82.5
    assert statistics.precision_recall(real, generated, 1) == (3 / 5, 4 / 4)  # -1 and 2.5 and 4 are in; 17.5 is half too far
    assert statistics.precision_recall(real, generated[:3], 1) == (3 / 3, 3 / 4)  # none reaches 10
    assert statistics.precision_recall(real, real + 1000, 3) == (0, 0)
    assert statistics.precision_recall(real, np.array([[3.0]] * 5), 3) == (1, 1 / 4)  # one image again and again has balls of no size


def test_precision_and_recall_in_blocks(monkeypatch):
    real, generated = correlated(*SHAPES[0])
    whole, rows = statistics.precision_recall(real, generated), []
    chunked = sklearn.metrics.pairwise_distances_chunked

    def small(x, y, reduce_func, working_memory):
        def seen(block, start):
            rows.append(block.shape)
            return reduce_func(block, start)

        assert working_memory == 256  # MiB
        return chunked(x, y, reduce_func=seen, working_memory=0.02)

    monkeypatch.setattr(sklearn.metrics, "pairwise_distances_chunked", small)
    assert statistics.precision_recall(real, generated) == whole
    assert max(np.prod(shape) for shape in rows) * 8 <= 0.02 * 2**20
    assert len(rows) > 20


@pytest.mark.parametrize("count", [5, 50])
def test_scores_are_plain_finite_numbers_of_few_images(count):
    real, generated = correlated(count, 5, 100, 0, np.float32)
    result = statistics.feature_scores(real, generated)
    assert json.loads(json.dumps(result)) == result
    assert set(result) == {"frechet", "precision", "recall"}
    assert all(type(value) is float and np.isfinite(value) for value in result.values())
    assert result["frechet"] > 1
    assert statistics.feature_scores(real, real) == {"frechet": pytest.approx(0, abs=1e-9), "precision": 1, "recall": 1}


@pytest.mark.parametrize("score", [statistics.feature_scores, statistics.frechet])
def test_too_few_images_are_refused(score):
    for real, generated in ((4, 50), (50, 4)):
        message = f"{real} images are compared with {generated}, and image scores need 5 of each: raise config.evaluate.images, or take"
        with pytest.raises(UserError, match=message):
            score(np.zeros((real, 2)), np.zeros((generated, 2)))


# The features.


def test_pixels():
    images = np.random.default_rng(0).integers(17, size=(100, 3, 4, 3)).astype(np.uint8)
    extractor = pixels(17)
    np.testing.assert_allclose(extractor(images), images.reshape(100, 36) / 16, rtol=1e-6)
    assert (extractor.name, extractor.proxy, len(extractor.digest)) == ("pixels", True, 16)
    assert extractor.digest == pixels(17).digest != pixels(256).digest


def test_the_classifier_knows_digits_and_its_features_tell_them_from_others(train, cnn, monkeypatch):
    images, labels = images_of(sources.open_source("digits", "test"))
    features = {"real": cnn(images_of(train)[0]), "held-out": cnn(images)}
    rng = np.random.default_rng(0)
    features["noise"] = cnn(rng.integers(17, size=images.shape).astype(np.uint8))
    features["shuffled"] = cnn(rng.permuted(images.reshape(len(images), -1), axis=1).reshape(images.shape))
    assert features["held-out"].shape == (297, 64)
    assert features["held-out"].dtype == np.float32
    assert (cnn.name, cnn.proxy, len(cnn.digest)) == ("cnn", True, 16)
    held_out, noise, shuffled = (statistics.feature_scores(features["real"], features[name]) for name in ("held-out", "noise", "shuffled"))
    assert held_out["frechet"] < 0.1 * min(noise["frechet"], shuffled["frechet"])
    assert min(held_out["precision"], held_out["recall"]) > 0.8
    assert max(noise["precision"], shuffled["precision"]) < 0.2
    monkeypatch.setattr(features, "_classify", lambda *arguments, classify=quality._classify: classify(*arguments)[::-1])
    assert (cnn(images).argmax(-1) == labels).mean() >= 0.95


def test_the_classifier_is_the_same_every_time_and_in_a_job_of_many_devices(train, cnn):
    devices, digest, features = json.loads(python(
        "-c", PROGRAM, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_DISABLE_MOST_OPTIMIZATIONS="0").stdout)
    assert (devices, digest) == (8, cnn.digest)
    images = np.arange(16 * 64).reshape(16, 8, 8, 1).astype(np.uint8) % 17
    np.testing.assert_allclose(features, cnn(images), rtol=1e-3, atol=1e-3)


def test_the_digest_is_of_parameters_and_data(train, cnn, monkeypatch):
    monkeypatch.setattr(features, "_fit", lambda model, seed, *_: {"b": np.array([0.5, -1e-9]), "a": np.array([1.0 + seed])})
    digest = cnn(train).digest
    assert digest != cnn(train, seed=1).digest
    assert digest != cnn(dataclasses.replace(train, version="of another day")).digest
    monkeypatch.setattr(features, "_fit", lambda *_: {"b": np.array([0.5 + 1e-7, 1e-9]), "a": np.array([1.0])})
    assert digest == cnn(train).digest


def test_large_images_are_shrunk_and_long_splits_read_in_part(monkeypatch):
    source = sources.open_source("mock:40x64x3,levels=256,classes=5,count=1000", "train")
    monkeypatch.setattr(features, "_RECORDS", 30)
    monkeypatch.setattr(features, "_STEPS", 2)
    seen = []
    monkeypatch.setattr(features, "_fit", lambda *arguments, fit=quality._fit: seen.append(arguments[2:]) or fit(*arguments))
    read = []
    counted = dataclasses.replace(source, records=type("Counted", (), {
        "__len__": lambda self: len(source.records), "__getitem__": lambda self, i: read.append(i) or source.records[i]})())
    features = cnn(counted)(images_of(source, 5)[0])
    assert (features.shape, np.isfinite(features).all()) == ((5, 64), True)
    x, label, rows = seen[0]
    assert (x.shape, label.shape, rows.shape) == ((30, 32, 32, 3), (30,), (2, 64))
    assert (len(read), min(read), max(read)) == (30, 0, 999)
    assert abs(float(x.mean())) < 0.05  # of uniform pixels in [-1, 1]
    assert -1 <= float(x.min()) < float(x.max()) <= 1


# What is refused.


def test_an_extractor_by_name(train):
    assert make_extractor("pixels", train).digest == pixels(17).digest
    with pytest.raises(UserError, match=r"config.evaluate.features='vgg' is not known: expected pixels, cnn or inception"):
        make_extractor("vgg", train)
    with pytest.raises(UserError, match=r"features=inception needs its weights: give --inception_weights=FILE, https://"):
        make_extractor("inception", train)
    with pytest.raises(UserError, match=r"mock:8x8x4 holds latents, and image scores are of pixels: set config.evaluate.features=none"):
        make_extractor("pixels", sources.open_source("mock:8x8x4", "train"))
    with pytest.raises(UserError, match=r"has images of 4 channels, and Inception takes 1 or 3: set config.evaluate.features=pixels"):
        make_extractor("inception", sources.open_source("mock:8x8x4,levels=4", "train"), "x.pth")
    unlabelled = sources.open_source("mock:8x8x1,levels=4", "train")
    with pytest.raises(UserError, match=r"=cnn learns classes, and mock:8x8x1,levels=4 has none: set config.evaluate.features=pixels"):
        make_extractor("cnn", unlabelled)


def test_cnn_by_name(train, monkeypatch):
    monkeypatch.setattr(features, "cnn", lambda source: ("trained on", source))
    assert make_extractor("cnn", train) == ("trained on", train)


@pytest.mark.parametrize("module", ["torch", "torch_fidelity"])
def test_inception_without_its_packages(module, train, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"features=inception needs torch-fidelity, not installed here: pip install -e '.\[fid\]'"):
        make_extractor("inception", train, "weights.pth")


# Inception, where torch is installed.


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights of the real network, of a size that keeps activations alive."""
    torch, module = pytest.importorskip("torch"), pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
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

    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    colour, gray = np.random.default_rng(0).integers(256, size=(1, 8, 8, 3)).astype(np.uint8), images_of(train, 1)[0]
    shown = np.concatenate([colour, np.repeat(np.round(gray * (255 / 16)).astype(np.uint8), 3, -1)])
    expected = theirs(torch.from_numpy(shown).permute(0, 3, 1, 2))[0].numpy()
    safetensors.torch.save_file(torch.load(weights, weights_only=True), tmp_path / "weights.safetensors")
    extractors = [inception(str(weights)), make_extractor("inception", train, str(weights)),
                  inception(str(tmp_path / "weights.safetensors"))]
    assert len({e.digest for e in extractors[:2]}) == 1 < len({e.digest for e in extractors})
    assert (extractors[0].name, extractors[0].proxy, len(extractors[0].digest)) == ("inception", False, 16)
    for ours, images, rows in zip(extractors, (colour, gray, colour[:1]), (slice(1), slice(1, 2), slice(1)), strict=True):
        features = ours(images)
        assert (features.shape, features.dtype, np.isfinite(features).all()) == ((len(images), 2048), np.float32, True)
        np.testing.assert_allclose(features, expected[rows], rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected[:1] - expected[1:]).max(1).min() > 0.01 * np.abs(expected).max()


class Code:
    """Unpickled, it runs code: a file appears."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_inception_refuses_bad_files_and_runs_nothing_in_them(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch_fidelity")
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"fc.weight": Code(tmp_path / "ran")}))
    torch.save({"fc.weight": Code(tmp_path / "ran")}, tmp_path / "code.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    torch.save({}, tmp_path / "none.pth")
    torch.save({"fc.weight": 1.0}, tmp_path / "numbers.pth")
    torch.save({0: torch.zeros(2)}, tmp_path / "unnamed.pth")
    with zipfile.ZipFile(tmp_path / "script.pth", "w") as script:  # what tells torch a TorchScript file
        for name in ("data.pkl", "constants.pkl", "version"):
            script.writestr(f"script/{name}", "3")
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "other.pth")
    for name in ("text.pth", "text.safetensors", "empty.pth", "pickle.pth", "code.pth", "list.pth", "none.pth", "numbers.pth",
                 "unnamed.pth", "script.pth"):
        with (warnings.catch_warnings(record=True, action="always") as warned,
              pytest.raises(UserError, match=rf"--inception_weights=\S*/{name} is no file of weights alone: expected https://") as error):
            inception(str(tmp_path / name))
        assert "\n" not in str(error.value)
        assert not warned
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match=r"/other.pth is of another network, with 2 arrays, the first 'weight': expected https://\S+$"):
        inception(str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match=r"/absent.pth cannot be read \(No such file or directory\): expected https://\S+$"):
        inception(str(tmp_path / "absent.pth"))
    with pytest.raises(UserError, match=r" cannot be read \(Is a directory\)"):
        inception(str(tmp_path))


def test_inception_refuses_other_shapes(weights, tmp_path):
    import torch

    state = torch.load(weights, weights_only=True)
    torch.save(state | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "shapes.pth")
    with pytest.raises(UserError, match=r"/shapes.pth is of another network, with \d+ arrays"):
        inception(str(tmp_path / "shapes.pth"))


def test_pictures_are_retrieved_by_what_they_look_like():
    """The true pictures first, whatever their contrast and detail; of noise the ranks are chance; of a picture its negative is the last."""
    random = np.random.default_rng(0)
    pictures = random.integers(64, 192, (300, 8, 8, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    pictures[7], pictures[3] = pictures[250], 128  # a copy, and one that lies in the middle of all
    truth = np.arange(200, 300)
    np.testing.assert_array_equal(statistics.retrieved(pictures, pictures[200:], truth, 256), 1)  # the copy's rank is shared
    grainy = pictures[200:] // 2 + random.integers(32, 97, (100, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(statistics.retrieved(pictures, grainy, truth, 256), 1)
    faint = pictures[200:] // 8 + 112
    np.testing.assert_array_equal(statistics.retrieved(pictures, faint, truth, 256), 1)
    ranks = statistics.retrieved(pictures, random.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8), truth, 256)
    assert abs(ranks.mean() - 150.5) < 3 * 300 / np.sqrt(12 * 100)
    assert (ranks <= 5).sum() < 8  # 1.7 expected
    assert statistics.retrieved(pictures, 255 - pictures[200:], truth, 256).min() > 297
    assert statistics.retrieved(pictures, pictures[200:], np.roll(truth, 1), 256).min() > 1
