"""Helpers for the tests of prepare: random images, folders of them, and their preparation."""

import dataclasses
import hashlib
import io
import json
import tarfile

import numpy as np
from PIL import Image
from scipy.io import savemat

from ntm_jax.data.records import read_manifest
from ntm_jax.data.sources import open_source
from ntm_jax.tools.prepare import PrepareOptions, prepare

WORDS = "words:3:a red green circle"


def picture(seed, size=(20, 30), detail=(3, 4)):
    """A random smooth image [H, W, 3] uint8."""
    coarse = np.random.default_rng(seed).integers(256, size=(*detail, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def write_folder(folder, files, rows=None):
    """Writes files {name: bytes} and metadata.jsonl with `rows`, by default a caption "a" each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    rows = rows or [{"file_name": name, "caption": "a"} for name in files]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pictures(folder, count, **keys):
    """A folder of `count` images with captions and labels."""
    captions = ["a green circle", "a red circle"]
    rows = [
        {"file_name": f"{i:03}.png", "caption": captions[i % 2], "label": i % 3, **keys}
        for i in range(count)
    ]
    files = {row["file_name"]: encoded(picture(i)) for i, row in enumerate(rows)}
    return write_folder(folder, files, rows)


def run(tmp_path, folder, out="out", **options):
    choices = {field.name for field in dataclasses.fields(PrepareOptions)}
    given = {"image_size": 8, "test": 0, "input": f"folder:{folder}"} | {
        key: options.pop(key) for key in choices & options.keys()
    }
    prepare(PrepareOptions(**given), str(tmp_path / out), **options)
    return tmp_path / out


def records(folder, split="train"):
    return list(open_source(f"records:{folder}", split).records)


def choices(folder):
    return read_manifest(str(folder))[0].choices


def files(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def tar_of_tars(path, folders):
    """Writes {folder: {name: bytes}} as ILSVRC2012_img_train.tar is: a tar of each folder."""
    with tarfile.open(path, "w") as outer:
        for folder, files in folders.items():
            part = io.BytesIO()
            with tarfile.open(fileobj=part, mode="w") as inner:
                for name, data in files.items():
                    add(inner, name, data)
            add(outer, f"{folder}.tar", part.getvalue())
    return path


def devkit(path, classes, truth):
    """Writes ImageNet's devkit: the numbers of the classes, and `truth`, those of the test images.
    """
    dtype = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    meta, synsets = io.BytesIO(), [(i, name, name) for i, name in enumerate(classes, 1)]
    savemat(meta, {"synsets": np.array(synsets, dtype)})
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "kit/data/meta.mat", meta.getvalue())
        lines = "".join(f"{number}\n" for number in truth)
        add(tar, "kit/data/ILSVRC2012_validation_ground_truth.txt", lines.encode())
    return path
