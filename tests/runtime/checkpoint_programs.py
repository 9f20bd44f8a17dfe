"""Programs that test_checkpoint.py starts: python -m tests.runtime.checkpoint_programs NAME ...

The state of `killed` is of integers, so that each process has the same bits, however it compiles.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.runtime.checksums import array_checksums


def integers() -> dict:
    """The state of `killed` before its first step, which adds 1 to all numbers, as every step."""
    return {str(i): jnp.arange(256.0 * 256).reshape(256, 256) + i for i in range(8)}


def killed(folder: str) -> None:
    """Saves in a loop until it is killed, from the latest checkpoint on; tells what it does."""
    state = integers()
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpoints = Checkpoints(folder)
    step = 0
    if checkpoints.latest() is not None:
        step, state, data = checkpoints.restore(template)
        assert data == {"n": step}
    print("restored", step, flush=True)
    while True:
        step += 1
        state = jax.tree.map(lambda x: x + 1, state)
        checkpoints.save(step, state, {"n": step})
        print("saving", step, flush=True)
        checkpoints.wait()
        print("committed", step, flush=True)


def eight(folder: str, shapes: str) -> None:
    """Restores onto a mesh of 8 devices, saves it as step 2 and prints the checksums."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = {"both": P("fsdp", "tensor"), "second": P(None, "fsdp"),
             "joint": P(("fsdp", "tensor")), "half": P("tensor"), "step": P()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    with Checkpoints(folder) as checkpoints:
        _, state, data = checkpoints.restore({
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[name])
            for name, (shape, dtype) in json.loads(shapes).items()})
        assert all(state[name].sharding == shardings[name] for name in state)
        checkpoints.save(2, state, data)
    print(json.dumps(array_checksums(state)))


if __name__ == "__main__":
    {"killed": killed, "eight": eight}[sys.argv[1]](*sys.argv[2:])
