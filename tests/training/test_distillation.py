"""A run's own denoiser: resumed bit for bit, and taken by sample.decoder=auto."""

import dataclasses
import pathlib
import shutil

import pytest

import ntm_jax
from ntm_jax.errors import UserError
from ntm_jax.evaluation import measures
from ntm_jax.export import read, write
from ntm_jax.runtime.config import Config
from ntm_jax.training import distillation, loop, pictures
from tests.common import bits, tiny_config

CHANGES = {"train.steps": 2, "sample.decoder": "auto", "evaluate.split": "test[:6]",
           "evaluate.trajectories": 1, "evaluate.num_samples": 6, "evaluate.features": "pixels"}


def distilling(steps: int, **changes) -> Config:
    return tiny_config(**CHANGES | {"train.distil_steps": steps} | changes)


def decoder(run) -> str:
    return run.config.sample.decoder


@pytest.mark.slow
def test_a_run_distils_its_denoiser_resumes_it_and_samples_by_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *_: [])
    monkeypatch.setattr(measures, "denoising_errors", lambda *_: {})  # as do these
    monkeypatch.setattr(write, "programs", lambda run: {})  # they take a minute to compile
    whole, parts, moved = (str(tmp_path / name) for name in ("whole", "parts", "moved"))
    run, result = loop.train(distilling(3), whole, progress=False)
    assert (decoder(run), run.step, run.denoiser.step) == ("denoiser", 2, 3)
    assert result["class_accuracy"]["decoder"] == "denoiser"

    # Stopped in the middle: the denoiser's steps are those of a run of its own.
    ntm, _ = loop.train(distilling(0), parts, progress=False)
    assert decoder(ntm_jax.load(parts)) == decoder(ntm) == "score"
    nested = distillation.settings(distilling(3))
    assert loop.train(nested, f"{parts}/denoiser", progress=False, until=2) is None
    early = f"{parts}/denoiser/checkpoints/2"
    assert decoder(ntm_jax.load(parts)) == "score"
    loop.train(distilling(3), parts, progress=False)
    assert pathlib.Path(early).exists()  # it went on from there
    shutil.move(parts, moved)
    loaded = ntm_jax.load(moved)
    assert (decoder(loaded), loaded.denoiser.teacher_step) == ("denoiser", 2)
    assert bits(loaded.denoiser.params) == bits(run.denoiser.params)
    assert bits(loaded.params) == bits(run.params)
    samples = ntm_jax.load(whole).sample(4)
    assert (loaded.sample(4) == samples).all()
    assert decoder(ntm_jax.load(moved, raw=True)) == "score"
    assert decoder(ntm_jax.load(f"{moved}/denoiser")) == "denoiser"

    loaded.export(str(tmp_path / "export"))
    about = read.read_export_info(str(tmp_path / "export"))
    assert (about.step, about.teacher_step, about.denoiser_step) == (2, 2, 3)
    assert (ntm_jax.load(str(tmp_path / "export")).sample(4) == samples).all()

    # A denoiser of another step is not used, and makes room for a new one.
    with pytest.raises(UserError, match=r"distil_steps is 2, and .* holds step 3: raise it, or"):
        loop.train(distilling(2), moved, progress=False)
    longer, _ = loop.train(distilling(3, **{"train.steps": 4}), moved, progress=False)
    assert (longer.step, longer.denoiser.teacher_step) == (4, 4)
    assert bits(longer.denoiser.params) != bits(run.denoiser.params)


def test_only_an_ntm_is_distilled():
    with pytest.raises(UserError, match="distil_steps is 3: a denoiser is distilled of an NTM"):
        distilling(3, **{"model.head": "standard"})
    learned = distilling(3, **{"model.pixel_likelihood": "learned"})
    by_score = dataclasses.replace(distilling(0), model=dataclasses.replace(
        learned.model, pixel_likelihood="binned"))
    assert learned.without_auto().sample.decoder == "inverse"
    assert by_score.without_auto().sample.decoder == "score"
