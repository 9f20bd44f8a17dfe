"""Arrays as a source, in memory and of files: splits, content, units and mistakes.

Images [n, H, W, C], rows [n, D] of an array, and the vectors [n, E] that they are conditioned on.
"""

import pickle
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
IMAGES = RNG.integers(256, size=(20, 4, 6, 3), dtype=np.uint8)
LABELS = np.arange(20) % 4
CAPTIONS = [f"picture {i}" for i in range(20)]
# Some columns are so far from zero that float32 would not tell their values apart.
ROWS = RNG.normal(size=(40, 6)) * [1, 10, 1e-3, 1e5, 2, 3] + [0, 5, 1, -1e5, 100, 1.7e9]
VECTORS = RNG.normal(size=(40, 3)) * [7, 1, 1e-3] + [-2, 0, 1e6]


@pytest.fixture(autouse=True)
def _nothing_provided(monkeypatch):
    monkeypatch.setattr(module, "_provided", {})


def values(source, key="image"):
    return np.stack([record[key] for record in source.records])


def opened(arrays, split="all"):
    provide(arrays)
    return open_source("arrays", split)


def test_splits_cut_the_permutation_of_their_seed():
    for seed in (0, 3):
        arrays = from_arrays(IMAGES, LABELS, held_out=0.25, seed=seed)
        order = np.random.RandomState(seed).permutation(20)
        for split, rows in (("train", order[:15]), ("test", order[15:]), ("all", order)):
            source = opened(arrays, split)
            np.testing.assert_array_equal(values(source), IMAGES[rows])
            np.testing.assert_array_equal(values(source, "label"), LABELS[rows])
    assert (source.image_shape, source.pixel_levels, source.num_classes) == ((4, 6, 3), 256, 4)


def test_names_of_classes_are_numbered_in_sorted_order():
    names = np.array(["ring", "cross", "bar", "ring"] * 5)
    source = opened(arrays := from_arrays(IMAGES, names))
    assert (source.class_names, source.num_classes) == (("bar", "cross", "ring"), 3)
    order = np.random.RandomState(0).permutation(20)
    assert [source.class_names[label] for label in values(source, "label")] == list(names[order])
    assert from_arrays(IMAGES, names.astype(object)).name == arrays.name  # as pandas has them
    assert from_arrays(IMAGES, np.char.upper(names)).name != arrays.name


def test_slices_sizes_and_captions_apply():
    provide(from_arrays(IMAGES, captions=CAPTIONS, held_out=0.0))
    words = f"words:2:picture {' '.join(map(str, range(20)))}"
    source = open_source("arrays", "all[5:8]", image_size=2, text=words)
    rows = np.random.RandomState(0).permutation(20)[5:8]
    assert list(source.captions) == [CAPTIONS[row] for row in rows]
    assert (source.image_shape, source.num_classes, source.text_tokens) == ((2, 2, 3), 0, 2)
    again = pickle.loads(pickle.dumps(source))
    for record, row in zip([again.records[i] for i in range(3)], rows, strict=True):
        assert (record["caption"], record["label"]) == (CAPTIONS[row], -1)
        np.testing.assert_array_equal(record["text"].argmax(1), [0, 1 + row])


def test_images_have_other_levels_or_are_latents():
    source = opened(from_arrays(IMAGES[..., 0] // 32, pixel_levels=8))
    assert (source.image_shape, source.pixel_levels, values(source).max()) == ((4, 6, 1), 8, 7)
    latents = RNG.normal(size=(20, 2, 2, 5)).astype(np.float32)
    source = opened(from_arrays(latents, LABELS), "train")
    assert source.notes == ""
    assert opened(from_arrays(IMAGES.astype(np.float32))).notes.startswith(
        "float32 images from 0 to 255 are taken as latents, and not as pixels: pixels become uint8")
    expected = pipeline.DataSpec((2, 2, 5), 1, pixel_levels=0, num_classes=4, count=18)
    assert pipeline.spec(source, 1) == expected
    batch = next(pipeline.evaluation_batches(source, 1, 18, 0, 1))
    order = np.random.RandomState(0).permutation(20)
    np.testing.assert_array_equal(batch["x"], latents[order[:18]].reshape(18, 4, 5))


def test_the_version_names_the_content_and_its_splits():
    other = IMAGES.copy()
    other[3, 1, 2, 0] ^= 1
    first, again, *different = (each.name for each in (
        from_arrays(IMAGES, LABELS, CAPTIONS),
        from_arrays(IMAGES.copy(order="F"), list(LABELS), CAPTIONS, seed=np.int64(0)),
        from_arrays(other, LABELS, CAPTIONS),
        from_arrays(IMAGES, LABELS[::-1], CAPTIONS),
        from_arrays(IMAGES, LABELS, CAPTIONS[::-1]),
        from_arrays(IMAGES, LABELS, CAPTIONS, held_out=0.2),
        from_arrays(IMAGES, LABELS, CAPTIONS, seed=1),
    ))
    assert first == again
    assert len({first, *different}) == 1 + len(different)


def test_arrays_open_by_their_version_and_only_where_they_are_provided():
    first, second = from_arrays(IMAGES), from_arrays(255 - IMAGES)
    message = "is not in .* this run was trained on arrays in memory: pass data=... with the same"
    with pytest.raises(UserError, match=f"^data.source {first.name} {message}"):
        open_source(first.name, "train")
    provide(first)
    assert opened(second).version == second.source.version
    order = np.random.RandomState(0).permutation(20)
    for each, images in ((first, IMAGES), (second, 255 - IMAGES)):
        source = open_source(each.name, "all")
        assert source.name == each.name
        np.testing.assert_array_equal(values(source), images[order])


def test_rows_are_standardised_by_the_training_records():
    arrays = from_arrays(ROWS, condition=VECTORS, held_out=0.25)
    order = np.random.RandomState(0).permutation(40)
    for split, rows in (("train", order[:30]), ("test", order[30:]), ("all", order)):
        source = opened(arrays, split)
        for given, key, mean, std in (
            (ROWS, "image", source.mean, source.std),
            (VECTORS, "condition", source.condition_mean, source.condition_std),
        ):
            known = given[order[:30]]
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
    with pytest.raises(UserError, match="token_size is 4, and a record of arrays has 6 columns"):
        open_source("arrays", "all", token_size=4)


def test_a_constant_column_of_many_records():
    rows = np.random.default_rng(0).normal(size=(10_000, 2))
    rows[:, 1] = 7.3  # whose deviation is not 0, by rounding
    with pytest.raises(UserError, match=r"^data has the constant column 1, which has no density"):
        from_arrays(rows)
    source = opened(from_arrays(rows[:, :1], condition=rows))
    assert (values(source, "condition")[:, 1] == 0).all()
    assert (source.condition_mean[1], source.condition_std[1]) == (7.3, 1)


TABLE = {"data": ROWS, "condition": VECTORS, "mass": ROWS[:, 0], "spin": ROWS[:, 1],
         "count": np.arange(40), "good": np.arange(40) % 3 == 0}


def write_npz(path):
    np.savez(path, **TABLE)


def write_parquet(path):
    lists = {"data": list(ROWS), "condition": list(VECTORS)}
    parquet.write_table(pyarrow.table(TABLE | lists), path, row_group_size=16)


@pytest.mark.parametrize(("kind", "write"), [("npz", write_npz), ("parquet", write_parquet)])
def test_a_file_holds_columns_under_keys(tmp_path, kind, write):
    path = tmp_path / f"some,file.{kind}"
    write(path)
    both = np.stack([TABLE["mass"], TABLE["spin"]], 1)
    for keys, rows, condition in (
        ("", ROWS, VECTORS),
        (",data=mass+spin,condition=condition+mass", both, np.column_stack([VECTORS, both[:, 0]])),
        (",data=spin,condition=count+good", both[:, 1:],
         np.column_stack([TABLE["count"], TABLE["good"]])),
    ):
        expected = from_arrays(rows, condition=condition)
        assert open_source(f"{kind}:{path}{keys}", "all").version == expected.source.version
    (tmp_path / "text").write_text("no archive")
    for name, message in (
        (f"{path},data=weight", "has no array 'weight': it has data, condition, mass"),
        (f"{path},data=mass+count", "the array 'count' is int64: expected floating-point numbers"),
        (f"{tmp_path}/text", "/text cannot be read ("),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            open_source(f"{kind}:{name}", "train")


def test_a_changed_file_is_read_anew_and_may_lack_a_condition(tmp_path):
    write_npz(path := tmp_path / "a.npz")
    assert open_source(f"npz:{path}", "all").condition_width == 3
    np.savez(path, data=ROWS[:30])
    assert open_source(f"npz:{path}", "all").condition_width == 0


@pytest.mark.parametrize(("given", "message"), [
    ({"images": np.zeros(40)}, "images are float64 [40]: expected uint8 pixels or float32 latents "
     "[n, H, W, C] or [n, H, W], or an array [n, D], such as data[:, None] for one column"),
    ({"images": IMAGES.transpose(0, 3, 1, 2).repeat(5, 2)}, "images are [20, 3, 20, 6], channels "
     "first: expected [n, H, W, C]; give np.moveaxis(images, 1, -1), the same as images.transpo"),
    ({"images": np.arange(40).reshape(20, 2)}, "data is int64 [20, 2]: expected floating-point "
     "numbers [n, D], as whole numbers have no density: add noise, data + np.random.default_rng("),
    ({"images": IMAGES / 255}, "images are float64 [20, 4, 6, 3]: expected uint8 pixels or float32 "
     "latents [n, H, W, C] or [n, H, W], or an array [n, D], such as data[:, None] for one column; "
     "pixels become uint8 by images.astype(np.uint8) from 0..255, and by (255 * images).round()"),
    ({"pixel_levels": 17}, "pixel_levels is 17, and the data are uint8 up to 255: expected"),
    ({"labels": LABELS[1:]}, "labels has 19 rows: expected one for each of the 20 records"),
    ({"held_out": float("nan")}, "held_out is nan: expected a share of the records"),
    ({"images": np.where(ROWS > 100, np.nan, ROWS)}, "data holds a number that is not finite"),
    ({"images": np.ma.masked_greater(ROWS, 100)}, "data has masked entries: fill them in"),
], ids=range(9))
def test_mistakes_are_refused_in_one_line(given, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        from_arrays(**{"images": IMAGES} | given)
    assert "\n" not in str(error.value)
