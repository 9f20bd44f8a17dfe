"""Files of reference statistics: the mean and covariance of features of real images.

They are .npz files in the layout of ADM's evaluator (Dhariwal and Nichol 2021, arXiv 2105.05233):
`mu` [d] and `sigma` [d, d], and optionally `arr_0`, uint8 images [n, H, W, C]. Ours also have
`digest`, that of the features' extractor.
"""

import jax
import numpy as np
from etils import epath

from ntm_jax import files
from ntm_jax.errors import UserError, first_line
from ntm_jax.evaluation.features import Extractor
from ntm_jax.evaluation.statistics import FeatureStatistics


def read(path: str, extractor: Extractor, picture: np.ndarray,
         pixel_levels: int) -> FeatureStatistics:
    """The statistics in a file, and the features of the images that it has.

    picture: an image [1, H, W, C] of the data, whose features tell their dimension; pixel_levels:
    its values. Raises UserError for a file that is damaged, or is of other features.
    """
    def refuse(found: str):
        return UserError(f"config.evaluate.reference={path} {found}: expected an .npz with mu and "
                         f"sigma of {extractor.name} features, such as --write_reference writes")

    try:
        with (files.regular(path).open("rb") as file,
              np.load(file, allow_pickle=False) as archive):
            mean, covariance = (np.asarray(archive[name], np.float64) for name in ("mu", "sigma"))
            digest = str(archive["digest"]) if "digest" in archive else extractor.digest
            images = archive["arr_0"] if "arr_0" in archive else np.zeros(0)
    except OSError:
        raise
    except Exception as error:  # of numpy and of zipfile
        raise refuse(f"cannot be used ({first_line(error)})") from None
    dimensions = extractor(picture).shape[1]
    if (mean.shape, covariance.shape) != ((dimensions,), (dimensions, dimensions)):
        raise refuse(f"has mu and sigma of shapes {mean.shape} and {covariance.shape}, and the "
                     f"features have {dimensions} dimensions")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise refuse("holds numbers that are not finite")
    if digest != extractor.digest:
        raise refuse(f"is of features of digest {digest[:16]!r}, and these are {extractor.digest}")
    if not len(images):
        return FeatureStatistics.of_gaussian(mean, covariance)
    shape, largest = picture.shape[1:], pixel_levels - 1
    if images.dtype != np.uint8 or images.shape[1:] != shape or images.max() > largest:
        raise refuse(f"has images arr_0 of {images.dtype} {images.shape} up to {images.max()}, and "
                     f"the data's are uint8 {shape} up to {largest}")
    return FeatureStatistics.of_gaussian(
        mean, covariance, FeatureStatistics.of(extractor(images)).kept)


def check_new(path: str) -> None:
    """Raises UserError where a file would be overwritten."""
    if epath.Path(path).exists():
        raise UserError(f"--write_reference={path} exists: give a new file (nothing was "
                        "overwritten)")


def write(path: str, statistics: FeatureStatistics, extractor: Extractor) -> None:
    """Writes the mean and the covariance of features, and their extractor's digest, in process 0.

    Raises UserError like check_new.
    """
    if jax.process_index():
        return
    check_new(path)
    mean, root = statistics.gaussian()
    with files.atomic_writer(path) as file:
        np.savez(file, mu=mean, sigma=root.T @ root, digest=np.str_(extractor.digest))
