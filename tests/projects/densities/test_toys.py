"""Toy points against their densities: integrals on grids, and counts of samples."""

import math
import pickle

import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from ntm_jax.data import pipeline
from ntm_jax.data.sources import open_as_stored, open_source
from ntm_jax.projects.densities import toys

NAMES = ("moons", "checkerboard", "gaussians")


@pytest.fixture(scope="module")
def sources():
    return {
        name: {split: open_source(f"toy:{name}", split) for split in ("train", "test")}
        for name in NAMES
    }


def points(source, count=None):
    """The first records, [n, 2]; all by default."""
    stored = open_as_stored(source.name, source.split)
    return stored.records.images[:count].reshape(-1, 2)


def grid(t):
    """Points [side^2, 2] of a square with all but 1e-6 of the noised data, and the area of each."""
    half = (1 - t) * 2.6 + 5.5 * t
    side = 241 if t < 0.1 else 121  # steps of 0.022 at t = 0.02: finer than any edge
    line, step = np.linspace(-half, half, side, retstep=True)
    return np.stack(np.meshgrid(line, line), -1).reshape(-1, 2), step**2


@pytest.mark.parametrize("t", [0.02, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_densities_integrate_to_1_with_mean_0_and_their_levels_variance(sources, name, t):
    where, area = grid(t)
    mass = area * np.exp(sources[name]["test"].log_density(where, t))
    assert mass.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(mass @ where, 0, atol=1e-6)
    np.testing.assert_allclose(mass @ where**2, (1 - t) ** 2 + t**2, atol=1e-4)


@pytest.mark.parametrize("t", [0.05, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_samples_lie_where_their_density_says(sources, name, t):
    """Counts in the cells of a 24 x 24 board, of which the density is integrated: chi-squared."""
    source = sources[name]["train"]
    x = points(source, 200_000)
    x = (1 - t) * x + t * np.random.default_rng(2).normal(size=x.shape)
    cells, inside, half = 24, 6, 2.5
    step = 2 * half / (cells * inside)
    line = (np.arange(cells * inside) + 0.5) * step - half
    middles = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    density = np.exp(source.log_density(middles, t))
    expected = len(x) * step**2 * density.reshape(cells, inside, cells, inside).sum((1, 3))
    counts = np.histogram2d(*x.T, bins=np.linspace(-half, half, cells + 1))[0]
    kept = expected > 20
    chi_squared, freedom = np.sum((counts - expected)[kept] ** 2 / expected[kept]), kept.sum()
    assert freedom > 100
    assert abs(chi_squared - freedom) < 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", NAMES)
def test_pure_noise_is_standard_normal(sources, name):
    log_density = sources[name]["test"].log_density
    where = np.random.default_rng(0).normal(size=(1000, 2)) * 3
    normal = -0.5 * np.sum(where**2, 1) - math.log(2 * math.pi)
    np.testing.assert_allclose(log_density(where, 1.0), normal, rtol=1e-12)
    # no jump on the way there
    np.testing.assert_allclose(log_density(where, 1 - 1e-7), normal, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_records_are_reproducible_and_streams_differ(sources, name):
    train, test = (sources[name][split] for split in ("train", "test"))
    spec = pipeline.spec(train, 1)
    assert spec == pipeline.DataSpec((1, 2, 1), 1, 0, num_classes=0, count=1_000_000)
    assert (spec.tokens, spec.dim, train.version, len(test.records)) == (2, 1, "1", 2_000)
    again = pickle.loads(pickle.dumps(open_source(f"toy:{name}", "train[999990:]")))
    for i, record in enumerate(again.records):
        np.testing.assert_array_equal(record["image"].ravel(), points(train)[-10 + i])
    assert (record["image"].dtype, record["label"]) == (np.float32, -1)
    # From one stream they would share modes and angles.
    likeness = np.corrcoef(points(train, 2_000).T, points(test).T)[:2, 2:]
    assert (abs(likeness) < 4.5 / math.sqrt(2_000)).all()


@pytest.mark.parametrize("t", [0.04, 0.5, 1.0])
@pytest.mark.parametrize(("name", "shape"), [("mixture", (4, 4, 1)), ("field", (8, 8, 1))])
def test_data_of_more_dimensions_have_mean_0_and_variance_1_and_their_density(name, shape, t):
    """The density against a sum of SciPy's normal densities, and its integral by weighting."""
    test = open_source(f"toy:{name}", "test")
    x = np.stack([record["image"].ravel() for record in test.records]).astype(np.float64)
    assert (test.image_shape, test.planar_extent) == (shape, 0)
    assert abs(np.mean(x**2) - 1) < 0.05
    assert np.abs(x.mean(0)).max() < 5 / math.sqrt(2_000)
    points = (1 - t) * x[:20] + t * np.random.default_rng(0).normal(size=(20, x.shape[1]))
    if name == "field":
        means, covariance = np.zeros((1, 64)), np.kron(*[toys._CORRELATION] * 2)
    else:
        means, covariance = toys._CORNER_MEANS, toys._SPREAD**2 * np.eye(16)
    noised = (1 - t) ** 2 * covariance + t**2 * np.eye(len(covariance))
    parts = [stats.multivariate_normal((1 - t) * mean, noised).logpdf(points) for mean in means]
    expected = logsumexp(parts, 0) - math.log(len(means))
    np.testing.assert_allclose(test.log_density(points, t), expected, rtol=1e-9)
    second = x.T @ x / len(x)  # of the samples, against the density's
    wanted = covariance + means.T @ means / len(means)
    assert np.abs(second - wanted).max() < 6 / math.sqrt(2_000)
