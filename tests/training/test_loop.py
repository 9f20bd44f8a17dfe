"""The training loop: what a resumed run repeats, how a finished one goes on, how one diverges."""

import shutil

import jax
import numpy as np
import pytest

from ntm_jax.errors import UserError
from ntm_jax.runtime import sharding
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.training import loop, pictures, resources, state
from ntm_jax.training.metrics import logged_scalars
from tests.common import bits, figures, logged, new_run, tiny_config


def saved(settings, workdir):
    """(step, state, data state) of the last checkpoint."""
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(state.abstract(new_run(settings)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in two folders, `whole` and `parts`: taken to step 5 at once and in two parts.

    A step gets nothing from the host but its batch: no implicit transfer, no wait. Returns their
    folder, and the T and the records of each step.
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
            assert loop.train(tiny_config(), folder / name, progress=False, until=until) is None
    return folder, taken


def test_a_resumed_run_continues_bit_for_bit(trained):
    folder, taken = trained
    assert taken[5:] == taken[:5]
    assert [len(records) for _, records in taken[:5]] == [16] * 5
    lines = logged(folder / "whole")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert logged(folder / "parts") == lines
    (step, first, position), (other, second, other_position) = (
        saved(tiny_config(), folder / name) for name in ("whole", "parts"))
    assert (step, position) == (other, other_position)
    assert step == int(first.step) == 5
    assert bits(first) == bits(second)
    assert bits(first.params) != bits(first.ema)


def test_a_finished_run_is_evaluated_again_and_goes_on_when_steps_are_raised(trained, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *_: [])  # tests/test_programs.py draws them
    folder, finished = trained[0] / "parts", tiny_config(**{"train.steps": 5})
    before = (folder / "metrics.jsonl").read_bytes()
    results = [loop.train(finished, folder, progress=False)[1] for _ in range(2)]
    for result in results:
        del result["provenance"]["date"]
    assert results[0] == results[1] == figures(folder / "evaluation.json")
    assert results[0]["step"] == 5
    assert (folder / "metrics.jsonl").read_bytes() == before
    loop.train(tiny_config(), folder, progress=False)
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
