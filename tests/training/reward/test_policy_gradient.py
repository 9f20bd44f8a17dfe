"""The policy gradient: exact ratios, the score-function gradient, and a reward that rises."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ntm_jax
from ntm_jax.analysis import compile
from ntm_jax.core.model import NTM
from ntm_jax.errors import UserError
from ntm_jax.training import loop, objectives
from ntm_jax.training.objectives import Draws
from ntm_jax.training.reward import policy, rewards, rollouts
from tests.common import ROOT, as_run, batch_of, bits, random_run, setup, tiny_config

PAGE = (ROOT / "docs/howto/reward.md").read_text()
EXAMPLE = re.search(r"```python\n# my_reward\.py\n(.*?)```", PAGE, re.S)[1]
SETTINGS = {"train.objective": "policy_gradient", "reward.name": "brightness", "init_from": "x",
            "reward.samples": 3, "data.batch_size": 4}


@pytest.fixture(autouse=True)
def brightness(monkeypatch):
    """The reward of the page's example: the mean pixel, over 255."""
    monkeypatch.setattr(rewards.REWARDS, "_entries", dict(rewards.REWARDS._entries))
    exec(EXAMPLE, {})


def rolled(run, whole: bool, samples: int = 3, step: int = 0):
    """(a batch of four records, the same with rollouts) of a random run."""
    config = dataclasses.replace(run.config, reward=dataclasses.replace(
        run.config.reward, samples=samples, trains="both" if whole else "predictor"))
    run = dataclasses.replace(run, config=config)
    source = run.config.data.open("train")
    batch = batch_of(source, run.config, 4)
    return run, rollouts.Rollouts(run, source)(run.params, batch, step)


@pytest.fixture(scope="module")
def run():
    settings = tiny_config(**{"reward.name": "brightness", "reward.samples": 3})
    _, model, mesh = setup(settings)
    return random_run(as_run(settings, model, mesh), 0)


def moved(params, size: float):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return jax.tree.unflatten(tree, [a + size * jax.random.normal(k, a.shape)
                                     for a, k in zip(leaves, keys, strict=True)])


@pytest.mark.parametrize("whole", [False, True])
def test_ratios_are_those_of_log_likelihoods_of_the_trajectories(run, whole):
    """Exact, through the transporter where it trains; latents where it is frozen."""
    run, batch = rolled(run, whole)
    flat = jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[2:]), {
        name: batch[name] for name in ("rollout", "old_nll")})
    t = run.schedule.fixed_levels(2, 12)
    y = np.repeat(batch["label"], 3)
    steps = jnp.full(12, 2)
    xs = flat["rollout"]
    if not whole:  # the trajectories of these latents
        xs = rollouts.sampling.invert_trajectory(run.model, run.params, xs, t, y)
    old = run.model.apply(run.params, xs, t, steps, y).nll
    new_params = moved(run.params, 0.01)
    if not whole:
        new_params = {"params": new_params["params"] | {
            "transporter": run.params["params"]["transporter"]}}
    new = run.model.apply(new_params, xs, t, steps, y).nll
    found = rollouts.terms(run.model, new_params, flat["rollout"], t, y, whole).nll
    expected = np.asarray(old - new, np.float64)
    ratio = policy.log_ratio(found, flat["old_nll"])
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(ratio, expected, atol=1e-3, rtol=1e-5)  # nats, sums of hundreds
    at_first = policy.log_ratio(rollouts.terms(run.model, run.params, flat["rollout"], t, y,
                                               whole).nll, flat["old_nll"])
    np.testing.assert_allclose(at_first, 0, atol=1e-4)


def test_advantages_have_mean_0_and_deviation_1_in_a_group():
    rewards_ = np.random.default_rng(0).random((5, 8))
    rewards_[2] = 0.5
    found = policy.advantages(rewards_)
    np.testing.assert_allclose(found.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(found.std(1), [1, 1, 0, 1, 1], atol=1e-4)


def test_the_surrogate_is_clipped_where_that_lowers_it():
    log_ratio = jnp.log(jnp.array([[0.5, 1.0, 1.5]]))
    np.testing.assert_allclose(
        policy.clipped_surrogate(log_ratio, jnp.ones(1), 0.2), [[0.5, 1, 1.2]], rtol=1e-6)
    np.testing.assert_allclose(
        policy.clipped_surrogate(log_ratio, -jnp.ones(1), 0.2), [[-0.8, -1, -1.5]], rtol=1e-6)
    assert policy.clipped_share(log_ratio, 0.2) == pytest.approx(2 / 3)


@pytest.mark.parametrize("whole", [False, True])
def test_the_first_gradient_is_the_score_functions(run, whole):
    """That of advantage * log p(x_k | x_{k+1}), and 0 for what is frozen."""
    run, batch = rolled(run, whole)
    setting = objectives.setup(dataclasses.replace(run, config=dataclasses.replace(
        run.config, reward=dataclasses.replace(run.config.reward, anchor=0.0))))
    loss = objectives.find("policy_gradient").loss
    draws = Draws(jax.random.key(0), batch, 2, 0)
    found = jax.grad(lambda params: loss(setting, params, draws)[0])(run.params)

    def expected(params):
        flat = batch["rollout"].reshape(-1, *batch["rollout"].shape[2:])
        t = run.schedule.fixed_levels(2, 12)
        terms = run.model.apply(params, flat, t, jnp.full(12, 2), np.repeat(batch["label"], 3),
                                method=NTM.trajectory if whole else NTM.latents)
        return jnp.mean(batch["advantage"].reshape(-1, 1) * terms.nll) / 64

    wanted = jax.grad(expected)(run.params)
    for name, tree in found["params"].items():
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted["params"][name]),
                        strict=True):
            b = b if whole or name != "transporter" else 0 * b
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    assert any(np.abs(a).max() > 1e-4 for a in jax.tree.leaves(found))


def test_rollouts_are_the_same_twice_and_differ_by_step(run):
    _, one = rolled(run, False)
    _, two = rolled(run, False)
    np.testing.assert_array_equal(one["rollout"], two["rollout"])
    assert one["rollout"].shape == (4, 3, 3, 16, 4)
    assert one["reward"].shape == one["advantage"].shape == (4, 3)
    _, later = rolled(run, False, step=1)
    flat = np.concatenate([one["rollout"], later["rollout"]]).reshape(24, -1)
    assert len(np.unique(flat, axis=0)) == 24


def test_what_is_frozen_has_no_gradient(run):
    """Not even from the data, since the gradient's norm is clipped."""
    run, batch = rolled(run, False)
    loss = objectives.find("policy_gradient").loss
    draws = Draws(jax.random.key(0), batch, 2, 0)
    found = jax.grad(lambda params: loss(objectives.setup(run), params, draws)[0])(run.params)
    largest = {name: max(np.abs(a).max() for a in jax.tree.leaves(tree))
               for name, tree in found["params"].items()}
    assert largest["transporter"] == 0
    assert largest["predictor"] > 1e-4


def test_rollouts_have_the_shapes_that_compilation_takes(run):
    config = dataclasses.replace(run.config, data=dataclasses.replace(
        run.config.data, batch_size=4))
    shapes = rollouts.abstract(dataclasses.replace(run, config=config))
    _, batch = rolled(run, False)
    assert {name: a.shape for name, a in shapes.items()} == {
        name: batch[name].shape for name in shapes}
    assert set(batch) - set(shapes) == {"x", "label", "index"}
    program = compile.train_program(
        dataclasses.replace(run, config=tiny_config(**SETTINGS)), run.config.data.open("train"))
    assert set(shapes) < set(program.arguments[1])


def test_a_reward_that_gives_no_numbers_is_refused(run):
    run, _ = rolled(run, False)
    made = rollouts.Rollouts(run, run.config.data.open("train"))
    for wrong in (np.full(12, np.nan), np.zeros(3)):
        made._reward = lambda images, given, wrong=wrong: wrong
        with pytest.raises(UserError, match=r"gave an array of shape .*: expected 8 finite"):
            made(run.params, batch_of(run.config.data.open("train"), run.config, 4), 0)


@pytest.mark.slow
def test_a_reward_rises_and_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    base = tiny_config(**{"train.steps": 30})
    loop.train(base, str(tmp_path / "base"), progress=False)
    settings = SETTINGS | {"init_from": str(tmp_path / "base"), "train.steps": 40,
                           "reward.updates": 2, "reward.samples": 8, "reward.anchor": 0.0,
                           "data.batch_size": 8, "optimizer.learning_rate": 2e-3,
                           "optimizer.weight_decay": 0.5, "train.save_every": 20}
    config = tiny_config(**settings)
    _, result = loop.train(config, str(tmp_path / "whole"), progress=False)
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text()
             .splitlines()]
    rewarded = [line["reward"] for line in lines if "reward" in line]
    assert np.mean(rewarded[-8:]) > np.mean(rewarded[:8]) + 0.003  # of about 0.02
    assert loop.train(config, str(tmp_path / "parts"), progress=False, until=9) is None
    _, again = loop.train(config, str(tmp_path / "parts"), progress=False)
    assert again["nats_per_dim"] == result["nats_per_dim"]
    # What is frozen does not move, in spite of weight decay.
    before, after = (ntm_jax.load(str(tmp_path / name), raw=raw).params["params"]
                     for name, raw in (("base", False), ("whole", True)))
    assert bits(before["transporter"]) == bits(after["transporter"])
    assert bits(before["predictor"]) != bits(after["predictor"])


def test_mistakes_are_one_line():
    for changes, words in (
            ({"reward.name": ""}, "reward.name is empty"),
            ({"init_from": ""}, "init_from is empty"),
            ({"reward.updates": 4, "train.steps": 6}, "train.steps is 6: expected a multiple of")):
        with pytest.raises(UserError, match=words):
            tiny_config(**SETTINGS | changes)
    source = tiny_config().data.open("train")
    with pytest.raises(UserError, match="shapes needs a source that checks images against"):
        rewards.find("shapes", source)
    with pytest.raises(UserError, match="'best' is not known: expected one of shapes"):
        rewards.find("best", source)
