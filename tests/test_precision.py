"""float32 means float32: reported likelihoods, exact inverses and score denoising keep every digit on
hardware that rounds the operands of float32 products unless it is told otherwise.

A CPU never rounds them, so the rounding is emulated; what a TPU would run is read off its compiler.
"""

import collections
import dataclasses
import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import mlir
from jax._src.lax import lax

from ntm_jax.analysis import chips, compile
from ntm_jax.api import Run
from ntm_jax.core import denoising
from ntm_jax.core.model import NTM, exact
from ntm_jax.data import pipeline, sources
from ntm_jax.evaluation import evaluate, scoring
from ntm_jax.export.write import programs
from ntm_jax.runtime import attention, build, config, sharding
from ntm_jax.runtime.config import SampleOptions
from ntm_jax.sampling import generate
from ntm_jax.training import state
from ntm_jax.training.step import make_step, steps_of
from tests.common import TINY, as_run, batch_of, experiment, python, randomised, rehearsal, setup, tiny_config
from tests.precision import HIGHEST, precisions

CHANGES = {"model.transporter_blocks": 2, "sample.guidance": 0.5}
MANTISSA = {"bfloat16": 7, "tf32": 10}  # bits that products keep


# 1. Every product of the programs that report or invert.


def flow_config():
    """experiments/digits_fm.py, shrunk."""
    values = experiment("digits_fm")
    values.update_from_flattened_dict(
        {k: v for k, v in TINY.items() if k != "model.transporter_blocks"} | {"trajectory.schedule": "shifted"})
    return config.read(values)


@functools.cache
def run_of(dtype: str, flow_matching: bool = False) -> Run:
    """A run of abstract parameters, with a denoiser."""
    settings = flow_config() if flow_matching else tiny_config(**{"model.dtype": dtype} | CHANGES)
    source, model, mesh = setup(settings)
    spec, params = pipeline.spec(source, 2), state.abstract(as_run(settings, model, mesh)).ema
    denoiser = denoising.make_denoiser(model)
    denoiser_params = state.abstract(as_run(settings, denoiser, mesh)).ema
    return Run(settings, spec, model, params, 0, mesh, "", denoiser=(denoiser, denoiser_params))


def with_decoder(run: Run, decoder: str, inverse: str = "auto") -> Run:
    sample = dataclasses.replace(run.config.sample, decoder=decoder, inverse=inverse)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, sample=sample))


def traced_sampler(run: Run, monkeypatch):
    """The program that generate.generate runs."""
    return recorded(monkeypatch, generate, "_generate", lambda: generate.sample_at(as_run(
        run.config, run.model, run.mesh, run.params), np.arange(2), denoiser=run.denoiser))


def recorded(monkeypatch, module, name: str, call):
    """The traced program of a jitted function of a module, with the arguments that call() gives it."""
    function, seen = getattr(module, name), []

    def record(*arguments, **options):
        seen.append(function.trace(*arguments, **options))
        raise StopIteration

    with monkeypatch.context() as patch:
        patch.setattr(module, name, record)
        with pytest.raises(StopIteration):
            call()
    return seen[0]


def traced_evaluation(run: Run, name: str, monkeypatch):
    """A program that the evaluation of a run runs."""
    source = run.config.data.open(run.config.evaluate.split)
    call = {
        "_score": lambda: scoring.score_records(as_run(run.config, run.model, run.mesh, run.params), source, 2),
        "_denoising_errors": lambda: evaluate.denoising_errors(run, source),
        "_denoiser_errors": lambda: evaluate.denoiser_errors(run, source),
        "_velocity_errors": lambda: evaluate.velocity_errors(run.config, run.model, run.params, source, run.mesh, 2)}
    return recorded(monkeypatch, evaluate, name, call[name])


def check(traced, dtype: str, least: int) -> None:
    """Float32 products, at least so many, are of the highest precision; those of bfloat16 are left as they are."""
    found = precisions(traced)
    assert found.pop(("float32", "HIGHEST")) >= least
    assert not found if dtype == "float32" else set(found) == {("bfloat16", "DEFAULT")}, found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("decoder", "inverse"), [
    ("inverse", "sequential"), ("inverse", "parallel"), ("score", "auto"), ("denoiser", "auto")])
def test_samplers(dtype, decoder, inverse, monkeypatch):
    check(traced_sampler(with_decoder(run_of(dtype), decoder, inverse), monkeypatch), dtype, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["_score", "_denoising_errors", "_denoiser_errors"])
def test_evaluations(dtype, name, monkeypatch):
    check(traced_evaluation(run_of(dtype), name, monkeypatch), dtype, 20)


@pytest.mark.parametrize("decoder", ["euler", "heun"])
def test_the_ode_of_a_flow_matching_run(decoder, monkeypatch):
    run = run_of("float32", flow_matching=True)
    check(traced_sampler(with_decoder(run, decoder), monkeypatch), "float32", 10)
    check(traced_evaluation(run, "_velocity_errors", monkeypatch), "float32", 10)
    check(traced_evaluation(run, "_score", monkeypatch), "float32", 10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["sampler", "log_likelihood"])
def test_exports(dtype, name):
    function, arguments = programs(with_decoder(run_of(dtype), "score"))[name]
    check(jax.jit(function).trace(*arguments.values()), dtype, 20)


def test_an_export_with_a_denoiser():
    function, arguments = programs(with_decoder(run_of("float32"), "denoiser"))["sampler"]
    check(jax.jit(function).trace(*arguments.values()), "float32", 10)


def test_a_training_step_is_left_as_it_is():
    run = run_of("float32")
    batch = batch_of(run.config.data.open("train"), run.config, 16)
    step = make_step(as_run(run.config, run.model, run.mesh))
    current = state.abstract(as_run(run.config, run.model, run.mesh))
    with sharding.use(run.mesh):
        traced = step.trace(current, sharding.to_global(batch, run.mesh), steps_of(run.config, 0))
    assert set(precisions(traced)) == {("float32", "DEFAULT")}


def test_a_denoisers_targets_are_exact_and_its_own_products_as_they_are():
    run = run_of("float32")
    x, keys = jnp.zeros((2, 16, 4)), jax.random.split(jax.random.key(0))
    traced = jax.jit(functools.partial(denoising.denoiser_errors, run.config, run.denoiser.module, teacher=run.model)).trace(
        run.denoiser.params, frozen=run.params, keys=keys, x=x, y=jnp.zeros(2, jnp.int32))
    found = precisions(traced)
    own = precisions(jax.jit(functools.partial(denoising.denoise, run.denoiser.module)).trace(
        run.denoiser.params, x, jnp.zeros(2), 2, jnp.zeros(2, jnp.int32)))
    assert found[("float32", "DEFAULT")] == own[("float32", "DEFAULT")] > 0
    assert found[("float32", "HIGHEST")] > 20


@pytest.mark.parametrize("options", [{"remat": "full"}, {"scan": True}, {"remat": "narrow", "scan": True, "flat": False}])
def test_scanned_and_recomputed_layers_keep_it(options):
    run = run_of("float32")
    model = exact(run.model.clone(config=dataclasses.replace(run.model.config, **options)))

    def loss(params, xs, t):
        return jnp.sum(model.apply(params, xs, t, jnp.full(2, 2), jnp.zeros(2, jnp.int32)).nll)

    traced = jax.jit(jax.grad(loss)).trace(run.params, jnp.zeros((2, 3, 16, 4)), jnp.full((2, 3), 0.5))
    check(traced, "float32", 40)
    assert jax.config.jax_default_matmul_precision is None  # nothing leaks


# 2. The same numbers where products round their operands.


def emulate(mantissa: int) -> None:
    """Makes this process round the operands of float32 products to so many bits of mantissa.

    Products of the highest precision keep theirs, as on a TPU or GPU.
    """
    def lower(context, *operands, precision, **params):
        if precision != HIGHEST and all(a.dtype == jnp.float32 for a in context.avals_in):
            bits = mlir.i32_attr(8), mlir.i32_attr(mantissa)  # of the exponent, as float32's, too
            operands = [mlir.hlo.reduce_precision(a, *bits) for a in operands]
        return lax._dot_general_lower(
            context, *operands, precision=precision, platform="cpu", **params)

    mlir.register_lowering(lax.dot_general_p, lower, platform="cpu")
    jax.clear_caches()


def results(dtype: str, exact: bool) -> dict:
    """What a tiny model of random weights reports, samples, inverts and denoises."""
    settings = tiny_config(**{"model.dtype": dtype})
    source, model, mesh = setup(settings)
    new = state.initialize(as_run(settings, model, mesh)).params
    params = jax.tree.map(lambda a, b: a + 0.2 * (b - a), new, randomised(new))  # few sweeps invert it
    model = exact(model) if exact else model
    batch, count = batch_of(source, settings, 8), settings.sample.steps

    @jax.jit
    def compute(params, root):
        schedule = settings.schedule(model.config.tokens)
        scored = scoring.weigh_batch(
            params, root, batch, schedule=schedule, model=model, pixel_levels=source.levels,
            trajectories=1, steps=count)
        options = SampleOptions(count, 0.0, "score", "parallel", 100.0)
        denoised, sampled = generate.generate_tokens(
            params, root, batch["index"], batch["label"],
            sampler=generate.Sampler(model, schedule, options), with_levels=True)
        given = jnp.full(8, 0.5), jnp.full(8, count), batch["label"]
        parallel, sequential = (
            model.apply(params, batch["x"], *given, how=how, method=NTM.invert)
            for how in ("parallel", "sequential"))
        return {"bound": scored["bound"], "sampled": sampled, "denoised": denoised,
                "parallel": parallel[0], "sweeps": parallel[1], "sequential": sequential[0]}

    with sharding.use(mesh):
        return jax.tree.map(np.ndarray.tolist, jax.device_get(compute(params, jax.random.key(0))))


def write_results(out: str) -> None:
    """Writes {rounding: {name: results}} as JSON; names: a dtype, or plain: float32, not exact."""
    found = {"none": {dtype: results(dtype, exact=True) for dtype in ("float32", "bfloat16")}}
    for rounding, mantissa in MANTISSA.items():
        emulate(mantissa)
        found[rounding] = {"float32": results("float32", exact=True), "plain": results("float32", exact=False)}
        if rounding == "bfloat16":
            found[rounding]["bfloat16"] = results("bfloat16", exact=True)
    with open(out, "w") as file:
        json.dump(found, file)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """write_results of a process of its own: what it emulates cannot be undone."""
    out = tmp_path_factory.mktemp("rounded") / "out.json"
    python(__file__, "results", str(out))
    return json.loads(out.read_text())


@rehearsal
@pytest.mark.parametrize(("rounding", "dtype"), [
    ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("tf32", "float32")])
def test_exact_results_do_not_move(rounded, rounding, dtype):
    assert rounded[rounding][dtype] == rounded["none"][dtype]


@rehearsal
@pytest.mark.parametrize("rounding", MANTISSA)
def test_without_it_every_result_moves(rounded, rounding):
    moved, before = rounded[rounding]["plain"], rounded["none"]["float32"]
    for name in before:  # by more than float32's rounding, 1e-6
        assert np.max(np.abs(np.subtract(moved[name], before[name]))) > 1e-5, name
    assert np.mean(moved["sweeps"]) > np.mean(before["sweeps"])


# 3. What a TPU would run.


PRODUCT = re.compile(r"= (\w+)\[.* (?:convolution|dot)\(.*")


def write_products(out: str) -> None:
    """Writes, for programs compiled for a TPU v5e, how many products are there by kind, as JSON.

    Kinds: whose, "transporter" or "other", and "highest" or "default".
    """
    found = {}
    for dtype in ("float32", "bfloat16"):
        settings = tiny_config(**{
            "model.dtype": dtype, "sample.decoder": "score", "sample.inverse": "parallel"})
        mesh = compile._mesh(settings, chips.devices("v5e:2x2", 1)[0])
        source = sources.open_source(settings.data.source, settings.evaluate.split)
        model = build.make_model(settings, pipeline.spec(source, 2), attention.choose(mesh))
        sampler = compile.sample_program(settings, model, source, mesh)
        batch = {name: compile._abstract((4, *a.shape[1:]), a.dtype, mesh)
                 for name, a in batch_of(source, settings, 4).items()}
        options = {"config": settings, "levels": source.levels, "trajectories": 2, "steps": 2}
        scores = {name: compile.Program(scoring.weigh_batch, (*sampler.arguments[:2], batch),
                                        options | {"model": changed})
                  for name, changed in (("score", exact(model)), ("plain", model))}
        for name, program in ({"sample": sampler} | scores).items():
            with sharding.use(mesh):
                text = program.trace().lower().compile().as_text()
            counts = collections.Counter()
            for line in text.splitlines():
                if PRODUCT.search(line):
                    highest = "operand_precision={highest,highest}" in line
                    counts[f"{'transporter' if 'transporter' in line else 'other'} "
                           f"{'highest' if highest else 'default'}"] += 1
            found[f"{dtype} {name}"] = counts
    with open(out, "w") as file:
        json.dump(found, file)


def test_products_compiled_for_a_tpu(tmp_path):
    pytest.importorskip("libtpu")
    out = tmp_path / "out.json"
    python(__file__, "products", str(out), JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    found = json.loads(out.read_text())
    for name in ("sample", "score"):
        assert set(found[f"float32 {name}"]) == {"transporter highest", "other highest"}
        assert set(found[f"bfloat16 {name}"]) == {"transporter highest", "other highest", "other default"}
        assert found[f"float32 {name}"]["transporter highest"] > 10
    assert set(found["float32 plain"]) == {"transporter default", "other default"}


if __name__ == "__main__":
    {"results": write_results, "products": write_products}[sys.argv[1]](sys.argv[2])
