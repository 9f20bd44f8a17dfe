"""The training step's draws and estimates, and the loop: what a resumed run repeats, and how one that diverges ends."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags

from ntm_jax import files
from ntm_jax.analysis import profile
from ntm_jax.core import trajectory
from ntm_jax.errors import UserError
from ntm_jax.runtime import sharding
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.training import loop, objectives, pictures, state
from ntm_jax.training.step import make_step, steps_of
from tests.common import as_run, batch_of, bits, randomised, rehearsal, setup, tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")
TERMS = ("quadratic", "log_scale", "log_det")


@pytest.fixture(scope="module", autouse=True)
def _parsed_flags():
    """Grain's worker processes read absl flags, which launch/ parses."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@pytest.fixture
def indices(monkeypatch):
    """The record indices of every batch that is trained on."""
    seen = []
    to_global = sharding.to_global

    def spy(batch, mesh):
        seen.append(batch["index"].tolist())
        return to_global(batch, mesh)

    monkeypatch.setattr(sharding, "to_global", spy)
    return seen


def losses(workdir) -> dict:
    """Each step's scalars, except those that a clock gives."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: {k: v for k, v in line.items() if k not in ("wall_time", "examples_per_second")} for line in lines}


def saved(settings, workdir):
    """(step, state, data state) of the last checkpoint."""
    _, model, mesh = setup(settings)
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(state.abstract(as_run(settings, model, mesh)))


@pytest.mark.parametrize(("overrides", "workers"), [
    ({}, 1), pytest.param({"trajectory.steps": (2, 4), "seed": 1}, 0, marks=rehearsal),
    pytest.param({"trajectory.steps": (2, 4), "train.objective": "pairwise"}, 0, marks=rehearsal)])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, indices, overrides, workers):
    settings = tiny_config(**overrides)
    loop.train(settings, tmp_path / "whole", progress=False, until=5)
    whole = indices.copy()
    indices.clear()
    loop.train(settings, tmp_path / "parts", progress=False, until=3)
    loop.train(tiny_config(**overrides | {"data.workers": workers}), tmp_path / "parts", progress=False, until=5)
    assert indices == whole
    assert [len(batch) for batch in whole] == [16] * 5
    assert list(losses(tmp_path / "whole")) == [1, 2, 3, 4, 5]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    (step, first, position), (other, second, other_position) = (saved(settings, tmp_path / name) for name in ("whole", "parts"))
    assert (step, position) == (other, other_position)
    assert step == int(first.step) == 5
    assert bits(first) == bits(second)
    assert bits(first.params) != bits(first.ema)
    if "train.objective" not in overrides:
        count = {sum(key.startswith("nll/level") for key in line) for line in losses(tmp_path / "whole").values()}
        assert count == set(settings.trajectory.steps)  # the draw of T, too, is repeated


@rehearsal
def test_a_finished_run_is_evaluated_again_and_goes_on_when_steps_are_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *_: None)  # the pictures are test_programs' affair
    settings = tiny_config(**{"train.steps": 2})
    result = loop.train(settings, tmp_path, progress=False)
    assert result["step"] == 2
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "evaluation.json").unlink()
    again = loop.train(settings, tmp_path, progress=False)
    assert again == result == files.read_json(tmp_path / "evaluation.json", "")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert loop.train(tiny_config(**{"train.steps": 4}), tmp_path, progress=False, until=3) is None
    assert list(losses(tmp_path)) == [1, 2, 3]
    with pytest.raises(UserError, match=r"holds step 3, beyond config\.train\.steps = 2: raise it to go on"):
        loop.train(settings, tmp_path, progress=False)


def test_a_step_is_traced_once_for_its_flops_and_its_program(tmp_path, monkeypatch):
    traced = []
    monkeypatch.setitem(objectives.OBJECTIVES, "end_to_end", lambda *arguments: traced.append(1) or objectives.end_to_end(*arguments))
    loop.train(tiny_config(**{"train.save_every": 9}), tmp_path, until=2)
    assert len(traced) == 1
    assert all(line["flops_per_second"] > 0 for line in losses(tmp_path).values())


def test_a_batch_that_does_not_divide_is_refused_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "batch_shards", lambda _: 3)
    with pytest.raises(UserError, match=r"config\.data\.batch_size is 16: expected a multiple of 3"):
        loop.train(tiny_config(), tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_a_batch_taken_in_parts_makes_the_same_step():
    found = []
    for parts in (1, 4):
        settings = tiny_config(**{"train.accumulate": parts})
        source, model, mesh = setup(settings)
        current = state.initialize(as_run(settings, model, mesh))
        params = jax.device_put(randomised(current.params), jax.tree.map(lambda a: a.sharding, current.params))
        current = current.replace(params=params, step=current.step + 1)
        batch, step = sharding.to_global(batch_of(source, settings, 16), mesh), make_step(as_run(settings, model, mesh))
        with sharding.use(mesh):
            current, metrics = step(current, batch, 2)
        found.append(jax.device_get((metrics, current.opt_state)))
    for whole, parts in zip(*map(jax.tree.leaves, found), strict=True):
        # float32 sums in another order, of the largest entry: single ones cancel
        np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


def test_a_step_that_lacks_a_part_of_its_batch_changes_nothing():
    settings = tiny_config()
    source, model, mesh = setup(settings)
    step, batch = make_step(as_run(settings, model, mesh)), sharding.to_global(batch_of(source, settings, 16), mesh)

    def after(whole):
        new = state.initialize(as_run(settings, model, mesh))
        with sharding.use(mesh):
            made, metrics = step(new, batch, 2, None, sharding.flag_by_process(whole, mesh))
        assert bool(metrics["whole"]) is whole
        return bits(made)

    assert after(True) != after(False) == bits(state.initialize(as_run(settings, model, mesh)))


def test_a_trace_of_the_steps_asked_for_is_written(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    said = []
    trace = profile.Trace(tmp_path / "profile", (2, 4), said.append)
    seen = []
    for step in range(6):
        trace.at(step, None, False, lambda *_: [])
        seen.append(len(calls))
    assert calls == [str(tmp_path / "profile"), "stop"]
    assert seen == [0, 0, 1, 1, 2, 2]
    assert said == [f"the trace in {tmp_path / 'profile'} could not be read, and there is no summary of it: there is none"]


def test_a_run_that_diverges_stops_and_leaves_its_last_checkpoint(tmp_path):
    settings = tiny_config(**{"optimizer.learning_rate": 1e30, "optimizer.clip": 1e30, "train.save_every": 1})
    with pytest.raises(UserError) as error:
        loop.train(settings, tmp_path, progress=False)
    assert str(error.value).startswith("step 3: log_det at level 0 is not a finite number")  # the rate is 0 at first, and the second shows
    step, last, _ = saved(settings, tmp_path)
    assert step == 2
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(last.params))
    with pytest.raises(UserError) as again:  # with the same numbers the same end
        loop.train(settings, tmp_path, progress=False)
    assert str(again.value) == str(error.value)
    # What the message advises.
    lower = tiny_config(**{"optimizer.learning_rate": 1e-3, "train.save_every": 1})
    with pytest.raises(UserError, match=r"step 3: .* is not a finite number"):
        loop.train(lower, tmp_path, progress=False)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    assert loop.train(lower, tmp_path, progress=False, until=4) is None
    assert saved(lower, tmp_path)[0] == 4


@pytest.mark.parametrize("term", TERMS)
def test_the_level_and_the_term_that_went_bad_are_named(term):
    metrics = {name: np.ones(3) for name in TERMS}
    metrics[term][1] = np.nan
    with pytest.raises(UserError, match=f"step 7: {term} at level 1 is not a finite number"):
        loop.check(metrics | {"loss": np.nan, "grad_norm": 1.0, "finite": True}, 7)
    for last in ({"grad_norm": np.inf, "finite": True}, {"grad_norm": 1.0, "finite": False}):
        with pytest.raises(UserError, match="step 7: the gradient or the update, every term being finite"):
            loop.check({name: np.ones(3) for name in TERMS} | {"loss": 1.0} | last, 7)


def test_logged_levels_are_likelihoods():
    metrics = {"quadratic": np.array([0.5, 0.25]), "log_scale": np.array([-1.0, 0.0]), "log_det": np.array([0.5, 0.0])}
    scalars = loop.check(metrics | {"loss": np.float32(1), "grad_norm": np.float32(2), "finite": True}, 1)
    expected = [-1 + np.log(2 * np.pi) / 2, 0.25 + np.log(2 * np.pi) / 2]
    np.testing.assert_allclose([scalars["nll/level_0"], scalars["nll/level_1"]], expected, rtol=1e-6)


# What a step draws, and what it estimates.

DRAWS = tiny_config(**{"trajectory.steps": (2, 4), "trajectory.t_min_range": (0.02, 0.04), "train.condition_dropout": 0.3})


@pytest.fixture(scope="module")
def drawn():
    source, model, _ = setup(DRAWS)
    label = np.arange(4000, dtype=np.int32) % 10
    batch = {"index": np.arange(4000, dtype=np.int32), "label": label}
    return source, model, batch, objectives._draws(DRAWS, model, jax.random.key(3), batch)


def test_conditions_are_dropped_one_by_one_at_the_given_rate(drawn):
    _, _, batch, (_, _, label) = drawn
    dropped = np.asarray(label) == 10
    assert abs(dropped.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4000)
    np.testing.assert_array_equal(label[~dropped], batch["label"][~dropped])
    assert 0.15 < np.corrcoef(dropped[:-1], dropped[1:])[0, 1] + 0.2 < 0.25  # neighbours are independent, within 3 sigma


def test_t_min_is_uniform_over_its_range(drawn):
    t_min = np.sort(np.asarray(drawn[3][1]))
    assert 0.02 <= t_min[0] < 0.0201
    assert 0.0399 < t_min[-1] < 0.04
    assert np.abs((t_min - 0.02) / 0.02 - np.arange(4000) / 4000).max() < 1.63 / np.sqrt(4000)  # Kolmogorov-Smirnov at 1%


@functools.cache
def terms_of(objective, settings, model):
    return jax.jit(lambda params, root, batch, steps: objective(settings, model, params, root, batch, steps), static_argnums=3)


@pytest.fixture(scope="module")
def model_and_batch():
    source, model, mesh = setup(tiny_config(**{"evaluate.split": "train[:256]", "trajectory.steps": (2, 4)}))
    params = randomised(state.initialize(as_run(DRAWS, model, mesh)).params)
    return model, params, batch_of(source, DRAWS, 256)


@pytest.mark.parametrize("objective", [objectives.end_to_end, objectives.pairwise])
def test_draws_follow_the_record_and_not_its_row(model_and_batch, objective):
    model, params, batch = model_and_batch
    order = np.random.default_rng(0).permutation(256)
    function, root = terms_of(objective, DRAWS, model), jax.random.key(1)
    terms, permuted = (function(params, root, b, 2) for b in (batch, {k: v[order] for k, v in batch.items()}))
    for name in TERMS:
        np.testing.assert_allclose(getattr(permuted, name), getattr(terms, name)[order], rtol=1e-4, atol=1e-3)  # sums over 64 dimensions
    other = function(params, jax.random.key(2), batch, 2)
    assert np.abs(other.quadratic - terms.quadratic).min() > 0


def test_pairs_estimate_the_trajectory_without_bias(model_and_batch):
    model, params, batch = model_and_batch
    pair, whole = (terms_of(objective, DRAWS, model) for objective in (objectives.pairwise, objectives.end_to_end))
    roots = [jax.random.key(i) for i in range(12)]
    for name in TERMS:
        def draws(function, steps, name=name):
            return np.concatenate([np.mean(getattr(function(params, root, batch, steps), name), 1) / 64 for root in roots])

        pairs, two, four = draws(pair, 0), draws(whole, 2), draws(whole, 4)
        trajectories = (two + four) / 2  # T is 2 or 4 with equal chance
        error = np.hypot(pairs.std(), trajectories.std()) / np.sqrt(len(pairs))
        assert abs(pairs.mean() - trajectories.mean()) < 4 * error, name
        assert error < 0.1 * abs(two.mean() - four.mean()) or error < 0.02 * abs(pairs.mean()), name  # small enough to tell


def test_a_pair_is_the_trajectorys_own_factor(model_and_batch):
    model, params, batch = model_and_batch
    x, label = batch["x"][:4], batch["label"][:4]
    t = DRAWS.schedule(model.config.tokens).levels(4, jnp.full(4, 0.03))
    xs = trajectory.simulate(x, t, jax.random.normal(jax.random.key(0), (4, 5, *x.shape[1:])))
    steps = jnp.full(4, 4)
    whole = jax.jit(model.apply)(params, xs, t, steps, label)
    apply = jax.jit(functools.partial(model.apply, method=type(model).pair))
    for k in range(4):
        pair = apply(params, xs[:, k], xs[:, k + 1], t[:, k], t[:, k + 1], jnp.full(4, k == 3), steps, label)
        np.testing.assert_allclose(pair.nll, whole.nll[:, k], rtol=1e-4)
        np.testing.assert_array_equal(pair.level, whole.level[:, k])
        np.testing.assert_array_equal(pair.level, t[:, k])


def test_a_factor_counts_by_a_power_of_its_level():
    """The step's gradient is that of sum_k w_k NLL_k, w_k = t_k^2 over its mean; the loss that is told is the likelihood's."""
    settings = tiny_config(**{
        "train.level_power": 2.0, "optimizer.clip": 1e9, "trajectory.t_min": 0.04, "trajectory.t_min_range": (0.04, 0.04)})
    source, model, mesh = setup(settings)
    current = state.initialize(as_run(settings, model, mesh)).replace(step=np.int32(1))
    params = jax.device_put(randomised(current.params), jax.tree.map(lambda a: a.sharding, current.params))
    batch, steps = batch_of(source, settings, 16), settings.evaluation_steps
    root = jax.random.fold_in(jax.random.key(settings.seed), 1)
    weight = as_run(settings, model, None).evaluated_levels()[:-1] ** 2
    weight /= weight.mean()

    def loss(params, weight):
        terms = objectives.end_to_end(settings, model, params, root, batch, steps)
        return jnp.mean(weight * (terms.nll - terms.constant)) / 64

    gradient = jax.jit(jax.grad(loss))
    expected, alike = (optax.tree.norm(gradient(params, w)) for w in (weight, np.ones(steps, np.float32)))
    assert abs(expected / alike - 1) > 0.1
    step = make_step(as_run(settings, model, mesh))
    with sharding.use(mesh):
        told = jax.jit(loss)(params, np.ones(steps, np.float32))
        _, metrics = step(current.replace(params=params), batch, steps)
    np.testing.assert_allclose(metrics["grad_norm"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], told, rtol=1e-5)


def test_the_number_of_steps_is_drawn_from_the_seed_and_the_step():
    settings = tiny_config(**{"trajectory.steps": (2, 4, 8)})
    drawn = [steps_of(settings, step) for step in range(300)]
    assert drawn == [steps_of(settings, step) for step in range(300)]
    assert all(70 < drawn.count(steps) < 130 for steps in (2, 4, 8))
    assert drawn != [steps_of(tiny_config(seed=1, **{"trajectory.steps": (2, 4, 8)}), step) for step in range(300)]
