"""Checksums of arrays under any sharding, and the comparison of two trees of named arrays.

Checkpoints and exports store these checksums, since loading a flipped bit raises no error.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from ntm_jax import files

STREAMS = (0x9E3779B9, 0x7F4A7C15)  # seeds of the two 32-bit sums
ON_HOST = 2**20  # elements: on a CPU, summing fewer with NumPy takes less than compiling a program


def array_checksums(tree) -> dict[str, str]:
    """The 64-bit checksum of every array of a tree: {"path/of/array": 16 hex digits}.

    A checksum depends on the bits and their positions, not on the sharding or on the number of
    devices and processes. Every process must call this with the same tree. Arrays may have any
    shape and size, and any dtype of 8, 16 or 32 bits.
    """
    # Each device sums its own shards without a collective, and the host adds up the devices' sums.
    leaves = named_leaves(tree)
    found = [_local_sums(jnp.asarray(leaf)) for leaf in leaves.values()]  # dispatches all
    sums = np.array([np.sum([np.asarray(part) for part in parts], (0, 1), np.uint32)
                     if parts else (0, 0) for parts in found], np.uint32)
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
    return {name: f"{int(first):08x}{int(second):08x}"
            for name, (first, second) in zip(leaves, sums, strict=True)}


def json_checksum(content) -> str:
    """The checksum of a JSON value: 16 hex digits."""
    return files.digest(content)[:16]


def digest(tree) -> str:
    """One checksum for all arrays of a tree: 16 hex digits."""
    return json_checksum(array_checksums(tree))


def named_leaves(tree) -> dict:
    """{"path/of/leaf": leaf} of a tree."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def first_difference(found: dict, expected: dict) -> tuple[str, str, str] | None:
    """(name, found, expected) of the first array that differs between two dicts of named arrays.

    Arrays are described by dtype and shape, as in "float32[3,4]", or as "absent". None if all
    agree.
    """
    def describe(leaf):
        return "absent" if leaf is None else f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"

    for name in [*expected, *sorted(set(found) - set(expected))]:
        there, here = describe(found.get(name)), describe(expected.get(name))
        if there != here:
            return name, there, here
    return None


def _local_sums(x: jax.Array) -> list:
    """uint32 [1, 2] of each shard of an array in this process: both sums, 0 for a repeated one.

    A shard that is repeated on several devices may also be left out on all but one.
    """
    small = x.size <= ON_HOST and all(d.platform == "cpu" for d in x.sharding.device_set)
    if small or not isinstance(x.sharding, NamedSharding):
        return [_both_sums(np.asarray(shard.data), [part.start or 0 for part in shard.index])[None]
                for shard in x.addressable_shards if shard.replica_id == 0]
    return [shard.data for shard in _sharded_sums(x, x.sharding).addressable_shards]


# For each array: one program for a tree of 240 arrays took 6 s to compile.
@functools.partial(jax.jit, static_argnames="sharding")
def _sharded_sums(x, sharding: NamedSharding):
    mesh = sharding.mesh
    entries = (*sharding.spec, *(None,) * x.ndim)[: x.ndim]
    axes = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries]
    replicated = tuple(axis for axis in mesh.axis_names if not any(axis in names for names in axes))

    def local(part):
        starts = [jax.lax.axis_index(names) * size if names else 0
                  for names, size in zip(axes, part.shape, strict=True)]
        counts = jax.lax.axis_index(replicated) == 0 if replicated else True
        return jnp.where(counts, _both_sums(part, starts), jnp.uint32(0))[None]

    return jax.shard_map(local, mesh=mesh, in_specs=sharding.spec,
                         out_specs=PartitionSpec(mesh.axis_names), check_vma=False)(x)


def _both_sums(x, starts):
    """uint32 [2]: sums mod 2^32 of mix(bits ^ position) over the elements of x [...].

    x: a jax or NumPy array. starts: the index at which this part begins in the complete array.
    Unsigned addition wraps exactly, so neither the order of summation nor the division into parts
    changes the result.
    """
    # mix is a bijection, so one changed element always changes the sum. It must follow the xor:
    # with the linear bits * odd(position), flips of two top bits would cancel in every stream.
    array = np if isinstance(x, np.ndarray) else jnp
    bits = _bits(x)[None]
    seeds = np.array(STREAMS, np.uint32).reshape(2, *(1,) * (bits.ndim - 1))
    position = seeds
    for axis, (start, size) in enumerate(zip(starts, bits.shape[1:], strict=True)):
        # Hashed axis by axis: a flat index would overflow beyond 2^32 elements.
        shape = tuple(size if other == axis + 1 else 1 for other in range(bits.ndim))
        index = array.arange(size, dtype=np.uint32).reshape(shape)
        index = index + array.asarray(start).astype(np.uint32)
        position = position + _mix(index + _mix(seeds + np.uint32(axis)))
    sums = array.sum(_mix(bits ^ position), tuple(range(1, bits.ndim)), dtype=np.uint32)
    return cast(jax.Array | np.ndarray, sums)


def _bits(x):
    """The bits of x [...] as uint32 [...]."""
    if x.dtype == np.bool_:
        return x.astype(np.uint32)
    word = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x).view(word).reshape(x.shape).astype(np.uint32)
    return jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)


def _mix(x):
    """MurmurHash3's 32-bit finalizer, of a jax or NumPy array."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
