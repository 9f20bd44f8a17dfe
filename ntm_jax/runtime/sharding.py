"""The mesh, and the one map from logical axis names to its axes.

Programs are jax.jit with NamedShardings over ("data", "fsdp", "tensor", "sequence"): examples split over data and fsdp, tokens over
sequence, parameters over fsdp and tensor. Over several TPU slices the data axis runs across them, outermost.
"""

import contextlib
import math

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ntm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")
RULES = (
    ("batch", ("data", "fsdp")),
    ("tokens", "sequence"),
    ("keys", None),
    ("embed_activation", None),
    ("embed", "fsdp"),
    ("embed_out", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("layers", None),
)
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(config, devices=None) -> jax.sharding.Mesh:
    """A mesh of config.data x fsdp x tensor x sequence devices, one of them -1 for what is left. UserError if they do not multiply.

    config.slices > 1 lays the data axis across that many slices: those that the devices tell, else equal runs of their list.
    """
    devices = jax.devices() if devices is None else devices
    shape = [getattr(config, axis) for axis in AXES]
    if shape.count(-1) == 1:
        known = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = len(devices) // known if known else 0
    if min(shape) < 1 or math.prod(shape) != len(devices):
        sizes = " x ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
        raise UserError(f"config.mesh is {sizes}: expected a product of {len(devices)}, the number of devices; set one of them to -1")
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % config.slices or found not in (1, config.slices):
        raise UserError(f"config.mesh.slices is {config.slices}: expected a divisor of the data axis, {shape[0]}, and the number of slices "
                        f"that the devices belong to, {found}")
    if config.slices == 1:  # an axis need not be a product of the torus's sides: jax may split them
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif found == 1:  # simulated: the devices in order stand for slices
        grid = np.asarray(devices).reshape(shape)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            [shape[0] // config.slices, *shape[1:]], [config.slices, 1, 1, 1], devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def use(mesh):
    """While a program is traced and run: the mesh and the rules that logical constraints in core refer to."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def replicated(mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh) -> NamedSharding:
    """Split over examples, the leading axis."""
    return NamedSharding(mesh, BATCH)


def batch_shards(mesh) -> int:
    """How many parts a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def share(mesh) -> tuple[int, int]:
    """(number, count): which share of every batch this process reads, of how many. Processes that hold the same examples read the same.

    UserError where a process holds some of another's examples but not all: then no share is whole.
    """
    rows = mesh.devices.reshape(batch_shards(mesh), -1)
    held = {}
    for row, devices in enumerate(rows):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(r)) for r in held.values()})
    if len(shares) > 1 and sum(map(len, shares)) != len(rows):
        raise UserError("config.mesh splits the examples of one process over others that hold different ones: make the product of tensor "
                        "and sequence divide the devices of a process, or the devices of a process divide it")
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def shardings(abstract, mesh):
    """Shardings of a tree of abstract arrays, boxed by their logical names where core named them; unnamed ones are replicated.

    Raises UserError where an array does not divide over its mesh axes, or two of its dimensions would lie on one axis.
    """
    names = nn.get_partition_spec(abstract)
    tree = nn.logical_to_mesh_sharding(names, mesh, RULES)
    arrays = jax.tree_util.tree_flatten_with_path(nn.unbox(abstract))[0]
    logical = jax.tree.leaves(names, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    for (path, array), axes, sharding in zip(arrays, logical, jax.tree.leaves(tree), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        used = [mesh_axis for axis in axes for mesh_axis in _tuple(dict(RULES).get(axis))]
        if len(used) != len(set(used)):  # by the names: flax would leave the second dimension whole without a word
            raise UserError(f"the rules put two dimensions of {name}, {', '.join(map(str, axes))}, on one mesh axis: change RULES")
        for size, entry in zip(array.shape, sharding.spec, strict=False):
            parts = math.prod(mesh.shape[axis] for axis in _tuple(entry))
            if size % parts:
                raise UserError(f"{name} has a dimension of {size}, which does not divide over the mesh axis {entry} of {parts}: change "
                                f"config.mesh or the model's sizes")
    return tree


def _tuple(entry) -> tuple:
    """A PartitionSpec's entry as the mesh axes in it."""
    return (entry,) if isinstance(entry, str) else entry or ()


def to_global(batch: dict, mesh) -> dict:
    """This process's share of a batch, dict of NumPy arrays [b, ...] -> global arrays split over the mesh's examples."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def by_device(mesh) -> NamedSharding:
    """One entry a device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def flag_by_process(value: bool, mesh):
    """What every process says, as a global array [devices]: its own word lies on each of its devices."""
    return jax.make_array_from_process_local_data(by_device(mesh), np.full(len(mesh.local_devices), value), (mesh.size,))


def place(tree, mesh):
    """NumPy arrays [n, ...] that every process holds whole -> global arrays split over the mesh's examples, repeated to whole shards."""
    shards, sharding = batch_shards(mesh), batch_sharding(mesh)

    def one(a):
        a = np.resize(a, (-(-len(a) // shards) * shards, *a.shape[1:]))
        return jax.make_array_from_callback(a.shape, sharding, lambda i: a[i])

    return jax.tree.map(one, tree)


def to_host(tree):
    """Arrays, sharded over processes or not -> NumPy arrays, whole, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
