"""The source `toy:NAME`, points whose density is known at every noise level.

`toy:moons`, `toy:checkerboard` and `toy:gaussians` are points of the plane as latents of shape 1 x
2 x 1, 1,000,000 in train and 2,000 in test, of mean 0 and variance 1. Two have more dimensions,
with 100,000 points in train: `toy:mixture`, a mixture of 32 Gaussians in 16 dimensions as latents
of shape 4 x 4 x 1, and `toy:field`, images of correlated Gaussians, 8 x 8 x 1.

n points. Densities are in nats, float64. No jax is imported: grain's worker processes run this.
"""

import numpy as np
from scipy.linalg import hadamard
from scipy.special import log_ndtr, logsumexp

from ntm_jax.data.sources.source import ArrayRecords, Source, check_split
from ntm_jax.errors import UserError

_SPLITS = ("train", "test")

# Points of the plane, scaled so that each coordinate has mean 0 and variance 1.

_EXTENT = 3.0  # half the side of the square that plots show: three standard deviations

_CENTRES, _DEVIATION = 8, 0.1  # Gaussians on a circle; their deviation as a share of its radius
_RADIUS = 1 / np.sqrt(0.5 + _DEVIATION**2)  # a coordinate's variance: radius^2 / 2 + deviation^2
_ANGLES = 2 * np.pi * np.arange(_CENTRES) / _CENTRES
_MEANS = _RADIUS * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)  # [8, 2]

_SIDE = np.sqrt(3) / 2  # of a square; four span a coordinate, which is uniform on +-sqrt(3)
_SQUARES = [(i - 2, j - 2) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
_CORNERS = _SIDE * np.array(_SQUARES)  # [8, 2], lower left

_THICKNESS = 0.1  # standard deviation of the isotropic noise about the moons
# Gauss-Legendre nodes on each moon: the density's relative error is below 1e-6 even at t = 0.
_NODES = 256


def _arcs(angle: np.ndarray) -> np.ndarray:
    """Points of the two moons at angles in [0, pi], [..., n] -> [2, ..., n, 2].

    They are scaled to mean 0 and variance 1 - thickness^2.
    """
    outer = np.stack([np.cos(angle), np.sin(angle)], -1)
    both = np.stack([outer, [1, 0.5] - outer])
    # For a uniform angle E cos = 0, E sin = 2/pi and E cos^2 = E sin^2 = 1/2; each moon is the
    # other, turned about (1/2, 1/4).
    variance = np.array([3 / 4, 9 / 16 - 1 / np.pi])
    return (both - [0.5, 0.25]) * np.sqrt((1 - _THICKNESS**2) / variance)


def _draw_gaussians(random: np.random.Generator, count: int) -> np.ndarray:
    means = _MEANS[random.integers(_CENTRES, size=count)]
    return means + _RADIUS * _DEVIATION * random.standard_normal((count, 2))


def _draw_checkerboard(random: np.random.Generator, count: int) -> np.ndarray:
    corners = _CORNERS[random.integers(len(_CORNERS), size=count)]
    return corners + _SIDE * random.random((count, 2))


def _draw_moons(random: np.random.Generator, count: int) -> np.ndarray:
    arcs = _arcs(np.pi * random.random(count))
    points = arcs[random.integers(2, size=count), np.arange(count)]
    return points + _THICKNESS * random.standard_normal((count, 2))


def gaussians_log_density(points: np.ndarray, t: float) -> np.ndarray:
    """log q(x_t) of `toy:gaussians` at points [n, 2] -> [n], in nats, 0 < t <= 1."""
    weights = np.full(_CENTRES, 1 / _CENTRES)
    return _log_mixture(points, t, _MEANS, weights, _RADIUS * _DEVIATION)


def moons_log_density(points: np.ndarray, t: float) -> np.ndarray:
    """log q(x_t) of `toy:moons` at points [n, 2] -> [n], in nats, 0 < t <= 1.

    The integral over the angle is a mixture over the quadrature's nodes.
    """
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)  # on [-1, 1], weights of sum 2
    means = _arcs(np.pi / 2 * (1 + nodes)).reshape(-1, 2)
    return _log_mixture(points, t, means, np.tile(weights / 4, 2), _THICKNESS)


def checkerboard_log_density(points: np.ndarray, t: float) -> np.ndarray:
    """log q(x_t) of `toy:checkerboard` at points [n, 2] -> [n], in nats, 0 < t <= 1."""
    low = (1 - t) * _CORNERS
    scaled = np.asarray(points, np.float64)[:, None] / t
    means = _log_interval_mean(scaled, low / t, (1 - t) * _SIDE / t)
    return logsumexp(np.sum(means, -1), 1) - np.log(len(_CORNERS)) - 2 * np.log(t)


def _log_mixture(points, t, means, weights, deviation) -> np.ndarray:
    """log of sum_m weights_m N((1-t) means_m, ((1-t)^2 deviation^2 + t^2) I), [n, d] -> [n]."""
    points, scale = np.asarray(points, np.float64), np.hypot((1 - t) * deviation, t)
    parts = []
    for some in np.split(points, range(4096, len(points), 4096)):  # 17 MB an array for 512 nodes
        squares = sum(
            (some[:, None, axis] / scale - (1 - t) / scale * means[:, axis]) ** 2
            for axis in range(means.shape[1])
        )
        parts.append(logsumexp(-0.5 * squares, 1, weights))
    return np.concatenate(parts) - means.shape[1] / 2 * np.log(2 * np.pi * scale**2)


def _log_interval_mean(z, low, width: float) -> np.ndarray:
    """log of the mean over m in [low, low + width] of the density of N(m, 1) at z; broadcasts."""
    if width < 1e-4:
        # The difference below would cancel; the relative error here is (z^2 - 1) width^2 / 24.
        return -0.5 * ((z - low - width / 2) ** 2 + np.log(2 * np.pi))
    # By symmetry in the lower tail, where log_ndtr keeps its precision.
    upper = width / 2 - np.abs(z - low - width / 2)
    log_upper, log_lower = log_ndtr(upper), log_ndtr(upper - width)
    return log_upper + np.log(-np.expm1(log_lower - log_upper)) - np.log(width)


# More dimensions, each of mean 0 and variance 1.

# A mixture about the rows of a Hadamard matrix and their negatives, whose second moment is I.
_SPREAD = 0.6  # deviation of a component
_SIGNS = hadamard(16)
_CORNER_MEANS = np.sqrt(1 - _SPREAD**2) * np.concatenate([_SIGNS, -_SIGNS])  # [32, 16]

# Neighbours in a row or a column of a field correlate; the covariance of pixels is R x R.
_FIELD_SIDE, _NEIGHBOURS = 8, 0.9
_PLACES = np.arange(_FIELD_SIDE)
_CORRELATION = _NEIGHBOURS ** np.abs(np.subtract.outer(_PLACES, _PLACES))  # R, [8, 8]


def _draw_mixture(random: np.random.Generator, count: int) -> np.ndarray:
    means = _CORNER_MEANS[random.integers(len(_CORNER_MEANS), size=count)]
    return means + _SPREAD * random.standard_normal((count, 16))


def _draw_field(random: np.random.Generator, count: int) -> np.ndarray:
    root = np.linalg.cholesky(_CORRELATION)
    white = random.standard_normal((count, _FIELD_SIDE, _FIELD_SIDE))
    return (root @ white @ root.T).reshape(count, -1)


def mixture_log_density(points: np.ndarray, t: float) -> np.ndarray:
    """log q(x_t) of `toy:mixture` at points [n, 16] -> [n], in nats, 0 < t <= 1."""
    count = len(_CORNER_MEANS)
    return _log_mixture(points, t, _CORNER_MEANS, np.full(count, 1 / count), _SPREAD)


def field_log_density(points: np.ndarray, t: float) -> np.ndarray:
    """log q(x_t) of `toy:field` at points [n, 64] -> [n], in nats, 0 < t <= 1."""
    values, vectors = np.linalg.eigh(_CORRELATION)
    images = np.asarray(points, np.float64).reshape(-1, _FIELD_SIDE, _FIELD_SIDE)
    variance = (1 - t) ** 2 * np.outer(values, values) + t**2
    squares = (vectors.T @ images @ vectors) ** 2 / variance
    return -0.5 * np.sum(squares + np.log(2 * np.pi * variance), (1, 2))


_PLANE = (1, 2, 1)
_TOYS = {  # how points are drawn, their density, and the shape of a record
    "moons": (_draw_moons, moons_log_density, _PLANE),
    "checkerboard": (_draw_checkerboard, checkerboard_log_density, _PLANE),
    "gaussians": (_draw_gaussians, gaussians_log_density, _PLANE),
    "mixture": (_draw_mixture, mixture_log_density, (4, 4, 1)),
    "field": (_draw_field, field_log_density, (_FIELD_SIDE, _FIELD_SIDE, 1)),
}


def open_toy(name: str, split: str) -> Source:
    """Opens a split of the data `name` of known density."""
    check_split(f"toy:{name}", split, _SPLITS)
    if name not in _TOYS:
        raise UserError(
            f"data.source toy:{name} is not known: expected toy:NAME with one of {', '.join(_TOYS)}"
        )
    draw, log_density, shape = _TOYS[name]
    planar = shape == _PLANE
    random = np.random.default_rng(_SPLITS.index(split))
    # All points are drawn at once: one by one they would take longer than a small model's step.
    count = 1_000_000 if planar else 100_000
    points = draw(random, 2_000 if split == "test" else count).astype(np.float32)
    return Source(
        ArrayRecords(points.reshape(-1, *shape)),
        shape,
        pixel_levels=0,
        version="1",
        log_density=log_density,
        planar_extent=_EXTENT if planar else 0.0,
    )
