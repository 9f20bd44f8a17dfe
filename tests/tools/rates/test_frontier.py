"""The frontier of runs: its rows, seeds and FLOPs, what it refuses, and the files it writes."""

import dataclasses
import json

import numpy as np
import pytest

from ntm_jax.errors import UserError
from ntm_jax.evaluation import image_scores
from ntm_jax.runtime import config_file
from ntm_jax.tools.rates import benchmark, frontier, rows
from ntm_jax.training import loop
from tests.common import (
    TINY,
    configured,
    new_run,
    pixels,
    tiny_config,
    without_an_ending,
    write_run,
)

SMALL = {"data.split": "train[:60]", "evaluate.num_samples": 12, "evaluate.features": "pixels",
         "sample.num": 8}
FLOW = {"model.transporter_blocks": 0, "sample.decoder": "euler", "trajectory.schedule": "shifted"}


def ntm(**changes):
    return tiny_config(**SMALL | changes)


def flow(**changes):
    return configured("digits_fm", TINY | SMALL | FLOW | changes)


def log(folder, of_step: float, *steps: int, batch_size: int = 16):
    """Writes a metrics.jsonl whose steps have so many FLOPs, at a speed of 10 steps/s."""
    folder.mkdir(exist_ok=True)
    lines = [{"step": 1, "evaluate/loss": 2.0}, *(
        {"step": step, "flops_per_second": 10 * of_step, "examples_per_second": 10 * batch_size}
        for step in steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two seeds of an NTM and a flow-matching run, with random parameters, at step 4."""
    root = tmp_path_factory.mktemp("runs")
    found = {"one": ntm(), "two": ntm(seed=1), "flow": flow()}
    for name, config in found.items():
        log(write_run(root / name, config), 100 if name == "flow" else 300, 2, 4)
    return {name: str(root / name) for name in found}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.01)
    monkeypatch.setattr(frontier, "ODE_STEPS", (1, 2))


def test_a_frontier_has_a_row_for_each_model_decoder_and_number_of_steps(
        folders, tmp_path, capsys):
    one, two, other = folders.values()
    found = frontier.frontier([one, other, two], 3)
    rows_ = found["rows"]
    assert [(row["model"], row["decoder"], row["steps"]) for row in rows_] == [
        ([one, two], "inverse", 2), ([one, two], "score", 2),
        ([other], "euler", 1), ([other], "heun", 1), ([other], "euler", 2), ([other], "heun", 2)]
    assert [row["training_flops"] for row in rows_] == pytest.approx([1200] * 2 + [400] * 4)
    assert (found["num"], found["batch"], found["rounds"]) == (12, 8, 3)
    for row in rows_:
        seeds = len(row["seeds"])
        assert np.shape(row["timed"]) == (seeds, 3)
        assert row["images_per_second"] == np.median(row["timed"]) > 0
        assert {*frontier.SCORES} <= row.keys()
        for name in frontier.SCORES:
            assert ("seed_stderr" in row[name]) == (seeds > 1)
    shown = frontier.table(found)
    assert shown.count("\n") == 3 + len(rows_)
    assert f"| {one}, {two} | score | 2 |" in shown
    assert "median of 3 rounds over all rows, 8 images at a time; 12 samples a row" in shown
    assert "6/8 scored" in (errors := capsys.readouterr().err)
    assert "round 3/3 timed" in errors

    _check_scores(found, one, two)
    out = tmp_path / "out"
    frontier.write(found, str(out))
    frontier.write(found, str(out))
    assert (out / "frontier.md").read_text() == shown + "\n"
    assert json.loads((out / "frontier.json").read_text())["rows"][0]["model"] == [one, two]
    before = pixels(out / "frontier.png")
    with pytest.raises(UserError, match="holds the frontier of another call"):
        frontier.check_out(str(out), frontier.call([one, other, two], 2, None, None, ""))
    frontier.check_out(str(out), found["call"])

    rows_[-1]["frechet"]["mean"] = float("nan")  # is neither drawn nor written
    frontier.write(found, str(out))
    assert json.loads((out / "frontier.json").read_text())["rows"][-1]["frechet"]["mean"] is None
    assert (pixels(out / "frontier.png") != before).any()


def _check_scores(found: dict, one: str, two: str):
    """A row of seeds has the mean of the seeds' own figures, and an evaluation's figures."""
    own = []
    for workdir in (one, two):
        run = frontier.load_run(workdir)
        data = run.config.data
        train, held_out = data.open(data.split), data.open(run.config.evaluate.split)
        comparison = image_scores.Comparison(run, run.config.evaluate, train, held_out)
        figures = image_scores.image_scores(run, train, held_out, comparison)
        own.append([figures["frechet"], figures["frechet_stderr"], figures["recall"],
                    figures["class_accuracy"]["mean"]])
    (d1, e1, r1, a1), (d2, e2, r2, a2) = own
    row = found["rows"][0]
    # float32 pixels of samples in batches of another size round alike to the same 17 values
    assert row["frechet"] == pytest.approx({
        "mean": (d1 + d2) / 2, "stderr": np.hypot(e1, e2) / 2, "seed_stderr": abs(d1 - d2) / 2})
    assert row["recall"]["mean"] == pytest.approx((r1 + r2) / 2)
    assert row["class_accuracy"]["mean"] == pytest.approx((a1 + a2) / 2)


def test_runs_of_other_data_and_equal_runs_are_refused(folders, monkeypatch):
    one, two, _ = folders.values()
    other = ntm(**{"data.split": "train[:61]"})
    for changed, message in (
            (new_run(other), "other has config.data.split train.:61., where .*one has train.:60."),
            (new_run(ntm(**{"model.condition": "none", "train.condition_dropout": 0.0})),
             "other has condition none")):
        runs = {one: frontier.load_run(one), two: dataclasses.replace(changed, workdir="other")}
        with monkeypatch.context() as patched:
            patched.setattr(frontier, "load_run", runs.get)
            with pytest.raises(UserError, match=message):
                frontier.frontier([one, two], 1)
    with pytest.raises(UserError, match="hold one model with one seed, 0: give each run once"):
        frontier.frontier([one, one], 1)
    with pytest.raises(UserError, match="--rows=denoiser is in no row's name"):
        frontier.frontier([one], 1, only="denoiser")


def test_training_flops_include_what_a_run_was_made_from(tmp_path):
    """A denoiser of a fine-tuned run cost its own steps, its teacher's and the start's."""
    def write(name: str, config, of_step: float, *steps: int) -> str:
        folder = log(tmp_path / name, of_step, *steps)
        config_file.write(str(folder), config, new_run(config).spec)
        return str(folder)

    def costs(workdir: str, denoiser: bool = True) -> list:
        return [cost for _, cost in frontier.history(workdir, denoiser)]

    start = write("start", flow(), 5, 10, 20)
    early = f"{start}/checkpoints/15"
    assert costs(start) == pytest.approx([100])
    assert costs(early) == pytest.approx([75])
    tuned = write("tuned", ntm(init_from=early, **{"model.transporter_blocks": 0}), 7, 4, 6)
    assert costs(tuned) == pytest.approx([42, 75])
    distilled = dataclasses.replace(ntm(), teacher=tuned)
    denoiser = write("denoiser", distilled, 11, 3)
    assert costs(denoiser) == pytest.approx([33, 42, 75])
    assert costs(denoiser, False) == costs(tuned)
    own = write("own", ntm(**{"train.distil_steps": 3}), 7, 6)
    write("own/denoiser", dataclasses.replace(ntm(), teacher=".."), 11, 3)
    assert costs(own) == pytest.approx([33, 42])
    assert costs(own, False) == pytest.approx([42])
    lost = write("lost", ntm(init_from=str(tmp_path / "nowhere")), 7, 6)
    assert costs(lost) == [pytest.approx(42), None]
    unlogged = write("unlogged", ntm(), 7)
    assert costs(unlogged) == [None]


@pytest.mark.slow
def test_training_flops_are_those_of_a_runs_steps(tmp_path, monkeypatch):
    without_an_ending(monkeypatch)
    config = ntm(**{"train.steps": 5, "train.log_every": 2})
    loop.train(config, str(tmp_path / "run"))
    data = (config.data.open(split) for split in (config.data.split, config.evaluate.split))
    of_step = rows._train_step(rows.BenchmarkInput(new_run(config), 8, *data)).flops
    found = frontier.training_flops(str(tmp_path / "run"), config.data.batch_size)
    assert found == pytest.approx(5 * of_step)
