"""The source `digits`: scikit-learn's 1,797 handwritten digits.

An image has 8 x 8 pixels of 17 levels; there are 10 classes.
Splits: train, 1,500 digits; test, the remaining 297; all.
"""

from typing import cast

import numpy as np
import sklearn
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

from ntm_jax.data.sources.source import ArrayRecords, Source, check_split, permuted_splits


def open_digits(argument: str, split: str) -> Source:
    """Opens a split of the digits; `argument` is unused."""
    digits = cast(Bunch, load_digits())
    splits = permuted_splits(len(digits.target), 1500)
    check_split("digits", split, splits)
    images = digits.images.astype(np.uint8)[..., None]
    records = ArrayRecords(images, digits.target, rows=splits[split])
    version = f"scikit-learn {sklearn.__version__}"
    return Source(records, (8, 8, 1), pixel_levels=17, num_classes=10, version=version)
