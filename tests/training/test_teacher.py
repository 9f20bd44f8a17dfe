"""The learned denoiser: its target is the teacher's, the teacher stays as it was, a resume needs the run's folder alone."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import ntm_jax
from ntm_jax.core import denoising, trajectory
from ntm_jax.core.model import NTM
from ntm_jax.errors import UserError
from ntm_jax.evaluation import evaluate
from ntm_jax.runtime import config
from ntm_jax.sampling.write import SampleRequest, write_samples
from ntm_jax.training import loop, state
from tests.common import as_run, batch_of, bits, randomised, rehearsal, setup, tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")
TEACHER = tiny_config(**{"train.steps": 2, "train.log_every": 10, "evaluate.split": "test[:6]", "evaluate.trajectories": 1})


def denoiser_config(teacher, **changes) -> config.Config:
    values = TEACHER.raw
    values["teacher"] = str(teacher)
    values["train"] |= {"objective": "denoiser", "condition_dropout": 0.0, "steps": 4, "save_every": 2, "evaluate_every": 4}
    values["model"] |= {"width": 32, "predictor_layers": 2, "transporter_blocks": 0}
    values["sample"] |= {"decoder": "denoiser"}
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    return config.read(values)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    loop.train(TEACHER, str(workdir), progress=False)
    return workdir


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    """The workdir of a denoiser's run, stopped half way and resumed without its teacher's folder, and its evaluation."""
    workdir, moved = tmp_path_factory.mktemp("denoiser") / "run", teacher.with_name("moved")
    assert loop.train(denoiser_config(teacher), str(workdir), progress=False, until=2) is None
    shutil.move(teacher, moved)
    try:
        result = loop.train(denoiser_config(teacher), str(workdir), progress=False)
    finally:
        shutil.move(moved, teacher)
    return workdir, result


@rehearsal
def test_the_target_is_the_teachers_score_denoising_of_the_same_trajectory():
    source, model, mesh = setup(TEACHER)
    frozen = randomised(state.initialize(as_run(TEACHER, model, mesh)).params)
    denoiser = denoising.make_denoiser(model)
    params = randomised(state.initialize(as_run(TEACHER, denoiser, mesh)).params, seed=1)
    batch = batch_of(source, TEACHER, 4)
    x, y, keys = batch["x"], batch["label"], jax.random.split(jax.random.key(0), 4)
    t = TEACHER.schedule(model.config.tokens).levels(2, np.full(4, 0.03, np.float32))
    xs = trajectory.simulate(x, t, trajectory.example_noise(keys, (3, *x.shape[1:])))
    target = denoising.score_denoise(model, frozen, xs, t, y)
    u_0, _ = model.apply(frozen, xs[:, 0], t[:, 0], np.full(4, 2), y, method=NTM.transport)
    found = denoising.denoise(denoiser, params, u_0, t[:, 0], 2, y)
    errors = denoising.denoiser_errors(TEACHER, denoiser, params, model, frozen, keys, x, y)
    for name, (a, b) in {"to_target": (found, target), "to_data": (found, x), "target_to_data": (target, x)}.items():
        np.testing.assert_allclose(errors[name], np.mean((np.asarray(a) - b) ** 2, (1, 2)), rtol=1e-4, err_msg=name)
    assert np.abs(u_0 - xs[:, 0]).max() > 0.01  # the transporter does something
    gradient = jax.grad(lambda frozen: denoising.denoiser_errors(TEACHER, denoiser, params, model, frozen, keys, x, y)["to_target"].sum())
    through_u = jax.tree.leaves(gradient(frozen)["params"]["predictor"])
    assert not any(np.any(g) for g in through_u)  # the target is a constant: of the predictor only it depends


def test_a_new_denoiser_starts_from_the_best_linear_guess():
    """With a zero projection the preconditioned head at s = 0 is E[x | u_0] of Gaussian data."""
    _, model, mesh = setup(TEACHER)
    denoiser = denoising.make_denoiser(model)
    params = state.initialize(as_run(TEACHER, denoiser, mesh)).params
    u = np.random.default_rng(0).normal(size=(2, model.config.tokens, model.config.dim)).astype(np.float32)
    found = denoising.denoise(denoiser, params, u, np.full(2, 0.03, np.float32), 2, np.zeros(2, int))
    r, t = model.config.data_std, 0.03
    np.testing.assert_allclose(found, (1 - t) * r**2 / ((1 - t) ** 2 * r**2 + t**2) * u, rtol=1e-5)


def test_the_teacher_is_kept_once_and_not_trained(run, teacher):
    workdir, _ = run
    kept = ntm_jax.load(str(workdir / "frozen"))
    assert bits(kept.params) == bits(ntm_jax.load(str(teacher)).params)
    assert kept.config == TEACHER
    sizes = [sum(f.stat().st_size for f in (folder / "checkpoints").rglob("*") if f.is_file()) for folder in (workdir, workdir / "frozen")]
    assert sizes[0] > 0
    names = json.loads((workdir / "config.json").read_text())
    assert names["teacher"] == str(teacher)


@rehearsal
def test_a_resumed_run_is_the_uninterrupted_one(run, teacher, tmp_path):
    workdir, result = run
    whole = loop.train(denoiser_config(teacher), str(tmp_path / "whole"), progress=False)
    for raw in (True, False):
        one, other = (ntm_jax.load(str(folder), raw=raw).denoiser.params for folder in (workdir, tmp_path / "whole"))
        assert bits(one) == bits(other)
    assert result["denoiser"] == whole["denoiser"]


def test_what_its_evaluation_says(run, teacher):
    workdir, result = run
    assert set(result["denoiser"]) == {"to_target", "to_data", "target_to_data"}
    teachers, _ = evaluate.evaluate(ntm_jax.load(str(teacher)))
    assert result["nats_per_dim"] == teachers["nats_per_dim"]  # the likelihood is the teacher's
    assert ("denoising" in result, "denoising" in teachers) == (False, True)  # of the score decoder alone
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["evaluate/mse"] == pytest.approx(result["denoiser"]["to_target"]["mean"], rel=1e-5)
    assert {"samples.png", "trajectories.png"} <= {path.name for path in workdir.iterdir()}


def test_sampling(run, teacher):
    loaded, plain = ntm_jax.load(str(run[0])), ntm_jax.load(str(teacher))
    images = loaded.sample(3)
    assert (images.shape, images.dtype) == ((3, 8, 8, 1), np.uint8)
    assert (images != loaded.sample(3, decoder="score")).any()
    np.testing.assert_array_equal(loaded.sample(3, decoder="score"), plain.sample(3, decoder="score"))
    with pytest.raises(UserError, match="decoder=denoiser needs a denoiser, and this run has none"):
        plain.sample(3, decoder="denoiser")
    with pytest.raises(UserError, match="decoder=denoiser needs a denoiser, and this run has none"):
        write_samples(plain, str(run[0] / "out"), SampleRequest(3, 3, decoder="denoiser"))
    assert not (run[0] / "out").exists()
    assert loaded.teacher_step == plain.step == 2


def test_what_does_not_go_together_is_refused(run, teacher, tmp_path):
    with pytest.raises(UserError, match=r"config\.trajectory\.t_min is 0\.02, and 0\.03 in the teacher"):
        loop.train(denoiser_config(teacher, **{"trajectory.t_min": 0.02}), str(tmp_path / "new"), progress=False)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="holds a run with teacher = "):
        loop.train(dataclasses.replace(denoiser_config(teacher), teacher="elsewhere"), str(run[0]), progress=False)
    with pytest.raises(UserError, match="a denoiser, and nothing else, has a teacher"):
        denoiser_config("")
    with pytest.raises(UserError, match=r"config\.sample\.decoder=denoiser needs a denoiser"):
        tiny_config(**{"sample.decoder": "denoiser"})
    with pytest.raises(UserError, match="holds no run"):
        loop.train(denoiser_config(tmp_path / "nothing"), str(tmp_path / "new"), progress=False)
