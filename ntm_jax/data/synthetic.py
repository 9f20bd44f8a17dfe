"""Data made up here: `mock:` records of any shape, and `toy:` points of the plane whose density is known at every noise level.

H, W, C image height, width, channels; V pixel levels; M, E text tokens and width; n points. Densities are in nats, float64. No jax is
imported: grain's worker processes run this.
"""

import dataclasses
import re
from typing import Any

import numpy as np
from scipy.special import log_ndtr, logsumexp

from ntm_jax.data.records import pad_text
from ntm_jax.errors import UserError

SPLITS = ("train", "test")


def open_made_up(name: str, split: str) -> dict[str, Any]:
    """The fields of sources.Source that a split, 'train' or 'test', of mock:SHAPE or toy:NAME has, but for its name and split."""
    kind, _, where = name.partition(":")
    return {"mock": _mock, "toy": _toy}[kind](where, SPLITS.index(split)) | {"version": "1"}


# Records of any shape.


@dataclasses.dataclass(frozen=True)
class _MadeUp:
    """Random records, each a function of `stream` and its index alone."""

    stream: int
    count: int
    shape: tuple[int, int, int]
    levels: int
    classes: int
    text: tuple[int, int]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng((self.stream, index))
        if self.levels:
            image = random.integers(self.levels, size=self.shape, dtype=np.uint8)
        else:
            image = random.standard_normal(self.shape, np.float32)
        record = {"image": image, "label": int(random.integers(self.classes)) if self.classes else -1}
        tokens, width = self.text
        if not tokens:
            return record
        # Random signs and mantissas, 0.5 to 1 either side of 0: normal numbers would take ten times as long.
        bits = random.integers(1 << 16, size=(random.integers(1, tokens + 1), width), dtype=np.uint16) & 0x83FF | 0x3800
        return record | pad_text(bits.view(np.float16), tokens)


def _mock(where: str, stream: int) -> dict[str, Any]:
    name = f"mock:{where}"
    number = "([1-9][0-9]{0,8})"
    syntax = {"": f"{number}x{number}x{number}", "levels": number, "classes": number, "count": number, "text": f"{number}x{number}"}
    given = {"count": (10_000,), "levels": (0,), "classes": (0,), "text": (0, 0)}
    for option in f"={where}".split(","):
        key, _, value = option.partition("=")
        match = re.fullmatch(syntax.get(key, "(?!)"), value)
        if not match:
            raise UserError(
                f"data.source {name} is not understood at {option.lstrip('=')!r}: expected HxWxC and after it any of "
                ",levels=V ,classes=K ,count=N ,text=MxE"
            )
        given[key] = tuple(map(int, match.groups()))
    levels, classes, (tokens, width) = given["levels"][0], given["classes"][0], given["text"]
    if levels and not 2 <= levels <= 256:
        raise UserError(f"data.source {name} has levels={levels}: expected 2 to 256, or none for latents")
    records = _MadeUp(stream, 1000 if stream else given["count"][0], given[""], levels, classes, (tokens, width))
    return dict(
        records=records, image_shape=given[""], levels=levels, num_classes=classes, text_tokens=tokens, text_width=width)  # fmt: skip


# Points of the plane: mean 0 and variance 1 in either coordinate, by definition.

_CENTRES, _DEVIATION = 8, 0.1  # Gaussians on a circle, their standard deviation as a share of its radius
_RADIUS = 1 / np.sqrt(0.5 + _DEVIATION**2)  # a coordinate's variance: radius^2 / 2 + deviation^2
_ANGLES = 2 * np.pi * np.arange(_CENTRES) / _CENTRES
_MEANS = _RADIUS * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)  # [8, 2]

_SIDE = np.sqrt(3) / 2  # of a square; four of them span a coordinate, which is uniform on +-sqrt(3)
_CORNERS = _SIDE * np.array([(i - 2, j - 2) for i in range(4) for j in range(4) if (i + j) % 2 == 0])  # [8, 2], lower left

_THICKNESS = 0.1  # standard deviation of the noise about the moons, isotropic
_NODES = 256  # of Gauss and Legendre, on either moon: even at t = 0 they err by less than 1e-6 of the density


def _arcs(angle: np.ndarray) -> np.ndarray:
    """Points of the two moons at angles in [0, pi], [..., n] -> [2, ..., n, 2], scaled to mean 0 and variance 1 - thickness^2."""
    outer = np.stack([np.cos(angle), np.sin(angle)], -1)
    both = np.stack([outer, [1, 0.5] - outer])
    # For a uniform angle E cos = 0, E sin = 2/pi and E cos^2 = E sin^2 = 1/2; each moon is the other, turned about (1/2, 1/4).
    variance = np.array([3 / 4, 9 / 16 - 1 / np.pi])
    return (both - [0.5, 0.25]) * np.sqrt((1 - _THICKNESS**2) / variance)


def _draw_gaussians(random: np.random.Generator, count: int) -> np.ndarray:
    return _MEANS[random.integers(_CENTRES, size=count)] + _RADIUS * _DEVIATION * random.standard_normal((count, 2))


def _draw_checkerboard(random: np.random.Generator, count: int) -> np.ndarray:
    return _CORNERS[random.integers(len(_CORNERS), size=count)] + _SIDE * random.random((count, 2))


def _draw_moons(random: np.random.Generator, count: int) -> np.ndarray:
    arcs = _arcs(np.pi * random.random(count))
    return arcs[random.integers(2, size=count), np.arange(count)] + _THICKNESS * random.standard_normal((count, 2))


def gaussians_log_density(points: np.ndarray, t: float) -> np.ndarray:
    """log q(x_t) of `toy:gaussians` at points [n, 2] -> [n], 0 < t <= 1."""
    return _log_mixture(points, t, _MEANS, np.full(_CENTRES, 1 / _CENTRES), _RADIUS * _DEVIATION)


def moons_log_density(points: np.ndarray, t: float) -> np.ndarray:
    """log q(x_t) of `toy:moons` at points [n, 2] -> [n], 0 < t <= 1: the integral over the angle as a mixture of its nodes."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)  # on [-1, 1], weights of sum 2
    means = _arcs(np.pi / 2 * (1 + nodes)).reshape(-1, 2)
    return _log_mixture(points, t, means, np.tile(weights / 4, 2), _THICKNESS)


def checkerboard_log_density(points: np.ndarray, t: float) -> np.ndarray:
    """log q(x_t) of `toy:checkerboard` at points [n, 2] -> [n], 0 < t <= 1."""
    low = (1 - t) * _CORNERS
    means = _log_interval_mean(np.asarray(points, np.float64)[:, None] / t, low / t, (1 - t) * _SIDE / t)
    return logsumexp(np.sum(means, -1), 1) - np.log(len(_CORNERS)) - 2 * np.log(t)


def _log_mixture(points, t, means, weights, deviation) -> np.ndarray:
    """log of sum_m weights_m N((1-t) means_m, ((1-t)^2 deviation^2 + t^2) I) at points [n, 2] -> [n]."""
    points, scale = np.asarray(points, np.float64), np.hypot((1 - t) * deviation, t)
    parts = []
    for some in np.split(points, range(4096, len(points), 4096)):  # of the moons' 512 nodes, 17 MB an array
        squares = sum((some[:, None, axis] / scale - (1 - t) / scale * means[:, axis]) ** 2 for axis in (0, 1))
        parts.append(logsumexp(-0.5 * squares, 1, weights))
    return np.concatenate(parts) - np.log(2 * np.pi * scale**2)


def _log_interval_mean(z, low, width: float) -> np.ndarray:
    """log of the mean over m in [low, low + width] of the density of N(m, 1) at z; broadcasts."""
    if width < 1e-4:  # the difference below would cancel; the relative error here is (z^2 - 1) width^2 / 24
        return -0.5 * ((z - low - width / 2) ** 2 + np.log(2 * np.pi))
    # By symmetry in the lower tail, where log_ndtr keeps its precision.
    upper = width / 2 - np.abs(z - low - width / 2)
    log_upper, log_lower = log_ndtr(upper), log_ndtr(upper - width)
    return log_upper + np.log(-np.expm1(log_lower - log_upper)) - np.log(width)


_TOYS = {
    "moons": (_draw_moons, moons_log_density),
    "checkerboard": (_draw_checkerboard, checkerboard_log_density),
    "gaussians": (_draw_gaussians, gaussians_log_density),
}


@dataclasses.dataclass(frozen=True)
class _Points:
    """Points [n, 1, 2, 1] in memory, as records: drawn one by one they would take longer than a small model's step."""

    points: np.ndarray

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.points[index], "label": -1}


def _toy(where: str, stream: int) -> dict[str, Any]:
    if where not in _TOYS:
        raise UserError(f"data.source toy:{where} is not known: expected toy:NAME with one of {', '.join(_TOYS)}")
    draw, log_density = _TOYS[where]
    points = draw(np.random.default_rng(stream), 2_000 if stream else 1_000_000).astype(np.float32)
    return dict(
        records=_Points(points.reshape(-1, 1, 2, 1)), image_shape=(1, 2, 1), levels=0, num_classes=0, log_density=log_density)  # fmt: skip
