"""Direct preference optimisation: exact likelihoods of pairs, from a reward or from records."""

import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from ntm_jax.core import sampling
from ntm_jax.training import loop, objectives
from ntm_jax.training.objectives import StepInputs
from tests.common import logged, objective_of, tiny_config, without_an_ending, write_run
from tests.projects.reward.common import flat, moved, rolled, with_objective

SETTINGS = {"train.objective": "preference", "reward.name": "brightness", "init_from": "x",
            "reward.kl": 0.1, "data.batch_size": 4}


@pytest.mark.parametrize("trains", ["predictor", pytest.param("both", marks=pytest.mark.slow)])
def test_the_loss_is_that_of_exact_likelihoods(run, trains):
    run = with_objective(run, "preference", kl=0.05, trainable=trains, data_loss_weight=0.0)
    batch, _ = rolled(run)
    setup = objectives.loss_context(run, objective_of(run))
    draws = StepInputs(jax.random.key(0), batch, 2, 0)
    loss = functools.partial(objectives.find("preference").loss, setup, inputs=draws)
    graded = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (first, metrics), gradient = graded(run.params)
    assert metrics["preference_loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert first == pytest.approx(np.log(2) / (0.05 * 64), rel=1e-4)
    params = moved(run.params, 0.01)
    if trains == "predictor":
        params["params"]["transporter"] = run.params["params"]["transporter"]
    (_, metrics), _ = graded(params)
    xs, t = flat(batch["rollout"]), run.schedule.fixed_levels(2, 16)
    y, steps = np.repeat(batch["label"], 4), np.full(16, 2)
    if trains == "predictor":
        xs = jax.jit(lambda us: sampling.invert_trajectory(run.model, run.params, us, t, y))(xs)
    likelihood = jax.jit(lambda params: run.model.apply(params, xs, t, steps, y).nll.sum(1))
    nll = [likelihood(p) for p in (run.params, params)]
    gain = np.asarray(nll[0] - nll[1]).reshape(4, 4)
    margin = 0.05 * (gain[:, :, None] - gain[:, None])
    weight = np.asarray(batch["pair_weight"])
    wanted = (weight * np.log1p(np.exp(-margin))).sum() / 4
    assert metrics["preference_loss"] == pytest.approx(wanted, rel=1e-3)
    assert abs(wanted - np.log(2)) > 1e-3
    frozen = max(np.abs(a).max() for a in jax.tree.leaves(gradient["params"]["transporter"]))
    assert (frozen == 0) == (trains == "predictor")


@pytest.mark.slow
def test_a_folder_of_pairs_is_learned_from(tmp_path, monkeypatch):
    """The images that lost a comparison become less likely than those that won."""
    (tmp_path / "pairs").mkdir()
    rows = []
    for i in range(40):
        for name, value in (("won", 200), ("lost", 60)):
            pixels = np.random.default_rng(i).integers(value - 30, value + 30, (8, 8))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "pairs" / f"{name}{i}.png")
        rows.append({"file_name": f"won{i}.png", "caption": "grey", "rejected": f"lost{i}.png"})
    (tmp_path / "pairs/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = {"data.source": f"folder:{tmp_path}/pairs", "model.condition": "none",
              "train.condition_dropout": 0.0, "data.batch_size": 8, "evaluate.split": "test"}
    write_run(tmp_path / "base", tiny_config(**shared))
    config = tiny_config(**shared | {
        "train.objective": "preference", "init_from": str(tmp_path / "base"), "reward.kl": 0.1,
        "train.steps": 20, "reward.trainable": "both"})
    assert config.data.open("train").records[0]["rejected"].mean() < 100
    without_an_ending(monkeypatch)
    run, _ = loop.train(config, str(tmp_path / "tuned"), progress=False)
    lines = [line for line in logged(tmp_path / "tuned") if "preference_loss" in line]
    assert lines[0]["preference_loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert lines[-1]["preference_loss"] < 0.5
    assert lines[-1]["preference_accuracy"] == 1
    assert run.step == 20
