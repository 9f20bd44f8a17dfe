"""Means with standard errors, and scores of features: Frechet distance, precision, recall, ranks.

Symbols: n real and m generated images; d features; H, W, C image height, width, channels; V pixel
levels.
"""

import math

import jax
import numpy as np

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


def feature_scores(real, generated) -> dict[str, float]:
    """Frechet distance, precision and recall of features real [n, d] and generated [m, d].

    NAME_stderr is the standard error of each: of the distance and the precision over the generated
    images, of the recall over the real ones.
    """
    found = {"frechet": frechet(real, generated)}
    found |= dict(zip(("precision", "recall"), precision_recall(real, generated), strict=True))
    return with_stderr(found)


def with_stderr(figures: dict[str, dict]) -> dict[str, float]:
    """{name: {"mean", "stderr"}} -> {name: mean, name_stderr: stderr}."""
    return {f"{name}{end}": figure[key] for name, figure in figures.items()
            for end, key in (("", "mean"), ("_stderr", "stderr"))}


def frechet(real, generated) -> dict[str, float]:
    """The Frechet distance of the Gaussians fitted to features [n, d] and [m, d], in float64.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), which with Inception's features is the FID (Heusel
    et al. 2017, arXiv 1706.08500, eq. 6). With S = R'R, the eigenvalues of (S1 S2)^(1/2) are the
    singular values of R1 R2': none is complex, and none loses digits where S is singular, as it is
    with fewer images than features.

    The standard error is that of a bootstrap over the generated images in the limit of many
    resamples (the infinitesimal jackknife): from the distance's derivative by each one's weight,
    2 (m2 - m1)'y + y'(I - T)y with y = x - m2 and T the optimal transport's matrix, T S2 T = S1.
    """
    (mean1, _, root1), (mean2, white, root2) = _gaussian(real), _gaussian(generated)
    offset, (_, singular, axes) = mean2 - mean1, np.linalg.svd(root1 @ root2.T, full_matrices=False)
    distance = sum(np.square(part).sum() for part in (offset, root1, root2)) - 2 * singular.sum()
    centred = white @ root2
    by_image = (centred @ (2 * offset) + np.square(centred).sum(1)
                - np.square(white @ axes.T) @ singular)
    return {"mean": max(float(distance), 0.0), "stderr": mean_and_stderr(by_image)["stderr"]}


def _gaussian(features):
    """Features [n, d] -> (mean [d], W [n, r], R [r, d]), r = min(n, d).

    W R are the features less their mean, and R'R is their unbiased covariance.
    """
    features = np.asarray(features, np.float64)
    mean, scale = features.mean(0), np.sqrt(len(features) - 1)
    white, root = np.linalg.qr(features - mean)
    return mean, white * scale, root / scale


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
