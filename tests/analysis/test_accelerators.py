"""Programs compiled for TPUs and GPUs that are not there."""

import json
import os

import pytest

from tests.common import needs_compiler, python

pytestmark = pytest.mark.slow

DEVICES = {  # package, devices, chips, unit, GiB, kind of attention
    "v5e:2x2": ("libtpu", 4, 4, "chip", 15.75, "splash"),
    "tpu7x:2x2x1": ("libtpu", 8, 4, "core", 94.74, "splash"),
    "h100:1x1x2": ("jax_plugins.xla_cuda13", 2, 2, "GPU", 59.33, "cudnn"),
}


@pytest.mark.parametrize("topology", DEVICES)
def test_compiles_for_absent_devices(tmp_path, topology):
    package, devices, number, unit, memory, kernel = DEVICES[topology]
    needs_compiler(package)
    out = tmp_path / "report.json"
    done = python(
        "-m", "launch.compile", "--config=experiments/imagenet256.py:runlocal",
        f"--topology={topology}", "--config.model.dtype=bfloat16", "--config.mesh.fsdp=2",
        "--config.model.scan", f"--json={out}",  # of two layers, so that trips are counted
        JAX_DISABLE_MOST_OPTIMIZATIONS="0", XLA_FLAGS="")
    found = json.loads(out.read_text())
    assert (found["devices"], found["chips"], found["unit"]) == (devices, number, unit)
    assert found["attention"] == kernel
    assert found["fits"]
    assert not found["unknown_loops"]
    assert found["bytes_per_chip"]["hbm"] == pytest.approx(memory * 2**30, rel=1e-4)
    assert found["flops_per_chip"] == pytest.approx(found["flops_traced_per_chip"], rel=0.1)
    assert found["collective_bytes_per_chip"]["all-gather"] > 0
    assert found["bound_by"] in ("compute", "memory", "network")
    assert "fits           yes" in done.stdout
    assert os.path.getsize(out)


@pytest.mark.parametrize(("topology", "package"), [
    ("cpu:4", "jaxlib"), ("v5p:2x2x1", "libtpu"), ("h100:1x1x4", "jax_plugins.xla_cuda13")])
def test_only_a_cpus_program_has_arithmetic_for_cpus(tmp_path, topology, package):
    needs_compiler(package)
    small = {"mesh.fsdp": 4, "model.scan": False, "model.predictor_layers": 2,
             "model.transporter_blocks": 1, "model.width": 256, "model.transporter_width": 256,
             "model.kv_heads": 2, "data.batch_size": 16, "trajectory.steps": "(1,)",
             "sample.steps": 1}
    python("-m", "launch.compile", "--config=imagenet256", f"--topology={topology}",
           *(f"--config.{key}={value}" for key, value in small.items()), f"--dump={tmp_path}",
           JAX_DISABLE_MOST_OPTIMIZATIONS="0", XLA_FLAGS="")
    text = (tmp_path / "program.hlo.txt").read_text()
    assert ("cpu_arithmetic" in text) == topology.startswith("cpu")

