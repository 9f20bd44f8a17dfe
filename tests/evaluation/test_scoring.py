"""Scores of records: the same in any batch size and twice over, their bounds in order."""

import dataclasses

import numpy as np

from ntm_jax.evaluation import scoring
from ntm_jax.evaluation.report import CONTRIBUTIONS


def test_every_record_counts_once_in_any_batch_size_with_the_same_scores(run, source, scores):
    in_sevens = dataclasses.replace(run, config=run.config.with_evaluation(batch_size=7))
    table = scoring.score_records(in_sevens, source, 3)
    np.testing.assert_array_equal(table["index"], np.arange(20))
    assert table.keys() == scores.keys()
    for name, values in table.items():  # the tolerance is for sums of hundreds of nats
        np.testing.assert_allclose(values, scores[name], rtol=1e-5, atol=1e-3, err_msg=name)
    again = scoring.score_records(run, source, 3)
    for name, values in again.items():
        np.testing.assert_array_equal(values, scores[name])
    other = dataclasses.replace(run, config=dataclasses.replace(run.config, seed=1))
    assert np.abs(scoring.score_records(other, source, 3)["bound"] - again["bound"]).min() > 0


def test_the_weighted_bound_is_the_tighter_one_record_by_record(scores):
    assert (scores["importance_weighted"] > scores["bound"]).all()
    assert (scores["importance_weighted"] - scores["bound"] < 1000).all()
    size = scores["effective_sample_size"]
    assert ((size >= 1 - 1e-5) & (size <= 3)).all()
    parts = sum(scores[name].reshape(20, -1).sum(1) for name in CONTRIBUTIONS)
    np.testing.assert_allclose(parts, scores["bound"], rtol=1e-5, atol=1e-2)
