"""Means, and scores of features against torch-fidelity's, closed forms and cases made by hand."""

import functools
import json
import math

import numpy as np
import pytest
import scipy.linalg

from ntm_jax.evaluation import statistics

SHAPES = [  # n, m, d, seed
    (150, 100, 20, 1), (50, 70, 64, 2), (90, 90, 5, 3), (40, 25, 100, 4), (30, 200, 1, 5),
    pytest.param((2000, 1500, 512, 6), marks=pytest.mark.slow)]  # more than are merged at once


def correlated(n, m, d, seed):
    """Two sets of correlated features [n, d] and [m, d], slightly different from each other."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) / np.sqrt(d)
    real, noise = rng.normal(size=(n, d)) @ mix, rng.normal(size=(m, d))
    generated = noise @ (mix + 0.1 * rng.normal(size=(d, d))) + 0.3
    return real, generated


def exactly(mean, covariance, n=200, seed=0):
    """Features [n, d] with exactly this sample mean and unbiased sample covariance."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    white = np.linalg.qr(x - x.mean(0))[0] * np.sqrt(n - 1)
    features = white @ np.linalg.cholesky(covariance).T + mean
    np.testing.assert_allclose(np.cov(features, rowvar=False), covariance, rtol=1e-9, atol=1e-9)
    return features


def frechet(real, generated) -> float:
    real, generated = map(statistics.FeatureStatistics.of, (real, generated))
    return statistics.frechet(real, generated)["mean"]


def precision_recall(*arguments):
    return tuple(figure["mean"] for figure in statistics.precision_recall(*arguments))


def test_mean_and_stderr():
    values = np.array([1, 2, 6], np.float32)
    stderr = math.sqrt((4 + 1 + 9) / 2 / 3)
    assert statistics.mean_and_stderr(values) == {"mean": 3.0, "stderr": pytest.approx(stderr)}
    found = statistics.mean_and_stderr(values, np.array([4, 1, 4], np.float32))
    assert found == {"mean": 3.0, "stderr": pytest.approx(stderr), "noise_stderr": 1.0}
    assert statistics.mean_and_stderr(values[:1]) == {"mean": 1.0, "stderr": 0.0}
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("shape", SHAPES)
def test_frechet_precision_and_recall_are_torch_fidelitys(shape):
    torch = pytest.importorskip("torch")
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    metric_prc = pytest.importorskip("torch_fidelity.metric_prc")
    real, generated = correlated(*shape)
    theirs = metric_prc.prc_features_to_metric(
        torch.from_numpy(generated), torch.from_numpy(real), prc_neighborhood=3,
        prc_batch_size=64, save_cpu_ram=True, verbose=False)
    expected = pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert precision_recall(real, generated) == expected
    if shape[2] == 1:  # torch-fidelity takes the covariance of one feature for a number
        real, generated = (np.pad(x, ((0, 0), (0, 1))) for x in (real, generated))
    gaussians = [metric_fid.fid_features_to_statistics(torch.from_numpy(x))
                 for x in (real, generated)]
    theirs = metric_fid.fid_statistics_to_metric(*gaussians, False)["frechet_inception_distance"]
    assert theirs > 0.01
    assert frechet(real, generated) == pytest.approx(theirs, rel=1e-3)
    single = frechet(real.astype(np.float32), generated.astype(np.float32))
    assert single == pytest.approx(theirs, rel=1e-3)
    kid = statistics.kernel_distance(real, generated, subsets=3)["mean"]
    theirs = metric_kid.kid_features_to_metric(
        torch.from_numpy(real), torch.from_numpy(generated), kid_subsets=3,
        kid_subset_size=min(1000, len(real), len(generated)), rng_seed=0, verbose=False)
    assert kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)


def test_frechet_is_the_closed_form_of_two_gaussians():
    rng = np.random.default_rng(7)
    means, roots = rng.normal(size=(2, 6)), rng.normal(size=(2, 6, 6))
    one, two = (a @ a.T + 0.1 * np.eye(6) for a in roots)
    expected = (np.square(means[0] - means[1]).sum() + np.trace(one + two)
                - 2 * np.trace(scipy.linalg.sqrtm(one @ two).real))
    ours = frechet(exactly(means[0], one), exactly(means[1], two, 300, 1))
    assert ours == pytest.approx(expected, rel=1e-6)
    few = correlated(25, 1, 100, 4)[0]  # fewer images than features
    assert 0 <= frechet(few, few[::-1]) < 1e-9
    a, b = exactly([0, 0], np.diag([4.0, 1])), exactly([3, 0], np.diag([1.0, 25]), seed=1)
    assert frechet(a, b) == pytest.approx(9 + (2 - 1) ** 2 + (1 - 5) ** 2, rel=1e-6)


def test_the_kernel_distance_is_its_double_sum():
    real, generated = correlated(6, 6, 3, 7)

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    def inside(x):  # by point, over the others
        return [np.mean([kernel(x[i], x[j]) for j in range(6) if j != i]) for i in range(6)]

    across = [np.mean([kernel(x, y) for x in real]) for y in generated]
    expected = np.mean(inside(real)) + np.mean(inside(generated)) - 2 * np.mean(across)
    found = statistics.kernel_distance(real, generated)
    assert found["mean"] == pytest.approx(expected)
    by_image = 2 * (np.array(inside(generated)) - across)
    assert found["stderr"] == pytest.approx(by_image.std(ddof=1) / math.sqrt(6))


def test_statistics_of_batches_are_those_of_all_features(monkeypatch):
    """Of more features than are merged at once, and more than are kept."""
    real, features = correlated(300, 2300, 4, 8)
    whole = statistics.frechet(*map(statistics.FeatureStatistics.of, (real, features)))
    monkeypatch.setattr(statistics, "KEPT", 400)
    found = statistics.FeatureStatistics(2300)
    for batch in np.split(features.astype(np.float32), [5, 900, 1700, 1701]):
        found.add(batch)
    mean, root = found.gaussian()
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(root.T @ root, np.cov(features, rowvar=False), rtol=1e-6, atol=1e-6)
    assert found.count == 2300
    assert found.kept.shape == (400, 4)
    assert len({*map(tuple, found.kept)} & {*map(tuple, features.astype(np.float32))}) == 400
    assert 150 < np.isin(features[:1150, 0].astype(np.float32), found.kept).sum() < 250
    part = statistics.frechet(statistics.FeatureStatistics.of(real), found)
    assert part["mean"] == pytest.approx(whole["mean"], rel=1e-6)
    assert part["stderr"] == pytest.approx(whole["stderr"], rel=0.2)  # of a deviation over 400


def test_precision_and_recall_by_hand():
    real = np.array([[0.0], [1], [3], [10]])  # balls of the nearest neighbour: 1, 1, 2, 7
    generated = np.array([[-1.0], [2.5], [4], [17.5], [100]])  # balls: 3.5, 1.5, 1.5, 13.5, 82.5
    # -1, 2.5 and 4 are covered; 17.5 is half too far. Every real point is covered.
    assert precision_recall(real, generated, 1) == (3 / 5, 4 / 4)
    assert precision_recall(real, generated[:3], 1) == (3 / 3, 3 / 4)  # 10 is too far
    assert precision_recall(real, real + 1000, 3) == (0, 0)
    # One image, generated again and again, has balls of radius 0.
    assert precision_recall(real, np.array([[3.0]] * 5), 3) == (1, 1 / 4)


@pytest.mark.parametrize("scale", [1.0, 1.3])  # of the samples, beside the real ones
def test_errors_of_feature_scores_are_the_spread_of_other_samples(scale, monkeypatch):
    few = functools.partial(statistics.kernel_distance, subsets=5)  # 100 take too long here
    monkeypatch.setattr(statistics, "kernel_distance", few)
    rng, mix = np.random.default_rng(0), np.diag(np.geomspace(2, 0.05, 6))
    real = rng.normal(size=(150, 6)) @ mix
    of = statistics.FeatureStatistics.of
    found = [statistics.feature_scores(of(real), of(scale * rng.normal(size=(300, 6)) @ mix + 0.1))
             for _ in range(60)]
    for name in ("frechet", "kid", "precision"):
        spread = np.std([scores[name] for scores in found], ddof=1)
        stated = np.mean([scores[f"{name}_stderr"] for scores in found])
        # the spread of 60 is known to 9 %, and the error is of first order
        assert stated == pytest.approx(spread, rel=0.3), name
    share = found[0]["recall"]  # whose error is over the real ones
    assert found[0]["recall_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 149))


def test_retrieval_ranks_pictures_by_layout_and_colour():
    """True pictures rank first at any contrast and detail, noise by chance, negatives last."""
    random = np.random.default_rng(0)
    pictures = random.integers(64, 192, (300, 8, 8, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    pictures[7], pictures[3] = pictures[250], 128  # a copy, and one in the middle of all others
    truth = np.arange(200, 300)

    def ranks(generated, own=truth):
        return statistics.retrieved(pictures, generated, own, 256)

    np.testing.assert_array_equal(ranks(pictures[200:]), 1)  # a picture and its copy share a rank
    grain = random.integers(32, 97, (100, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(ranks(pictures[200:] // 2 + grain), 1)
    faint = pictures[200:] // 8 + 112
    np.testing.assert_array_equal(ranks(faint), 1)
    by_chance = ranks(random.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8))
    # The mean of 100 uniform ranks 1..300, with its standard error three times over.
    assert abs(by_chance.mean() - 150.5) < 3 * 300 / np.sqrt(12 * 100)
    assert (by_chance <= 5).sum() < 8  # 1.7 expected
    assert ranks(255 - pictures[200:]).min() > 297
    assert ranks(pictures[200:], np.roll(truth, 1)).min() > 1
