"""The learned denoiser: its target is the teacher's, and its workdir keeps the teacher."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntm_jax
from ntm_jax.core import denoising, trajectory
from ntm_jax.core.model import NTM
from ntm_jax.errors import UserError
from ntm_jax.evaluation import measures
from ntm_jax.export import write
from ntm_jax.runtime import config
from ntm_jax.runtime.run import untrained as new_run
from ntm_jax.training import finetune, loop, pictures, reference_model, state
from tests.common import (
    as_run,
    batch_of,
    bits,
    logged,
    objective_of,
    random_run,
    randomised,
    setup,
    tiny_config,
    write_run,
)

TEACHER_CHANGES = {
    "sample.decoder": "score", "train.log_every": 10, "evaluate.split": "test[:6]",
    "evaluate.trajectories": 1}
TEACHER = tiny_config(**TEACHER_CHANGES)


def denoiser_config(teacher, **changes) -> config.Config:
    return tiny_config(teacher=str(teacher), **TEACHER_CHANGES | {
        "train.objective": "denoiser", "train.condition_dropout": 0.0, "train.steps": 4,
        "train.evaluate_every": 4, "model.width": 32, "model.predictor_layers": 2,
        "model.transporter_blocks": 0, "sample.decoder": "denoiser"} | changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The workdir of a run at step 4, with random parameters."""
    return write_run(tmp_path_factory.mktemp("teacher") / "run", TEACHER)


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    """The workdir of a denoiser's run and its evaluation.

    The folder has the teacher of a run that never saved a checkpoint. The run is stopped at step 2
    and resumed while its teacher's folder is away.
    """
    workdir, moved = tmp_path_factory.mktemp("denoiser") / "run", teacher.with_name("moved")
    shutil.copytree(teacher, workdir / "frozen")
    assert loop.train(denoiser_config(teacher), str(workdir), progress=False, until=2) is None
    shutil.move(teacher, moved)
    try:
        _, result = loop.train(denoiser_config(teacher), str(workdir), progress=False)
    finally:
        shutil.move(moved, teacher)
    return workdir, result


@pytest.fixture(scope="module")
def untrained():
    """(the source, the teacher's run with random parameters, a denoiser, its new parameters)."""
    source, model, mesh = setup(TEACHER)
    run = random_run(as_run(TEACHER, model, mesh))
    denoiser = denoising.make_denoiser(model)
    params = state.initialize(as_run(TEACHER, denoiser, mesh)).params
    return source, run, denoiser, params


@pytest.mark.slow
def test_the_target_is_the_teachers_score_denoising_of_the_same_trajectory(untrained):
    source, run, denoiser, params = untrained
    params = randomised(params, seed=1)
    batch = batch_of(source, TEACHER, 4)
    x, y, keys = batch["x"], batch["label"], jax.random.split(jax.random.key(0), 4)

    t = run.schedule.levels(2, np.full(4, 0.03, np.float32))

    @jax.jit
    def expected(frozen, params):
        xs = trajectory.simulate(x, t, trajectory.example_noise(keys, (3, *x.shape[1:])))
        target = denoising.score_denoise(run.model, frozen, xs, t, y)
        u_0, _ = run.model.apply(
            frozen, xs[:, 0], t[:, 0], np.full(4, 2), y, method=NTM.transport)
        found = denoising.denoise(denoiser, params, u_0, t[:, 0], 2, y)
        return target, found, jnp.abs(u_0 - xs[:, 0]).max()

    @jax.jit
    def errors_and_gradient(frozen, params):
        def to_target(frozen):
            errors = denoising.denoiser_errors(
                denoiser, params, run.model, frozen, run.pixels, keys, x, t, y)
            return errors["to_target"].sum(), errors

        return jax.grad(to_target, has_aux=True)(frozen)

    target, found, moved = expected(run.params, params)
    gradient, errors = errors_and_gradient(run.params, params)
    pairs = {"to_target": (found, target), "to_data": (found, x), "target_to_data": (target, x)}
    for name, (a, b) in pairs.items():
        error = np.mean((np.asarray(a) - b) ** 2, (1, 2))
        np.testing.assert_allclose(errors[name], error, rtol=1e-4, err_msg=name)
    assert moved > 0.01  # the transporter does something
    # The target is a constant: among the errors' inputs it alone depends on the predictor.
    assert not any(np.any(g) for g in jax.tree.leaves(gradient["params"]["predictor"]))


def test_a_new_denoiser_starts_from_the_best_linear_guess(untrained):
    """With a zero projection the preconditioned head at s = 0 is E[x | u_0] of Gaussian data."""
    _, run, denoiser, params = untrained
    c = run.model.config
    u = np.random.default_rng(0).normal(size=(2, c.tokens, c.dim)).astype(np.float32)
    r, t = c.data_std, 0.03
    found = jax.jit(denoising.denoise, static_argnums=(0, 4))(
        denoiser, params, u, np.full(2, t, np.float32), 2, np.zeros(2, int))
    factor = (1 - t) * r**2 / ((1 - t) ** 2 * r**2 + t**2)
    np.testing.assert_allclose(found, factor * u, rtol=1e-5)


@pytest.mark.slow
def test_the_teacher_is_kept_once_and_a_run_resumes_without_its_source(
        run, teacher, tmp_path, monkeypatch):
    workdir, result = run
    kept = ntm_jax.load(str(workdir / "frozen"))
    assert bits(kept.params) == bits(ntm_jax.load(str(teacher)).params)
    assert kept.config == TEACHER
    assert [path.name for path in (workdir / "frozen" / "checkpoints").iterdir()] == ["4"]
    monkeypatch.setattr(pictures, "draw", lambda *_: [])
    _, whole = loop.train(denoiser_config(teacher), str(tmp_path / "whole"), progress=False)
    for raw in (True, False):
        folders = workdir, tmp_path / "whole"
        one, other = (ntm_jax.load(str(folder), raw=raw).denoiser.params for folder in folders)
        assert bits(one) == bits(other)
    assert result["denoiser"] == whole["denoiser"]
    trained, export = ntm_jax.load(str(workdir)), str(tmp_path / "export")
    monkeypatch.setattr(write, "programs", lambda run: {})  # they take a minute to compile
    trained.export(export)
    for source in (str(workdir), export):  # from which an NTM or another denoiser starts
        for settings, expected in ((TEACHER, trained.params),
                                   (denoiser_config("x"), trained.denoiser.params)):
            new = new_run(dataclasses.replace(settings, init_from=source), trained.spec,
                          trained.mesh)
            assert bits(finetune.start_from(new, state.abstract(new)).params) == bits(expected)
        again = new_run(denoiser_config(source), trained.spec, trained.mesh)
        distilled = reference_model.load_distilled(again, objective_of(again))
        assert (distilled.step, distilled.denoiser) == (4, None)
        assert bits(distilled.params) == bits(trained.params)


@pytest.mark.slow
def test_the_evaluation_of_a_denoiser(run, teacher, monkeypatch):
    monkeypatch.setattr(measures, "denoising_errors", lambda *_: {})  # they take long to compile
    workdir, result = run
    assert set(result["denoiser"]) == {"to_target", "to_data", "target_to_data"}
    teachers = ntm_jax.load(str(teacher)).evaluate()
    assert result["nats_per_dim"] == teachers["nats_per_dim"]  # the likelihood is the teacher's
    # Denoising errors are those of the score decoder alone.
    assert ("denoising" in result, "denoising" in teachers) == (False, True)
    found, evaluated = logged(workdir)[-1]["evaluate/mse"], result["denoiser"]["to_target"]["mean"]
    assert found == pytest.approx(evaluated, rel=1e-5)
    assert {"samples.png", "trajectories.png"} <= {path.name for path in workdir.iterdir()}


def test_a_teacher_that_does_not_fit_is_refused(untrained):
    teacher = untrained[1]
    other = dataclasses.replace(teacher, config=denoiser_config("x", **{"trajectory.t_min": 0.02}))
    with pytest.raises(UserError, match=r"trajectory\.t_min is 0\.02, and 0\.03 in the"):
        reference_model.check_teacher(other, teacher)
    guided = dataclasses.replace(teacher, config=denoiser_config("x", **{"sample.guidance": 1.0}))
    reference_model.check_teacher(guided, teacher)
