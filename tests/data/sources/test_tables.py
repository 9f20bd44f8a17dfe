"""Arrays [n, D] and vectors as conditions: their units, their tokens, and files that hold them."""

import re

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from ntm_jax.data import pipeline
from ntm_jax.data.sources import arrays as module
from ntm_jax.data.sources import from_arrays, open_source, provide
from ntm_jax.errors import UserError

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(40, 6)) * [1, 10, 1e-3, 1e5, 2, 3] + [0, 5, 1, -1e5, 100, 0]
VECTORS = RNG.normal(size=(40, 3)).astype(np.float32) * 7 - 2


@pytest.fixture(autouse=True)
def _nothing_provided(monkeypatch):
    monkeypatch.setattr(module, "_provided", {})


def values(source, key):
    return np.stack([source.records[i][key] for i in range(len(source.records))])


def test_rows_are_standardised_by_the_training_records():
    provide(from_arrays(ROWS, condition=VECTORS, held_out=0.25))
    order = np.random.RandomState(0).permutation(40)
    for split, rows in (("train", order[:30]), ("test", order[30:]), ("all", order)):
        source = open_source("arrays", split)
        for given, key, mean, std in (
            (ROWS, "image", source.mean, source.std),
            (VECTORS, "condition", source.condition_mean, source.condition_std),
        ):
            known = given[order[:30]].astype(np.float64)
            np.testing.assert_allclose(mean, known.mean(0), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(std, known.std(0), rtol=1e-12)
            found = values(source, key)
            assert found.dtype == np.float32
            expected = (given[rows] - known.mean(0)) / known.std(0)
            np.testing.assert_allclose(found.reshape(len(rows), -1), expected, atol=1e-5)
    assert (source.image_shape, source.columns, source.condition_width) == ((1, 6, 1), 6, 3)
    assert source.pixel_levels == 0


@pytest.mark.parametrize("size", [1, 2, 6])
def test_tokens_group_columns_and_give_the_rows_back(size):
    provide(from_arrays(ROWS, condition=VECTORS))
    source = open_source("arrays", "all", token_size=size)
    spec = pipeline.spec(source, 1)
    assert (spec.tokens, spec.dim) == (6 // size, size)
    batch = next(pipeline.evaluation_batches(source, 1, 40, 0, 1))
    rows = ROWS[np.random.RandomState(0).permutation(40)]
    np.testing.assert_allclose(spec.from_tokens(batch["x"]), rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(spec.to_tokens(rows), batch["x"])
    assert batch["condition"].shape == (40, 3)
    np.testing.assert_allclose(spec.log_unit, np.log(spec.std).sum())
    content = pipeline.spec_to_json(spec)
    assert pipeline.spec_from_json(content) == spec
    for key in ("columns", "condition_width", "condition_mean", "condition_std"):
        del content[key]  # as earlier versions wrote it
    assert pipeline.spec_from_json(content).columns == 0


def assert_refused(mistakes):
    """Opening each of these sources is refused by a line that has its message."""
    for name, message in mistakes.items():
        with pytest.raises(UserError, match=re.escape(message)) as error:
            open_source(name, "train")
        assert "\n" not in str(error.value)


def assert_opens_as(name, given):
    """Opening `name` gives the rows of these arrays; the opened source."""
    source = open_source(name, "all")
    np.testing.assert_array_equal(values(source, "image").reshape(40, 6),
                                  given.table.values[given.splits["all"]])
    assert source.condition_width == 3
    return source


def test_an_npz_file_holds_columns_under_keys(tmp_path):
    path = tmp_path / "some,file.npz"
    np.savez(path, data=ROWS, condition=VECTORS, mass=ROWS[:, 0], spin=ROWS[:, 1:3])
    source = assert_opens_as(f"npz:{path}", from_arrays(ROWS, condition=VECTORS))
    named = open_source(f"npz:{path},data=mass+spin,condition=mass", "train")
    assert (named.columns, named.condition_width) == (3, 1)
    np.testing.assert_allclose(named.mean, source.mean[:3], rtol=1e-12)
    np.savez(path, data=ROWS[:30])
    assert open_source(f"npz:{path}", "all").condition_width == 0
    (tmp_path / "text.npz").write_text("no archive")
    assert_refused({
        f"npz:{path},data=mass": "names the array 'mass': ",
        f"npz:{tmp_path}/text.npz": "cannot be read (it is no archive): expected a file of",
    })


def test_a_parquet_file_holds_columns_of_numbers_and_of_lists(tmp_path):
    path = tmp_path / "rows.parquet"
    table = {"data": list(ROWS), "condition": list(VECTORS), "mass": ROWS[:, 0], "spin": ROWS[:, 1],
             "count": np.arange(40), "good": np.arange(40) % 3 == 0}
    parquet.write_table(pyarrow.table(table), path, row_group_size=16)
    source = assert_opens_as(f"parquet:{path}", from_arrays(ROWS, condition=VECTORS))
    named = open_source(f"parquet:{path},data=mass+spin,condition=condition+mass", "train")
    assert (named.columns, named.condition_width) == (2, 4)
    np.testing.assert_allclose(named.mean, source.mean[:2], rtol=1e-12)
    for keys in ("count", "good", "count+good+mass"):
        given = np.stack([table[key] for key in keys.split("+")], 1).astype(float)
        found = open_source(f"parquet:{path},data=mass,condition={keys}", "all")
        assert found.version == from_arrays(ROWS[:, :1], condition=given).version
    assert_refused({
        f"parquet:{path},data=mass+count": "the array 'count' is int64: expected floating-point "
            "numbers, since whole numbers, dates and text have no density",
    })


def test_a_constant_column_of_many_records():
    rows = np.random.default_rng(0).normal(size=(10_000, 2))
    rows[:, 1] = 7.3  # whose deviation is not 0, by rounding
    with pytest.raises(UserError, match=r"^data has the constant column 1, which has no density"):
        from_arrays(rows)
    given = from_arrays(rows[:, :1], condition=rows).condition
    assert (given.values[:, 1] == 0).all()
    assert (given.mean[1], given.std[1]) == (7.3, 1)


@pytest.mark.parametrize(("given", "message"), [
    ({"images": ROWS.astype(int)}, "data is int64 [40, 6]: expected floating-point numbers [n, D]; "
     "convert it with .astype(float)"),
    ({"images": np.where(ROWS > 100, np.nan, ROWS)}, "data holds a number that is not finite"),
    ({"images": np.ma.masked_greater(ROWS, 100)}, "data has masked entries: fill them in"),
    ({"images": np.zeros(40)}, "images are float64 [40]: expected uint8 pixels or float32 latents "
     "[n, H, W, C] or [n, H, W], or an array [n, D], such as data[:, None] for one column"),
])
def test_mistakes_are_refused_in_one_line(given, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        from_arrays(**{"images": ROWS} | given)
    assert "\n" not in str(error.value)


def test_columns_far_from_zero_are_standardised():
    rows, given = ROWS[:, :2] + [1.7e9, 1e6], VECTORS[:, :1].astype(np.float64) / 1e3 + 1e6
    source = from_arrays(rows, condition=given).open("train")
    np.testing.assert_allclose(source.std[0], ROWS[:, 0].std(), rtol=0.3)
    np.testing.assert_allclose(values(source, "image").std(0).ravel(), 1, rtol=1e-4)
    np.testing.assert_allclose(values(source, "condition").std(0), 1, rtol=1e-4)


def test_a_token_size_fits_the_columns():
    provide(from_arrays(ROWS))
    with pytest.raises(UserError, match="token_size is 4, and a record of arrays has 6 columns"):
        open_source("arrays", "all", token_size=4)
    with pytest.raises(UserError, match="token_size is 2, and a record of digits has 0 columns"):
        open_source("digits", "test", token_size=2)
