"""The benchmark: what its rows say, what it counts, and the program."""

import json
import re
import time

import jax
import numpy as np
import pytest

from ntm_jax.runtime import benchmark, flops, sharding
from tests.common import TINY, python, rehearsal, tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEYS = ["name", "items_per_second", "flops_per_second", "limit", "share_of_limit", "runs"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.02)
    monkeypatch.setattr(flops, "MATRICES", (64, 128))
    monkeypatch.setattr(benchmark, "COPIED", 1 << 20)


def setting(**overrides) -> benchmark.Setting:
    config = tiny_config(**overrides)
    source, held_out = (benchmark.sources.open_source("digits", split) for split in (config.data.split, config.evaluate.split))
    return benchmark.Setting(config, sharding.make_mesh(config.mesh), source, held_out)


def test_rows_agree_with_themselves():
    rows = benchmark.benchmark(tiny_config(), 3)
    assert [row["name"] for row in rows] == ["train step", "forward pass", "input pipeline", "likelihood evaluation"]
    for row in rows:
        assert list(row) == KEYS
        assert len(row["runs"]) == 3
        assert row["items_per_second"] == np.median(row["runs"])
        assert min(row["runs"]) > 0
        if row["flops_per_second"] is not None:
            assert row["share_of_limit"] == pytest.approx(row["flops_per_second"] / row["limit"])
    pipeline = rows[2]
    assert pipeline["flops_per_second"] is None
    example = 64 * 4 + 4 + 4  # pixels in float32, the label and the index
    assert pipeline["share_of_limit"] == pytest.approx(pipeline["items_per_second"] * example / pipeline["limit"])
    printed = benchmark.table(rows).splitlines()
    assert len(printed) == 7
    assert f"gives {pipeline['items_per_second'] / rows[0]['items_per_second']:.1f} examples" in printed[-2]
    slower = rows[1]["items_per_second"] / rows[3]["items_per_second"]
    assert f"takes {slower:.2f} times as long as a train step's forward pass" in printed[-1]


def test_recomputation_is_not_counted():
    counts = [benchmark._train_step(setting(**{"model.remat": remat})).flops for remat in ("none", "full")]
    assert counts[0] == counts[1]


def test_a_step_is_three_evaluations():
    """The gradient of a product is two products; the first layers' inputs need none, so a little less than three."""
    tiny = setting(**{"data.batch_size": 20, "evaluate.batch_size": 20})
    step, forward, evaluation = benchmark._train_step(tiny), benchmark._forward(tiny), benchmark._likelihood(tiny)
    assert step.items == forward.items == evaluation.items == 20
    assert 2.7 * forward.flops < step.flops < 3 * forward.flops
    assert evaluation.flops == forward.flops


def test_steps_go_on_from_one_another():
    case = benchmark._train_step(setting())
    first, second = (jax.device_get(case.once()) for _ in range(2))
    assert first["finite"]
    assert second["finite"]
    assert first["loss"] != second["loss"]


def test_a_run_is_long_enough_and_the_case_is_closed():
    done, closed = [], []
    case = benchmark.Case("sleep", lambda: done.append(time.sleep(0.001)), 5, bytes=7, least=3, close=lambda: closed.append(True))
    row = benchmark.measure(case, 2, setting())
    assert all(rate <= 5 / 0.001 for rate in row["runs"])
    assert len(done) >= 2 + 2 * (3 + benchmark.SECONDS / 0.002)
    assert closed == [True]


def test_product_rate_counts_half_precision():
    rate = flops.products("bfloat16", setting().mesh, 0.02)
    assert 1e6 < rate() < 1e16


@rehearsal
@rehearsal
def test_the_program_writes_rows(tmp_path, compilation_cache):
    arguments = ["--config=experiments/digits.py", *(f"--config.{key}={value}" for key, value in TINY.items()), "--runs=1"]
    done = python("-m", "launch.benchmark", *arguments, f"--json={tmp_path / 'rows.json'}", JAX_COMPILATION_CACHE_DIR=compilation_cache)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [list(row) for row in rows] == [KEYS] * 4
    assert re.match(r"1 x \S.*, jax [\d.]+, medians of 1 runs\n", done.stdout)
    assert benchmark.table(rows) in done.stdout
