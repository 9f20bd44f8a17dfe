"""An evaluation: its figures and table, comparisons of two runs, and what is refused."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from ntm_jax import files
from ntm_jax.errors import UserError
from ntm_jax.evaluation import evaluate, measures, scoring
from ntm_jax.evaluation.evaluate import EvaluationOptions
from ntm_jax.evaluation.report import table, write_report
from tests.common import tiny_config
from tests.evaluation.conftest import SETTINGS


def configured(run, **overrides):
    """The run with settings of the shrunk experiment overridden."""
    return dataclasses.replace(run, config=tiny_config(**SETTINGS | overrides))


def test_the_figures_and_the_table_of_an_evaluation(run, source, tmp_path, capsys):
    run = configured(run, **{"evaluate.num_samples": 20, "evaluate.features": "pixels",
                             "sample.decoder": "score"})
    reference = tmp_path / "reference.npz"
    result, scores = evaluate.evaluate(run, EvaluationOptions(write_reference=str(reference)))
    train = run.config.data.open("train").records
    with np.load(reference) as content:
        mean = np.mean([train[i]["image"] for i in range(len(train))], 0).ravel() / 16
        np.testing.assert_allclose(content["mu"], mean, rtol=1e-6, atol=1e-6)
        assert content["digest"] == result["features"]["digest"]
    assert (result["step"], result["split"], result["count"]) == (3, "test[:20]", 20)
    assert scores["bound"].shape == (20,)
    accuracy, features = result["class_accuracy"], result["features"]
    assert (accuracy["images"], accuracy["decoder"]) == (20, "score")
    assert 0 <= accuracy["mean"] < 0.6  # the model is untrained
    assert result["frechet"] > 3 * result["frechet_held_out"] > 0
    assert (features["name"], features["proxy"], features["images"]) == ("pixels", True, 20)
    provenance = result["provenance"]
    assert (provenance["t_min"], provenance["parameters"]) == (0.03, "ema")
    assert len(provenance["checksum"]) == 16
    assert provenance["levels"] == pytest.approx([0.03, 0.515, 1])
    assert provenance["config"] == run.config.raw
    assert result["denoising"] == measures.denoising_errors(run, source)
    write_report(run, result, scores, tmp_path / "evaluation.json")
    assert files.read_json(tmp_path / "evaluation.json", "") == result
    printed = capsys.readouterr().out
    assert "pixels features, a proxy" in printed
    for name in ("frechet", "kid", "precision", "recall", "frechet_held_out"):
        assert f"{result[name]:.4f} ± {result[f'{name}_stderr']:.4f}" in printed
    assert "FID" not in printed.upper()


def test_options_that_cannot_be_followed_are_refused_first(run, monkeypatch):
    def score(*_):
        raise AssertionError("records are scored")

    monkeypatch.setattr(scoring, "map_records", score)
    message = "--features is about samples, and none are scored: give --images"
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(configured(run), EvaluationOptions(features="pixels"))


def test_figures_that_are_not_finite_are_null_in_the_file(run, tmp_path, capsys):
    broken = dataclasses.replace(run, params=jax.tree.map(lambda a: a * np.nan, run.params))
    result, _ = evaluate.evaluate(broken)
    write_report(broken, result, None, tmp_path / "evaluation.json")
    text = (tmp_path / "evaluation.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["nats_per_dim"]["bound"]["mean"] is None
    assert "note: the likelihood of some records is not a finite number" in capsys.readouterr().out


def test_data_that_changed_since_the_training_are_named(run):
    changed = dataclasses.replace(run, spec=dataclasses.replace(run.spec, version="before"))
    with pytest.warns(UserWarning, match=r"^digits changed since the run began, from version "
                                         r"'before' to 'scikit-learn .*'"):
        evaluate.evaluate(changed)


def test_two_runs_are_compared_record_by_record(run):
    """The standard error of the difference is paired. Runs of other data are refused."""
    other = dataclasses.replace(run, params=jax.tree.map(lambda a: 1.01 * a, run.params))
    result, mine = evaluate.evaluate(run, against=other)
    _, theirs = evaluate.evaluate(other)
    difference = (theirs["bound"].astype(np.float64) - mine["bound"]) / 64 / math.log(2)
    found = result["against"]["bits_per_dim"]["bound"]
    assert found["mean"] == pytest.approx(difference.mean(), rel=1e-6)
    assert found["stderr"] == pytest.approx(difference.std(ddof=1) / math.sqrt(20), rel=1e-6)
    other_stderr = np.std(theirs["bound"], ddof=1) / 64 / math.log(2) / math.sqrt(20)
    unpaired = math.hypot(result["bits_per_dim"]["bound"]["stderr"], other_stderr)
    assert found["stderr"] < unpaired
    assert "against.bits_per_dim.bound " in table(result, "bits_per_dim")
    elsewhere = configured(run, **{"data.source": "mnist_5k"})
    with pytest.raises(UserError, match=r"has data\.source = mnist_5k, and this run has digits: "
                                        "their figures do not compare"):
        evaluate.evaluate(run, against=elsewhere)


