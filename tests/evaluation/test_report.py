"""evaluation.json's likelihood figures, its table and its files."""

import dataclasses
import math
import re

import numpy as np
import pyarrow.parquet
import pytest

from ntm_jax import files
from ntm_jax.core import likelihood
from ntm_jax.errors import UserError
from ntm_jax.evaluation.report import (
    advice,
    check_unit,
    provenance,
    summarize,
    summary,
    table,
    write_report,
)
from ntm_jax.evaluation.scoring import BOUNDS


def test_bounds_in_both_units(run, scores):
    result = summarize(scores, run.spec, 3)
    assert result["count"] == 20
    for name in BOUNDS:
        nats = -scores[name].astype(np.float64)
        values, bits = nats / 64, result["bits_per_dim"][name]
        found = result["nats_per_dim"][name]
        assert found["mean"] == pytest.approx(values.mean(), rel=1e-6)
        stderr = np.sqrt(((values - values.mean()) ** 2).sum() / 19 / 20)
        assert found["stderr"] == pytest.approx(stderr, rel=1e-4)
        assert bits["mean"] == pytest.approx(found["mean"] / math.log(2))
        assert bits["stderr"] == pytest.approx(found["stderr"] / math.log(2))
        assert likelihood.bits_per_dim(nats, 64).mean() == pytest.approx(bits["mean"], rel=1e-6)
    weighted = result["bits_per_dim"]["importance_weighted"]
    assert weighted["trajectories"] == 3
    assert list(weighted["by_trajectories"]) == ["1", "3"]
    assert weighted["by_trajectories"]["3"]["mean"] == pytest.approx(weighted["mean"], rel=1e-6)
    noise = result["bits_per_dim"]["bound"]["noise_stderr"] * 64 * math.log(2)
    assert noise == pytest.approx(math.sqrt(scores["bound_variance"].sum()) / 20, rel=1e-5)
    assert noise > 0
    continuous = dataclasses.replace(run.spec, pixel_levels=0)
    assert "bits_per_dim" not in summarize(scores, continuous, 3)
    one = summarize({name: values[:1] for name, values in scores.items()}, run.spec, 3)
    assert one["nats_per_dim"]["bound"]["stderr"] == 0


def test_figures_by_level(run, scores):
    result = summarize(scores, run.spec, 3)
    levels, found = scores["nll"].astype(np.float64) / 64, result["trajectory_nll"]
    assert found["by_level"] == pytest.approx(levels.mean(0), rel=1e-6)
    assert found["mean"] == pytest.approx(levels.mean(), rel=1e-6)
    stderr = levels.mean(1).std(ddof=1) / np.sqrt(20)
    assert found["stderr"] == pytest.approx(stderr, rel=1e-4)
    by_level = levels.std(0, ddof=1) / np.sqrt(20)
    assert found["stderr_by_level"] == pytest.approx(by_level, rel=1e-4)
    paid = np.sum(result["rate_by_level"]) - result["contributions"]["reconstruction"]
    assert paid == pytest.approx(result["nats_per_dim"]["bound"]["mean"], rel=1e-5)


def test_written_report(run, source, scores, tmp_path, capsys):
    result = {"split": "test[:20]", "step": 3, "provenance": provenance(run, source)}
    result |= summarize(scores, run.spec, 3)
    write_report(run, result, scores, tmp_path / "evaluation.json", per_example=True)
    written = files.read_json(tmp_path / "evaluation.json", "")
    assert written == result
    assert capsys.readouterr().out == table(result, "bits_per_dim") + "\n"
    written["contributions"]["reconstruction"] = -0.8 * result["nats_per_dim"]["bound"]["mean"]
    assert advice(written) == []  # at a usual t_min, which samples in few steps need
    written["provenance"]["t_min"] = 0.2
    (line,) = advice(written)
    assert line.startswith("80% of the bound is reconstruction, the cost of pixel values that the "
                           "noise of t_min = 0.2 hides: --pixel_likelihood=network")
    written["provenance"]["config"]["model"]["pixel_likelihood"] = "network"
    assert advice(written) == []  # the levels above do not pay for what x_0 hides
    assert (tmp_path / "evaluation.png").stat().st_size > 1000
    rows = pyarrow.parquet.read_table(tmp_path / "evaluation.parquet").to_pydict()
    assert rows["index"] == list(range(20))
    np.testing.assert_array_equal(np.float32(rows["bound"]), scores["bound"])
    np.testing.assert_array_equal(np.float32(rows["nll_1"]), scores["nll"][:, 1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evaluation.json", "evaluation.parquet", "evaluation.png"]


def test_an_array_has_the_bound_on_its_own_density_first(run, scores):
    array = dataclasses.replace(run.spec, pixel_levels=0, columns=64)
    clean = scores | {name: scores[name] - 64 for name in (*BOUNDS, "weighted")}
    result = {"split": "test", "step": 3} | summarize(scores, array, 3)
    result["clean_nats_per_dim"] = summarize(clean, array, 3)["nats_per_dim"]
    own, noised = (result[unit]["bound"]["mean"] for unit in ("clean_nats_per_dim", "nats_per_dim"))
    assert own == pytest.approx(noised + 1)
    assert re.split("  +", summary(result, "").splitlines()[1])[2].startswith(f"{own:.3f} ±")


def test_bits_of_latents_are_refused(run):
    assert check_unit("bits_per_dim", run) is None
    latents = dataclasses.replace(run, spec=dataclasses.replace(run.spec, pixel_levels=0))
    assert check_unit("nats_per_dim", latents) is None
    with pytest.raises(UserError, match="take nats/dim, a bound on the density of the data noised "
                                        r"to t_0 = 0\.03"):
        check_unit("bits_per_dim", latents)
    with pytest.raises(UserError, match="take nats/dim"):
        latents.bits_per_dim(np.zeros((1, 8, 8, 1)), 0)
