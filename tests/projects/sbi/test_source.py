"""The source `sbi:TASK`: simulators against their likelihoods, and the benchmark's files.

Symbols: n draws, D parameters, E numbers of x.
"""

import bz2
import math

import numpy as np
import pytest
from scipy import stats

from ntm_jax.data import sources
from ntm_jax.projects.sbi import references, source, tasks

SIZES = {"two_moons": (2, 2), "slcp": (5, 8), "slcp_moments": (5, 5), "gaussian_mixture": (2, 2),
         "bernoulli_glm": (10, 10)}
# Two parameters near each other, so that ratios of their likelihoods have a small variance.
NEAR = {
    "slcp": ([0.5, -1.0, 1.2, -0.9, 0.4], [0.4, -0.95, 1.15, -0.88, 0.3]),
    "gaussian_mixture": ([2.0, -3.0], [2.02, -3.02]),
    "bernoulli_glm": (np.linspace(-0.5, 0.5, 10), np.linspace(-0.4, 0.45, 10)),
}


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", SIZES)
def test_shapes_and_the_support_of_the_prior(name):
    task, (dim, width) = tasks.find(name), SIZES[name]
    theta = task.draw_prior(rng(), 7)
    x = task.simulate(rng(), theta)
    assert (theta.shape, x.shape) == ((7, dim), (7, width))
    assert np.isfinite(task.log_joint(x[0], theta)[0])
    if name != "bernoulli_glm":
        assert np.isneginf(task.log_joint(x[0], theta + 100)).all()


@pytest.mark.parametrize("name", NEAR)
def test_the_mean_ratio_of_likelihoods_is_one(name):
    """E p(x | b) / p(x | a) = 1 over simulations x of a, if both are densities of x."""
    task, (a, b) = tasks.find(name), np.array(NEAR[name])
    x = task.simulate(rng(), np.tile(a, (20_000, 1)))
    ratio = np.exp(task.log_likelihood(x, b[None]) - task.log_likelihood(x, a[None]))
    assert 0.1 < ratio.std() < 1.5  # it tests something, and the error below means something
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(x))


@pytest.mark.parametrize("name", ["two_moons", "gaussian_mixture"])
def test_the_density_of_x_integrates_to_one(name):
    theta, half, points = {"two_moons": ([0.3, -0.5], 0.2, 401),
                           "gaussian_mixture": ([2.0, -3.0], 6.0, 601)}[name]
    task = tasks.find(name)
    middle = task.simulate(rng(), np.tile(theta, (1000, 1))).mean(0)
    side, step = np.linspace(-half, half, points, retstep=True)
    grid = middle + np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    total = np.exp(task.log_likelihood(grid, np.array([theta]))).sum() * step**2
    assert total == pytest.approx(1, abs=2e-3)


def test_the_crescents_entropy():
    """A density with the simulator's entropy as its cross-entropy is the simulator's."""
    theta, task = np.array([[0.3, -0.5]]), tasks.find("two_moons")
    x = task.simulate(rng(), np.tile(theta, (20_000, 1)))
    found = -task.log_likelihood(x, theta)
    radius = 0.1 + 0.01 * np.random.default_rng(1).standard_normal(100_000)
    entropy = np.log(np.pi * radius).mean() + 0.5 * math.log(2 * math.pi * math.e * 0.01**2)
    assert abs(found.mean() - entropy) < 4 * found.std() / math.sqrt(len(x))


def test_four_points_of_one_gaussian():
    theta, task = np.array([NEAR["slcp"][0]]), tasks.find("slcp")
    x = task.simulate(rng(), theta)[0]
    one, two, across = 1.2**2, 0.9**2, math.tanh(0.4)
    covariance = [[one**2 + 1e-6, across * one * two], [across * one * two, two**2 + 1e-6]]
    expected = stats.multivariate_normal(theta[0, :2], covariance).logpdf(x.reshape(4, 2)).sum()
    assert task.log_likelihood(x, theta)[0] == pytest.approx(expected)


def test_moments_have_the_likelihood_of_their_points():
    task, moments = tasks.find("slcp"), tasks.find("slcp_moments")
    theta = task.draw_prior(rng(), 50)
    x = task.simulate(rng(), theta[:3])
    of_points = x[0].reshape(4, 2)
    found = moments.summary(x)
    factor = np.linalg.cholesky(np.cov(of_points.T, bias=True))
    np.testing.assert_allclose(found[0], [
        *of_points.mean(0), np.log(factor[0, 0]), np.arcsinh(factor[1, 0] / factor[1, 1]),
        np.log(factor[1, 1])])
    for points, statistics in zip(x, found, strict=True):
        np.testing.assert_allclose(moments.log_likelihood(statistics, theta),
                                   task.log_likelihood(points, theta))
    np.testing.assert_array_equal(moments.simulate(rng(), theta[:3]), found)


def test_the_design_convolves_the_stimulus_with_a_filter():
    stimulus, taps = tasks._X[:, 1], np.linspace(1, 2, 9)
    expected = np.convolve(stimulus, taps)[:100]
    np.testing.assert_allclose(tasks._X @ [3, *taps], 3 + expected, atol=1e-12)
    assert stimulus[0] == pytest.approx(0.49671414)  # of RandomState(42)


def test_spikes_have_the_likelihood_of_their_sums():
    theta = tasks.find("bernoulli_glm").draw_prior(rng(), 3)
    odds = theta @ tasks._X.T
    spikes = rng().random(odds.shape) < 0.3
    expected = stats.bernoulli(1 / (1 + np.exp(-odds))).logpmf(spikes).sum(1)
    found = tasks.find("bernoulli_glm").log_likelihood(spikes @ tasks._X, theta)
    np.testing.assert_allclose(found, expected)


def test_the_prior_of_filters_is_smooth():
    """Its precision is 1/2 for the offset, and F^T F for the filter (Lueckmann et al., T.5)."""
    second = np.eye(9) - 2 * np.eye(9, k=-1) + np.eye(9, k=-2)
    root = second + np.diag(np.sqrt(np.arange(9) / 9))
    precision = np.zeros((10, 10))
    precision[0, 0], precision[1:, 1:] = 0.5, root.T @ root
    covariance, task = np.linalg.inv(precision), tasks.find("bernoulli_glm")
    theta = task.draw_prior(rng(), 5)
    expected = stats.multivariate_normal(np.zeros(10), covariance).logpdf(theta)
    np.testing.assert_allclose(task.log_prior(theta), expected)
    many = task.draw_prior(rng(), 20_000)
    np.testing.assert_allclose(np.mean((many @ precision) * many), 1, atol=0.02)


def test_a_source_is_the_same_simulations_every_time():
    train, test = (sources.open_source("sbi:slcp,count=50", split) for split in ("train", "test"))
    assert (len(train.records), len(test.records)) == (45, 5)
    assert (train.columns, train.condition_width, train.pixel_levels) == (5, 8, 0)
    source._arrays.cache_clear()
    again = sources.open_source("sbi:slcp,count=50", "train")
    assert again.version == train.version
    np.testing.assert_array_equal(again.records[3]["condition"], train.records[3]["condition"])
    fresh, _ = source.simulate("slcp", 50, source.FRESH)
    known, _ = source.simulate("slcp", 50, 0)
    assert not np.isin(fresh, known).any()


def write_references(root, task: str, samples, x) -> None:
    """The files of a package sbibm in `root`, with one observation's reference posterior."""
    folder = root / "sbibm" / "tasks" / task / "files" / "num_observation_1"
    folder.mkdir(parents=True)
    (root / "sbibm" / "__init__.py").write_text("raise ImportError('it is not imported')\n")
    with bz2.open(folder / "reference_posterior_samples.csv.bz2", "wt") as file:
        np.savetxt(file, samples, delimiter=",", header="parameter_1,parameter_2", comments="")
    np.savetxt(folder / "observation.csv", x[None], delimiter=",", header="data", comments="")


def test_references_are_read_without_an_import(tmp_path, monkeypatch):
    samples, x = rng().normal(size=(20, 2)), np.array([1.5, -2.0])
    write_references(tmp_path, "two_moons", samples, x)
    monkeypatch.syspath_prepend(tmp_path)
    found = references.read("two_moons", 1)
    np.testing.assert_allclose(found.samples, samples)
    np.testing.assert_array_equal(found.x, x)
    points = rng().normal(size=8)
    write_references(tmp_path, "slcp", samples, points)
    np.testing.assert_allclose(
        references.read("slcp_moments", 1).x, tasks.find("slcp_moments").summary(points[None])[0])
