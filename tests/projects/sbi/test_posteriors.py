"""Scores of posteriors: of exact ones, of wrong ones, and of a run of `sbi:TASK`.

The exact posterior is that of theta ~ N(0, 1) and x ~ N(theta, 1): N(x / 2, 1 / 2).
"""


import joblib
import numpy as np
import pytest

from ntm_jax import files
from ntm_jax.errors import UserError
from ntm_jax.projects.sbi import benchmark, references, scores, tasks
from ntm_jax.runtime import config
from tests.common import TINY, experiment, new_run, random_run, tiny_config

SOURCE = {"data.source": "sbi:two_moons,count=60", "evaluate.split": "test"}


def posteriors(n: int, draws: int, wider: float = 1.0, shift: float = 0.0):
    """theta [n, 2], and draws [n, L, 2] of posteriors that are `wider` and shifted."""
    random = np.random.default_rng(0)
    theta = random.normal(size=(n, 2))
    x = theta + random.normal(size=theta.shape)
    noise = random.normal(size=(n, draws, 2))
    return theta, x[:, None] / 2 + np.sqrt(0.5) * wider * noise + shift


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(scores, "EPOCHS", 40)
    with joblib.parallel_config(backend="sequential"):  # starts no processes
        yield


def test_the_classifier_is_as_good_as_theory():
    """The best accuracy for two Gaussians whose means differ by 2 deviations is Phi(1) = 0.841."""
    random = np.random.default_rng(0)
    one, two = random.normal(size=(2, 1000, 2))
    assert scores.c2st(one, two + np.array([2, 0])) == pytest.approx(0.841, abs=0.04)


@pytest.mark.parametrize(("wider", "shift", "right"), [
    (1.0, 0.0, True), (0.6, 0.0, False), (1.6, 0.0, False), (1.0, 0.4, False)])
def test_ranks_and_shares_of_exact_posteriors_are_uniform(wider, shift, right):
    draws = 20
    theta, drawn = posteriors(1000, draws, wider, shift)
    ranks = scores.ranks(theta, drawn)
    assert ranks.shape == (1000, 2)
    assert (ranks.min(), ranks.max()) == (0, draws)
    shares = scores.shares_nearer(theta, drawn) * draws
    seen = (*ranks.T, shares)[: 2 if shift else 3]  # shares hardly see a common shift
    found = [scores.uniformity(values, draws)["p_value"] for values in seen]
    assert min(found) > 0.01 if right else max(found) < 1e-3


def test_the_distance_from_uniform():
    everything = scores.uniformity(np.arange(11), 10)
    assert everything["distance"] == pytest.approx(0, abs=1e-12)
    assert everything["p_value"] == pytest.approx(1)
    assert scores.uniformity(np.zeros(50), 9)["distance"] == pytest.approx(0.9)
    assert scores.band(1000) == pytest.approx(1.628 / np.sqrt(1000), rel=0.02)


@pytest.fixture(scope="module")
def run():
    """A run with random parameters."""
    values = experiment("sbi")
    values.update_from_flattened_dict(TINY | SOURCE)
    return random_run(new_run(config.read(values)), workdir="runs/moons")


@pytest.fixture
def reference(monkeypatch):
    """References whose posterior is that of the prior, for one observation and another."""
    random = np.random.default_rng(0)
    found = [references.Reference(np.array([0.1 * i, 0.3]), random.uniform(-1, 1, (120, 2)))
             for i in range(2)]
    monkeypatch.setattr(references, "read", lambda task, number: found[number - 1])
    return found


AMOUNTS = benchmark.Amounts(observations=2, samples=120, weighted=240, simulations=11, draws=4)


@pytest.mark.slow
def test_a_runs_benchmark(run, reference, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "BATCH", 12)  # several batches, the last one cut
    # The posterior's support is thin, and a run with random parameters may miss it.
    monkeypatch.setattr(tasks.Task, "log_joint", lambda self, x, theta: -np.sum(theta**2, 1))
    result, drawn = benchmark.benchmark(run, AMOUNTS)
    benchmark.write_benchmark(result, drawn, tmp_path)
    assert files.read_json(tmp_path / "sbi.json", "run again") == files.to_json(result)
    for name in ("posteriors.png", "calibration.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (result["task"], result["calibration"]["simulations"]) == ("two_moons", 11)
    assert all(row["weighted"] == 240 for row in result["observations"])
    distinct = [len(np.unique(after, axis=0)) for _, after in drawn.samples]
    assert [row["distinct"] for row in result["observations"]] == distinct
    assert all(0.4 * 120 < count <= len(after) == 120 for count, (_, after) in zip(
        distinct, drawn.samples, strict=True))
    before, _ = drawn.samples[0]
    assert 0 < len(before) <= 120
    assert (np.abs(before) <= 1).all()  # the prior's support
    assert result["share_in_prior"]["mean"] < 1
    assert drawn.ranks.shape == (11, 2)


def test_draws_belong_to_their_simulation_in_any_batch(run, monkeypatch):
    theta, one = benchmark.posterior_draws(run, "two_moons", AMOUNTS)
    monkeypatch.setattr(benchmark, "BATCH", 12)
    _, other = benchmark.posterior_draws(run, "two_moons", AMOUNTS)
    assert (theta.shape, one.shape) == ((11, 2), (11, 4, 2))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_run_of_another_source_is_refused():
    with pytest.raises(UserError, match=r"data\.source is digits: expected a run of sbi:TASK"):
        benchmark.benchmark(new_run(tiny_config()), AMOUNTS)
