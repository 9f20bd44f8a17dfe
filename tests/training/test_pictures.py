"""The pictures of a run: their rows, their names, and the levels that they show."""

import dataclasses

import numpy as np
import pytest

from ntm_jax.data import pipeline
from ntm_jax.runtime import plots, sharding
from ntm_jax.runtime.run import untrained
from ntm_jax.sampling import generate
from ntm_jax.training import pictures
from tests.common import random_run, tiny_config
from tests.data.common import write_autoencoder


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: the arguments of contact_sheet and of trajectory_picture."""
    seen = {}
    for name in ("contact_sheet", "trajectory_picture"):
        monkeypatch.setattr(plots, name, lambda *arguments, name=name: seen.update(
            {name: arguments}))
    return seen


def run_of(source: str, tmp_path, **overrides):
    """(a run in a folder before it has parameters, its training split, its held-out split)."""
    settings = tiny_config(**{"data.source": source, "data.patch_size": 2} | overrides)
    train, held_out = (settings.data.open(split) for split in ("train", "test"))
    mesh, spec = sharding.make_mesh(settings.mesh), pipeline.spec(train, settings.data.patch_size)
    return untrained(settings, spec, mesh, str(tmp_path)), train, held_out


def test_each_class_has_a_row_of_samples_beside_its_own_images(tmp_path, drawn):
    run, train, held_out = run_of("digits", tmp_path, **{"sample.num": 20})
    names = tuple("abcdefghij")
    run = random_run(run, spec=dataclasses.replace(run.spec, class_names=names))
    pictures.draw(run, held_out, "loss")
    rows, _ = drawn["contact_sheet"]
    assert [row.name for row in rows] == list(names)
    expected = plots.displayable(generate.sample_at(run, np.arange(20), with_levels=True)[0], 17)
    for label, row in enumerate(rows):
        np.testing.assert_array_equal(row.samples, expected[label::10])
        assert len(row.beside) == pictures.REAL_PER_CLASS
    images = {record["image"].tobytes(): record["label"] for record in map(
        train.records.__getitem__, range(1000))}
    shown = {plots.displayable(np.frombuffer(image, np.uint8), 17).tobytes(): label
             for image, label in images.items()}
    for label, row in enumerate(rows):
        assert all(shown[image.tobytes()] == label for image in np.asarray(row.beside))
    levels, t, _, names = drawn["trajectory_picture"]
    assert (len(levels), names) == (10, list("abcdefghij"))
    assert (t[0], t[1] < 1, t[-1]) == (1, True, 0)
    np.testing.assert_array_equal(levels[:, -1].shape, (10, 8, 8, 1))


def test_latents_are_shown_decoded_beside_decoded_images(tmp_path, drawn, monkeypatch):
    write_autoencoder(tmp_path / "vae")
    run, train, held_out = run_of("mock:4x4x3,levels=0,classes=2", tmp_path, **{
        "sample.autoencoder": f"kl:{tmp_path}/vae", "sample.num": 4})
    latents = np.random.default_rng(0).normal(size=(4, 3, 4, 4, 3)).astype(np.float32)
    monkeypatch.setattr(generate, "sample_at", lambda run, index, with_levels: (
        latents[index, -1], latents[index]))
    pictures.draw(run, held_out, "loss")
    rows, _ = drawn["contact_sheet"]
    for label, row in enumerate(rows):
        expected = generate.as_pictures(run, latents[label::2, -1])
        np.testing.assert_array_equal(row.samples, expected)
        first = next(i for i in range(100) if train.records[i]["label"] == label)
        expected = generate.as_pictures(run, train.records[first]["image"][None])
        np.testing.assert_array_equal(row.beside[:1], expected)
    assert row.samples.shape == (2, 8, 8, 3)
    levels, *_ = drawn["trajectory_picture"]  # of latents as they are
    assert levels.shape == (2, 4, 4, 4, 3)
