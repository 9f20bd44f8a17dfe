"""A tfds data set with captions."""

import io

import pytest
import tensorflow_datasets as tfds

from tests.data.prepare.common import encoded, picture


class Captioned(tfds.core.GeneratorBasedBuilder):
    """Six images, each with two captions."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["ant", "bee", "cat", "dog"]),
            "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
            "title": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            texts = [{"text": f"first {i}"}, {"text": f"second {i}"}]
            yield (
                i,
                {
                    "image": io.BytesIO(encoded(picture(i))),
                    "label": i % 4,
                    "captions": texts,
                    "title": f"title {i}",
                },
            )


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Captioned(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder / "captioned" / "1.0.0"
