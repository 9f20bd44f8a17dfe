"""The device mesh, and the one map from logical axis names to its axes.

Programs are jax.jit with NamedShardings over the axes data, fsdp, tensor and sequence: examples are
split over data and fsdp, tokens over sequence, and parameters over fsdp and tensor. Across several
TPU slices the data axis is outermost.
"""

import contextlib
import functools
import math
from collections.abc import Iterator

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ntm_jax.errors import UserError
from ntm_jax.runtime import stops

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
    """The mesh of config.data x fsdp x tensor x sequence devices; -1 infers one of these sizes.

    config.slices > 1 lays the data axis across that many slices: the slices that the devices
    report, or else equal runs of the list of devices.

    Raises UserError if the sizes do not multiply to the number of devices, or the slices do not
    divide the data axis or are not the devices'.
    """
    devices = jax.devices() if devices is None else devices
    shape = [getattr(config, axis) for axis in AXES]
    if shape.count(-1) == 1:
        others = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = len(devices) // others if others else 0
    if min(shape) < 1 or math.prod(shape) != len(devices):
        sizes = " x ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
        raise UserError(f"config.mesh is {sizes}: expected a product of {len(devices)}, the number "
                        f"of devices; {_advice(config, len(devices))}")
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % config.slices or slices not in (1, config.slices):
        raise UserError(f"config.mesh.slices is {config.slices}: expected a divisor of the data "
                        f"axis, {shape[0]}, and the number of slices that the devices belong to, "
                        f"{slices}")
    if config.slices == 1:
        # An axis need not be a product of the torus's sides: jax may split these.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif slices == 1:  # simulated slices
        grid = np.asarray(devices).reshape(shape)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            [shape[0] // config.slices, *shape[1:]], [config.slices, 1, 1, 1], devices,
            allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _advice(config, devices: int) -> str:
    """What to set where the mesh's sizes do not multiply to the number of devices."""
    given = {axis: getattr(config, axis) for axis in AXES if getattr(config, axis) != -1}
    if len(given) == len(AXES):
        return "set config.mesh.data=-1"
    if len(given) < len(AXES) - 1:
        return "set all but one of them to 1 or more"
    rest = devices
    for axis, size in reversed(given.items()):  # fsdp is the one to change, as a rule
        if size < 1 or rest % size:
            fits = math.gcd(size, rest) if size > 0 else 1
            return f"set config.mesh.{axis}={fits}, which divides {rest}"
        rest //= size
    raise AssertionError(given)


@contextlib.contextmanager
def use(mesh):
    """Sets the mesh and the rules that core's logical constraints use while a program is traced."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def replicated(mesh) -> NamedSharding:
    """The sharding of an array that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh) -> NamedSharding:
    """The sharding of a batch, split over examples, its leading axis."""
    return NamedSharding(mesh, BATCH)


def equal_batches(count: int, size: int) -> list[np.ndarray]:
    """Indices 0..count-1 in batches of one size, for one program; the last one goes on at 0."""
    return [np.arange(start, start + size) % count for start in range(0, count, size)]


@functools.cache
def _sizes(mesh, *program) -> set[int]:
    """The batch sizes that padded_batches gave a program in this process."""
    return set()


def padded_batches(count: int, limit: int, mesh, *program) -> Iterator[np.ndarray]:
    """equal_batches of a size that a program has run with before, where one holds `count`.

    It is the smallest such size, or else the next power of two, at most `limit` and in equal
    shards. program: hashable, all that a compiled program depends on.
    """
    shards, sizes = batch_shards(mesh), _sizes(mesh, *program)

    def padded(size: int) -> int:
        return -(-min(size, limit) // shards) * shards

    fitting = [size for size in sizes if padded(count) <= size <= padded(limit)]
    size = min(fitting, default=padded(1 << (count - 1).bit_length()))
    yield from equal_batches(count, size)
    sizes.add(size)  # here, as a size that needs too much memory does not come this far


def batch_shards(mesh) -> int:
    """The number of parts that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def share(mesh) -> tuple[int, int]:
    """(number, count): this process reads share `number` of the `count` shares of every batch.

    Processes that hold the same examples read the same share. Raises UserError if two processes
    hold some of their examples in common but not all.
    """
    rows = mesh.devices.reshape(batch_shards(mesh), -1)
    held = {}
    for row, devices in enumerate(rows):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(r)) for r in held.values()})
    if len(shares) > 1 and sum(map(len, shares)) != len(rows):
        raise UserError("config.mesh splits the examples of one process over others that hold "
                        "different ones: make the product of tensor and sequence divide the "
                        "devices of a process, or the devices of a process divide it")
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def shardings(abstract, mesh):
    """The shardings of a tree of abstract arrays, by the logical names that core boxed them with.

    Arrays without names are replicated. Raises UserError if an array does not divide over its mesh
    axes.
    """
    tree = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, RULES)
    arrays = jax.tree_util.tree_leaves_with_path(nn.unbox(abstract))
    for (path, array), sharding in zip(arrays, jax.tree.leaves(tree), strict=True):
        try:
            sharding.shard_shape(array.shape)
        except ValueError:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(f"{name} of shape {array.shape} does not divide over the mesh axes "
                            f"{tuple(sharding.spec)}: change config.mesh or the model's sizes"
                            ) from None
    return tree


def to_global(batch: dict, mesh) -> dict:
    """This process's share of a batch, NumPy arrays [b, ...] -> global arrays [B, ...].

    The global arrays are split over examples.
    """
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value)
            for key, value in batch.items()}


def to_local(array) -> np.ndarray:
    """This process's share of an array that is split over examples; the inverse of to_global."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def by_device(mesh) -> NamedSharding:
    """The sharding of an array [devices] with one entry on each device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def flag_by_process(value: bool, mesh):
    """Each process's flag, replicated on its devices: a global array [devices]."""
    local = np.full(len(mesh.local_devices), value)
    return jax.make_array_from_process_local_data(by_device(mesh), local, (mesh.size,))


def place(tree, mesh):
    """NumPy arrays [n, ...], the same on all processes -> global arrays split over examples.

    Repeats examples in order until all shards have equal sizes.
    """
    shards, sharding = batch_shards(mesh), batch_sharding(mesh)

    def one(a):
        a = np.resize(a, (-(-len(a) // shards) * shards, *a.shape[1:]))
        return jax.make_array_from_callback(a.shape, sharding, lambda i: a[i])

    return jax.tree.map(one, tree)


def to_host(tree):
    """Arrays, possibly sharded over processes -> complete NumPy arrays on every process.

    A point at which an evaluation during training may stop.
    """
    stops.evaluation_point()
    return multihost_utils.process_allgather(tree, tiled=True)
