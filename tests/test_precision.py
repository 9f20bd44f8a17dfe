"""float32 means float32: reported likelihoods, exact inverses and score denoising keep all digits.

Accelerators round the operands of float32 products unless the highest precision is set. A CPU never
rounds them, so the rounding is emulated; a TPU's products are read off its compiled programs.
"""

import dataclasses
import functools
import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import mlir
from jax._src.lax import lax

from ntm_jax.core import denoising
from ntm_jax.core.model import NTM, full_precision
from ntm_jax.data import pipeline
from ntm_jax.evaluation import scoring
from ntm_jax.export.write import programs
from ntm_jax.runtime import sharding
from ntm_jax.runtime.run import Denoiser, Run, untrained
from ntm_jax.sampling import generate
from ntm_jax.tools.pods import compile, hlo
from ntm_jax.tools.pods import topology as topologies
from ntm_jax.training import state
from tests.common import (
    TINY,
    as_run,
    batch_of,
    configured,
    new_run,
    python,
    randomised,
    setup,
    tiny_config,
)
from tests.precision import HIGHEST, precisions

MANTISSA = 7  # bits that products keep, those of bfloat16


# 1. Every product of the programs that report or invert


@functools.cache
def run_of(flow_matching: bool = False) -> Run:
    """A run of abstract parameters, with a denoiser."""
    settings = tiny_config(**{"sample.guidance": 0.5})
    if flow_matching:
        settings = configured("digits_fm", TINY | {
            "model.transporter_blocks": 0, "trajectory.schedule": "shifted"})
    run = new_run(settings)
    module = denoising.make_denoiser(run.model)
    params = state.abstract(dataclasses.replace(run, model=module)).ema
    denoiser = Denoiser(module, params, settings, 0)
    return dataclasses.replace(run, params=state.abstract(run).ema, denoiser=denoiser)


def check(traced, least: int) -> None:
    """Asserts that at least `least` products are of float32 at the highest precision, and all."""
    found = precisions(traced)
    assert found.pop(("float32", "HIGHEST")) >= least
    assert not found


@pytest.mark.parametrize("decoder", ["inverse", "score", "denoiser", "euler", "heun"])
def test_exported_samplers_and_likelihoods(decoder):
    run = run_of(flow_matching=decoder in ("euler", "heun"))
    run = dataclasses.replace(run, config=run.config.with_sampling(decoder=decoder))
    for function, arguments in programs(run).values():
        check(jax.jit(function).trace(*arguments.values()), 8)


# 2. The same numbers where products round their operands


def emulate() -> None:
    """Makes this process round the operands of float32 products to MANTISSA bits.

    Products of the highest precision keep theirs, as on a TPU or GPU.
    """
    def lower(context, *operands, precision, **params):
        if precision != HIGHEST and all(a.dtype == jnp.float32 for a in context.avals_in):
            bits = mlir.i32_attr(8), mlir.i32_attr(MANTISSA)  # of the exponent, as float32's, too
            operands = [mlir.hlo.reduce_precision(a, *bits) for a in operands]
        return lax._dot_general_lower(
            context, *operands, precision=precision, platform="cpu", **params)

    mlir.register_lowering(lax.dot_general_p, lower, platform="cpu")
    jax.clear_caches()


def weights():
    """Random float32 weights of a tiny model, near the identity, so that few sweeps invert it."""
    new = jax.device_get(state.initialize(new_run(tiny_config())).params)
    return jax.tree.map(lambda a, b: a + np.float32(0.2) * (b - a), new, randomised(new))


def results(params, plain: bool = False) -> dict:
    """The bound, samples with their levels, and inverses of a tiny model with these weights.

    plain: without `full_precision`, unlike the programs.
    """
    settings = tiny_config(**{"sample.decoder": "score", "sample.inverse": "parallel"})
    source, model, mesh = setup(settings)
    run, batch = as_run(settings, model, mesh, params), batch_of(source, settings, 8)
    exact = (lambda model: model) if plain else full_precision
    given = jnp.full(8, 0.5), jnp.full(8, settings.sample.steps), batch["label"]
    with (mock.patch.object(scoring, "full_precision", exact),
          mock.patch.object(generate, "full_precision", exact)):
        found = {"bound": scoring.score_batch(run, batch, 1)["bound"],
                 "levels": generate.draw_at(run, batch["index"]).levels}
    invert = jax.jit(lambda how: exact(model).apply(
        params, batch["x"], *given, how=how, method=NTM.invert), static_argnums=0)
    with sharding.use(mesh):
        found |= zip(("parallel", "sweeps"), invert("parallel"), strict=False)
        found["sequential"] = invert("sequential")[0]
    return jax.tree.map(np.ndarray.tolist, jax.device_get(found))


def write_results(out: str) -> None:
    """Writes {"exact", "rounded" or "plain": results} as JSON; plain: rounded, and not exact."""
    params = weights()
    found = {"exact": results(params)}
    emulate()
    found |= {"rounded": results(params), "plain": results(params, plain=True)}
    with open(out, "w") as file:
        json.dump(found, file)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The output of write_results, run in another process since the emulation cannot be undone."""
    out = tmp_path_factory.mktemp("rounded") / "out.json"
    python(__file__, "results", str(out))
    return json.loads(out.read_text())


@pytest.mark.slow
def test_exact_results_do_not_move(found):
    assert found["rounded"] == found["exact"]


@pytest.mark.slow
def test_without_the_highest_precision_every_result_moves(found):
    moved, before = found["plain"], found["exact"]
    for name in before:  # by more than float32's rounding, 1e-6
        assert np.max(np.abs(np.subtract(moved[name], before[name]))) > 1e-5, name
    assert np.mean(moved["sweeps"]) > np.mean(before["sweeps"])


# 3. An accelerator's programs


def write_products(topology: str, out: str) -> None:
    """Writes FLOPs by kind in programs compiled for a topology, as JSON.

    A kind is "transporter" or "other", then the precision; see tools.pods.hlo.Work.
    """
    found, chosen = {}, topologies.find(topology)
    for dtype in ("float32", "bfloat16"):
        settings = tiny_config(**{
            "model.dtype": dtype, "sample.decoder": "score", "sample.inverse": "parallel"})
        mesh = sharding.make_mesh(settings.mesh, chosen.devices)
        source = settings.data.open(settings.evaluate.split)
        run = untrained(settings, pipeline.spec(source, settings.data.patch_size), mesh)
        with chosen.tracing():
            sampler = compile.sample_program(run, source)
        home = sharding.batch_sharding(mesh)
        batch = {name: jax.ShapeDtypeStruct((4, *a.shape[1:]), a.dtype, sharding=home)
                 for name, a in batch_of(source, settings, 4).items()}
        options = {"schedule": run.schedule, "decoder_levels": source.pixel_levels,
                   "trajectories": 2, "steps": 2}
        score = compile.Program(
            scoring.bounds_of_batch, (*sampler.arguments[:2], batch),
            options | {"model": full_precision(run.model)}, 4)
        programs = {"score": score} if dtype == "float32" else {"sample": sampler, "score": score}
        for name, program in programs.items():
            with chosen.tracing(), sharding.use(mesh):
                compiled = program.trace().lower().compile(chosen.compiler_options)
            work = hlo.count(compiled.as_text(), mesh.size)
            found[f"{dtype} {name}"] = {" ".join(key): v for key, v in work.products.items()}
    with open(out, "w") as file:
        json.dump(found, file)


def test_products_compiled_for_an_accelerator(tmp_path):
    """Every product of the transporter is at the highest precision, in samples and likelihoods."""
    pytest.importorskip("libtpu")
    out = tmp_path / "out.json"
    python(__file__, "products", "v5e:2x2", str(out), JAX_DISABLE_MOST_OPTIMIZATIONS="0",
           XLA_FLAGS="")
    found = json.loads(out.read_text())
    assert set(found["float32 score"]) == {"transporter highest", "other highest"}
    for name in ("sample", "score"):
        others = set(found[f"bfloat16 {name}"]) - {"transporter highest", "other highest"}
        assert len(found[f"bfloat16 {name}"]) == len(others) + 2
        assert others
        assert all(kind.startswith("other ") for kind in others)


if __name__ == "__main__":
    {"results": write_results, "products": write_products}[sys.argv[1]](*sys.argv[2:])
