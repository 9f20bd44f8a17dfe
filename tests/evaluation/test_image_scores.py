"""Scores of samples beside real images: class accuracy by guidance, features, retrieval."""

import dataclasses
import math

import numpy as np
import pytest
from sklearn.svm import SVC

from ntm_jax.data import pipeline, sources
from ntm_jax.data.records import Layout
from ntm_jax.evaluation import image_scores, statistics
from ntm_jax.evaluation.statistics import FeatureStatistics
from ntm_jax.runtime import build
from ntm_jax.runtime import config as configuration
from tests.common import as_run, random_run, tiny_config
from tests.data.common import write_records


def sampled(run, **overrides):
    """The run with samples decoded by the inverse, and other settings overridden."""
    settings = tiny_config(**{"sample.decoder": "inverse"} | overrides)
    return dataclasses.replace(run, config=settings)


@pytest.fixture
def guided_scores(run, source, monkeypatch):
    """(run, training split, image scores at two scales of guidance, the samples by scale)."""
    run = sampled(run, **{"evaluate.num_samples": 30, "evaluate.features": "pixels"})
    train = sources.open_source("digits", "train")
    made, generated = {}, image_scores.generated

    def kept(run, *arguments):
        scale = run.config.sample.guidance
        assert scale not in made  # the configuration's own scale, 0, is sampled once
        made[scale] = np.concatenate(list(generated(run, *arguments)))
        return np.split(made[scale], [8, 20])

    monkeypatch.setattr(image_scores, "generated", kept)
    scales = (0.0, (3.0, 0.0))
    comparison = image_scores.compare_with(run, run.config.evaluate, train, source)
    result = image_scores.image_scores(run, train, source, comparison, scales)
    assert list(made) == list(scales)
    return run, train, result, made


def test_guidance_is_compared_on_the_same_noise(guided_scores):
    run, train, result, made = guided_scores
    own, other = made
    expected = run.sample(30, np.arange(30) % 10, guidance=other)
    np.testing.assert_array_equal(made[other], expected)
    assert (made[other] != made[own]).any()
    records = [train.records[i] for i in range(1500)]
    real = np.stack([r["image"] for r in records]).reshape(1500, 64) / 16
    machine = SVC().fit(real, np.array([r["label"] for r in records]))
    flat = {scale: images.reshape(30, 64) / 16 for scale, images in made.items()}
    hits = {scale: (machine.predict(x) == np.arange(30) % 10).astype(int)
            for scale, x in flat.items()}
    for scale, found in zip(made, result["guidance"], strict=True):
        difference = hits[scale] - hits[own]
        assert (found["guidance"], found["mean"]) == (scale, pytest.approx(hits[scale].mean()))
        assert found["difference"]["mean"] == pytest.approx(difference.mean())
        stderr = difference.std(ddof=1) / math.sqrt(30)
        assert found["difference"]["stderr"] == pytest.approx(stderr)
        expected = statistics.feature_scores(*map(FeatureStatistics.of, (real, flat[scale])))
        for name in ("frechet", "kid", "precision"):
            assert found[name] == pytest.approx(expected[name]), name
    assert result["class_accuracy"]["mean"] == result["guidance"][0]["mean"]


def test_records_of_unknown_class_do_not_train_the_classifier(run, source, monkeypatch):
    run = sampled(run, **{"evaluate.num_samples": 30})
    train = sources.open_source("digits", "train")
    records = [record if i < 300 else record | {"label": -1}
               for i, record in enumerate(train.records[i] for i in range(600))]
    own = np.stack([next(r["image"] for r in records if r["label"] == i % 10) for i in range(30)])
    monkeypatch.setattr(image_scores, "generated", lambda *_: np.split(own, [7]))
    changed = dataclasses.replace(train, records=records)
    assert image_scores.image_scores(run, changed, source, None)["class_accuracy"]["mean"] == 1


@pytest.fixture(scope="module")
def pictures():
    """Random pictures [60, 8, 8, 1] of 16 levels: 40 to train on, 20 held out."""
    return np.random.default_rng(0).integers(0, 16, (60, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def captioned(run, pictures, tmp_path_factory):
    """A run conditioned on the captions of the pictures, never trained."""
    folder = tmp_path_factory.mktemp("captioned")
    words, random = "a red blue circle square", np.random.default_rng(1)
    examples = [{"image": picture, "caption": " ".join(random.choice(words.split(), 3))}
                for picture in pictures]
    write_records(folder, {"train": examples[:40], "test": examples[40:]},
                  Layout((8, 8, 1), 16, captions=True))
    values = sampled(run, **{"data.source": f"records:{folder}", "model.condition": "text",
                             "evaluate.num_samples": 30}).config.raw
    values["data"]["text"] = f"words:3:{words}"
    settings = configuration.read(values)
    spec = pipeline.spec(settings.data.open("test"), 2)
    new = as_run(settings, build.make_model(settings, spec), run.mesh)
    return random_run(new, step=3)


def test_retrieval_of_captioned_pictures(captioned, pictures, monkeypatch):
    """A sample retrieves its caption's own picture among those of both splits.

    Samples of an untrained model retrieve by chance, the held-out pictures themselves always.
    """
    source, train = (captioned.config.data.open(split) for split in ("test", "train"))
    settings = dataclasses.replace(captioned.config.evaluate, features="pixels")
    comparison = image_scores.compare_with(captioned, settings, train, source)
    made, generated = [], image_scores.generated
    monkeypatch.setattr(image_scores, "generated",
                        lambda *rest: made.extend(generated(*rest)) or made)
    found = image_scores.image_scores(captioned, train, source, comparison)["retrieval"]
    ranks = statistics.retrieved(pictures, made[0][:20], np.arange(40, 60), 16)
    assert found["rank_5"]["mean"] == pytest.approx((ranks <= 5).mean())
    assert found["rank_5"]["stderr"] == pytest.approx((ranks <= 5).std(ddof=1) / np.sqrt(20))
    assert (found["candidates"], found["captions"], found["proxy"]) == (60, 20, True)
    assert found["chance"] == {"rank_1": 1 / 60, "rank_5": 5 / 60}
    assert found["rank_1"]["mean"] < 0.3

    own = np.resize(pictures[40:], (30, 8, 8, 1))  # the captions' own pictures, in turn
    monkeypatch.setattr(image_scores, "generated", lambda *_: np.split(own, [7]))
    found = image_scores.image_scores(captioned, train, source, comparison)
    assert found["retrieval"]["rank_1"] == {"mean": 1.0, "stderr": 0.0}
    assert "retrieval" not in image_scores.image_scores(captioned, train, source, None)
