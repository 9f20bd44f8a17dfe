"""Means with standard errors, and scores of features: Frechet distance, KID, precision, recall.

Symbols: n real and m generated images; d features; H, W, C image height, width, channels; V pixel
levels.
"""

import math

import jax
import numpy as np

KEPT = 10_000  # features of a set that are kept, for all but its mean and covariance
MERGED = 1_000  # features, at least, that are taken into a covariance at once
THUMBNAILS = "thumbnails of 8 x 8 pixels, less the candidates' mean, scaled to unit length"


def mean_and_stderr(values, variance=None) -> dict:
    """The mean of values [n] and its standard error, in float64: {"mean", "stderr"}.

    The standard error of a single value is given as 0. variance [n]: the variance of each value
    over its own noise; adds "noise_stderr", the noise's part of the standard error.
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    stderr = (values.std(ddof=1) / math.sqrt(n)).item() if n > 1 else 0.0
    result = {"mean": values.mean().item(), "stderr": stderr}
    if variance is None:
        return result
    noise = np.sqrt(np.sum(variance, dtype=np.float64)) / n
    return result | {"noise_stderr": noise.item()}


class FeatureStatistics:
    """Features [n, d] of a set of images in constant memory: their Gaussian, and some of them.

    total: n. Of more than KEPT features, so many random ones are kept, the same in every call.
    count: the number of features that were added.
    """

    def __init__(self, total: int):
        self.count = 0
        self._kept, self._chosen = [], np.zeros(total, bool)
        self._chosen[np.random.default_rng(0).permutation(total)[:KEPT]] = True
        # Of those before the waiting ones: their number, mean, and sum of (x - mean)(x - mean)'.
        self._merged, self._mean, self._scatter = 0, np.zeros(1), np.zeros((1, 1))
        self._waiting: list[np.ndarray] = []
        self._gaussian: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def of(cls, features) -> "FeatureStatistics":
        """Those of all features [n, d] at once."""
        found = cls(len(features))
        found.add(features)
        return found

    @classmethod
    def of_gaussian(cls, mean, covariance, kept=()) -> "FeatureStatistics":
        """Those of a mean [d] and a covariance [d, d], with some of the features, [k, d]."""
        found = cls(0)
        found._gaussian = mean, _root(covariance)
        found._kept = [kept] if len(kept) else []
        return found

    def add(self, features) -> None:
        """Adds a batch of features [b, d]."""
        features, count = np.asarray(features), self.count + len(features)
        self._kept.append(features[self._chosen[self.count : count]])
        self._waiting.append(features)
        self.count, self._gaussian = count, None
        if count - self._merged > max(MERGED, features.shape[1]):
            self._merge()

    def _merge(self) -> None:
        features = np.concatenate(self._waiting).astype(np.float64)
        new, mean, self._waiting = len(features), features.mean(0), []
        offset, centred = mean - self._mean, features - mean
        self._scatter = self._scatter + centred.T @ centred + np.outer(
            offset, offset * (self._merged * new / (self._merged + new)))
        self._merged += new
        self._mean = self._mean + offset * (new / self._merged)

    def gaussian(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean [d], R [r, d]) in float64; R'R is the unbiased covariance."""
        if self._gaussian is None and not self._merged:  # no digits are lost in squares
            features = np.concatenate(self._waiting).astype(np.float64)
            mean = features.mean(0)
            root = np.asarray(np.linalg.qr(features - mean, "r"))
            self._gaussian = mean, root / math.sqrt(max(self.count - 1, 1))
        elif self._gaussian is None:
            if self._waiting:
                self._merge()
            self._gaussian = self._mean, _root(self._scatter / (self.count - 1))
        return self._gaussian

    @property
    def kept(self) -> np.ndarray:
        """At most KEPT features [k, d]; [0, 0] where only their Gaussian is known."""
        return np.concatenate(self._kept) if self._kept else np.zeros((0, 0))


def _root(covariance) -> np.ndarray:
    """R [d, d] with R'R = covariance."""
    values, axes = np.linalg.eigh(covariance)
    return np.sqrt(values.clip(0))[:, None] * axes.T


def feature_scores(real: FeatureStatistics, generated: FeatureStatistics) -> dict[str, float]:
    """Frechet distance, KID, precision and recall of the features of two sets of images.

    NAME_stderr is the standard error of each: of the distances and the precision over the generated
    images, of the recall over the real ones. All but the Frechet distance are of kept features, and
    are left out where none of the real ones are kept.
    """
    found = {"frechet": frechet(real, generated)}
    if len(real.kept):
        kept = real.kept, generated.kept
        found["kid"] = kernel_distance(*kept)
        found |= dict(zip(("precision", "recall"), precision_recall(*kept), strict=True))
    return with_stderr(found)


def with_stderr(figures: dict[str, dict]) -> dict[str, float]:
    """{name: {"mean", "stderr"}} -> {name: mean, name_stderr: stderr}."""
    return {f"{name}{end}": figure[key] for name, figure in figures.items()
            for end, key in (("", "mean"), ("_stderr", "stderr"))}


def frechet(real: FeatureStatistics, generated: FeatureStatistics) -> dict[str, float]:
    """The Frechet distance of the Gaussians fitted to two sets of features, in float64.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), which with Inception's features is the FID (Heusel
    et al. 2017, arXiv 1706.08500, eq. 6). With S = R'R, the eigenvalues of (S1 S2)^(1/2) are the
    singular values of R1 R2': none is complex, and none loses digits where S is singular, as it is
    with fewer images than features.

    The standard error is that of a bootstrap over the generated images in the limit of many
    resamples (the infinitesimal jackknife): from the distance's derivative by each one's weight,
    2 (m2 - m1)'y + y'(I - T)y with y = x - m2 and T the optimal transport's matrix, T S2 T = S1.
    With R1 R2' = U D V', T is R1'U D^-1 U'R1. The derivatives are those of the kept features.
    """
    (mean1, root1), (mean2, root2) = real.gaussian(), generated.gaussian()
    offset, (axes, singular, _) = mean2 - mean1, np.linalg.svd(root1 @ root2.T, full_matrices=False)
    distance = sum(np.square(part).sum() for part in (offset, root1, root2)) - 2 * singular.sum()
    sure = singular > singular.max() * max(root1.shape) * np.finfo(float).eps
    centred = generated.kept - mean2
    moved = centred @ (root1.T @ axes[:, sure])
    by_image = (centred @ (2 * offset) + np.square(centred).sum(1)
                - np.square(moved) @ (1 / singular[sure]))
    return {"mean": max(float(distance), 0.0), "stderr": _stderr(by_image, generated.count)}


def _stderr(by_image: np.ndarray, count: int) -> float:
    """The standard error of a figure of `count` images from the influence [k] of some of them."""
    return float(by_image.std(ddof=1) / math.sqrt(count)) if len(by_image) > 1 else 0.0


def kernel_distance(real, generated, subsets: int = 100, size: int = 1000) -> dict[str, float]:
    """KID: the unbiased squared MMD of features [n, d] and [m, d] by the kernel (x'y / d + 1)^3.

    It is the mean over random subsets of `size` features of each, or of all of the smaller set
    (Binkowski et al. 2018, arXiv 1801.01401), and below 0 by chance where the sets are alike. The
    standard error is over the generated images: from the distance's derivative by each one's
    weight, 2 (mean k(y, y') - mean k(x, y)), a mean over the subsets that the image is in.
    """
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    size, random = min(size, len(real), len(generated)), np.random.RandomState(0)
    if len(real) == len(generated) == size:
        subsets = 1  # all are the same

    def kernel(x, y):
        product = x @ y.T / x.shape[1] + 1
        return product * product * product  # in a tenth of the time of ** 3

    def others(x):  # each one's mean kernel with the others
        inside = kernel(x, x)
        return (inside.sum(1) - np.diagonal(inside)) / (size - 1)

    found, by_image, times = [], np.zeros(len(generated)), np.zeros(len(generated))
    for _ in range(subsets):
        chosen, places = (random.choice(len(x), size, replace=False) for x in (real, generated))
        x, y = real[chosen], generated[places]
        inside, across = others(y), kernel(x, y).mean(0)
        found.append(others(x).mean() + inside.mean() - 2 * across.mean())
        by_image[places] += 2 * (inside - across)
        times[places] += 1
    seen = times > 0
    return {"mean": float(np.mean(found)),
            "stderr": _stderr(by_image[seen] / times[seen], len(generated))}


def precision_recall(real, generated, neighbours: int = 3) -> tuple[dict, dict]:
    """Precision and recall: how many features of one set lie in the manifold of the other.

    Precision is the share of generated features [m, d] in the manifold of the real ones, recall the
    share of real features [n, d] in that of the generated ones: {"mean", "stderr"} each, with the
    manifold fixed.
    A manifold is the union of balls around the images of a set, each reaching the image's
    `neighbours`-th nearest of the same set (Kynkaanniemi et al. 2019, arXiv 1904.06991).
    """
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    return (mean_and_stderr(_covered(generated, real, neighbours)),
            mean_and_stderr(_covered(real, generated, neighbours)))


def _covered(queries, points, neighbours) -> np.ndarray:
    """Which of queries [m, d] lie in the balls around points [n, d]: [m] bool."""
    # Imported here: it takes a second of every program's start.
    from sklearn.metrics import pairwise_distances_chunked

    def blocks(x, y, reduce):  # blocks of rows of distances, 256 MiB at a time
        return np.concatenate(list(pairwise_distances_chunked(
            x, y, reduce_func=lambda block, _: reduce(block), working_memory=256)))

    def radius(block):  # the 0-th nearest is the point itself
        return np.partition(block, neighbours, 1)[:, neighbours]

    radii = blocks(points, None, radius)
    return blocks(queries, points, lambda block: (block <= radii).any(1))


def retrieved(candidates, generated, truth, pixel_levels: int) -> np.ndarray:
    """The rank [m] of each generated image's own candidate by distance to the image; 1 is nearest.

    candidates [n, H, W, C] and generated [m, H, W, C]: values 0..V-1; truth [m]: the index of each
    generated image's own candidate. Distances are of THUMBNAILS, a proxy that knows layout and
    colour: they are blurred, so that detail does not matter, and have neither mean nor length, so
    that no picture is near to all. Candidates that are alike share a rank.
    """
    def thumbnails(images):
        batches = (np.asarray(images[i : i + 500], np.float32) for i in range(0, len(images), 500))
        small = [jax.image.resize(batch / (pixel_levels - 1),
                                  (len(batch), 8, 8, batch.shape[-1]), "linear")
                 for batch in batches]
        return np.concatenate(small).reshape(len(images), -1).astype(np.float64)

    known, made = thumbnails(candidates), thumbnails(generated)
    known, made = (features - known.mean(0) for features in (known, made))
    known, made = (features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-12)
                   for features in (known, made))
    likeness = made @ known.T
    own = np.take_along_axis(likeness, np.asarray(truth)[:, None], 1)
    return 1 + (likeness > own + 1e-9).sum(1)
