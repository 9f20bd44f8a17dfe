"""Numbers that are reported or inverted are float32, however accelerators compute.

These round the operands of float32 products unless the highest precision is asked for.
"""

import dataclasses
import functools

import jax
import pytest

from ntm_jax.core import denoising
from ntm_jax.export.write import programs
from ntm_jax.runtime import sharding
from ntm_jax.runtime.run import Denoiser, Run
from ntm_jax.tools.pods import compile
from ntm_jax.training import state
from tests.common import TINY, configured, new_run, tiny_config


def products(jaxpr, path: str = ""):
    """(the modules that it is in, precision) of every matrix product of a jaxpr.

    Loops, gradients and Pallas kernels included. precision: HIGHEST only of float32 operands.
    """
    for equation in jaxpr.eqns:
        own = f"{path}/{equation.source_info.name_stack}"
        if equation.primitive.name == "dot_general":
            precision = equation.params["precision"]
            exact = precision == (jax.lax.Precision.HIGHEST,) * 2 and all(
                operand.aval.dtype == "float32" for operand in equation.invars)
            yield own, "HIGHEST" if exact else "rounded"
        for part in jax.tree.leaves(equation.params):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield from products(part, own)


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
    denoiser = Denoiser(module, params, settings, 0, 0)
    return dataclasses.replace(run, params=state.abstract(run).ema, denoiser=denoiser)


@pytest.mark.parametrize("decoder", ["inverse", "score", "denoiser", "euler"])
def test_exported_samplers_and_likelihoods(decoder):
    run = run_of(flow_matching=decoder == "euler")
    run = dataclasses.replace(run, config=run.config.with_sampling(decoder=decoder))
    for function, arguments in programs(run).values():
        found = [kind for _, kind in products(jax.make_jaxpr(function)(*arguments.values()).jaxpr)]
        assert found.count("HIGHEST") == len(found) >= 8


@pytest.mark.parametrize(("program", "inverse", "dtype"), [
    ("sample", "parallel", "float32"), ("sample", "sequential", "bfloat16"),
    ("evaluate", "parallel", "float32"), ("evaluate", "parallel", "bfloat16")])
def test_samples_and_held_out_likelihoods(program, inverse, dtype):
    """A model of bfloat16 has an exact transporter all the same; its predictor is rounded."""
    run = new_run(tiny_config(**{
        "model.dtype": dtype, "sample.decoder": "score", "sample.inverse": inverse}))
    made = compile.PROGRAMS[program](run, run.config.data.open("train"))
    with sharding.use(run.mesh):
        found = list(products(made.trace().jaxpr.jaxpr))
    kinds = {inside: {kind for path, kind in found if ("transporter" in path) == inside}
             for inside in (True, False)}
    assert kinds[True] == {"HIGHEST"}
    assert kinds[False] == {"HIGHEST"} if dtype == "float32" else "rounded" in kinds[False]
