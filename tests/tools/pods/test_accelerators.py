"""A program compiled for TPUs that are not there."""

import json

import pytest

from tests.common import needs_compiler, python

pytestmark = pytest.mark.slow


def test_a_tpus_program_has_no_arithmetic_for_cpus(tmp_path):
    """That a GPU's has none is in test_by_hand.py."""
    needs_compiler("libtpu")
    small = {"mesh.fsdp": 4, "model.scan": False, "model.predictor_layers": 1,
             "model.transporter_blocks": 1, "model.transporter_layers": 1, "model.width": 256,
             "model.transporter_width": 256, "model.kv_heads": 2, "data.batch_size": 16,
             "trajectory.steps": "(1,)", "sample.steps": 1}
    done = python(
        "-m", "launch.compile", "--config=imagenet256", "--topology=v5p:2x2x1",
        *(f"--config.{key}={value}" for key, value in small.items()), f"--dump={tmp_path}",
        f"--json={tmp_path}/report.json", JAX_DISABLE_MOST_OPTIMIZATIONS="0", XLA_FLAGS="")
    assert "fits           yes" in done.stdout
    assert "cpu_arithmetic" not in (tmp_path / "program.hlo.txt").read_text()
    found = json.loads((tmp_path / "report.json").read_text())
    assert (found["devices"], found["chips"], found["attention"]) == (4, 4, "splash")
    assert found["flops_per_chip"] == pytest.approx(found["flops_traced_per_chip"], rel=0.1)
    assert found["collective_bytes_per_chip"]["all-gather"] > 0
    assert found["bound_by"] in ("compute", "memory", "network")
