"""Flow-matching runs, and NTMs that start from them: the reference is kept once, in the workdir."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntm_jax
from ntm_jax.core import flow_matching
from ntm_jax.errors import UserError
from ntm_jax.evaluation import measures
from ntm_jax.runtime import checkpoint, config, config_file, sharding
from ntm_jax.training import finetune, loop, objectives, reference_model, state
from ntm_jax.training.objectives import StepInputs
from ntm_jax.training.step import make_step
from tests.common import (
    TINY,
    batch_of,
    bits,
    configured,
    logged,
    new_run,
    norm,
    objective_of,
    tiny_config,
    without_an_ending,
    write_run,
)

SMALL = TINY | {"trajectory.schedule": "shifted", "evaluate.split": "test[:6]"}


FLOW = configured("digits_fm", SMALL | {
    "model.transporter_blocks": 0, "train.steps": 2, "train.evaluate_every": 2, "sample.steps": 3,
    "sample.decoder": "euler"})


def tuned(source, **changes) -> config.Config:
    own = {"init_from": str(source), "train.steps": 4}
    return configured("digits_finetune", SMALL | own | changes)


def tuned_run(source, workdir="", **changes):
    """A fine-tuning run before it has parameters."""
    return dataclasses.replace(new_run(tuned(source, **changes)), workdir=str(workdir))


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """The workdir of a flow-matching run and its evaluation."""
    workdir = tmp_path_factory.mktemp("flow") / "run"
    _, result = loop.train(FLOW, str(workdir), progress=False)
    return workdir, result


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The workdir of a flow-matching run that was never trained, with random numbers as EMA."""
    return write_run(tmp_path_factory.mktemp("untrained") / "run", FLOW)


@pytest.fixture(scope="module")
def run(flow, tmp_path_factory):
    """The workdir of a fine-tuning run, and a copy of it whose steps 3 and 4 were taken again.

    They were taken while its source was away.
    """
    workdir, moved = tmp_path_factory.mktemp("tuned") / "run", flow[0].with_name("moved")
    again = workdir.with_name("again")
    with pytest.MonkeyPatch.context() as patched:
        without_an_ending(patched)
        loop.train(tuned(flow[0]), str(workdir), progress=False)
        shutil.copytree(workdir, again)
        shutil.rmtree(again / "checkpoints/4")
        shutil.move(flow[0], moved)
        try:
            loop.train(tuned(flow[0]), str(again), progress=False)
        finally:
            shutil.move(moved, flow[0])
    return workdir, again


@pytest.mark.slow
def test_figures_and_pictures_of_a_flow_matching_run(flow):
    workdir, result = flow
    assert set(result["velocity_error"]) == {"mean", "stderr"}
    # The likelihood is of the Gaussian posterior in trajectory.steps, not in the ODE's steps.
    assert len(result["trajectory_nll"]["by_level"]) == 2
    found = logged(workdir)[-1]["evaluate/velocity_error"]
    assert found == pytest.approx(result["velocity_error"]["mean"], rel=1e-5)
    assert result["measures"] == ["velocity_error"]
    assert ntm_jax.load(str(workdir)).evaluate()["velocity_error"] == result["velocity_error"]
    pictures = {"samples.png", "trajectories.png", "loss.png"}
    assert pictures <= {path.name for path in workdir.iterdir()}


@pytest.mark.slow
def test_the_held_out_velocity_error_is_a_mean_over_levels_spread_evenly(untrained):
    run = ntm_jax.load(str(untrained))
    source = FLOW.data.open(FLOW.evaluate.split)
    found = measures.velocity_error(run, source, 400)
    one = objectives.find("flow_matching").measure(run, source, 1)["velocity_error"]
    assert one == measures.velocity_error(run, source, 1) != found
    batch = batch_of(source, FLOW, 6)
    rng, errors = np.random.default_rng(0), []
    params = flow_matching.backbone_params(run.params)
    error = jax.jit(lambda noise, t: flow_matching.velocity_errors(
        run.model.backbone, params, batch["x"], noise, t, batch["label"]))
    shift = np.exp(run.schedule.shift)
    for u in (np.arange(400) + 0.5) / 400:  # u -> t of the shifted schedule
        t = np.full(6, shift * u / (shift * u + 1 - u), np.float32)
        errors.append(error(rng.normal(size=batch["x"].shape).astype(np.float32), t))
    # 2,400 draws of a mean of 64 squares, each of which deviates from its level's mean by about
    # sqrt(2/64) of it
    np.testing.assert_allclose(found["mean"], np.mean(errors), rtol=0.02)


def test_samples_solve_the_ode(untrained):
    run = ntm_jax.load(str(untrained))
    euler, levels = run.sample(3, label=1, with_levels=True)
    assert levels.shape == (3, 4, 8, 8, 1)
    np.testing.assert_array_equal(levels[:, -1], euler)
    heun = run.sample(3, label=1, decoder="heun", steps=2, guidance=2.0)
    assert (heun != euler).any()


@pytest.mark.slow
def test_a_new_run_is_the_flow_matching_model(untrained):
    """Parameters and EMA are the EMA of the flow-matching run; the means are the reference's."""
    run = tuned_run(untrained)
    current = finetune.start_from(run, state.initialize(run))
    expected = ntm_jax.load(str(untrained)).params["params"]["backbone"]
    for tree in (current.params, current.ema):
        assert bits(tree["params"]["backbone"]) == bits(expected)
    reference = {"params": current.params["params"]["backbone"]}
    batch = batch_of(run.config.data.open(run.config.evaluate.split), run.config, 4)
    made = objectives.loss_context(run, objective_of(run))

    @jax.jit
    def misalignment_and_log_det(params, reference):
        draws = StepInputs(jax.random.key(0), batch, 2, 0)
        terms = objectives.trajectory_terms(made, params, draws, reference)
        return terms.misalignment, terms.log_det

    misalignment, log_det = misalignment_and_log_det(current.params, reference)
    np.testing.assert_allclose(misalignment, 0, atol=1e-10)
    np.testing.assert_array_equal(log_det, 0)


@pytest.mark.slow
def test_the_reference_is_kept_once_and_not_trained_and_a_run_resumes_without_its_source(run, flow):
    for raw in (True, False):
        one, other = (ntm_jax.load(str(folder), raw=raw).params for folder in run)
        assert bits(one) == bits(other)
    own = tuned_run(flow[0], run[0])
    kept = reference_model.kept_reference(own)
    expected = ntm_jax.load(str(flow[0])).params["params"]["backbone"]
    assert bits(kept["params"]) == bits(expected)
    first, *_, last = logged(run[0])
    assert first["misalignment/level_0"] < 1e-10 < last["misalignment/level_0"]
    with checkpoint.Checkpoints(run[0]) as checkpoints:
        checkpoints.restore(state.abstract(own))  # holds the state alone, or it would refuse


@pytest.mark.slow
def test_the_alignments_weight_falls_by_a_cosine():
    """The step's gradient is that of NLL + weight x misalignment; in this test both count.

    The weight is lambda (1 + cos(pi step / steps)) / 2.
    """
    run = tuned_run("x", **{"train.objective": "pairwise", "optimizer.clip": 1e9,
                            "train.align_weight": 1e4, "train.level_weight_power": 0.0})
    current = state.initialize(run).replace(step=np.int32(1))
    reference = {"params": jax.tree.map(
        lambda a: jax.device_put(np.asarray(a) + 0.1, a.sharding),
        current.params["params"]["backbone"])}
    batch = batch_of(run.config.data.open(run.config.evaluate.split), run.config, 4)
    draws = StepInputs(jax.random.fold_in(jax.random.key(run.config.seed), 1), batch, 2, 1)
    size = run.model.config.tokens * run.model.config.dim

    def losses(params):
        context = objectives.loss_context(run, objective_of(run))
        terms = objectives.pair_terms(context, params, draws, reference)
        return jnp.stack([((terms.nll - terms.constant) / size).mean(), terms.misalignment.mean()])

    gradient = jax.jit(jax.grad(lambda params, weights: weights @ losses(params)))
    nll, apart = (jax.device_get(gradient(current.params, row)) for row in jnp.eye(2))
    weight = 1e4 * (1 + np.cos(np.pi / 4)) / 2
    expected = norm(jax.tree.map(lambda a, b: a + weight * b, nll, apart))
    assert weight * norm(apart) > 0.1 * norm(nll)
    step = make_step(run, objective_of(run))
    with sharding.use(run.mesh):
        _, found = step(current, batch, 2, reference)
    np.testing.assert_allclose(found["grad_norm"], expected, rtol=1e-4)


def test_another_flow_matching_model_is_refused(untrained):
    message = r"of another kind: config\.model\.data_std is 0\.75 there and 0\.5"
    with pytest.raises(UserError, match=f"config.init_from is .*{message}"):
        finetune.start_from(tuned_run(untrained, **{"model.data_std": 0.5}), None)


def test_the_same_model_with_another_vocabulary_is_refused(tmp_path):
    """Its parameters have the same shapes, and the words would change their meanings."""
    def run_of(words, init_from=""):
        run = new_run(tiny_config(init_from=init_from, **{
            "data.source": "mock:8x8x1,levels=17,text=2x2", "model.condition": "text"}))
        return dataclasses.replace(
            run, spec=dataclasses.replace(run.spec, text=f"words:2:{words}"))

    (tmp_path / "checkpoints").mkdir()
    first = run_of("red blue")
    config_file.write(str(tmp_path), first.config, first.spec)
    with pytest.raises(UserError, match=f"learned the text encoder {first.spec.text}"):
        finetune.start_from(run_of("blue red", str(tmp_path)), None)
