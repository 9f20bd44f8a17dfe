"""A data set that tfds prepared."""

from tests.data.conftest import squares_dir  # noqa: F401
