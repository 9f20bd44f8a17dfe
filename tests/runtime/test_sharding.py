"""The same numbers on every mesh of 8 simulated devices: the shipped step, scores and sampler."""

import dataclasses
import hashlib
import json
import re
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh

from ntm_jax.data import pipeline, sources
from ntm_jax.errors import UserError
from ntm_jax.evaluation import scoring
from ntm_jax.runtime import build, config, sharding
from ntm_jax.sampling import generate
from ntm_jax.sampling.selection import selecting
from ntm_jax.training import state
from ntm_jax.training.step import make_step
from tests.common import (
    TINY,
    as_run,
    batch_of,
    bits,
    experiment,
    objective_of,
    python,
    randomised,
    setup,
    tiny_config,
)

RELATIVE = 1e-5  # float32 sums in another order


def sizes(name: str) -> tuple[int, ...]:
    """The sizes of a mesh's axes: "4x2x1x1" -> (4, 2, 1, 1)."""
    return tuple(map(int, name.split("x")))


def main(what, out, *names):
    """Writes what the shipped functions compute on each of these meshes.

    what: "steps", or "all": also scores and images on ONE, which comes first, and SHARDED. Arrays
    as OUT.npz, {mesh/number of the step/metric: value} and others; the rest as OUT.json.
    """
    arrays, facts, random = {}, {}, None
    for name in names:
        shape = sizes(name)
        axes = {f"mesh.{axis}": size for axis, size in zip(sharding.AXES, shape, strict=True)}
        # One mesh spans two slices and takes its batch in two parts: the same numbers.
        many = 2 if name == SEQUENCE else 1
        settings = tiny_config(**axes, **{
            "sample.decoder": "inverse", "mesh.slices": many, "train.accumulate": many})
        source, model, _ = setup(
            dataclasses.replace(settings, mesh=config.Mesh(1, -1, 1, 1, 1)))
        mesh = sharding.make_mesh(settings.mesh, jax.devices()[: np.prod(shape)])
        run = as_run(settings, model, mesh)
        if (what, name) != ("all", SHARDED):  # whose steps the quick tests take
            random, metrics, facts[name] = take_steps(run, source)
            arrays |= {f"{name}/{key}": value for key, value in metrics.items()}
        if what == "all" and name in (ONE, SHARDED):
            homes = jax.tree.map(lambda a: a.sharding, state.abstract(run).params)
            run = dataclasses.replace(run, params=jax.device_put(random, homes))
            table = scoring.score_records(run, source, 2)
            arrays |= {f"{name}/scores/{key}": value for key, value in table.items()}
            arrays[f"{name}/images"] = generate.sample_at(selecting(run, 2), np.arange(5))
    np.savez(out + ".npz", **arrays)
    with open(out + ".json", "w") as file:
        json.dump(facts, file)


def take_steps(run, source):
    """(random parameters, the metrics of three steps from them, facts of the run's state)."""
    current = state.initialize(run)
    begun = hashlib.sha256(repr(bits(current)).encode()).hexdigest()
    homes, random = jax.tree.map(lambda a: a.sharding, current.params), randomised(current.params)
    current = current.replace(params=jax.device_put(random, homes),
                              ema=jax.device_put(random, homes))
    batch, found = sharding.to_global(batch_of(source, run.config, 16), run.mesh), {}
    step = make_step(run, objective_of(run))
    with sharding.use(run.mesh):
        compiled = step.lower(current, batch, 2).compile()
        for number in range(3):  # compiled once: the new state is sharded as the old
            current, metrics = compiled(current, batch)
            found |= {f"{number}/{key}": np.asarray(value) for key, value in metrics.items()}
    where = {jax.tree_util.keystr(path, simple=True, separator="/"):
             [list(a.shape), list(a.addressable_shards[0].data.shape)]
             for path, a in jax.tree_util.tree_leaves_with_path(current)}
    return random, found, {"begun": begun, "where": where}


ONE, SHARDED, SEQUENCE = "1x1x1x1", "2x2x2x1", "2x1x2x2"
SMALL = {key: TINY[key] for key in TINY if key.startswith(("model.", "train."))}
SMALL |= {"model.transporter_blocks": 2}  # the second reverses the tokens
OTHERS = {  # the other networks: the experiment, and what makes it tiny
    "text": (("t2i256", "runlocal"), {"data.source": "mock:4x4x4,text=4x8"}),
    "flux2": (("flux2_klein", "runlocal"), {
        "data.source": "mock:4x4x4,text=8x8", "init_from": "frozen", "train.align_weight": 2.5}),
}


def others(out):
    """Writes a step's metrics of every one of OTHERS, on one device and on 8, as OUT.npz.

    {network/mesh/metric: value}, with random parameters.
    """
    arrays = {}
    for network, (where, changes) in OTHERS.items():
        for name in (ONE, "1x2x2x2"):
            values = experiment(*where)
            values.update_from_flattened_dict(SMALL | {"data.batch_size": 16} | changes)
            values.mesh.update(dict(zip(sharding.AXES, sizes(name), strict=True)))
            settings = config.read(values)
            source = sources.open_source(settings.data.source, "train")
            model = build.make_model(settings, pipeline.spec(source, settings.data.patch_size))
            mesh = sharding.make_mesh(settings.mesh, jax.devices()[: np.prod(sizes(name))])
            run = as_run(settings, model, mesh)
            if name == ONE:
                first = jax.device_get(state.initialize(run))
                first = first.replace(params=randomised(first.params))
            places = jax.tree.map(lambda a: a.sharding, state.abstract(run))
            current, homes = jax.device_put(first, places), places.params
            params = current.params
            batch = next(pipeline.evaluation_batches(source, settings.data.patch_size, 16))
            batch = sharding.to_global(
                {key: value for key, value in batch.items() if key != "mask"}, mesh)
            reference = None
            if settings.train.align_weight:
                own, home = (tree["params"]["backbone"] for tree in (params, homes))
                moved = jax.tree.map(lambda a: np.asarray(a) + 0.05, own)
                reference = {"params": jax.device_put(moved, home)}
            step = make_step(run, objective_of(run))
            with sharding.use(mesh):
                _, metrics = step(current, batch, max(settings.trajectory.steps), reference)
            arrays |= {f"{network}/{name}/{key}": np.asarray(value)
                       for key, value in metrics.items()}
    np.savez(out + ".npz", **arrays)


def on_8_devices(*arguments):
    python(__file__, *arguments, devices=8)


@pytest.mark.slow
def test_a_step_of_the_other_networks_is_the_same_on_any_mesh(tmp_path):
    out = str(tmp_path / "out")
    on_8_devices("others", out)
    with np.load(out + ".npz") as file:
        arrays = dict(file)
    assert len([key for key in arrays if f"/{ONE}/" in key]) == 7 + 8
    for key in arrays:
        network, _, metric = key.split("/")
        expected = arrays[f"{network}/{ONE}/{metric}"]
        np.testing.assert_allclose(
            arrays[key], expected, rtol=3 * RELATIVE, atol=1e-6, err_msg=key)


def computed(folder, what, *names):
    """(arrays, facts) that main writes."""
    out = str(folder / "out")
    on_8_devices(what, out, *names)
    with open(out + ".json") as file:
        return np.load(out + ".npz"), json.load(file)


@pytest.fixture(scope="module")
def two_meshes(tmp_path_factory):
    return computed(tmp_path_factory.mktemp("two"), "steps", ONE, SHARDED)


@pytest.fixture(scope="module")
def all_meshes(tmp_path_factory):
    return computed(tmp_path_factory.mktemp("all"), "all", ONE, SHARDED, SEQUENCE)


@pytest.fixture
def runs(request):
    """(arrays, facts) of one device and others; a slow test gets all meshes, with more computed."""
    slow = request.node.get_closest_marker("slow")
    return request.getfixturevalue("all_meshes" if slow else "two_meshes")


MESHES = [SHARDED, pytest.param(SEQUENCE, marks=pytest.mark.slow)]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_run_starts_from_the_same_bits_on_any_mesh(runs, mesh):
    _, facts = runs
    assert facts[mesh]["begun"] == facts[ONE]["begun"]


@pytest.mark.parametrize("mesh", MESHES)
def test_steps_are_the_same_on_any_mesh(runs, mesh):
    arrays, _ = runs
    keys = [key.removeprefix(f"{mesh}/") for key in arrays if re.match(rf"{mesh}/\d/", key)]
    assert len(keys) == 3 * 7
    for key in keys:
        np.testing.assert_allclose(
            arrays[f"{mesh}/{key}"], arrays[f"{ONE}/{key}"], rtol=RELATIVE, atol=1e-6, err_msg=key)
    assert np.abs(arrays[f"{mesh}/0/log_det"]).min() > 1e-3
    assert arrays[f"{mesh}/1/loss"] != arrays[f"{mesh}/2/loss"]


@pytest.mark.slow
def test_scores_are_the_same_on_8_devices(runs):
    arrays, _ = runs
    prefix = f"{SHARDED}/scores/"
    names = [key.removeprefix(prefix) for key in arrays if key.startswith(prefix)]
    assert {"index", "bound", "importance_weighted", "nll"} <= set(names)
    for name in names:
        np.testing.assert_allclose(arrays[prefix + name], arrays[f"{ONE}/scores/{name}"],
                                   rtol=3e-5, atol=1e-3, err_msg=name)
    np.testing.assert_array_equal(arrays[prefix + "index"], np.arange(20))


@pytest.mark.slow
def test_images_are_the_same_on_8_devices(runs):
    arrays, _ = runs
    one, many = (arrays[f"{mesh}/images"].astype(int) for mesh in (ONE, SHARDED))
    assert one.shape == (5, 8, 8, 1)
    assert np.abs(one - many).max() <= 1  # rounding may fall on the other side
    assert (one != many).mean() < 0.02


def test_parameters_moments_and_ema_stay_sharded(runs):
    where = runs[1][SHARDED]["where"]
    kernel = "transporter/blocks_0/stack/layers/attention/query/kernel"
    copies = {name: shapes for name, shapes in where.items() if name.endswith(kernel)}
    assert len(copies) == 4, list(copies)  # params, ema and Adam's two moments
    for whole, here in copies.values():
        np.testing.assert_array_equal(whole, np.array(here) * (1, 2, 2))


@pytest.mark.parametrize(("shape", "devices"), [
    ((2, 2, 1, 1), 8), ((-1, 3, 1, 1), 8), ((-1, 1, 1, -1), 8), ((-1, 0, 1, 1), 2)])
def test_a_mesh_that_does_not_fit_is_refused(shape, devices):
    named = " x ".join(f"{axis} {size}" for axis, size in zip(sharding.AXES, shape, strict=True))
    with pytest.raises(UserError, match=f"{named}: expected a product of {devices}"):
        sharding.make_mesh(config.Mesh(1, *shape), devices=[None] * devices)


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


@pytest.mark.parametrize(("slices", "data", "fsdp"), [(2, 1, 8), (4, 8, 1)])
def test_slices_that_do_not_fit_are_refused(slices, data, fsdp):
    message = f"config.mesh.slices is {slices}: expected a divisor of the data axis, .*belong to, 2"
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(config.Mesh(slices, data, fsdp, 1, 1), [Chip(i) for i in range(8)])


def test_one_axis_is_inferred_from_the_device_count():
    expected = {"data": 1, "fsdp": 1, "tensor": jax.device_count(), "sequence": 1}
    assert sharding.make_mesh(config.Mesh(1, 1, 1, -1, 1)).shape == expected


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(("process", "shape", "expected"), [
    ([0, 0, 1, 1], (4, 1, 1, 1), (0, 2)), ([1, 1, 0, 0], (2, 1, 2, 1), (1, 2)),
    ([0, 0, 1, 1], (1, 1, 4, 1), (0, 1)), ([2, 3, 0, 1], (1, 2, 1, 2), (1, 2)),
])
def test_processes_that_hold_the_same_examples_read_the_same_share(process, shape, expected):
    mesh = Mesh(np.array([Device(i) for i in process]).reshape(shape), sharding.AXES)
    assert sharding.share(mesh) == expected


def test_shares_that_overlap_are_refused():
    devices = np.array([Device(i) for i in (0, 0, 0, 1, 1, 1)])
    mesh = Mesh(devices.reshape(3, 1, 2, 1), sharding.AXES)
    with pytest.raises(UserError, match="splits the examples of one process"):
        sharding.share(mesh)


def abstract_mesh(*shape):
    return AbstractMesh((*shape, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)


def test_a_parameter_that_does_not_divide_is_refused_by_name():
    settings = tiny_config()
    _, model, _ = setup(settings)
    with pytest.raises(UserError) as error:
        state.abstract(as_run(settings, model, abstract_mesh(1, 3, 1)))
    assert re.match(r"params/params/\S+ has a dimension of 16, which does not divide over the mesh "
                    r"axis fsdp of 3", str(error.value))


def test_heads_that_do_not_divide_are_refused_by_name():
    settings = tiny_config()
    _, model, _ = setup(settings)  # 2 key-value heads of 8, a width of 16: every parameter divides
    state.abstract(as_run(settings, model, abstract_mesh(1, 1, 2)))
    message = r"config\.model\.kv_heads is 2: expected a multiple of 4, the mesh's tensor axis"
    with pytest.raises(UserError, match=message):
        state.abstract(as_run(settings, model, abstract_mesh(1, 1, 4)))


if __name__ == "__main__":
    others(sys.argv[2]) if sys.argv[1] == "others" else main(*sys.argv[1:])
