"""The same numbers on every mesh: one process with 8 simulated devices runs the shipped step, scores and sampler on four meshes."""

import dataclasses
import json
import re
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from ntm_jax.data import pipeline, sources
from ntm_jax.errors import UserError
from ntm_jax.evaluation import scoring
from ntm_jax.runtime import build, config, sharding
from ntm_jax.sampling import generate
from ntm_jax.training import state
from ntm_jax.training.step import make_step
from tests.common import TINY, as_run, batch_of, bits, experiment, python, randomised, rehearsal, setup, tiny_config

pytestmark = pytest.mark.xdist_group("sharding")  # one worker: they share a run
SHAPES = ((1, 1, 1, 1), (8, 1, 1, 1), (4, 2, 1, 1), (2, 2, 2, 1), (2, 1, 2, 2))
RELATIVE = 1e-5  # float32 sums in another order


def main(out):
    """Writes what the shipped functions make of one configuration on each mesh: arrays as OUT.npz, the rest as OUT.json."""
    arrays, facts, first = {}, {}, None
    for shape in SHAPES:
        name = "x".join(map(str, shape))
        axes = {f"mesh.{axis}": size for axis, size in zip(sharding.AXES, shape, strict=True)}
        many = 2 if shape == (4, 2, 1, 1) else 1  # one mesh spans two slices and takes its batch in two parts: the same numbers
        settings = tiny_config(**axes, **{"sample.decoder": "inverse", "mesh.slices": many, "train.accumulate": many})
        source, model, _ = setup(dataclasses.replace(settings, mesh=config.Mesh(1, -1, 1, 1, 1)))
        mesh = sharding.make_mesh(settings.mesh, jax.devices()[: np.prod(shape)])
        current = state.initialize(as_run(settings, model, mesh))
        begun = bits(current)
        first = first or begun
        homes = jax.tree.map(lambda a: a.sharding, state.abstract(as_run(settings, model, mesh)).params)
        params = jax.device_put(randomised(current.params), homes)
        current = current.replace(params=params, ema=jax.tree.map(lambda a: a + 0, params))
        evaluated = current.ema
        batch = sharding.to_global(batch_of(source, settings, 16), mesh)
        step = make_step(as_run(settings, model, mesh))
        with sharding.use(mesh):
            lowered = step.lower(current, batch, 2)
            text, compiled = lowered.as_text(), lowered.compile()
            for number in range(3):  # the rate is 0 in the first; compiled once: the new state is sharded as the old
                evaluated = jax.tree.map(np.asarray, current.ema) if number == 0 else evaluated
                current, metrics = compiled(current, batch)
                arrays |= {f"{name}/{number}/{key}": np.asarray(value) for key, value in metrics.items()}
        where = {jax.tree_util.keystr(path, simple=True, separator="/"): [list(a.shape), list(a.addressable_shards[0].data.shape)]
                 for path, a in jax.tree_util.tree_leaves_with_path(current)}
        facts[name] = {"same_start": begun == first, "constraints": re.findall(r"sharding_constraint .*?<@mesh, (.*?)>", text),
                       "where": where}
        evaluated = jax.device_put(evaluated, homes)
        if shape in ((1, 1, 1, 1), (8, 1, 1, 1)):
            table = scoring.score_records(as_run(settings, model, mesh, evaluated), source, 2)
            arrays |= {f"{name}/scores/{key}": value for key, value in table.items()}
        if shape in ((1, 1, 1, 1), (2, 2, 2, 1)):
            spec = pipeline.spec(source, settings.data.patch_size)
            arrays[f"{name}/images"] = generate.sample_at(as_run(settings, model, mesh, evaluated), np.arange(5))
    np.savez(out + ".npz", **arrays)
    with open(out + ".json", "w") as file:
        json.dump(facts, file)


SMALL = {key: TINY[key] for key in TINY if key.startswith(("model.", "train.")) and key != "model.transporter_blocks"}
OTHERS = {  # of the other networks: the experiment, and what makes it tiny
    "finetune": (("digits_finetune",), {"init_from": "frozen"}),
    "text": (("t2i256", "runlocal"), {"data.source": "mock:4x4x4,text=4x8"}),
    "flux2": (("flux2_klein", "runlocal"), {"data.source": "mock:4x4x4,text=8x8", "init_from": "frozen", "train.align_weight": 2.5}),
}


def others(out):
    """Writes {network/mesh/metric: value} of a step of every one of OTHERS on one device and on 8, random parameters, as OUT.npz."""
    arrays = {}
    for name, (where, changes) in OTHERS.items():
        for shape in ((1, 1, 1, 1), (1, 2, 2, 2)):
            values = experiment(*where)
            values.update_from_flattened_dict(SMALL | {"data.batch_size": 16} | changes)
            values.mesh.update(dict(zip(sharding.AXES, shape, strict=True)))
            settings = config.read(values)
            source = sources.open_source(settings.data.source, "train")
            model = build.make_model(settings, pipeline.spec(source, settings.data.patch_size))
            mesh = sharding.make_mesh(settings.mesh, jax.devices()[: np.prod(shape)])
            current = state.initialize(as_run(settings, model, mesh))
            homes = jax.tree.map(lambda a: a.sharding, state.abstract(as_run(settings, model, mesh)).params)
            current = current.replace(params=jax.device_put(randomised(current.params), homes))
            batch = next(pipeline.evaluation_batches(source, settings.data.patch_size, 16))
            batch = sharding.to_global({key: value for key, value in batch.items() if key != "mask"}, mesh)
            frozen = None
            if settings.train.align_weight:
                backbone = jax.tree.map(lambda a: np.asarray(a) + 0.05, current.params["params"]["backbone"])
                frozen = {"params": jax.device_put(backbone, homes["params"]["backbone"])}
            step = make_step(as_run(settings, model, mesh))
            with sharding.use(mesh):
                _, metrics = step(current, batch, max(settings.trajectory.steps), frozen)
            arrays |= {f"{name}/{'x'.join(map(str, shape))}/{key}": np.asarray(value) for key, value in metrics.items()}
    np.savez(out + ".npz", **arrays)


@rehearsal
def test_a_step_of_the_other_networks_is_the_same_on_any_mesh(tmp_path):
    out = str(tmp_path / "out")
    python(__file__, out, "others", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    arrays = np.load(out + ".npz")
    assert len([key for key in arrays if "/1x1x1x1/" in key]) == 7 + 6 + 7
    for key in arrays:
        name, _, metric = key.split("/")
        np.testing.assert_allclose(arrays[key], arrays[f"{name}/1x1x1x1/{metric}"], rtol=3 * RELATIVE, atol=1e-6, err_msg=key)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("meshes") / "out")
    python(__file__, out, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    with open(out + ".json") as file:
        return np.load(out + ".npz"), json.load(file)


MANY = ["8x1x1x1", "4x2x1x1", "2x2x2x1", "2x1x2x2"]


@pytest.mark.parametrize("mesh", MANY)
def test_a_run_starts_from_the_same_bits_on_any_mesh(runs, mesh):
    assert runs[1][mesh]["same_start"]


@pytest.mark.parametrize("mesh", MANY)
def test_steps_are_the_same_on_any_mesh(runs, mesh):
    arrays, _ = runs
    keys = [key.removeprefix(f"{mesh}/") for key in arrays if re.match(rf"{mesh}/\d/", key)]
    assert len(keys) == 3 * 6
    for key in keys:
        np.testing.assert_allclose(arrays[f"{mesh}/{key}"], arrays[f"1x1x1x1/{key}"], rtol=RELATIVE, atol=1e-6, err_msg=key)
    assert np.abs(arrays[f"{mesh}/0/log_det"]).min() > 1e-3
    assert arrays[f"{mesh}/1/loss"] != arrays[f"{mesh}/2/loss"]


def test_scores_are_the_same_on_8_devices(runs):
    arrays, _ = runs
    keys = [key.removeprefix("8x1x1x1/") for key in arrays if key.startswith("8x1x1x1/scores/")]
    assert {"scores/index", "scores/bound", "scores/importance_weighted", "scores/nll"} <= set(keys)
    for key in keys:
        np.testing.assert_allclose(arrays[f"8x1x1x1/{key}"], arrays[f"1x1x1x1/{key}"], rtol=3e-5, atol=1e-3, err_msg=key)
    np.testing.assert_array_equal(arrays["8x1x1x1/scores/index"], np.arange(20))


def test_images_are_the_same_on_8_devices(runs):
    arrays, _ = runs
    one, many = (arrays[f"{mesh}/images"].astype(int) for mesh in ("1x1x1x1", "2x2x2x1"))
    assert one.shape == (5, 8, 8, 1)
    assert np.abs(one - many).max() <= 1  # rounding may fall on the other side
    assert (one != many).mean() < 0.02


@pytest.mark.parametrize(("mesh", "kernel", "parts"), [
    ("8x1x1x1", "predictor/stack/layers/up/kernel", (1, 1, 1)), ("4x2x1x1", "predictor/stack/layers/up/kernel", (1, 2, 1)),
    ("2x2x2x1", "predictor/stack/layers/up/kernel", (1, 2, 2)), ("2x2x2x1", "predictor/stack/layers/down/kernel", (1, 2, 2)),
    ("2x2x2x1", "transporter/blocks_0/stack/layers/attention/query/kernel", (1, 2, 2)),
])
def test_parameters_moments_and_average_are_sharded_before_and_after_steps(runs, mesh, kernel, parts):
    where = runs[1][mesh]["where"]
    copies = {name: shapes for name, shapes in where.items() if name.endswith(kernel)}
    assert len(copies) == 4, list(copies)  # params, ema and Adam's two moments
    for whole, here in copies.values():
        np.testing.assert_array_equal(whole, np.array(here) * parts)


def test_the_constraints_in_core_take_effect(runs):
    constraints = runs[1]["2x2x2x1"]["constraints"]
    assert any('{"data", "fsdp"}' in c for c in constraints), constraints
    assert any('"tensor"' in c for c in constraints), constraints




@pytest.mark.parametrize(("sizes", "devices"), [((3, 1, 1, 1), 8), ((2, 2, 1, 1), 8), ((-1, 3, 1, 1), 8), ((-1, 1, 1, -1), 8),
                                                ((0, 1, 1, 1), 1), ((-1, 16, 1, 1), 8), ((-2, 1, 1, 1), 2), ((-1, 0, 1, 1), 2)])
def test_a_mesh_that_does_not_fit_is_refused(sizes, devices):
    named_sizes = " x ".join(f"{axis} {size}" for axis, size in zip(sharding.AXES, sizes, strict=True))
    with pytest.raises(UserError, match=f"{named_sizes}: expected a product of {devices}"):
        sharding.make_mesh(config.Mesh(1, *sizes), devices=[None] * devices)


class Chip:
    """A device of a TPU slice, as a mesh sees it."""

    platform, device_kind, process_index = "tpu", "TPU v4", 0

    def __init__(self, number):
        self.id, self.slice_index = number, number // 4
        self.coords, self.core_on_chip = (number % 2, number // 2 % 2, 0), 0


def test_only_the_data_axis_crosses_slices():
    mesh = sharding.make_mesh(config.Mesh(2, 4, 2, 1, 1), [Chip(i) for i in range(8)])
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    np.testing.assert_array_equal(slices.reshape(4, 2), [[0, 0], [0, 0], [1, 1], [1, 1]])


@pytest.mark.parametrize(("slices", "data", "fsdp"), [(2, 1, 8), (3, -1, 1), (4, 8, 1)])
def test_slices_that_do_not_fit_are_refused(slices, data, fsdp):
    with pytest.raises(UserError, match=f"config.mesh.slices is {slices}: expected a divisor of the data axis, .*belong to, 2"):
        sharding.make_mesh(config.Mesh(slices, data, fsdp, 1, 1), [Chip(i) for i in range(8)])


def test_a_mesh_takes_what_is_left():
    assert sharding.make_mesh(config.Mesh(1, 1, 1, -1, 1)).shape == {"data": 1, "fsdp": 1, "tensor": jax.device_count(), "sequence": 1}


def abstract_mesh(*shape):
    return AbstractMesh((*shape, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)


def named(shape, names):
    return {"here": nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, "float32"), names)}


def test_a_parameter_that_does_not_divide_is_refused_by_name():
    settings = tiny_config()
    _, model, _ = setup(settings)
    with pytest.raises(UserError) as error:
        state.abstract(as_run(settings, model, abstract_mesh(1, 3, 1)))
    assert re.match(r"params/params/\S+ has a dimension of 16, which does not divide over the mesh axis fsdp of 3", str(error.value))


def test_heads_that_do_not_divide_are_refused_by_name():
    settings = tiny_config()
    _, model, _ = setup(settings)  # 2 key-value heads of 8, and a width of 16: every parameter divides
    state.abstract(as_run(settings, model, abstract_mesh(1, 1, 2)))
    with pytest.raises(UserError, match=r"config\.model\.kv_heads is 2: expected a multiple of 4, the mesh's tensor axis"):
        state.abstract(as_run(settings, model, abstract_mesh(1, 1, 4)))


def test_two_dimensions_on_one_axis_are_refused_by_name():
    with pytest.raises(UserError, match="two dimensions of here, heads, mlp, on one mesh axis"):
        sharding.shardings(named((4, 4), ("heads", "mlp")), abstract_mesh(1, 1, 2))
    tree = sharding.shardings(named((4, 4), ("embed", "mlp")), abstract_mesh(1, 2, 2))
    assert tree["here"].spec == PartitionSpec("fsdp", "tensor")


if __name__ == "__main__":
    (others if "others" in sys.argv else main)(sys.argv[1])
