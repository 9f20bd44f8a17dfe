"""A data set that tfds prepared."""

import io

import pytest
import tensorflow_datasets as tfds
from PIL import Image


class Squares(tfds.core.GeneratorBasedBuilder):
    """Images of one grey level, with two captions each: 10 to train on, 4 to test."""

    VERSION = tfds.core.Version("1.2.3")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
            "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 10), "test": self._generate_examples(10, 14)}

    def _generate_examples(self, first, last):
        for i in range(first, last):
            file = io.BytesIO()
            Image.new("RGB", (6, 6), (i, i, i)).save(file, "png")
            file.seek(0)
            yield i, {
                "image": file,
                "label": i % 3,
                "captions": [{"text": f"first {i}"}, {"text": f"second {i}"}],
            }


@pytest.fixture(scope="package")
def squares_dir(tmp_path_factory):
    """The folder for TFDS_DATA_DIR; the data set lies in squares/1.2.3."""
    folder = tmp_path_factory.mktemp("tfds")
    Squares(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder
