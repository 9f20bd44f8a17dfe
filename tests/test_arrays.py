"""Arrays in their own units, conditioned on vectors: densities, samples and their weights.

A new model is exact for independent normal data, so that closed forms are known; with random
parameters it is wrong, and identities must hold all the same. Symbols: n samples, D columns, s the
deviation of the decoder p(x | x_0), v the variance of the target.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest
from scipy import stats

import ntm_jax
from ntm_jax.core.conditions import Vector
from ntm_jax.core.model import full_precision
from ntm_jax.data import sources
from ntm_jax.errors import UserError
from ntm_jax.evaluation import scoring
from ntm_jax.projects.weighing import reweight
from ntm_jax.sampling.write import SampleRequest
from ntm_jax.training import state
from tests.common import ROOT, TINY, configured, new_run, randomised
from tests.export.common import run_script

MEAN, STD = np.array([5.0, -1e4]), np.array([0.01, 300.0])
T_0 = TINY["trajectory.t_min"]
S = T_0 / (1 - T_0)
COUNT = reweight.BATCH


def data(n: int = 400):
    """Independent normal columns [n, 2], whose sample moments are MEAN and STD, and vectors."""
    rng = np.random.default_rng(0)
    theta, x = rng.normal(size=(n, 2)), rng.normal(size=(n, 3)) * 4 + 1
    theta = (theta - theta.mean(0)) / theta.std(0)
    return MEAN + STD * theta, x


@pytest.fixture(scope="module")
def gaussian():
    """A new run: exact for its data."""
    theta, x = data()
    arrays = sources.from_arrays(theta, condition=x, held_out=0.0)
    sources.provide(arrays)
    run = new_run(configured("arrays", TINY | {
        "data.source": arrays.name, "evaluate.split": "train", "train.condition_dropout": 0.1}))
    return dataclasses.replace(run, params=state.initialize(run).params)


@pytest.fixture(scope="module")
def random(gaussian):
    """A run with random parameters, which depend on the condition."""
    return dataclasses.replace(gaussian, params=randomised(gaussian.params), workdir="runs/tiny")


def test_the_density_at_t_0_is_in_the_datas_own_units(gaussian):
    theta, x = data(6)
    found = gaussian.log_prob(theta, condition=x, noised=True, trajectories=1)
    root = jax.random.key(gaussian.config.seed)
    x_0 = scoring.noised(root, gaussian.spec.to_tokens(theta), np.full(6, T_0, np.float32),
                         np.arange(6))
    deviation = np.hypot(1 - T_0, T_0)
    expected = stats.norm(0, deviation).logpdf(np.asarray(x_0)).sum((1, 2)) - np.log(STD).sum()
    np.testing.assert_allclose(found, expected, atol=2e-5)  # float32 sums of some ten nats


def test_the_bound_on_the_density_itself_is_that_of_the_data_and_the_decoder(gaussian):
    """The model's x is the data with two noises of the decoder's deviation S."""
    theta, x = data(6)
    found = gaussian.log_prob(theta, condition=x, trajectories=512)
    expected = stats.norm(MEAN, STD * np.sqrt(1 + 2 * S**2)).logpdf(theta).sum(1)
    # Given x, log w varies by S |x| only: 512 trajectories leave its square over 1,024.
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_many_conditions_have_samples_of_their_own(random):
    _, x = data(3)
    found = random.sample(3, condition=x)
    assert found.shape == (3, 3, 2)
    # sample i of condition j has index 3 i + j, in this n and in any
    turned = random.sample_at(np.arange(9), np.tile(x, (3, 1)))
    np.testing.assert_allclose(found, turned.reshape(3, 3, 2).swapaxes(0, 1), rtol=1e-5)
    assert len(np.unique(found)) == found.size
    drawn = random.sample(3, condition=x, with_log_prob=True)
    assert (drawn.samples.shape, drawn.log_prob.shape) == ((3, 3, 2), (3, 3))


def test_the_recipe_for_held_out_rows_gives_them_in_their_own_units(random):
    page = (ROOT / "docs/howto/outliers.md").read_text()
    (block,) = re.findall(r"^```python\n([^`]*condition_std.*?)^```", page, re.M | re.S)
    records = random.config.data.open("train[:6]").records
    names = {"np": np, "run": random, "records": records}
    exec(block, names)
    for found, expected in zip((names["theta"], names["x"]), data(), strict=True):
        nearest = np.abs(found[:, None] - expected).max(-1).min(1)
        np.testing.assert_allclose(nearest, 0, atol=1e-5)
    assert np.isfinite(names["log_p"]).all()


def test_batches_give_the_same_as_all_at_once(random):
    """Two batches of six, of which the last is cut, are the same as one of nine."""
    theta, x = data(9)
    small = dataclasses.replace(random, config=random.config.with_evaluation(batch_size=6))
    drawn, once = (run.sample(3, condition=x[:3], with_log_prob=True) for run in (small, random))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), drawn, once)
    found, expected = (run.log_prob(theta, condition=x) for run in (small, random))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def recomputed(run, levels, condition):
    """log p(x_0..x_T | y) by factor, from noise down, of such levels by the model's own terms."""
    n = len(levels)
    xs = levels[:, ::-1].reshape(n, -1, run.spec.tokens, run.spec.dim)
    t = np.broadcast_to(run.sampled_levels(), xs.shape[:2]).astype(np.float32)
    values = (condition - np.array(run.spec.condition_mean)) / run.spec.condition_std
    y = Vector(np.broadcast_to(values, (n, 3)).astype(np.float32), np.ones(n, bool))
    apply = jax.jit(full_precision(run.model).apply)
    terms = apply(run.params, xs, t, np.full(n, xs.shape[1] - 1), y)
    prior = stats.norm.logpdf(xs[:, -1]).sum((1, 2))
    return np.concatenate([prior[:, None], -np.asarray(terms.nll)[:, ::-1]], 1)


def test_samples_have_the_density_of_their_saved_trajectory(random):
    condition = np.array([1.0, -3.0, 2.0])
    drawn = random.sample(9, condition=condition, with_log_prob=True)
    np.testing.assert_allclose(drawn.samples, random.sample(9, condition=condition), rtol=1e-5)
    last = drawn.levels[:, -1] / (1 - T_0)
    np.testing.assert_allclose((drawn.samples - MEAN) / STD, last, rtol=1e-3, atol=1e-4)
    factors = recomputed(random, drawn.levels, condition)
    dimensions = random.spec.tokens * random.spec.dim
    np.testing.assert_allclose(drawn.log_prob_by_factor, factors, atol=1e-4 * dimensions)
    np.testing.assert_allclose(drawn.log_prob, factors.sum(1), atol=1e-4 * dimensions)
    assert drawn.log_prob.std() > 0.1


@pytest.mark.slow
def test_written_samples_hold_their_density(random, tmp_path):
    vectors = ((1.0, -3.0, 2.0), (0.0, 0.5, 9.0))
    random.write_samples(str(tmp_path / "out"), SampleRequest(
        18, 9, save_trajectories=True, log_prob=True, condition=vectors))
    with np.load(tmp_path / "out" / "samples.npz") as found, np.load(
            tmp_path / "out" / "trajectories.npz") as levels:
        given = np.resize(np.array(vectors), (18, 3))
        np.testing.assert_allclose(found["arr_1"], given, atol=1e-5)
        assert found["arr_0"].shape == (18, 2)
        factors = np.concatenate([recomputed(random, levels["arr_0"][rows], given[rows])
                                  for rows in (slice(9), slice(9, 18))])
        np.testing.assert_allclose(found["log_prob_by_factor"], factors, atol=2e-4)
        np.testing.assert_allclose(found["log_prob"], factors.sum(1), atol=2e-4)


@pytest.mark.slow
def test_an_export_gives_standardised_samples_and_its_script_own_units(
        random, tmp_path, monkeypatch):
    random.export(str(tmp_path / "out"))
    again = ntm_jax.load(str(tmp_path / "out"))
    condition = random.spec.condition_mean  # the script's: standardised, 0
    expected = random.sample(9, condition=condition, seed=0)
    np.testing.assert_allclose(again.sample(9, condition=condition, seed=0), expected, rtol=1e-5)
    _, samples = run_script(tmp_path / "out", "9", "0")
    assert samples.dtype == np.float64
    np.testing.assert_allclose((samples - expected) / STD, 0, atol=1e-4)
    other = np.array([-9.5, 20, 7])
    expected = random.sample(9, condition=other, seed=0)
    assert np.abs((expected - samples) / STD).max() > 0.01  # the condition matters
    _, samples = run_script(tmp_path / "out", "9", "0", "-9.5,20,7")
    np.testing.assert_allclose((samples - expected) / STD, 0, atol=1e-4)
    monkeypatch.chdir(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    code, spec = "".join(re.findall(r"```python\n(.*?)```", card, re.S)), random.spec
    found = {"index": np.arange(9, dtype=np.int32),
             "images": np.float32((expected - spec.mean) / spec.std),
             "condition": np.tile(np.float32((other - spec.condition_mean) / spec.condition_std),
                                  (9, 1))}
    exec(code, found)
    own = random.log_prob(expected, condition=other, noised=True, seed=0,
                          trajectories=random.config.evaluate.trajectories)
    np.testing.assert_allclose(found["own_nats"], own, atol=1e-2)


PRIOR, LIKELIHOOD = stats.norm(MEAN, 2 * STD), stats.norm(MEAN + 0.3 * STD, 0.7 * STD)
EVIDENCE = np.sum(stats.norm(MEAN, np.hypot(2, 0.7) * STD).logpdf(MEAN + 0.3 * STD))


def log_target(theta):
    """Prior times likelihood, [n, 2] -> [n]: normal, with a known integral."""
    return PRIOR.logpdf(theta).sum(1) + LIKELIHOOD.logpdf(theta).sum(1)


def test_the_evidence_of_a_linear_gaussian_model_is_unbiased(gaussian):
    errors = []
    for seed in range(20):
        found = gaussian.reweight(log_target, condition=[1.0, 2.0, 3.0], n=COUNT, seed=seed)
        errors.append((np.exp(found.log_evidence - EVIDENCE) - 1) / found.relative_error)
    assert found.relative_error < 0.02
    assert np.sum(np.abs(errors) < 2) >= 18
    assert abs(np.mean(errors)) < 3.5 / np.sqrt(20)
    assert found.evidence == pytest.approx(np.exp(EVIDENCE), rel=0.1)


def test_a_diverged_sample_counts_nothing_only_where_the_target_is_0(gaussian, monkeypatch):
    draw_all = reweight._draw_all

    def diverged(*arguments):
        x, log_ratio = draw_all(*arguments)
        return x, np.where(np.arange(len(x)) == 1, np.nan, log_ratio)

    def target(theta):
        return np.where(np.arange(len(theta)) == 1, -np.inf, log_target(theta))

    monkeypatch.setattr(reweight, "_draw_all", diverged)
    given = {"condition": [1.0, 2.0, 3.0], "n": COUNT}
    with pytest.raises(UserError, match=rf"{COUNT - 1} of {COUNT} samples have a finite weight"):
        gaussian.reweight(log_target, **given)
    found = gaussian.reweight(target, **given)
    assert found.weights[1] == 0
    assert abs(np.exp(found.log_evidence - EVIDENCE) - 1) < 4 * found.relative_error


def test_weights_correct_a_wrong_model(random):
    """The evidence and the posterior's moments, from a model with random parameters."""
    found = random.reweight(log_target, condition=[1.0, 2.0, 3.0], n=COUNT)
    error = np.exp(found.log_evidence - EVIDENCE) - 1
    assert abs(error) < 4 * found.relative_error
    assert found.relative_error < 0.1
    precision = 1 / 4 + 1 / 0.49
    size = np.sqrt(found.effective_sample_size)
    mean = (found.weights @ found.samples - MEAN) / STD
    np.testing.assert_allclose(mean, 0.3 / 0.49 / precision, atol=4 / size)
    drawn = (found.resampled - MEAN) / STD
    np.testing.assert_allclose(drawn.mean(0), mean, atol=1 / size)
    np.testing.assert_allclose(drawn.std(0), np.sqrt(1 / precision), atol=4 / size)
    raw = (found.samples - MEAN) / STD
    assert np.abs(raw.std(0) - np.sqrt(1 / precision)).max() > 8 / size


@pytest.mark.parametrize(("call", "message"), [
    (lambda run: run.sample(3, label=[1.0, 2.0]), "condition is float64 [2]: expected 3 finite"),
    (lambda run: run.log_prob(MEAN[None]), "no condition is given, and the model is"),
    (lambda run: run.reweight(lambda x: x, condition=[1, 2, 3], n=COUNT),
     f"log_target returned [{COUNT}, 2]"),
])
def test_mistakes_are_one_line(random, call, message):
    with pytest.raises(ntm_jax.UserError, match=re.escape(message)):
        call(random)
