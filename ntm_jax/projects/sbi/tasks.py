"""Tasks of the benchmark sbibm (Lueckmann et al., arXiv 2101.04653): priors and simulators.

The likelihoods are the exact densities of the simulators, so prior times likelihood is the
posterior up to a constant. No jax is imported: grain's worker processes run this. Symbols: n draws;
D parameters theta; E numbers x that are observed.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy.linalg import solve_triangular

from ntm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Task:
    """A prior p(theta) and a simulator of p(x | theta).

    draw_prior: (random, n) -> theta [n, D] float64.
    simulate: (random, theta [n, D]) -> x [n, E] float64.
    log_prior: theta [n, D] -> [n] nats, -inf outside the prior's support.
    log_likelihood: (x [E] or [n, E], theta [n, D]) -> [n] nats, up to a function of x.
    """

    draw_prior: Callable
    simulate: Callable
    log_prior: Callable
    log_likelihood: Callable
    of_benchmark: str = ""  # the benchmark's name of the task; '' is the one it has here
    summary: Callable | None = None  # of the benchmark's observation [n, E'], [n, E]

    def log_joint(self, x, theta) -> np.ndarray:
        """log p(theta) p(x | theta) of x [E] at theta [n, D], up to a function of x, [n]."""
        theta = np.asarray(theta, np.float64)
        found = self.log_prior(theta)
        inside = np.isfinite(found)
        found[inside] += self.log_likelihood(np.asarray(x, np.float64), theta[inside])
        return found


def _box(half: float, dim: int) -> tuple[Callable, Callable]:
    """(draw_prior, log_prior) of the uniform prior on [-half, half]^dim."""

    def draw(random, n):
        return random.uniform(-half, half, (n, dim))

    def log_density(theta):
        inside = (np.abs(theta) <= half).all(1)
        return np.where(inside, -dim * math.log(2 * half), -np.inf)

    return draw, log_density


# Two moons: a crescent, shifted by a function of theta that takes two thetas to the same place.

_RADIUS, _SPREAD, _OFFSET = 0.1, 0.01, 0.25


def _moons_shift(theta):
    """[n, 2] -> [n, 2]."""
    total, difference = theta[:, 0] + theta[:, 1], theta[:, 1] - theta[:, 0]
    return np.stack([-np.abs(total), difference], 1) / math.sqrt(2)


def _simulate_moons(random, theta):
    angle = random.uniform(-math.pi / 2, math.pi / 2, len(theta))
    radius = random.normal(_RADIUS, _SPREAD, len(theta))
    crescent = np.stack([radius * np.cos(angle) + _OFFSET, radius * np.sin(angle)], 1)
    return crescent + _moons_shift(theta)


def _moons_log_likelihood(x, theta):
    """In polar coordinates the density is that of the radius, over pi times the radius."""
    across, along = (x - _moons_shift(theta) - [_OFFSET, 0]).T
    radius = np.maximum(np.hypot(across, along), 1e-12)
    z = (radius - _RADIUS) / _SPREAD
    constant = math.log(math.pi * _SPREAD * math.sqrt(2 * math.pi))
    return np.where(across > 0, -0.5 * z * z - np.log(radius) - constant, -np.inf)


# SLCP, simple likelihood and complex posterior: four points of one Gaussian of the plane.

_POINTS, _JITTER = 4, 1e-6


def _cholesky(theta):
    """The Cholesky factor of the covariance, as its entries (1,1), (2,1), (2,2), [n] each."""
    first, second = theta[:, 2] ** 2, theta[:, 3] ** 2
    across = np.tanh(theta[:, 4]) * first * second
    a = np.sqrt(first**2 + _JITTER)
    b = across / a
    return a, b, np.sqrt(second**2 + _JITTER - b**2)


def _simulate_slcp(random, theta):
    a, b, c = (entry[:, None] for entry in _cholesky(theta))
    z = random.standard_normal((len(theta), _POINTS, 2))
    points = np.stack([a * z[..., 0], b * z[..., 0] + c * z[..., 1]], -1)
    return (theta[:, None, :2] + points).reshape(len(theta), -1)


def _slcp_log_likelihood(x, theta):
    a, b, c = (entry[:, None] for entry in _cholesky(theta))
    first, second = np.moveaxis(x.reshape(-1, _POINTS, 2) - theta[:, None, :2], -1, 0)
    z = first / a
    w = (second - b * z) / c
    return np.sum(-0.5 * (z * z + w * w) - np.log(2 * math.pi * a * c), 1)


def _moments(x):
    """Sufficient statistics [n, 5] of points [n, 8]: their mean, and their covariance's factor.

    The Cholesky factor (a, 0; b, c) of the covariance of four points is (log a, asinh(b/c), log c),
    whose values are of order 1.
    """
    points = x.reshape(len(x), _POINTS, 2)
    mean = points.mean(1)
    first, second = np.moveaxis(points - mean[:, None], -1, 0)
    a = np.sqrt(np.mean(first**2, 1))
    b = np.mean(first * second, 1) / a
    c = np.sqrt(np.mean((second - (b / a)[:, None] * first) ** 2, 1))
    return np.stack([*mean.T, np.log(a), np.arcsinh(b / c), np.log(c)], 1)


def _simulate_moments(random, theta):
    return _moments(_simulate_slcp(random, theta))


def _moments_log_likelihood(x, theta):
    """The points' log-likelihood, which depends on their moments alone, up to a function of x."""
    x = np.atleast_2d(x)
    a, b, c = _cholesky(theta)
    of_points_a, of_points_c = np.exp(x[:, 2]), np.exp(x[:, 4])
    of_points_b = np.sinh(x[:, 3]) * of_points_c
    # |L^-1 (mean - m)|^2 and |L^-1 L_points|^2, L the factor of the covariance.
    z = (x[:, 0] - theta[:, 0]) / a
    w = (x[:, 1] - theta[:, 1] - b * z) / c
    aa = of_points_a / a
    squares = z**2 + w**2 + aa**2 + ((of_points_b - b * aa) / c) ** 2 + (of_points_c / c) ** 2
    return -_POINTS * (0.5 * squares + np.log(2 * math.pi * a * c))


# Gaussian mixture: theta is the mean of a wide and a narrow Gaussian.

_SCALES = np.array([1.0, 0.1])


def _simulate_mixture(random, theta):
    scale = _SCALES[random.integers(2, size=(len(theta), 1))]
    return theta + scale * random.standard_normal(theta.shape)


def _mixture_log_likelihood(x, theta):
    squares = np.sum((x - theta) ** 2, 1, keepdims=True) / _SCALES**2
    return np.logaddexp(*(-0.5 * squares - np.log(4 * math.pi * _SCALES**2)).T)


# Bernoulli GLM: spikes in 100 bins of time, whose log-odds are a filter's response to white noise.

_BINS, _TAPS = 100, 9


def _design() -> np.ndarray:
    """The offset, and the stimulus at each lag of the filter, [100, 10]."""
    stimulus = np.random.RandomState(42).randn(_BINS).astype(np.float32)
    lagged = [np.concatenate([np.zeros(lag), stimulus[: _BINS - lag]]) for lag in range(_TAPS)]
    return np.stack([np.ones(_BINS), *lagged], 1)


def _filter_root() -> np.ndarray:
    """R of the prior N(0, (R^T R)^-1), which favours smooth filters, [10, 10]."""
    difference = np.eye(_TAPS) - np.eye(_TAPS, k=-1)
    smooth = difference @ difference + np.diag(np.sqrt(np.arange(_TAPS) / _TAPS))
    root = np.zeros((_TAPS + 1, _TAPS + 1))
    root[0, 0], root[1:, 1:] = math.sqrt(0.5), smooth  # `smooth` is lower triangular
    return root


_X, _ROOT = _design(), _filter_root()


def _draw_filters(random, n):
    return solve_triangular(_ROOT, random.standard_normal((n, _TAPS + 1)).T, lower=True).T


def _filters_log_prior(theta):
    z = theta @ _ROOT.T
    log_det = np.sum(np.log(np.diag(_ROOT)))
    return -0.5 * np.sum(z * z + math.log(2 * math.pi), 1) + log_det


def _simulate_spikes(random, theta):
    """The sufficient statistics of the spikes: their number, and their sums of the stimulus."""
    odds = theta @ _X.T
    spikes = (random.random(odds.shape) < 1 / (1 + np.exp(-odds))).astype(np.float64)
    return spikes @ _X


def _spikes_log_likelihood(x, theta):
    """The log-odds' sum over spikes is theta times x; what is left out depends on x alone."""
    return np.sum(theta * x, 1) - np.sum(np.logaddexp(0, theta @ _X.T), 1)


_box_of_moons, _log_box_of_moons = _box(1.0, 2)
_box_of_slcp, _log_box_of_slcp = _box(3.0, 5)
_box_of_means, _log_box_of_means = _box(10.0, 2)

TASKS = {
    "two_moons": Task(_box_of_moons, _simulate_moons, _log_box_of_moons, _moons_log_likelihood),
    "slcp": Task(_box_of_slcp, _simulate_slcp, _log_box_of_slcp, _slcp_log_likelihood),
    "slcp_moments": Task(
        _box_of_slcp, _simulate_moments, _log_box_of_slcp, _moments_log_likelihood, "slcp",
        _moments),
    "gaussian_mixture": Task(
        _box_of_means, _simulate_mixture, _log_box_of_means, _mixture_log_likelihood),
    "bernoulli_glm": Task(
        _draw_filters, _simulate_spikes, _filters_log_prior, _spikes_log_likelihood),
}


def find(name: str) -> Task:
    """The task of this name; UserError for another."""
    if name not in TASKS:
        raise UserError(f"there is no task {name!r} of simulations: expected one of "
                        f"{', '.join(TASKS)}")
    return TASKS[name]
