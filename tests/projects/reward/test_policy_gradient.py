"""The policy gradient: exact ratios, the score-function gradient, and a reward that rises."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntm_jax
from ntm_jax.core import sampling
from ntm_jax.core.model import NTM
from ntm_jax.errors import UserError
from ntm_jax.projects.reward import drawing, policy, rollouts
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.training import loop, objectives, pictures
from ntm_jax.training.objectives import StepInputs
from tests.common import bits, logged, objective_of, tiny_config, without_an_ending, write_run
from tests.projects.reward.common import flat, moved, rolled, with_reward

SETTINGS = {"train.objective": "policy_gradient", "reward.name": "brightness", "init_from": "x",
            "reward.samples": 3, "data.batch_size": 4}
TRAINS = pytest.mark.parametrize(
    "trains", ["predictor", pytest.param("both", marks=pytest.mark.slow)])


def loss_of(run, batch):
    """The loss of a batch as a function of parameters."""
    objective = objective_of(run)
    context, inputs = objectives.loss_context(run, objective), StepInputs(
        jax.random.key(0), batch, 2, 0)
    return lambda params: objective.loss(context, params, inputs)[0]


def gradient(function, params):
    return jax.jit(jax.grad(function))(params)


@TRAINS
def test_ratios_are_those_of_log_likelihoods_of_the_trajectories(run, trains):
    """Exact, through the transporter where it trains; of latents where it is frozen."""
    run = with_reward(run, trainable=trains)
    batch, _ = rolled(run)
    t, y, steps = run.schedule.fixed_levels(2, 12), np.repeat(batch["label"], 3), jnp.full(12, 2)
    xs, new_params = flat(batch["rollout"]), moved(run.params, 0.01)
    if trains == "predictor":  # the trajectories of these latents
        xs = jax.jit(lambda us: sampling.invert_trajectory(run.model, run.params, us, t, y))(xs)
        new_params = {"params": new_params["params"] | {
            "transporter": run.params["params"]["transporter"]}}
    likelihood = jax.jit(lambda params: run.model.apply(params, xs, t, steps, y).nll)
    old, new = map(likelihood, (run.params, new_params))
    sampler = drawing.sampler_of(run)
    density = jax.jit(
        lambda params: drawing.densities(sampler, params, batch, batch["rollout"])["nll"])
    found = density(new_params)
    expected = np.asarray(old - new, np.float64)
    ratio = policy.log_ratio(found, flat(batch["old_nll"]))
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(ratio, expected, atol=1e-3, rtol=1e-5)  # nats, sums of hundreds
    same = density(run.params)
    np.testing.assert_allclose(policy.log_ratio(same, flat(batch["old_nll"])), 0, atol=1e-4)


@pytest.mark.parametrize(("updates", "trains"), [
    (1, "predictor"), pytest.param(2, "both", marks=pytest.mark.slow),
    pytest.param(2, "transporter", marks=pytest.mark.slow)])
def test_the_first_gradient_is_the_score_functions(run, updates, trains):
    """That of advantage * log p(x_k | x_{k+1}), and 0 for what is frozen."""
    run = with_reward(run, trainable=trains, data_loss_weight=0.0, updates=updates)
    batch, _ = rolled(run)
    assert ("old_nll" in batch) == (updates > 1)
    assert "old_nll" in objective_of(run).extend.abstract(with_reward(run, prefetch=True))
    found = gradient(loss_of(run, batch), run.params)

    def expected(params):
        t, xs = run.schedule.fixed_levels(2, 12), flat(batch["rollout"])
        arguments = xs, t, jnp.full(12, 2), np.repeat(batch["label"], 3)
        if trains != "predictor":
            nll = run.model.apply(params, *arguments).nll
        else:
            nll = policy.gaussian_nll(xs, *run.model.apply(params, *arguments,
                                                           method=NTM.gaussians))
        return jnp.mean(flat(batch["advantage"]) * nll) / 64

    wanted = gradient(expected, run.params)
    for name, tree in found["params"].items():
        scale = trains in (name, "both")  # not even the data's gradient, since its norm is clipped
        jax.tree.map(lambda a, b, scale=scale: np.testing.assert_allclose(
            a, scale * b, rtol=1e-3, atol=1e-6), tree, wanted["params"][name])
    assert any(np.abs(a).max() > 1e-4 for a in jax.tree.leaves(found))


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["predictor", "both"])
def test_the_divergence_is_penalised(run, trains):
    """Its gradient is that of the exact divergence, or of half the squared log-ratio."""
    run = with_reward(run, trainable=trains, data_loss_weight=0.0, updates=1, kl=0.3)
    reference = moved(run.params, 0.05)
    if trains == "predictor":
        reference["params"]["transporter"] = run.params["params"]["transporter"]
    batch, scalars = rolled(run, reference)
    assert scalars["kl"] > 0.1
    batch["advantage"] = np.zeros_like(batch["advantage"])  # leaves the penalty alone
    found = gradient(loss_of(run, batch), run.params)

    def penalty(params):
        t, xs = run.schedule.fixed_levels(2, 12), flat(batch["rollout"])
        arguments = xs, t, jnp.full(12, 2), np.repeat(batch["label"], 3)
        if trains == "both":
            apart = [run.model.apply(p, *arguments).nll for p in (params, reference)]
            return 0.3 * jnp.mean(0.5 * jnp.square(apart[1] - apart[0])) / 64
        both = [run.model.apply(p, *arguments, method=NTM.gaussians) for p in (params, reference)]
        return 0.3 * jnp.mean(policy.gaussian_divergence(*both[0], *both[1])) / 64

    wanted = gradient(penalty, run.params)
    for name in found["params"]:
        if trains == "both" or name == "predictor":
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-6),
                         found["params"][name], wanted["params"][name])


@pytest.mark.slow
def test_a_reward_rises_and_a_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch):
    """With samples that are drawn ahead, and are saved."""
    monkeypatch.setattr(pictures, "draw", lambda *_: [])
    monkeypatch.setattr(rollouts.Rollouts, "pictures", lambda *_: [])  # test_mesh.py draws it
    write_run(tmp_path / "base", tiny_config())
    settings = SETTINGS | {"init_from": str(tmp_path / "base"), "train.steps": 40,
                           "reward.updates": 2, "reward.samples": 8, "reward.data_loss_weight": 0.0,
                           "reward.kl": 0.001, "data.batch_size": 8, "evaluate.num_samples": 80,
                           "evaluate.features": "none", "optimizer.learning_rate": 2e-3,
                           "optimizer.weight_decay": 0.5, "train.save_every": 20,
                           "reward.prefetch": True}
    config = tiny_config(**settings)
    _, result = loop.train(config, str(tmp_path / "whole"), progress=False)
    lines = logged(tmp_path / "whole")
    rewarded = [line["reward"] for line in lines if "reward" in line]
    assert np.mean(rewarded[-8:]) > np.mean(rewarded[:8]) + 0.003  # of about 0.02
    assert result["reward"]["mean"] > result["reward_before"]["mean"] + 0.003
    # Two sets are of the first parameters, and the second is used after two updates.
    kl = [line["kl"] for line in lines if "kl" in line]
    np.testing.assert_allclose(kl[:4], 0, atol=1e-3)
    assert kl[4] > 2e-3
    assert lines[0]["clipped"] == 0 < max(line["clipped"] for line in lines[2:4])
    assert result["kl"]["mean"] > 0.01
    # What is frozen does not move, in spite of weight decay.
    before, after = (ntm_jax.load(str(tmp_path / name), raw=raw).params["params"]
                     for name, raw in (("base", False), ("whole", True)))
    assert bits(before["transporter"]) == bits(after["transporter"])
    assert bits(before["predictor"]) != bits(after["predictor"])
    with Checkpoints(tmp_path / "whole") as saved:
        assert "rollout" in saved.entries(20, "samples")
    shutil.rmtree(tmp_path / "whole/checkpoints/40")
    # A cycle of two updates ends one step later.
    assert loop.train(config, str(tmp_path / "whole"), progress=False, until=23) is None
    assert logged(tmp_path / "whole") == lines[:24]


@pytest.mark.slow
def test_a_run_of_new_samples_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Without reward.prefetch: no samples are saved, and the present parameters draw them again."""
    without_an_ending(monkeypatch)
    plain = {"model.transporter_blocks": 0}
    write_run(tmp_path / "base", tiny_config(**plain))
    config = tiny_config(**SETTINGS | plain | {
        "init_from": str(tmp_path / "base"), "train.steps": 6, "reward.updates": 2,
        "optimizer.learning_rate": 2e-3})
    folder = tmp_path / "run"

    def trained():
        run, _ = loop.train(config, str(folder), progress=False)
        return logged(folder), bits(run.params)

    whole = trained()
    shutil.rmtree(folder / "checkpoints/6")
    with Checkpoints(folder) as saved:
        assert saved.latest() == 4
        assert saved.entries(4, "samples") == ()
    assert trained() == whole


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match=r"train\.steps is 6: expected a multiple of"):
        tiny_config(**SETTINGS | {"reward.updates": 4, "train.steps": 6})
