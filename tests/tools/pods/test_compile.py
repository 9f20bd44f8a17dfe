"""Ahead-of-time compilation: the programs are those of a run, and their operations are counted."""

import json
import re
import types
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ntm_jax.errors import UserError
from ntm_jax.runtime import flops, sharding
from ntm_jax.runtime.run import Run
from ntm_jax.tools.pods import compile, gpu, hlo, topology
from ntm_jax.tools.pods import report as report_of
from ntm_jax.tools.pods.chips import TPUS
from ntm_jax.tools.pods.memory import advice, bytes_per_chip, check_fits, out_of_memory
from ntm_jax.training import state
from ntm_jax.training.step import make_step, steps_of
from tests.common import batch_of, new_run, objective_of, python, tiny_config

pytestmark = pytest.mark.xdist_group("compile")


def small(**overrides):
    return tiny_config(**{"data.mock": "mock:8x8x1,classes=10,levels=17"} | overrides)


def parameters_of(run: Run) -> int:
    return sum(a.size for a in jax.tree.leaves(state.abstract(run).params))


@pytest.mark.slow
def test_the_compiled_step_is_the_one_that_training_takes():
    settings = tiny_config()
    run, source = new_run(settings), settings.data.open("train")
    batch = batch_of(source, settings, settings.data.batch_size)
    program = compile.train_program(run, source)
    current, step = state.initialize(run), make_step(run, objective_of(run))
    with sharding.use(run.mesh):
        batch = sharding.to_global(batch, run.mesh)
        real = step.trace(current, batch, steps_of(settings, objective_of(settings), 0), None, None)
        planned = program.trace()
    assert planned.lower().as_text() == real.lower().as_text()


@pytest.mark.slow
@pytest.mark.parametrize(("program", "blocks"), [("train", 0), ("rollout", 1)])
def test_memory_includes_the_reference_and_all_of_the_state(program, blocks):
    settings = small(**{
        "train.objective": "policy_gradient", "reward.name": "nothing", "reward.samples": 3,
        "reward.kl": 0.1, "init_from": "x", "data.batch_size": 4,
        "model.transporter_blocks": blocks})
    run = new_run(settings)
    made = compile.PROGRAMS[program](run, compile.open_data(settings))
    report = compile.compile_for(settings, "cpu:1", program)
    state_bytes = sum(map(bytes_per_chip, jax.tree.leaves(state.abstract(run))))
    batch = sum(map(bytes_per_chip, made.arguments[-1].values()))
    held = report["bytes_per_chip"]["arguments"] - state_bytes - 4 * parameters_of(run)
    assert 0 < held <= batch + 8  # a key; the update does not read all of the batch
    assert report["bytes_per_chip"]["peak"] > report["bytes_per_chip"]["arguments"]
    assert f"program        {program}, plain attention" in report_of.table(report)


def test_the_report_of_a_step():
    """Of three scanned layers, each recomputed in the backward pass."""
    settings = small(**{"model.remat": "full", "model.scan": True, "model.predictor_layers": 3,
                        "model.transporter_blocks": 0})
    report = compile.compile_for(settings, "cpu:1")
    assert report["fits"]
    assert report["parameters"] == parameters_of(new_run(settings))
    assert "fits           yes" in report_of.table(report)
    assert report["flops_per_chip"] == pytest.approx(report["flops_traced_per_chip"], rel=0.02)
    assert report["unknown_loops"] == 0
    # Recomputation is work, but not the model's.
    assert 1.1 < report["flops_traced_per_chip"] / report["model_flops_per_chip"] < 1.34


HIDDEN = """
ENTRY %main (x: f32[1,8], w: f32[8,4]) -> f32[4] {
  %x = f32[1,8]{1,0} parameter(0)
  %w = f32[8,4]{1,0} parameter(1)
  %y = f32[8,4]{1,0} multiply(%x, %w)
  ROOT %sum = f32[4]{0} reduce(%y, %y), dimensions={0}, to_apply=%add
}
"""
SHOWN = "%y = f32[1,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def test_products_that_the_text_hides_count():
    """Those of one row, which compilers turn into multiplications and sums."""
    def step(x, w):
        return jnp.dot(x, w, precision="highest"), x @ w, x @ w

    jaxpr, one = jax.make_jaxpr(step)(np.ones((1, 8), np.float32), np.ones((8, 4), np.float32)), 64
    text = HIDDEN.replace("%y = f32[8,4]{1,0} multiply(%x, %w)", SHOWN)
    for said, products in (
            (HIDDEN, {("other", "highest"): one, ("other", "unknown"): 2 * one}),
            (text, {("other", "f32"): one, ("other", "highest"): one, ("other", "unknown"): one})):
        assert compile._work(said, jaxpr.jaxpr, 1, 1).products == products
    assert compile._work(HIDDEN, jaxpr.jaxpr, 3, 1).flops == one  # the share of a device of three


def test_a_program_that_does_not_fit_has_its_traced_products(monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError("Used 102.50G of 31.25G hbm.")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    monkeypatch.setattr(topology, "UNKNOWN_CHIP", TPUS["v5p"])
    found = compile.compile_for(small(), "cpu:1", "evaluate")
    assert not found["fits"]
    assert found["highest_flops_per_chip"] == found["flops_per_chip"]
    assert found["flops_per_chip"] == found["flops_traced_per_chip"] > 0
    seconds = found["roofline_seconds"]
    assert seconds["compute"] == pytest.approx(found["flops_per_chip"] * 6 / 459e12)
    assert seconds["memory"] is seconds["network"] is found["exposed_network_seconds"] is None
    assert set(found["collective_bytes_per_chip"].values()) == {None}
    assert "sent a chip    unknown" in report_of.table(found).splitlines()
    assert found["in_sequence"]["seconds"] is None
    json.dumps(found, allow_nan=False)
    with pytest.raises(UserError, match=r"needs 102\.50 GiB a chip of cpu:1, which has 31\.25 GiB"):
        check_fits(found)


@pytest.mark.parametrize(("remat", "temporaries", "held", "says"), [
    ("dots", 24, 3, "give --config.model.remat=full --config.train.accumulate=4, or more devices"),
    ("full", 24, 3, "give --config.train.accumulate=4, or more devices"),
    ("full", 900, 3, "give --config.train.accumulate=16, or more devices"),
    ("full", 1, 17, "split the state over more devices: config.mesh.fsdp")])
def test_advice_names_the_settings_to_compile_next(remat, temporaries, held, says):
    """One device of 16 GiB, of which the state takes `held`, and two parts of 8 examples."""
    config = small(**{"train.accumulate": 2, "data.batch_size": 16, "model.remat": remat})
    run: Any = types.SimpleNamespace(
        config=config, mesh=sharding.make_mesh(config.mesh, jax.devices()[:1]))
    assert advice(run, {"temporaries": temporaries, "peak": temporaries + held, "hbm": 16}) == says


def test_products_at_highest_take_their_own_rate_and_kernels_their_turns():
    work, chip = hlo.Work(), TPUS["v5p"]
    highest, bf16 = (("transporter", "highest"), 4e12), (("other", "bf16"), 5e12)
    work.products |= dict([highest, bf16])
    work.kernels |= {(1e9, (highest, bf16)): 1, (3e9, ()): 2}
    compiled = report_of.Compiled(work, {"peak": 1, "hbm": 2}, 9e12, 1, 1, "plain", [])
    found = report_of.figures(compiled, new_run(small()), chip)
    assert found["highest_seconds"] == pytest.approx(4e12 * 6 / 459e12)
    seconds = found["roofline_seconds"]["compute"]
    assert seconds == pytest.approx((5e12 + 4e12 * 6) / 459e12)
    bounds = report_of.rates(found | {"model_flops_per_chip": 6e12}, 10, 16, chip)
    waiting = 2 * 3e9 / 2765e9  # the second kernel, for its memory traffic
    for name, least in (("at_roofline", seconds), ("in_sequence", seconds + waiting)):
        assert bounds[name] == pytest.approx({
            "seconds": least, "examples_per_second": 10 / least,
            "tokens_per_second": 160 / least, "mfu": 6e12 / (least * 459e12)})
    assert gpu.chip("h100").rate("highest") == pytest.approx(66.9e12, rel=1e-3)


def stacked(x, w, unroll):
    return jnp.sum(jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w, unroll=unroll)[0])


def test_a_scan_counts_as_often_as_its_body_runs():
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    w = jax.ShapeDtypeStruct((7, 64, 64), jnp.float32)
    gradient = jax.jit(jax.grad(stacked, argnums=(0, 1)), static_argnums=2)
    compiled = {unroll: gradient.lower(x, w, unroll).compile() for unroll in (1, 7)}
    rolled, unrolled = (hlo.count(c.as_text(), 1) for c in compiled.values())
    assert rolled.flops == unrolled.flops == 7 * 3 * 2 * 32 * 64 * 64
    assert not rolled.unknown
    assert unrolled.flops == pytest.approx(compiled[7].cost_analysis()["flops"], rel=0.05)
    once = jax.grad(lambda x, w: stacked(x, w, 1), argnums=(0, 1))
    assert rolled.flops == flops.count(once, x, w)
    assert rolled.memory == pytest.approx(unrolled.memory, rel=1)


def eight_devices():
    """Run by the test below in a process of its own."""
    mesh = jax.make_mesh((8,), ("f",), axis_types=(AxisType.Auto,))
    rows, home = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("f",), (None, "f")))
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((5, 128, 128), jnp.float32, sharding=home)
    # a scan over 5 layers that each gather their split parameters
    gradient = jax.jit(jax.grad(lambda x, w: stacked(x, w, 1), argnums=1), out_shardings=home)
    work, layer = hlo.count(gradient.lower(x, w).compile().as_text(), 8), 128 * 128 * 4
    assert work.sent["all-gather", "ici"] == 5 * 2 * layer * 7 / 8  # forward and backward
    reduced = work.sent["all-reduce", "ici"] + 2 * work.sent["reduce-scatter", "ici"]
    assert reduced == 5 * 2 * layer * 7 / 8
    assert work.flops == 5 * 3 * 2 * 8 * 128 * 128
    settings = small(**{"mesh.slices": 2, "mesh.data": 2, "mesh.fsdp": 4})
    report = compile.compile_for(settings, "cpu:8")
    assert report["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
    gathered = 4 * parameters_of(new_run(settings))
    assert sum(report["collective_bytes_per_chip"].values()) > gathered
    assert 0 < report["data_centre_bytes_per_chip"] < gathered


@pytest.mark.slow
def test_collectives_are_found_on_eight_devices():
    python(__file__, devices=8)


@pytest.mark.parametrize(("topology", "program", "message"), [
    ("v9:4x4", "train", "--topology=v9:4x4 is not known: expected v5p:8x8x8, v5e:16x16"),
    ("h100:8x1x8", "train", "slices is 1: expected 8, the NVLink domains of --topology"),
    ("cpu:1", "rollout", "config.train.objective=end_to_end does not learn from samples")])
def test_what_cannot_be_compiled_is_one_line(topology, program, message):
    with pytest.raises(UserError, match=re.escape(message)):
        compile.compile_for(small(), topology, program)


@pytest.mark.parametrize("said", [
    "Ran out of memory in memory space hbm. Used 161.50G of 31.25G hbm. Exceeded",
    "Ran out of memory on HBM, the total memory required for HLO temporaries (159.50G) exceeds "
    "available HBM (31.25G)."])
def test_running_out_of_memory_is_read_and_anything_else_raised(said):
    error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")
    assert out_of_memory(error, 2**31) == {
        "temporaries": 159.5 * 2**30, "peak": 161.5 * 2**30, "hbm": 31.25 * 2**30}
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: broken"), 0)


if __name__ == "__main__":
    eight_devices()
