"""Whether samples show what their captions ask for: by task, split and guidance."""

import dataclasses
import math

import numpy as np
import pytest

from ntm_jax import files
from ntm_jax.core.conditions import Text
from ntm_jax.data import text
from ntm_jax.data.text import pad_text
from ntm_jax.evaluation import evaluate, image_scores
from ntm_jax.evaluation.evaluate import EvaluationOptions
from ntm_jax.evaluation.report import write_report
from ntm_jax.projects.scenes import tasks
from ntm_jax.runtime import config
from tests.common import experiment, new_run, random_run


@pytest.fixture(scope="module")
def run():
    """A run of experiments/shapes.py, never trained, that scores 16 samples of two steps."""
    values = experiment("shapes", "smoke")
    values.update_from_flattened_dict({
        "model.width": 16, "model.head_size": 8, "model.transporter_width": 16,
        "model.transporter_blocks": 1, "trajectory.steps": (2,), "sample.steps": 2,
        "sample.guidance": 1.0, "evaluate.trajectories": 1, "evaluate.num_samples": 16})
    return random_run(new_run(config.read(values)), step=3, workdir="runs/shapes")


def guided(run, scale):
    return dataclasses.replace(run, config=run.config.with_sampling(guidance=scale))


def test_samples_are_checked_against_the_captions_that_they_were_made_from(run):
    held_out, checked = run.config.data.open("heldout[3:11]"), {}

    def check(images, captions):
        checked.update(images=images, captions=captions)
        return {"task": np.array(["any"] * 16), "right": np.ones(16, bool)}

    source = dataclasses.replace(held_out, tasks=check)
    found = tasks.task_scores(guided(run, 0.0), source, {})
    assert (found["split"], found["overall"]["mean"]) == ("heldout[3:11]", 1)
    assert checked["captions"] == [held_out.captions[i % 8] for i in range(16)]
    states, _ = text.open_encoder(run.config.data.text_encoder).encode(checked["captions"])
    padded = [pad_text(own, 7) for own in states]
    y = Text(*(np.stack([p[name] for p in padded]) for name in ("text", "text_mask")))
    np.testing.assert_array_equal(checked["images"], run.sample(16, y, guidance=0.0))
    of_test = run.sample(16, guidance=0.0)  # of the captions of the configuration's split
    assert (checked["images"] != of_test).any()


def test_figures_by_task_and_their_paired_differences():
    task = np.array(["one", "two", "one", "two", "two"])
    rows = {"task": task, "right": np.array([1, 1, 0, 1, 0]), "traits": None,
            "colour": np.array([1.0, np.nan, 0.0, np.nan, np.nan])}
    found = tasks.figures(rows, {"right": np.array([1, 0, 1, 0, 0])})
    errors = [math.sqrt(1 / 2 / 2), math.sqrt(1 / 3 / 3)]  # unbiased, of two and of three values
    assert found["one"] == {"mean": 0.5, "stderr": pytest.approx(errors[0]), "count": 2}
    assert found["two"] == {"mean": pytest.approx(2 / 3), "stderr": pytest.approx(errors[1]),
                            "count": 3}
    assert found["overall"] == {"mean": pytest.approx(7 / 12),
                                "stderr": pytest.approx(math.hypot(*errors) / 2)}
    assert found["shares"] == {"colour": {"mean": 0.5, "stderr": pytest.approx(0.5)}}
    assert found["difference"]["one"]["mean"] == -0.5
    assert found["difference"]["two"]["mean"] == pytest.approx(2 / 3)
    assert found["difference"]["overall"]["mean"] == pytest.approx(1 / 12)
    assert "difference" not in tasks.figures(rows, None)


@pytest.mark.slow
def test_tasks_by_guidance_and_split(run, tmp_path, monkeypatch):
    """Of true scenes, of which guidance paints the left half of every other one black."""
    calls = []

    def generated(run, progress=False):
        scale, split = run.config.sample.guidance, run.config.evaluate.split
        calls.append((split, scale))
        records = run.config.data.open(split).records
        images = np.stack([records[i % len(records)]["image"] for i in range(16)])
        images[:: 2 if scale else 100, :, :12] = 0
        return np.split(images, [6])

    monkeypatch.setattr(image_scores, "generated", generated)
    result, scores = evaluate.evaluate(run, EvaluationOptions(guidance=(2.0, 0.0)))
    found = result["tasks"]
    assert sorted(calls) == [(split, scale) for split in ("heldout", "test[:16]")
                             for scale in (0.0, 1.0, 2.0)]
    assert (found["split"], found["images"], found["guidance"]) == ("test[:16]", 16, 1.0)
    first, second = found["by_guidance"]
    assert (first["guidance"], second["guidance"]) == (2.0, 0.0)
    assert found["overall"] == first["overall"]
    assert 0 < first["overall"]["mean"] < second["overall"]["mean"]
    assert first["difference"]["overall"] == {"mean": 0, "stderr": 0}
    assert second["difference"]["overall"]["mean"] == pytest.approx(
        second["overall"]["mean"] - first["overall"]["mean"])
    assert second["unseen"]["split"] == "heldout"
    write_report(run, result, scores, tmp_path / "evaluation.json")
    assert files.read_json(tmp_path / "evaluation.json", "") == result
    alone, _ = evaluate.evaluate(run, EvaluationOptions(split="heldout[:16]"))
    assert not {"unseen", "by_guidance", "difference"} & set(alone["tasks"])
