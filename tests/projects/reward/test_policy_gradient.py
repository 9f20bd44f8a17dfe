"""The policy gradient: exact ratios, the score-function gradient, and a reward that rises."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntm_jax
from ntm_jax.core.model import NTM
from ntm_jax.errors import UserError
from ntm_jax.projects.reward import policy, rollouts
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.training import loop, objectives, pictures
from ntm_jax.training.objectives import StepInputs
from tests.common import bits, logged, objective_of, tiny_config, without_an_ending, write_run
from tests.projects.reward.common import flat, moved, rolled, with_reward

SETTINGS = {"train.objective": "policy_gradient", "reward.name": "brightness", "init_from": "x",
            "reward.samples": 3, "data.batch_size": 4}

def gradient(function, params):
    return jax.jit(jax.grad(function))(params)


@pytest.mark.parametrize(("updates", "trains"), [
    (2, "predictor"), pytest.param(1, "transporter", marks=pytest.mark.slow),
    pytest.param(2, "both", marks=pytest.mark.slow)])
def test_the_first_gradient_is_the_score_functions_and_the_divergences(run, updates, trains):
    """That of advantage * log p(x_k | x_{k+1}), and 0 for what is frozen.

    The penalty's is that of the exact divergence, or of half the squared log-ratio.
    """
    run = with_reward(run, trainable=trains, data_loss_weight=0.0, updates=updates, kl=0.3)
    reference = moved(run.params, 0.05)
    if trains == "predictor":
        reference["params"]["transporter"] = run.params["params"]["transporter"]
    batch, scalars = rolled(run, reference)
    assert scalars["kl"] > 0.1
    assert ("old_nll" in batch) == (updates > 1)
    assert "old_nll" in objective_of(run).extend.abstract(with_reward(run, prefetch=True))
    objective = objective_of(run)
    context, inputs = objectives.loss_context(run, objective), StepInputs(
        jax.random.key(0), batch, 2, 0)
    found = gradient(lambda params: objective.loss(context, params, inputs)[0], run.params)

    def expected(params):
        t, xs = run.schedule.fixed_levels(2, 16), flat(batch["rollout"])
        arguments = xs, t, jnp.full(16, 2), np.repeat(batch["label"], 4)
        if trains == "predictor":
            ours, theirs = (run.model.apply(p, *arguments, method=NTM.gaussians)
                            for p in (params, reference))
            nll, apart = policy.gaussian_nll(xs, *ours), policy.gaussian_divergence(*ours, *theirs)
        else:
            nll, before = (run.model.apply(p, *arguments).nll for p in (params, reference))
            apart = 0.5 * jnp.square(before - nll)
        return jnp.mean(flat(batch["advantage"]) * nll + 0.3 * apart) / 64

    wanted = gradient(expected, run.params)
    for name, tree in found["params"].items():
        scale = trains in (name, "both")  # not even the data's gradient, since its norm is clipped
        jax.tree.map(lambda a, b, scale=scale: np.testing.assert_allclose(
            a, scale * b, rtol=1e-3, atol=1e-6), tree, wanted["params"][name])
    assert any(np.abs(a).max() > 1e-4 for a in jax.tree.leaves(found))


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
