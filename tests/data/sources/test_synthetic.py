"""Toy points against their densities: integrals on grids, moments, and samples' entropy."""

import math
import pickle

import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from ntm_jax.data import pipeline
from ntm_jax.data.sources import open_source, synthetic
from ntm_jax.errors import UserError

NAMES = ("moons", "checkerboard", "gaussians")
LEVELS = (0.02, 0.3, 0.9, 0.999999, 1.0)


@pytest.fixture(scope="module")
def sources():
    return {
        name: {split: open_source(f"toy:{name}", split) for split in ("train", "test")}
        for name in NAMES
    }


def points(source):
    """All records, [n, 2] float64."""
    return (
        np.stack([source.records[i]["image"] for i in range(len(source.records))])
        .reshape(-1, 2)
        .astype(np.float64)
    )


def grid(t, side=241):  # steps of 0.022 at t = 0.02: finer than any edge
    """Points [side^2, 2] of a square with all but 1e-6 of the noised data, and the area of each."""
    half = (1 - t) * 2.6 + 5.5 * t
    line, step = np.linspace(-half, half, side, retstep=True)
    return np.stack(np.meshgrid(line, line), -1).reshape(-1, 2), step**2


@pytest.mark.parametrize("t", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_densities_integrate_to_1_with_mean_0_and_their_levels_variance(sources, name, t):
    where, area = grid(t)
    mass = area * np.exp(sources[name]["test"].log_density(where, t))
    assert mass.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(mass @ where, 0, atol=1e-6)
    np.testing.assert_allclose(mass @ where**2, (1 - t) ** 2 + t**2, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_pure_noise_is_standard_normal(sources, name):
    where = np.random.default_rng(0).normal(size=(1000, 2)) * 3
    normal = -0.5 * np.sum(where**2, 1) - math.log(2 * math.pi)
    log_density = sources[name]["test"].log_density
    np.testing.assert_allclose(log_density(where, 1.0), normal, rtol=1e-12)
    np.testing.assert_allclose(
        log_density(where, 1 - 1e-7), normal, atol=1e-5
    )  # no jump on the way there


@pytest.mark.parametrize("t", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_entropy_of_their_density(sources, name, t):
    """Means of log p and its square over noised samples equal integrals to 4 standard errors."""
    source = sources[name]["train"]
    random = np.random.default_rng(1)
    x = source.records.records.images[:10_000].reshape(-1, 2)
    found = source.log_density((1 - t) * x + t * random.normal(size=x.shape), t)
    where, area = grid(t)
    log_density = source.log_density(where, t)
    for power in (1, 2):
        expected = np.sum(area * np.exp(log_density) * log_density**power)
        assert abs(np.mean(found**power) - expected) < 4 * np.std(found**power) / math.sqrt(len(x))


@pytest.mark.parametrize("name", NAMES)
def test_samples_lie_where_their_density_says(sources, name):
    """Counts in the cells of a 24 x 24 board, of which the density is integrated: chi-squared."""
    source, t = sources[name]["train"], 0.05
    x = source.records.records.images[:200_000].reshape(-1, 2)
    x = (1 - t) * x + t * np.random.default_rng(2).normal(size=x.shape)
    cells, inside, half = 24, 12, 2.5
    step = 2 * half / (cells * inside)
    line = (np.arange(cells * inside) + 0.5) * step - half
    density = np.exp(
        source.log_density(np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2), t)
    )
    expected = len(x) * step**2 * density.reshape(cells, inside, cells, inside).sum((1, 3))
    counts = np.histogram2d(*x.T, bins=np.linspace(-half, half, cells + 1))[0]
    kept = expected > 20
    chi_squared, freedom = np.sum((counts - expected)[kept] ** 2 / expected[kept]), kept.sum()
    assert freedom > 100
    assert abs(chi_squared - freedom) < 4.5 * math.sqrt(2 * freedom)


def test_samples_have_mean_0_and_variance_1(sources):
    for name in NAMES:
        for split, count in (("train", 1_000_000), ("test", 2_000)):
            source = sources[name][split]
            x = source.records.records.images.reshape(-1, 2).astype(np.float64)
            assert len(x) == len(source.records) == count
            for values, expected in ((x, 0), (x**2, 1)):
                assert (abs(values.mean(0) - expected) < 4 * values.std(0) / math.sqrt(count)).all()


def test_modes_are_apart():
    """Gaussians are 7 deviations apart; half the checkerboard and the moons' middle are empty."""
    centre, between = synthetic._MEANS[0], synthetic._MEANS[:2].mean(0)
    log_density = synthetic.gaussians_log_density(np.stack([centre, between]), 0.02)
    assert log_density[0] - log_density[1] > 6
    corners = synthetic._SIDE * (np.array([(0, 0), (0, 1)]) + 0.5)
    assert np.diff(synthetic.checkerboard_log_density(corners, 0.02)) < -100
    assert synthetic.moons_log_density(np.zeros((1, 2)), 0.02) < -10


def test_twice_as_many_nodes_change_nothing(monkeypatch):
    where = np.random.default_rng(3).uniform(-4, 4, (500, 2))
    for t in (0.02, 0.1, 0.6):
        coarse = synthetic.moons_log_density(where, t)
        with monkeypatch.context() as patch:
            patch.setattr(synthetic, "_NODES", 2 * synthetic._NODES)
            np.testing.assert_allclose(
                np.expm1(synthetic.moons_log_density(where, t) - coarse), 0, atol=1e-6
            )


@pytest.mark.parametrize("name", NAMES)
def test_densities_are_finite_far_outside_and_fall(sources, name):
    log_density = sources[name]["test"].log_density
    far = np.array([[3.0, 0], [30, 0], [0, 300], [-3000, 3000]])
    for t in LEVELS:
        found = log_density(far, t)
        assert np.isfinite(found).all()
        assert (np.diff(found) < 0).all()
    assert found.dtype == np.float64


@pytest.mark.parametrize("t", [0.02, 0.5, 0.9999])
def test_the_checkerboard_is_a_mixture_of_noised_squares(t):
    """One square's factor against quadrature, in the middle and far outside."""
    z, low, width = np.array([0.3, 1.0, -4.0, 9.0]), 0.2 / t, (1 - t) * 0.8 / t
    nodes, weights = np.polynomial.legendre.leggauss(400)
    m = low + width * (1 + nodes) / 2
    expected = np.log(
        np.exp(-0.5 * (z[:, None] - m) ** 2 - 0.5 * math.log(2 * math.pi)) @ weights / 2 + 1e-300
    )
    known = expected > -600
    assert known.any()
    np.testing.assert_allclose(
        synthetic._log_interval_mean(z, low, width)[known], expected[known], rtol=1e-6, atol=1e-8
    )


def test_a_narrow_square_is_nearly_a_point():
    """Both branches of the computation agree with the expansion to second order in its width."""
    z = np.array([0.0, 0.5, 3.0])
    for width in (1e-12, 1e-7, 0.9999e-4, 1.0001e-4, 1e-2):
        normal = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
        expected = normal + np.log1p((z**2 - 1) * width**2 / 24)
        np.testing.assert_allclose(
            synthetic._log_interval_mean(z, -width / 2, width), expected, atol=1e-8
        )


def test_records_are_reproducible_and_streams_differ(sources):
    for name in NAMES:
        train, test = (sources[name][split] for split in ("train", "test"))
        assert pipeline.spec(train, 1) == pipeline.DataSpec(
            (1, 2, 1), 1, pixel_levels=0, num_classes=0, count=1_000_000
        )
        assert (pipeline.spec(train, 1).tokens, pipeline.spec(train, 1).dim, train.version) == (
            2,
            1,
            "1",
        )
        again = points(open_source(f"toy:{name}", "train[999990:]"))
        np.testing.assert_array_equal(again, train.records.records.images[-10:, 0, :, 0])
        assert train.records[5]["image"].dtype == np.float32
        assert train.records[5]["label"] == -1
        pairs = [
            source.records.records.images.reshape(-1).view(np.int64) for source in (train, test)
        ]
        assert len(np.unique(pairs[1])) == 2_000
        # np.isin would sort the million.
        held_out = np.sort(pairs[1])
        nearest = held_out[np.searchsorted(held_out, pairs[0]).clip(max=1_999)]
        assert not (nearest == pairs[0]).any()
        likeness = np.corrcoef(
            train.records.records.images[:2_000].reshape(-1, 2).T, points(test).T
        )[:2, 2:]
        # From one stream they would share modes and angles.
        assert (abs(likeness) < 4.5 / math.sqrt(2_000)).all()


def test_a_source_can_be_pickled(sources):
    for name in NAMES:
        test = sources[name]["test"]
        again = pickle.loads(pickle.dumps(test))
        np.testing.assert_array_equal(points(again)[:5], points(test)[:5])
        where = points(test)[:5]
        np.testing.assert_array_equal(again.log_density(where, 0.3), test.log_density(where, 0.3))


@pytest.mark.parametrize("t", [0.04, 0.5, 1.0])
@pytest.mark.parametrize(("name", "shape"), [("mixture", (4, 4, 1)), ("field", (8, 8, 1))])
def test_data_of_more_dimensions_have_mean_0_and_variance_1_and_their_density(name, shape, t):
    """The density against a sum of SciPy's normal densities, and its integral by weighting."""
    test = open_source(f"toy:{name}", "test")
    x = test.records.records.images.reshape(2_000, -1).astype(np.float64)
    assert test.image_shape == shape
    assert test.planar_extent == 0
    assert abs(np.mean(x**2) - 1) < 0.05
    assert np.abs(x.mean(0)).max() < 5 / math.sqrt(2_000)
    points = (1 - t) * x[:20] + t * np.random.default_rng(0).normal(size=(20, x.shape[1]))
    if name == "field":
        means, covariance = np.zeros((1, 64)), np.kron(*[synthetic._CORRELATION] * 2)
    else:
        means, covariance = synthetic._CORNER_MEANS, synthetic._SPREAD**2 * np.eye(16)
    noised = (1 - t) ** 2 * covariance + t**2 * np.eye(len(covariance))
    parts = [stats.multivariate_normal((1 - t) * mean, noised).logpdf(points) for mean in means]
    expected = logsumexp(parts, 0) - math.log(len(means))
    np.testing.assert_allclose(test.log_density(points, t), expected, rtol=1e-9)
    second = x.T @ x / len(x)  # of the samples, against the density's
    wanted = covariance + means.T @ means / len(means)
    assert np.abs(second - wanted).max() < 6 / math.sqrt(2_000)


def test_a_mistake_is_named_in_one_line():
    with pytest.raises(UserError, match=r"^data\.source toy:spiral is not known: expected toy"):
        open_source("toy:spiral", "train")
