"""Data sources, opened by name: see `open_source` in source.py. One file for each kind of source.

No jax is imported: grain's worker processes run this.
"""

from ntm_jax.data.sources.arrays import from_arrays, provide
from ntm_jax.data.sources.source import (
    ArrayRecords,
    Source,
    SplitError,
    check_split,
    open_as_stored,
    open_source,
    permuted_splits,
    register,
    take,
)

__all__ = [
    "ArrayRecords",
    "Source",
    "SplitError",
    "check_split",
    "from_arrays",
    "open_as_stored",
    "open_source",
    "permuted_splits",
    "provide",
    "register",
    "take",
]
