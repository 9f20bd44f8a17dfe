"""TODO ntm_jax.evaluation.statistics."""

import math

import jax
import numpy as np

from ntm_jax.errors import UserError


def mean_and_stderr(values, variance=None) -> dict:
    """Mean over examples [n] and its standard error, in float64; variance [n], of each over its noise, gives the noise's part of it."""
    values = np.asarray(values, np.float64)
    n = len(values)
    result = {"mean": values.mean().item(), "stderr": (values.std(ddof=1) / math.sqrt(n)).item() if n > 1 else 0.0}
    return result if variance is None else result | {"noise_stderr": (np.sqrt(np.sum(variance, dtype=np.float64)) / n).item()}


def feature_scores(real, generated) -> dict[str, float]:
    """Frechet distance, precision and recall of features [n, d], [m, d]."""
    distance = frechet(real, generated)
    precision, recall = precision_recall(real, generated)
    return {"frechet": distance, "precision": precision, "recall": recall}


def frechet(real, generated) -> float:
    """Frechet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the Gaussians of features [n, d], [m, d]; float64.

    FID where the features are Inception's: Heusel et al. 2017, arXiv 1706.08500, eq. 6. With S = R'R, (S1 S2)^(1/2) has for eigenvalues the
    singular values of R1 R2': none is complex, and none loses digits where S is singular, as with fewer images than features.
    """
    if min(len(real), len(generated)) < 5:
        raise UserError(f"{len(real)} images are compared with {len(generated)}, and image scores need 5 of each: raise "
                        "config.evaluate.images, or take a larger config.evaluate.split")
    (mean1, root1), (mean2, root2) = _gaussian(real), _gaussian(generated)
    distance = np.square(mean1 - mean2).sum() + np.square(root1).sum() + np.square(root2).sum()
    return max(float(distance - 2 * np.linalg.norm(root1 @ root2.T, "nuc")), 0.0)


def _gaussian(features):
    """Features [n, d] -> (mean [d], R [min(n, d), d]), R' R the unbiased covariance."""
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    return mean, np.linalg.qr(features - mean, mode="r") / np.sqrt(len(features) - 1)


def precision_recall(real, generated, neighbours: int = 3) -> tuple[float, float]:
    """Shares of the generated features [m, d] within the real manifold and of the real ones [n, d] within the generated one.

    A manifold is every image's ball out to its `neighbours`-th nearest of the same set: Kynkaanniemi et al. 2019, arXiv 1904.06991.
    """
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    return _covered(generated, real, neighbours), _covered(real, generated, neighbours)


def _covered(queries, points, neighbours) -> float:
    """The share of queries [m, d] in the balls of points [n, d]."""
    from sklearn.metrics import pairwise_distances_chunked  # here: a second of every program's start

    def blocks(x, y, reduce):  # of rows of distances, 256 MiB at a time
        return np.concatenate(list(pairwise_distances_chunked(x, y, reduce_func=lambda block, _: reduce(block), working_memory=256)))

    radii = blocks(points, None, lambda block: np.partition(block, neighbours, 1)[:, neighbours])  # the 0-th is the point itself
    return float(blocks(queries, points, lambda block: (block <= radii).any(1)).mean())


THUMBNAILS = "thumbnails of 8 x 8 pixels, less the candidates' mean, scaled to unit length"


def retrieved(candidates, generated, truth, levels: int) -> np.ndarray:
    """Rank [m] of the candidate picture truth [m] by its distance to each generated image, 1: no other is nearer.

    candidates [n, H, W, C], generated [m, H, W, C]: values 0..levels-1. Distances are of THUMBNAILS, a proxy that knows layout and colour:
    blurred, so that detail does not matter, and without their mean and length, so that no picture is near to all. Candidates that are
    alike share a rank.
    """
    def thumbnails(images):
        batches = (np.asarray(images[i : i + 500], np.float32) for i in range(0, len(images), 500))
        small = [jax.image.resize(batch / (levels - 1), (len(batch), 8, 8, batch.shape[-1]), "linear") for batch in batches]
        return np.concatenate(small).reshape(len(images), -1).astype(np.float64)

    known, made = thumbnails(candidates), thumbnails(generated)
    known, made = (features - known.mean(0) for features in (known, made))
    known, made = (features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-12) for features in (known, made))
    likeness = made @ known.T
    own = np.take_along_axis(likeness, np.asarray(truth)[:, None], 1)
    return 1 + (likeness > own + 1e-9).sum(1)
