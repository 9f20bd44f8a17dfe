"""The report of a compiled step against arithmetic on its shapes, by formulas written here anew.

Symbols: N tokens, W width, G the width of keys and values, T levels of a trajectory.
"""

import dataclasses
import json

import jax
import pytest

from ntm_jax.data import pipeline
from ntm_jax.runtime import build, config, flops, sharding
from ntm_jax.runtime.run import Run
from ntm_jax.tools.pods import compile
from ntm_jax.tools.pods.memory import bytes_per_chip
from ntm_jax.training import state
from tests.common import experiment, needs_compiler, python

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compile")]

EMBEDDED = 512  # width of the embedded level and class
# Layers of the networks, width, heads of keys and values times 128, and tokens of image and text.
SIZES = {"imagenet256": dict(predictor=24, transporter=2 * 2, width=2048, keys=2048, text=0),
         "t2i256": dict(predictor=24, transporter=2 * 4, width=3072, keys=1024, text=128)}
TOKENS, CHANNELS, EXAMPLES = 256, 32, 1024 * 4  # of a batch, one for each level


def layer(width: int, keys: int, **_) -> int:
    """Weights of a layer: queries and output, keys and values, and the MLP of ratio 4."""
    return 2 * width**2 + 2 * width * keys + 8 * width**2


def parameters(predictor: int, transporter: int, text: int, **sizes) -> int:
    """The layers, the modulations, the class embeddings, and the projection of the text."""
    modulation = 2 * EMBEDDED * 6 * sizes["width"]
    condition = 2048 * sizes["width"] if text else 2 * 1001 * EMBEDDED
    return (predictor + transporter) * layer(**sizes) + modulation + condition


def step_flops(predictor: int, transporter: int, text: int, **sizes) -> int:
    """A forward pass of every example, and twice as much for its gradient."""
    forward = 0
    for layers, tokens in ((predictor, TOKENS + text), (transporter, TOKENS)):
        attention = 2 * 2 * tokens**2 * sizes["width"]
        forward += layers * (2 * tokens * layer(**sizes) + attention)
    return 3 * EXAMPLES * forward


@pytest.fixture(params=SIZES)
def planned(request):
    """(the run of an experiment at its full size on one device, its sizes)."""
    settings = config.read(experiment(request.param))
    mesh = config.Mesh(slices=1, data=1, fsdp=1, tensor=1, sequence=1)
    settings = dataclasses.replace(settings, mesh=mesh)
    spec = pipeline.spec(compile.open_data(settings), settings.data.patch_size)
    model = build.reference_variant(build.make_model(settings, spec))
    run = Run(settings, spec, model, None, 0, sharding.make_mesh(mesh, jax.devices()[:1]))
    return run, SIZES[request.param]


def test_the_state_and_the_models_flops_are_those_of_its_layers(planned):
    run, sizes = planned
    held = sum(map(bytes_per_chip, jax.tree.leaves(state.abstract(run))))
    assert held == pytest.approx(16 * parameters(**sizes), rel=0.02)
    program = compile.train_program(run, compile.open_data(run.config))
    with sharding.use(run.mesh):
        counted = flops.of_jaxpr(program.trace().jaxpr.jaxpr)
    assert counted == pytest.approx(step_flops(**sizes), rel=0.02)


def test_what_h100s_compute_and_send_is_arithmetic(tmp_path):
    """Nodes of 8 GPUs gather the weights twice and scatter their gradients, all in bfloat16.

    Between nodes each GPU reduces its own eighth of the gradients. Nothing is a CPU's arithmetic.
    """
    needs_compiler("jax_plugins.xla_cuda13")
    sizes, nodes = SIZES["imagenet256"] | {"predictor": 2}, 8
    python("-m", "launch.compile", "--config=imagenet256", f"--topology=h100:{nodes}x1x8",
           f"--config.mesh.slices={nodes}", "--config.mesh.fsdp=8",
           "--config.model.predictor_layers=2", "--config.model.scan=False",
           f"--json={tmp_path}/report.json", f"--dump={tmp_path}",
           JAX_DISABLE_MOST_OPTIMIZATIONS="0", XLA_FLAGS="")
    assert "cpu_arithmetic" not in (tmp_path / "program.hlo.txt").read_text()
    found, size = json.loads((tmp_path / "report.json").read_text()), 2 * parameters(**sizes)
    assert (found["unit"], found["attention"], found["fits"]) == ("GPU", "cudnn", True)
    assert found["bytes_per_chip"]["hbm"] == pytest.approx(59.33 * 2**30, rel=1e-4)
    assert not found["unknown_loops"]
    state_bytes = 16 * parameters(**sizes) / 8
    assert found["bytes_per_chip"]["arguments"] == pytest.approx(state_bytes, rel=0.02)
    work = step_flops(**sizes) / found["devices"]
    assert found["model_flops_per_chip"] == pytest.approx(work, rel=0.02)
    # Small parameters, of which the formula knows nothing, are a larger share of two layers.
    assert found["slice_network_bytes_per_chip"] == pytest.approx(3 * size * 7 / 8, rel=0.03)
    between = 2 * size / 8 * (nodes - 1) / nodes
    assert found["data_centre_bytes_per_chip"] == pytest.approx(between, rel=0.06)
