"""Scores of posterior samples: the classifier two-sample test, and calibration by simulations.

Calibration is necessary, not sufficient: draws from the prior, which ignore x, pass its checks.
Symbols: n simulations; L draws of each posterior; m samples; D parameters.
"""

import warnings

import numpy as np
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier

FOLDS = 5
EPOCHS = 10_000  # at most; training stops once the loss has not fallen for ten epochs


def c2st(reference, samples) -> float:
    """The accuracy of a classifier that tells samples [m, D] from reference [m, D].

    0.5: it cannot tell; 1: always. It is that of sbibm 1.1: a network of two hidden layers of 10 D
    units in float32, in 5-fold cross-validation, on numbers that are standardised by the reference.
    """
    reference, samples = (np.asarray(a, np.float64) for a in (reference, samples))
    mean, std = reference.mean(0), reference.std(0, ddof=1)
    both = ((np.concatenate([reference, samples]) - mean) / std).astype(np.float32)
    is_sample = np.repeat([0, 1], [len(reference), len(samples)])
    units = 10 * both.shape[1]
    classifier = MLPClassifier((units, units), max_iter=EPOCHS, random_state=1)
    folds = KFold(FOLDS, shuffle=True, random_state=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        # The products are too small for threads: n_jobs=-1 gives each fold a process of one thread.
        scores = cross_val_score(classifier, both, is_sample, cv=folds, n_jobs=-1)
    return float(np.mean(scores))


def ranks(theta, draws) -> np.ndarray:
    """Of each parameter, how many draws lie below the truth: theta [n, D], draws [n, L, D].

    -> [n, D] integers in 0..L. Where theta, x come from prior and simulator, and the draws from
    the exact posteriors of x, the ranks are uniform (Talts et al., arXiv 1804.06788).
    """
    return np.sum(np.asarray(draws) < np.asarray(theta)[:, None], 1)


def shares_nearer(theta, draws, seed: int = 0) -> np.ndarray:
    """The share of draws [n, L, D] that lie nearer to a random point than the truth [n, D], [n].

    The shares of exact posteriors are uniform in 0..1 (TARP, Lemos et al., arXiv 2302.03026).
    Distances are those of parameters that are standardised by the truths' deviation; the points
    are truths of other simulations, which know nothing of the posterior.
    """
    theta, draws = np.asarray(theta, np.float64), np.asarray(draws, np.float64)
    std, order = theta.std(0), np.random.default_rng(seed).permutation(len(theta))
    points = np.empty_like(theta)
    points[order] = theta[np.roll(order, 1)] / std
    truth = np.linalg.norm(theta / std - points, axis=-1)
    distances = np.linalg.norm(draws / std - points[:, None], axis=-1)
    return np.mean(distances < truth[:, None], 1)


def uniformity(values, draws: int) -> dict[str, float]:
    """How far ranks in 0..draws, [n], are from uniform ones.

    distance: the largest difference of the distribution functions; p_value: of a difference as
    large for uniform ranks (Kolmogorov and Smirnov, which is conservative for integers).
    """
    grid = np.arange(draws + 1)
    distance = float(np.max(np.abs(distribution(values, grid) - (grid + 1) / (draws + 1))))
    return {"distance": distance, "p_value": float(stats.kstwo.sf(distance, len(values)))}


def distribution(values, grid) -> np.ndarray:
    """The share of values at or below each number of `grid`."""
    return np.searchsorted(np.sort(values), grid, side="right") / len(values)


def band(count: int, level: float = 0.99) -> float:
    """Half the width of the band that holds all of a distribution function of `count` values.

    With probability `level` the empirical function of uniform values lies within it everywhere.
    """
    return float(stats.kstwo.ppf(level, count))
