"""The shipped step has the same numbers on every mesh of 8 simulated devices.

That scores and samples have them is in test_processes.py.
"""

import hashlib
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from ntm_jax.data import pipeline
from ntm_jax.errors import UserError
from ntm_jax.runtime import build, config, sharding
from ntm_jax.training import state
from ntm_jax.training.step import make_step
from tests.common import (
    TINY,
    as_run,
    bits,
    experiment,
    objective_of,
    python,
    randomised,
    setup,
    tiny_config,
)

RELATIVE = 1e-5  # float32 sums in another order


ONE, SHARDED, SEQUENCE, OTHER = "1x1x1x1", "2x2x2x1", "2x1x2x2", "1x2x2x2"
SMALL = {key: TINY[key] for key in TINY
         if key.startswith(("model.", "train.", "trajectory.steps", "sample.steps"))}
NETWORKS = {  # the experiment, and what makes it tiny
    "digits": (("digits",), TINY),
    "text": (("t2i256", "smoke"), SMALL | {
        "data.source": "mock:4x4x4,text=4x8", "model.transporter_blocks": 2}),  # one reversed
    "flux2": (("flux2_klein", "smoke"), SMALL | {
        "data.source": "mock:4x4x4,text=8x8", "init_from": "frozen", "train.align_weight": 2.5}),
}


def main(out, *cases):
    """Writes what the shipped step computes in each case, NETWORK/MESH.

    Metrics as OUT.npz, {network/mesh/number of the step/metric: value}; facts of the state as
    OUT.json.
    """
    arrays, facts = {}, {}
    for case in cases:
        run, source = tiny_run(*case.split("/"))
        # Not a new state: compiling that takes longer than the steps do.
        shapes = state.abstract(run)
        current = jax.tree_util.tree_map_with_path(
            lambda path, a: np.full(a.shape, "scale" in str(path[-1]), a.dtype), shapes)
        current = current.replace(params=randomised(current.params))
        current = jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), current, shapes)
        found, current = take_steps(run, source, current)
        arrays |= {f"{case}/{key}": value for key, value in found.items()}
        facts[case] = {jax.tree_util.keystr(path, simple=True, separator="/"):
                       [list(a.shape), list(a.addressable_shards[0].data.shape)]
                       for path, a in jax.tree_util.tree_leaves_with_path(current)}
        if case.startswith("text"):
            new = bits(state.initialize(run))
            facts[case]["new"] = hashlib.sha256(repr(new).encode()).hexdigest()
    np.savez(out + ".npz", **arrays)
    with open(out + ".json", "w") as file:
        json.dump(facts, file)


def tiny_run(network, name):
    """The tiny run of a network on a mesh, without parameters, and its held-out records."""
    where, changes = NETWORKS[network]
    values, sizes = experiment(*where), tuple(map(int, name.split("x")))
    # One mesh spans two slices and takes its batch in two parts: the same numbers.
    many = 2 if name == SEQUENCE else 1
    values.update_from_flattened_dict(changes | {
        "data.batch_size": 16, "mesh.slices": many, "train.accumulate": many})
    values.mesh.update(dict(zip(sharding.AXES, sizes, strict=True)))
    settings = config.read(values)
    source = settings.data.open(settings.evaluate.split)
    model = build.make_model(settings, pipeline.spec(source, settings.data.patch_size))
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[: np.prod(sizes)])
    return as_run(settings, model, mesh), source


def take_steps(run, source, current):
    """({number/metric: value}, the state) of three steps; the first has a learning rate of 0."""
    batch = next(pipeline.evaluation_batches(source, run.config.data.patch_size, 16))
    del batch["mask"]
    batch, found, reference = sharding.to_global(batch, run.mesh), {}, None
    if run.config.train.align_weight:
        reference = {"params": jax.tree.map(lambda a: a + 0.05,
                                            current.params["params"]["backbone"])}
    step, steps = make_step(run, objective_of(run)), max(run.config.trajectory.steps)
    with sharding.use(run.mesh):
        compiled = step.lower(current, batch, steps, reference).compile()
        for number in range(3):  # compiled once: the new state is sharded as the old
            current, metrics = compiled(current, batch, reference)
            found |= {f"{number}/{key}": np.asarray(value) for key, value in metrics.items()}
    return found, current


def same_steps(folder, tolerance, *cases):
    """Takes the steps of each case on 8 devices and asserts that they are those of one device.

    Returns (arrays, facts) as main writes them.
    """
    out = str(folder / "out")
    python(__file__, out, *cases, *{f"{case.split('/')[0]}/{ONE}" for case in cases}, devices=8)
    with open(out + ".json") as file:
        arrays, facts = dict(np.load(out + ".npz")), json.load(file)
    for case in cases:
        network, mesh = case.split("/")
        keys = [key for key in arrays if key.startswith(f"{case}/")]
        assert len(keys) == 3 * (8 if network == "flux2" else 7)
        for key in keys:
            np.testing.assert_allclose(arrays[key], arrays[key.replace(mesh, ONE)], rtol=tolerance,
                                       atol=1e-6, err_msg=key)
    return arrays, facts


def test_a_step_is_the_same_on_8_devices_and_its_state_stays_sharded(tmp_path):
    one, several = f"digits/{ONE}", f"digits/{SHARDED}"
    arrays, facts = same_steps(tmp_path, RELATIVE, several)
    assert np.abs(arrays[f"{one}/0/log_det"]).min() > 1e-3
    assert arrays[f"{one}/1/loss"] != arrays[f"{one}/2/loss"]
    kernel = "transporter/blocks_0/stack/layers/attention/query/kernel"
    copies = [shapes for name, shapes in facts[several].items() if name.endswith(kernel)]
    assert len(copies) == 4  # params, ema and Adam's two moments
    for whole, here in copies:
        np.testing.assert_array_equal(whole, np.array(here) * (1, 2, 2))


@pytest.mark.slow
def test_steps_and_a_new_state_are_the_same_on_other_meshes(tmp_path):
    _, facts = same_steps(tmp_path, 3 * RELATIVE, f"text/{SEQUENCE}", f"flux2/{OTHER}")
    assert facts[f"text/{SEQUENCE}"]["new"] == facts[f"text/{ONE}"]["new"]


@pytest.mark.parametrize(("data", "fsdp", "devices", "advice"), [
    (2, 2, 8, "set config.mesh.data=-1"),
    (-1, 16, 120, "set config.mesh.fsdp=8, which divides 120"),
    (-1, -1, 8, "set all but one of them to 1 or more")])
def test_a_mesh_that_does_not_fit_is_refused(data, fsdp, devices, advice):
    message = (f"data {data} x fsdp {fsdp} x tensor 1 x sequence 1: expected a product of "
               f"{devices}, the number of devices; {advice}")
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(config.Mesh(1, data, fsdp, 1, 1), devices=[None] * devices)


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


@pytest.mark.parametrize(("process", "shape", "expected"), [
    ([0, 0, 1, 1], (4, 1, 1, 1), (0, 2)), ([1, 1, 0, 0], (2, 1, 2, 1), (1, 2)),
    ([0, 0, 1, 1], (1, 1, 4, 1), (0, 1))])
def test_processes_that_hold_the_same_examples_read_the_same_share(process, shape, expected):
    devices = np.array([SimpleNamespace(process_index=i) for i in process]).reshape(shape)
    mesh = SimpleNamespace(devices=devices, shape=dict(zip(sharding.AXES, shape, strict=True)))
    assert sharding.share(mesh) == expected


def abstract_mesh(*shape):
    return AbstractMesh((*shape, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)


def test_parameters_and_heads_that_do_not_divide_are_refused_by_name():
    settings = tiny_config()
    _, model, _ = setup(settings)  # 2 key-value heads of 8, a width of 16
    message = r"params/\S+ of shape \(.*16\) does not divide over the mesh axes \(None, 'fsdp'\)"
    with pytest.raises(UserError, match=message):
        state.abstract(as_run(settings, model, abstract_mesh(1, 3, 1)))
    state.abstract(as_run(settings, model, abstract_mesh(1, 1, 2)))
    message = r"config\.model\.kv_heads is 2: expected a multiple of 4, the mesh's tensor axis"
    with pytest.raises(UserError, match=message):  # though every parameter divides
        state.abstract(as_run(settings, model, abstract_mesh(1, 1, 4)))


def test_muons_state_is_split_as_the_parameters_that_it_has():
    settings = tiny_config(**{"optimizer.name": "muon"})
    new = state.abstract(as_run(settings, setup(settings)[1], abstract_mesh(1, 2, 2)))
    for end, copies in (("0/stack/layers/up/kernel", 3), ("0/embed/kernel", 4)):  # 4: Adam's
        specs = [leaf.sharding.spec for path, leaf in jax.tree_util.tree_leaves_with_path(new)
                 if jax.tree_util.keystr(path, simple=True, separator="/").endswith(end)]
        assert len(specs) == copies
        assert set(specs) == {specs[0]}
        assert "fsdp" in specs[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
