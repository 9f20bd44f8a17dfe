"""The model of a configuration and the shape of its data."""

import pytest

from ntm_jax.data.pipeline import DataSpec
from ntm_jax.errors import UserError
from ntm_jax.runtime import build
from tests.common import tiny_config


def test_the_model_fits_the_data():
    spec = DataSpec((8, 4, 3), 2, 256, 7, 10)
    c = build.make_model(tiny_config(), spec).config
    assert (c.grid, c.dim, c.condition.width, c.steps) == ((4, 2), 12, 7, (2,))


def test_what_does_not_fit_is_refused():
    message = r"config\.model\.condition is class, and digits has no labels: set it to none"
    with pytest.raises(UserError, match=message):
        build.make_model(tiny_config(), DataSpec((8, 8, 1), 2, 17, 0, 10))
    message = r"config\.model\.width = 20 must be a multiple of head_size x kv_heads = 8 x 2"
    with pytest.raises(UserError, match=message):
        build.make_model(tiny_config(**{"model.width": 20}), DataSpec((8, 8, 1), 2, 17, 10, 10))
