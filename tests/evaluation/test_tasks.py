"""Whether samples show what their captions ask for: by task, split and guidance."""

import dataclasses
import math
import re

import numpy as np
import pytest

from ntm_jax import files
from ntm_jax.core.transformer.conditions import Text
from ntm_jax.data import pipeline, text
from ntm_jax.data.records import pad_text
from ntm_jax.data.sources import shapes
from ntm_jax.evaluation import evaluate, image_scores
from ntm_jax.evaluation.evaluate import EvaluationOptions
from ntm_jax.evaluation.report import write_report
from ntm_jax.runtime import build, sharding
from ntm_jax.runtime import config as configuration
from tests.common import as_run, experiment, random_run


@pytest.fixture(scope="module")
def run():
    """A run of experiments/shapes.py, never trained, that scores 16 samples of two steps."""
    values = experiment("shapes", "runlocal")
    values.update_from_flattened_dict({
        "model.width": 16, "model.head_size": 8, "model.transporter_width": 16,
        "model.transporter_blocks": 1, "trajectory.steps": (2,), "sample.steps": 2,
        "sample.guidance": 1.0, "evaluate.trajectories": 1, "sample.decoder": "inverse"})
    settings = configuration.read(values)
    source = settings.data.open(settings.evaluate.split)
    model = build.make_model(settings, pipeline.spec(source, settings.data.patch_size))
    new = as_run(settings, model, sharding.make_mesh(settings.mesh))
    return random_run(new, step=3, workdir="runs/shapes")


def guided(run, scale):
    return dataclasses.replace(run, config=run.config.with_sampling(guidance=scale))


def test_samples_are_checked_against_the_captions_that_they_were_made_from(run):
    held_out, checked = run.config.data.open("heldout[3:11]"), {}

    def tasks(images, captions):
        checked.update(images=images, captions=captions)
        return {"task": np.array(["any"] * 16), "right": np.ones(16, bool)}

    source = dataclasses.replace(held_out, tasks=tasks)
    found = image_scores.task_scores(guided(run, 0.0), source)
    assert (found["split"], found["overall"]["mean"]) == ("heldout[3:11]", 1)
    assert checked["captions"] == [held_out.captions[i % 8] for i in range(16)]
    states, _ = text.open_encoder(run.config.data.text).encode(checked["captions"])
    padded = [pad_text(own, 7) for own in states]
    y = Text(*(np.stack([p[name] for p in padded]) for name in ("text", "text_mask")))
    np.testing.assert_array_equal(checked["images"], run.sample(16, y, guidance=0.0))
    of_test = run.sample(16, guidance=0.0)  # of the captions of the configuration's split
    assert (checked["images"] != of_test).any()


SCALES = (0.0, 1.0, 2.0)


def pretended(run, progress=False):
    """Samples whose quality is known: true scenes, of which guidance spoils some.

    A guidance of 2 paints the left half of every third image black, one of 1 that of every image.
    """
    scale, split = run.config.sample.guidance, run.config.evaluate.split
    records = run.config.data.open(split).records
    images = np.stack([records[i % len(records)]["image"]
                       for i in range(run.config.evaluate.images)])
    images[:: {0.0: 100, 1.0: 1, 2.0: 3}[scale], :, :12] = 0
    return images


@pytest.mark.slow
def test_tasks_by_guidance_and_split(run, tmp_path, monkeypatch, capsys):
    calls = []

    def generated(run, progress=False):
        calls.append((run.config.evaluate.split, run.config.sample.guidance))
        return pretended(run)

    monkeypatch.setattr(image_scores, "generated", generated)
    result, scores = evaluate.evaluate(run, EvaluationOptions(guidance=(2.0, 0.0)))
    splits = ("heldout", "test[:16]")
    assert sorted(calls) == [(split, scale) for split in splits for scale in SCALES]
    assert "class_accuracy" not in result
    check_figures(result["tasks"], run)
    write_report(run, result, scores, tmp_path / "evaluation.json")
    assert files.read_json(tmp_path / "evaluation.json", "") == result
    printed = capsys.readouterr().out
    assert re.search("samples of test.:16. that show what was asked, % +guidance 2.0  guidance 0.0",
                     printed)
    assert re.search("samples of heldout that show what was asked, %", printed)
    calls.clear()
    alone, _ = evaluate.evaluate(run, EvaluationOptions(split="heldout[:16]"))
    assert calls == [("heldout[:16]", 1.0)]
    assert {"unseen", "by_guidance", "difference"} & set(alone["tasks"]) == set()


def check_figures(tasks: dict, run) -> None:
    """Asserts that evaluation.json's tasks follow from shapes.score of the pretended samples."""
    made = {name: tasks[name] for name in ("split", "guidance", "images", "steps", "decoder")}
    assert made == {"split": "test[:16]", "guidance": 1.0, "images": 16, "steps": 2,
                    "decoder": "inverse"}
    captions = [run.config.data.open("test[:16]").captions[i] for i in range(16)]
    task = np.array([shapes.task_of(caption) for caption in captions])
    rows = {scale: shapes.score(pretended(guided(run, scale)), captions) for scale in SCALES}
    right = {scale: row["right"].astype(float) for scale, row in rows.items()}

    def expected(values):
        means = {name: values[task == name].mean() for name in shapes.TASKS}
        return pytest.approx(means | {"overall": np.mean(list(means.values()))})

    def means(figures):
        return {name: figures[name]["mean"] for name in (*shapes.TASKS, "overall")}

    for found, scale in ((tasks, 1.0), *zip(tasks["by_guidance"], (2.0, 0.0), strict=True)):
        assert found["guidance"] == scale
        assert means(found) == expected(right[scale])
        assert means(found["difference"]) == expected(right[scale] - right[2.0])
        counts = {name: found[name]["count"] for name in shapes.TASKS}
        assert counts == {name: (task == name).sum() for name in shapes.TASKS}
        assert found["shares"]["empty"]["mean"] == rows[scale]["empty"].mean()
        colour = np.nanmean(rows[scale]["colour"])
        assert found["shares"]["colour"]["mean"] == pytest.approx(colour)
    errors = [right[2.0][task == name].std(ddof=1) / math.sqrt((task == name).sum())
              for name in shapes.TASKS]
    first, second = tasks["by_guidance"]
    stderr = math.sqrt(np.square(errors).sum()) / 6
    assert first["overall"]["stderr"] == pytest.approx(stderr)
    assert 0 < first["overall"]["mean"] < 1
    unseen = second["unseen"]
    assert unseen["split"] == "heldout"
    assert "single_object" not in unseen
    assert unseen["color_attr"] == {"mean": 1.0, "stderr": 0.0, "count": 4}
