"""Checksums of arrays: any sharding gives the same, and every flip and exchange changes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ntm_jax.runtime import checksums
from ntm_jax.runtime.checksums import array_checksums
from tests.common import python


@pytest.fixture(params=["host", "devices"])
def sums(request, monkeypatch):
    """array_checksums on the host, as of small arrays on a CPU, or on the devices."""
    if request.param == "host":
        return array_checksums
    monkeypatch.setattr(checksums, "ON_HOST", -1)
    one = NamedSharding(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), PartitionSpec())
    return lambda tree: array_checksums(jax.device_put(tree, one))


def main():
    """Asserts that sums of 100 arrays agree on three meshes, each time of 3, and on the host."""
    sums = []
    for shape in ((1, 1), (4, 2), (2, 4)):
        mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2,
                             devices=jax.devices()[: shape[0] * shape[1]])
        specs = ("fsdp",), (None, "fsdp"), (("data", "fsdp"),), ()
        shardings = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
        tree = {str(i): jax.device_put(jnp.arange(64.0 * 8).reshape(64, 8) + i, shardings[i % 4])
                for i in range(100)}
        sums.append(array_checksums(tree))
        on_host, checksums.ON_HOST = checksums.ON_HOST, -1
        sums += [array_checksums(tree) for _ in range(3)]
        checksums.ON_HOST = on_host
    assert sums == sums[:1] * 12


def test_checksums_of_many_sharded_arrays_need_no_collective():
    """100 arrays, repeatedly, on 8 devices of a machine with fewer cores.

    Their collectives would wait for each other for ever.
    """
    python(__file__, devices=8)


def test_checksums_are_those_that_files_hold(sums):
    """Other ones would make every checkpoint and export of a user look damaged."""
    tree = {"matrix": np.arange(6, dtype=np.float32).reshape(2, 3), "scalar": np.float32(1.5),
            "words": np.arange(4, dtype=np.int8), "flags": np.array([True, False]),
            "half": jnp.arange(3, dtype=jnp.bfloat16)}
    assert sums(tree) == {"matrix": "1ae9f7fa4da4cf22", "scalar": "b9a63f3780d56522",
                          "words": "162af0df19f7d7bd", "flags": "439ef094ac034d21",
                          "half": "8dd7c129dd5be705"}


@pytest.mark.parametrize("dtype", [
    "float32", "bfloat16", "float16", "int32", "uint32", "uint8", "bool"])
def test_a_checksum_sees_every_bit_and_every_exchange(dtype, sums):
    values = jax.random.normal(jax.random.key(1), (4, 3, 5)) * 9
    if dtype == "bool":
        x = np.array(values > 0)
    else:
        x = np.array((jnp.abs(values) if dtype.startswith("u") else values).astype(dtype))

    def checksum():
        return sums({"x": x})["x"]

    original, seen = checksum(), set()
    raw = x.reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])
    for bit in range(1 if dtype == "bool" else 8 * x.dtype.itemsize):
        raw[37] ^= raw.dtype.type(1 << bit)
        seen.add(checksum())
        raw[37] ^= raw.dtype.type(1 << bit)
    for i in range(0, 60, 7):
        for j in range(i):
            if raw[i] != raw[j]:
                raw[[i, j]] = raw[[j, i]]
                seen.add(checksum())
                raw[[i, j]] = raw[[j, i]]
    assert original not in seen
    assert checksum() == original


if __name__ == "__main__":
    main()
