"""Flow-matching runs, and NTMs that start from them: the frozen copy is kept once, a resume needs the run's folder alone."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest

import ntm_jax
from ntm_jax.analysis import benchmark, compile
from ntm_jax.core import flow_matching
from ntm_jax.data import pipeline
from ntm_jax.errors import UserError
from ntm_jax.evaluation import evaluate
from ntm_jax.runtime import checkpoint, config, sharding
from ntm_jax.training import finetune, loop, objectives, state
from ntm_jax.training.step import make_step
from tests.common import TINY, as_run, batch_of, bits, experiment, randomised, rehearsal, setup

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMALL = TINY | {"trajectory.schedule": "shifted", "evaluate.split": "test[:6]", "train.save_every": 2, "train.log_every": 1}


def shrunk(name: str, **changes) -> config.Config:
    values = experiment(name)
    values.update_from_flattened_dict({k: v for k, v in SMALL.items() if k != "model.transporter_blocks"} | changes)
    return config.read(values)


FLOW = shrunk("digits_fm", **{"train.steps": 2, "train.evaluate_every": 2, "sample.steps": 3})


def tuned(source, **changes) -> config.Config:
    return shrunk("digits_finetune", **{"init_from": str(source), "train.steps": 4, "model.transporter_blocks": 1} | changes)


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """The workdir of a flow-matching run and its evaluation."""
    workdir = tmp_path_factory.mktemp("flow") / "run"
    return workdir, loop.train(FLOW, str(workdir), progress=False)


@pytest.fixture(scope="module")
def run(flow, tmp_path_factory):
    """The workdir of a fine-tuning run, stopped half way and resumed without the folder it started from."""
    workdir, moved = tmp_path_factory.mktemp("tuned") / "run", flow[0].with_name("moved")
    assert loop.train(tuned(flow[0]), str(workdir), progress=False, until=2) is None
    shutil.move(flow[0], moved)
    try:
        loop.train(tuned(flow[0]), str(workdir), progress=False)
    finally:
        shutil.move(moved, flow[0])
    return workdir


def test_what_a_flow_matching_run_says(flow):
    workdir, result = flow
    assert set(result["velocity_error"]) == {"mean", "stderr"}
    assert len(result["trajectory_nll"]["by_level"]) == 2  # of its Gaussian posterior in trajectory.steps, not the ODE's steps
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["evaluate/velocity_error"] == pytest.approx(result["velocity_error"]["mean"], rel=1e-5)
    assert {"samples.png", "trajectories.png", "loss.png"} <= {path.name for path in workdir.iterdir()}


def test_the_held_out_velocity_error_is_a_mean_over_levels_spread_evenly(flow):
    run = ntm_jax.load(str(flow[0]))
    source, _, mesh = setup(FLOW)
    found = evaluate.velocity_errors(FLOW, run.model, run.params, source, mesh, 400)
    batch = batch_of(source, FLOW, 6)
    rng, errors = np.random.default_rng(0), []
    error = jax.jit(lambda noise, t: flow_matching.velocity_errors(
        run.model.backbone, flow_matching.backbone_params(run.params), batch["x"], noise, t, batch["label"]))
    shift = np.exp(FLOW.shift(16))
    for u in (np.arange(400) + 0.5) / 400:  # u -> t of the shifted schedule
        errors.append(error(rng.normal(size=batch["x"].shape).astype(np.float32), np.full(6, shift * u / (shift * u + 1 - u), np.float32)))
    # 2,400 draws of a mean of 64 squares; each relative to its level's mean deviates by about sqrt(2/64)
    np.testing.assert_allclose(found["mean"], np.mean(errors), rtol=0.02)


def test_samples_solve_the_ode(flow):
    run = ntm_jax.load(str(flow[0]))
    run = dataclasses.replace(run, params=randomised(run.params))
    euler, levels = run.sample(3, label=1, with_levels=True)
    assert (euler.shape, levels.shape) == ((3, 8, 8, 1), (3, 4, 8, 8, 1))
    np.testing.assert_array_equal(levels[:, -1], euler)
    assert (run.sample(3, label=1, decoder="heun", steps=2) != euler).any()
    assert (run.sample(3, label=1, guidance=2.0) != euler).any()
    np.testing.assert_array_equal(run.sample_at([2], label=1), euler[2:])


def test_a_new_run_is_the_flow_matching_model(flow):
    """Parameters and average are the average of the flow-matching run; before a step its own means are those of the frozen copy."""
    settings = tuned(flow[0])
    source, model, mesh = setup(settings)
    current = finetune.start_from(settings, pipeline.spec(source, 2), model, mesh, state.initialize(as_run(settings, model, mesh)))
    expected = ntm_jax.load(str(flow[0])).params["params"]["backbone"]
    for tree in (current.params, current.ema):
        assert bits(tree["params"]["backbone"]) == bits(expected)
    frozen = {"params": current.params["params"]["backbone"]}
    batch = batch_of(source, settings, 4)
    terms = objectives.end_to_end(settings, model, current.params, jax.random.key(0), batch, 2, frozen)
    np.testing.assert_allclose(terms.misalignment, 0, atol=1e-10)
    np.testing.assert_array_equal(terms.log_det, 0)


def test_the_frozen_copy_is_kept_once_and_not_trained(run, flow):
    settings = tuned(flow[0])
    _, model, mesh = setup(settings)
    kept = finetune.reference_params(settings, model, mesh, str(run), state.initialize(as_run(settings, model, mesh)).replace(step=np.int32(4)))
    assert bits(kept["params"]) == bits(ntm_jax.load(str(flow[0])).params["params"]["backbone"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["misalignment/level_0"] < 1e-10 < lines[-1]["misalignment/level_0"]
    with checkpoint.Checkpoints(run) as checkpoints:
        checkpoints.restore(state.abstract(as_run(settings, model, mesh)))  # holds the state and nothing else, or it would refuse


@rehearsal
def test_a_resumed_run_is_the_uninterrupted_one(run, flow, tmp_path):
    loop.train(tuned(flow[0]), str(tmp_path / "whole"), progress=False)
    for raw in (True, False):
        one, other = (ntm_jax.load(str(folder), raw=raw).params for folder in (run, tmp_path / "whole"))
        assert bits(one) == bits(other)


@rehearsal
@pytest.mark.parametrize("name", ["end_to_end", "pairwise"])
def test_the_alignments_weight_falls_by_a_cosine(flow, name):
    """The step's gradient is that of the NLL and of weight x misalignment, lambda (1 + cos(pi step / steps)) / 2; here both count."""
    settings = tuned(flow[0], **{"train.objective": name, "optimizer.clip": 1e9, "train.align_weight": 1e4, "train.level_power": 0.0})
    source, model, mesh = setup(settings)
    current = state.initialize(as_run(settings, model, mesh)).replace(step=np.int32(1))
    frozen = {"params": jax.tree.map(lambda a: jax.device_put(np.asarray(a) + 0.1, a.sharding), current.params["params"]["backbone"])}
    batch = batch_of(source, settings, 4)
    root, size = jax.random.fold_in(jax.random.key(settings.seed), 1), model.config.tokens * model.config.dim

    def loss(params, part):
        terms = objectives.OBJECTIVES[name](settings, model, params, root, batch, 2, frozen)
        return ((terms.nll - terms.constant) / size).mean() if part == "nll" else terms.misalignment.mean()

    nll, apart = (jax.jit(jax.grad(loss), static_argnums=1)(current.params, part) for part in ("nll", "misalignment"))
    weight = 1e4 * (1 + np.cos(np.pi / 4)) / 2
    expected = optax.tree.norm(jax.tree.map(lambda a, b: a + weight * b, nll, apart))
    assert weight * optax.tree.norm(apart) > 0.1 * optax.tree.norm(nll)
    step = make_step(as_run(settings, model, mesh))
    with sharding.use(mesh):
        _, metrics = step(current, batch, 2, frozen)
    np.testing.assert_allclose(metrics["grad_norm"], expected, rtol=1e-4)


def test_the_frozen_copys_memory_is_counted():
    free, aligned = (compile.compile_for(tuned("x", **{"train.align_weight": weight}), "cpu:1") for weight in (0.0, 2.5))
    _, model, mesh = setup(tuned("x"))
    size = sum(4 * a.size for a in jax.tree.leaves(finetune.abstract_reference(tuned("x"), model, mesh)))
    assert aligned["bytes_per_chip"]["arguments"] - free["bytes_per_chip"]["arguments"] == size


@pytest.mark.parametrize(("changes", "message"), [
    ({"model.width": 32}, "the flow-matching model there is another network: array condition/class/embedding is float32"),
    ({"model.data_std": 0.5}, r"learned data of another kind: config\.model\.data_std is 0\.75 there and 0\.5 here"),
    ({"data.patch_size": 4}, r"learned data of another kind: config\.data\.patch_size is 2 there and 4 here"),
])
def test_another_flow_matching_model_is_refused(flow, tmp_path, changes, message):
    with pytest.raises(UserError, match=f"config.init_from is .*{message}"):
        loop.train(tuned(flow[0], **changes), str(tmp_path / "new"), progress=False)
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_what_does_not_go_together_is_refused(flow, run, tmp_path):
    with pytest.raises(UserError, match=r"decoder=euler solves the ODE of a flow-matching model, and this run is none"):
        ntm_jax.load(str(run)).sample(1, label=0, decoder="euler")
    with pytest.raises(UserError, match=r"config\.train\.align_weight is 2\.5: .* config\.init_from names; give both"):
        tuned("")
    with pytest.raises(UserError, match=r"config\.sample\.decoder=heun solves the ODE of a flow-matching model"):
        tuned("x", **{"sample.decoder": "heun"})
    with pytest.raises(UserError, match=r"trains the backbone of config\.model\.head=posterior, found direct"):
        shrunk("digits_fm", **{"model.head": "direct"})
    with pytest.raises(UserError, match=r"config\.train\.level_power is 1\.0: .*=flow_matching has none; set it to 0"):
        tuned("x", **{"train.objective": "flow_matching", "train.level_power": 1.0})
    with pytest.raises(UserError, match=r"t_min_range starts at 0\.0: the posterior head's scale vanishes with t_min"):
        tuned("x", **{"trajectory.t_min_range": (0.0, 0.04)})
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "frozen")
    with pytest.raises(UserError, match=r"there is no checkpoint in .*frozen"):
        loop.train(tuned(flow[0], **{"train.steps": 5}), str(tmp_path / "run"), progress=False)


@rehearsal
def test_the_benchmarks_rows_of_both(flow):
    run = ntm_jax.load(str(flow[0]))
    made = {name: make(benchmark.Setting(run.config, run.mesh, run=run, batch=3)) for name, make in benchmark.SAMPLING.items()}
    euler, heun = (made.pop(f"images, decoder {solver}") for solver in ("euler", "heun"))
    assert not any(made.values())
    assert heun.flops == 2 * euler.flops > 0  # two passes a step
    made, _ = euler.once()
    assert made.shape == (3, 16, 4)
    settings = tuned("x")
    source, _, mesh = setup(settings)
    aligned, free = (benchmark._train_step(benchmark.Setting(config, mesh, source, source)) for config in (
        settings, tuned("x", **{"train.align_weight": 0.0})))
    assert aligned.flops > free.flops  # by the frozen copy's pass
    assert all(np.isfinite(aligned.once()["loss"]) for _ in range(2))  # the copy is not given away with the state
