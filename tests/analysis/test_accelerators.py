"""Programs compiled for TPUs and GPUs that are not there."""

import json

import pytest

from tests.common import needs_compiler, python

pytestmark = pytest.mark.slow


def test_compiles_for_absent_tpus(tmp_path):
    """Of a TPU7x each chip is two devices. H100s are in test_by_hand.py."""
    needs_compiler("libtpu")
    out = tmp_path / "report.json"
    done = python(
        "-m", "launch.compile", "--config=experiments/imagenet256.py:runlocal",
        "--topology=tpu7x:2x2x1", "--config.model.dtype=bfloat16", "--config.mesh.fsdp=2",
        "--config.model.scan", f"--json={out}",  # of two layers, so that trips are counted
        JAX_DISABLE_MOST_OPTIMIZATIONS="0", XLA_FLAGS="")
    found = json.loads(out.read_text())
    assert (found["devices"], found["chips"], found["unit"]) == (8, 4, "core")
    assert found["attention"] == "splash"
    assert found["fits"]
    assert not found["unknown_loops"]
    assert found["bytes_per_chip"]["hbm"] == pytest.approx(94.74 * 2**30, rel=1e-4)
    assert found["flops_per_chip"] == pytest.approx(found["flops_traced_per_chip"], rel=0.1)
    assert found["collective_bytes_per_chip"]["all-gather"] > 0
    assert found["bound_by"] in ("compute", "memory", "network")
    assert "fits           yes" in done.stdout


@pytest.mark.parametrize(("topology", "package"), [
    ("v5p:2x2x1", "libtpu"), ("h100:1x1x4", "jax_plugins.xla_cuda13")])
def test_a_program_for_accelerators_has_no_arithmetic_for_cpus(tmp_path, topology, package):
    needs_compiler(package)
    small = {"mesh.fsdp": 4, "model.scan": False, "model.predictor_layers": 2,
             "model.transporter_blocks": 1, "model.width": 256, "model.transporter_width": 256,
             "model.kv_heads": 2, "data.batch_size": 16, "trajectory.steps": "(1,)",
             "sample.steps": 1}
    python("-m", "launch.compile", "--config=imagenet256", f"--topology={topology}",
           *(f"--config.{key}={value}" for key, value in small.items()), f"--dump={tmp_path}",
           JAX_DISABLE_MOST_OPTIMIZATIONS="0", XLA_FLAGS="")
    text = (tmp_path / "program.hlo.txt").read_text()
    assert "attention" in text
    assert "cpu_arithmetic" not in text
