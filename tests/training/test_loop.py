"""The training loop: what a resumed run repeats, how a finished one goes on, how one diverges."""

import dataclasses
import shutil
import signal
import time

import jax
import numpy as np
import pytest

import ntm_jax
from ntm_jax.errors import UserError
from ntm_jax.evaluation import image_scores
from ntm_jax.runtime import sharding, stops
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.training import loop, objectives, pictures, resources, state
from ntm_jax.training.metrics import logged_scalars
from tests.common import bits, figures, logged, new_run, tiny_config

OWN = {"optimizer.name": "muon", "optimizer.schedule": "linear", "data.flip": True,
       "model.pixel_likelihood": "learned"}


def saved(settings, workdir):
    """(step, state, data state) of the last checkpoint."""
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(state.abstract(new_run(settings)))


SCORED = {"train.score_every": 2, "evaluate.num_samples": 10, "evaluate.features": "pixels"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in two folders, `whole` and `parts`: taken to step 5 at once and in two parts.

    The first is rehearsed, which changes no figure.

    A step gets nothing from the host but its batch: no implicit transfer, no wait. Samples are
    scored every other step. Returns their folder, and the T and the records of each step.
    """
    folder, make_step, taken = tmp_path_factory.mktemp("runs"), loop.make_step, []

    def make(*arguments):
        step = make_step(*arguments)

        def call(current, batch, *rest):
            taken.append((rest[0], np.asarray(batch["index"]).tolist()))
            with jax.transfer_guard("disallow"):
                return step(current, batch, *rest)

        call.lower = step.lower
        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", make)
        for name, until in (("whole", 5), ("parts", 3), ("parts", 5)):
            rehearse = str(name == "whole").lower()
            config = tiny_config(**OWN | SCORED | {"train.rehearse": rehearse})
            assert loop.train(config, folder / name, progress=False, until=until) is None
    return folder, taken


def test_a_resumed_run_continues_bit_for_bit(trained):
    folder, taken = trained
    assert taken[5:] == taken[:5]
    assert [len(records) for _, records in taken[:5]] == [16] * 5
    lines = logged(folder / "whole")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(lines[4]["learning_rate"], (3e-3 + 1e-6) / 2, rtol=1e-4)  # linear
    assert logged(folder / "parts") == lines
    drawn = [(folder / name / "samples.png").exists() for name in ("whole", "parts")]
    assert drawn == [True, False]
    assert [line["step"] for line in lines if "score/frechet" in line] == [2, 4]
    assert {"score/kid", "score/recall_stderr"} <= lines[1].keys()
    # an evaluation of the same step scores the same samples
    run = ntm_jax.load(folder / "whole", 4)
    train, held_out = map(run.config.data.open, ("train", run.config.evaluate.split))
    comparison = image_scores.compare_with(run, run.config.evaluate, train, held_out)
    found = image_scores.feature_scores(run, comparison)
    assert found["frechet"] == pytest.approx(lines[3]["score/frechet"], rel=1e-6)
    (step, first, position), (other, second, other_position) = (
        saved(tiny_config(**OWN), folder / name) for name in ("whole", "parts"))
    assert (step, position) == (other, other_position)
    assert step == int(first.step) == 5
    assert bits(first) == bits(second)
    assert bits(first.params) != bits(first.ema)
    first, second = (ntm_jax.load(folder / name).params["pixels"] for name in ("whole", "parts"))
    assert bits(first) == bits(second)
    assert first["log_prior"].shape == (16, 4, 17)


def test_a_finished_run_is_evaluated_again_and_goes_on_when_steps_are_raised(trained, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *_: [])  # tests/test_programs.py draws them
    folder, finished = trained[0] / "parts", tiny_config(**OWN, **{"train.steps": 5})
    before = (folder / "metrics.jsonl").read_bytes()
    results = [loop.train(finished, folder, progress=False)[1] for _ in range(2)]
    for result in results:
        del result["provenance"]["date"]
    assert results[0] == results[1] == figures(folder / "evaluation.json")
    assert results[0]["step"] == 5
    assert (folder / "metrics.jsonl").read_bytes() == before
    loop.train(tiny_config(**OWN), folder, progress=False)
    assert [line["step"] for line in logged(folder)] == [1, 2, 3, 4, 5, 6]
    message = r"holds step 6, beyond config\.train\.steps = 5: raise it to go on"
    with pytest.raises(UserError, match=message):
        loop.train(finished, folder, progress=False)


@pytest.mark.parametrize(("overrides", "message"), [
    ({"data.split": "train[:8]"},
     r"batch_size is 16, and digits has 8 records to train on: expected at most that many"),
    ({"evaluate.split": "tset"},
     r"^config\.evaluate\.split: digits has no split 'tset': it has train, test, all$"),
    ({"train.accumulate": 3}, r"config\.data\.batch_size is 16: expected a multiple of 3"),
    ({"optimizer.name": "mu"}, r"name 'mu' is not known: expected one of adamw, muon, lion, sgd;"),
    ({"train.score_every": 2}, r"score_every is 2, and no samples are scored: set config\."),
    ({"evaluate.features": "inception", "evaluate.num_samples": 10},
     r"features=inception needs its weights: .* or --config\.evaluate\.inception_weights=FILE"),
    ({"train.patience": 2}, r"config\.train\.evaluate_every is 0: set it"),
    ({"train.patience": 2, "train.evaluate_every": 1},
     r"split=test\[:20\], .*:validation .*split=train\[:90%\] and .*split=train\[90%:\]$"),
])
def test_settings_that_cannot_work_are_refused_and_nothing_written(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        loop.train(tiny_config(**overrides), str(tmp_path / "new"), progress=False)
    assert not (tmp_path / "new").exists()


def test_few_records_have_a_note():
    held_out, *sources = map(tiny_config().data.open, ("test[:1]", "train[:7]", "train[:100]"))
    assert [loop.data_notes(source, held_out) for source in sources] == [
        ["note: 7 training records are few: the model will repeat them, and figures of 1 held-out "
         "ones say little; take some hundred"], []]


def test_a_run_out_of_patience_ends_with_its_best_step_also_if_it_was_interrupted(
        tmp_path, monkeypatch):
    """Evaluations are reported to a function. The steps only count."""
    bounds, called, ended, checked = [3.0, 2.0, 2.5, 2.2], [], [], objectives.checked

    def held_out(run, source):
        bound = bounds[run.step - 1]
        return objectives.HeldOutScore(bound, {"evaluate/bits_per_dim": bound}, "")

    def keep(step, scalars):
        called.append((step, scalars["evaluate/bits_per_dim"]))
        if len(called) == 3:
            raise ValueError("pruned")

    def evaluate(run, *_, **__):
        ended.append((run.step, bits(run.params)))
        return {}, {}

    def zeros(run):
        shapes = state.abstract(run)
        made = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
        return jax.device_put(made, jax.tree.map(lambda a: a.sharding, shapes))

    @jax.jit
    def step(current, *_):
        ema = jax.tree.map(lambda a: a + 1, current.ema)
        metrics = {"loss": 0.0, "grad_norm": 0.0, "finite": True}
        return current.replace(step=current.step + 1, ema=ema), metrics

    for module, name, made in (
            (objectives, "checked", lambda config: dataclasses.replace(
                checked(config), held_out=held_out)),
            (loop, "make_step", lambda *_: step), (state, "initialize", zeros),
            (pictures, "draw", lambda *_: []), (loop, "evaluate", evaluate),
            (loop, "write_report", lambda *_, **__: None)):
        monkeypatch.setattr(module, name, made)
    settings = tiny_config(**{
        "train.patience": 2, "train.evaluate_every": 1, "train.save_every": 6,
        "data.split": "train[:90%]", "evaluate.split": "train[90%:]"})

    def train():
        loop.train(settings, tmp_path, progress=False, writers=[keep])

    with pytest.raises(ValueError, match="pruned"):
        train()  # step 2 is saved
    train()  # and this counts on
    train()  # it has ended
    assert called == [(1, 3.0), (2, 2.0), (3, 2.5), (3, 2.5), (4, 2.2)]
    loaded = ntm_jax.load(tmp_path)
    assert loaded.step == 2
    assert ended == [(2, bits(loaded.params))] * 2
    assert saved(settings, tmp_path)[0] == 4


@pytest.mark.slow
def test_a_step_without_enough_memory_is_refused_and_leaves_the_folder_free(
        tmp_path, monkeypatch, capsys):
    """Another command takes the folder, saves by time, and traces the steps that it is asked to."""
    settings = tiny_config(**{"train.save_every": 100, "train.save_minutes": 1e-9})
    with monkeypatch.context() as patched:
        free = iter((2**40, 1000))  # for the state, and then for the step
        patched.setattr(resources, "free_bytes", lambda mesh: next(free))
        with pytest.raises(UserError, match=r"a step needs about .* and 0\.0 GiB are free"):
            loop.train(settings, str(tmp_path), progress=False)
    assert resources.free_bytes(sharding.make_mesh(settings.mesh)) > 2**20
    loop.train(settings, str(tmp_path), until=3, profile=(1, 5))  # it ends before step 5
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_serialized_xspace(trace.read_bytes()).planes
    events = [event.name for plane in planes for line in plane.lines for event in line.events]
    assert any("step" in name for name in events)
    assert "xprof --logdir=" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_leaves_its_last_checkpoint(tmp_path):
    settings = tiny_config(**{
        "optimizer.learning_rate": 1e30, "optimizer.clip": 1e30, "train.save_every": 1})
    with pytest.raises(UserError) as error:
        loop.train(settings, tmp_path, progress=False)
    # The learning rate is 0 in the first step, and the second step's update shows in the third.
    assert str(error.value).startswith("step 3: log_det at level 0 is not a finite number")
    step, last, _ = saved(settings, tmp_path)
    assert step == 2
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(last.params))
    # What the message advises.
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    assert loop.train(tiny_config(), tmp_path, progress=False, until=4) is None
    assert saved(settings, tmp_path)[0] == 4


def test_logged_levels_are_likelihoods():
    metrics = {"quadratic": np.array([0.5, 0.25]), "log_scale": np.array([-1.0, 0.0]),
               "log_det": np.array([0.5, 0.0])}
    others = {"loss": np.float32(1), "grad_norm": np.float32(2), "finite": True}
    scalars = logged_scalars(metrics | others, 1)
    expected = [-1 + np.log(2 * np.pi) / 2, 0.25 + np.log(2 * np.pi) / 2]
    found = [scalars["nll/level_0"], scalars["nll/level_1"]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_stop_ends_an_evaluation_which_the_resumed_run_repeats(tmp_path, monkeypatch):
    """Also the best step is the same."""
    settings = tiny_config(**{
        "train.evaluate_every": 2, "train.patience": 5, "data.split": "train[:90%]",
        "evaluate.split": "train[98%:]"})

    def train(name):
        assert loop.train(settings, tmp_path / name, progress=False, until=2) is None

    reached, point = [], stops.evaluation_point

    def interrupted():
        reached.append(True)
        signal.raise_signal(signal.SIGINT)
        for _ in range(500):
            point()
            time.sleep(0.01)

    monkeypatch.setattr(pictures, "draw", lambda *_: [])
    train("whole")
    with monkeypatch.context() as patch:
        patch.setattr(stops, "evaluation_point", interrupted)
        train("parts")
    assert len(reached) == 1
    assert [line["step"] for line in logged(tmp_path / "parts")] == [1, 2]
    train("parts")
    assert merged(tmp_path / "whole") == merged(tmp_path / "parts")
    with Checkpoints(tmp_path / "whole") as one, Checkpoints(tmp_path / "parts") as other:
        assert one.best() == other.best() == 2
        assert other.measured(2)


def merged(workdir) -> dict:
    """{step: scalars} of a run's lines; a step whose evaluation was repeated has two."""
    found = {}
    for line in logged(workdir):
        found.setdefault(line["step"], {}).update(line)
    return found
