"""The reader of FLUX.2's checkpoints: both namings, bad files, and the host's memory."""

import json
import math
import os
import sys
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from ntm_jax.backbones import flux2, flux2_weights
from ntm_jax.errors import UserError
from tests.backbones.common import abstract, original, random_diffusers, write_folder
from tests.common import python


def test_both_namings_are_the_same_parameters(tmp_path):
    tensors = random_diffusers()
    write_folder(tmp_path / "klein" / "transformer", tensors)
    safetensors.numpy.save_file(original(tensors), tmp_path / "klein" / "tiny.safetensors")
    found = [flux2_weights.read(str(tmp_path / path), abstract())
             for path in ("klein", "klein/transformer", "klein/tiny.safetensors")]
    flat = [flatten_dict(jax.device_get(params), sep="/") for params in found]
    for other in flat[1:]:
        assert all(np.array_equal(other[name], a) for name, a in flat[0].items())
    last = tensors["single_transformer_blocks.1.attn.to_qkv_mlp_proj.weight"][-96:]
    np.testing.assert_array_equal(flat[0]["single/mlp_up/kernel"][1], last.T)
    np.testing.assert_array_equal(flat[0]["final_scale_modulation/kernel"],
                                  tensors["norm_out.linear.weight"][:32].T)
    # no tensor serves two parameters
    assert len({a.tobytes() for a in flat[0].values()}) == len(flat[0])


def test_dtypes_are_the_ones_asked_for(tmp_path):
    tensors = {name: a.astype(ml_dtypes.bfloat16) for name, a in random_diffusers().items()}
    safetensors.numpy.save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    half = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), abstract())
    for wanted in (abstract(), half):
        params = flux2_weights.read(str(tmp_path), wanted)
        found, expected = ({a.dtype for a in jax.tree.leaves(tree)} for tree in (params, wanted))
        assert found == expected
        np.testing.assert_array_equal(params["image_in"]["kernel"],
                                      tensors["x_embedder.weight"].T.astype(np.float32))


def missing(folder):
    tensors = random_diffusers()
    del tensors["transformer_blocks.1.ff.linear_in.weight"]
    tensors["proj_out.weight"] = np.zeros((7, 32), np.float32)
    write_folder(folder, tensors)


def pickled(folder):
    folder.with_suffix(".pt").write_bytes(b"\x80\x04.")
    return folder.with_suffix(".pt")


def truncated(folder):
    file = folder.with_suffix(".safetensors")
    safetensors.numpy.save_file(random_diffusers(), file)
    file.write_bytes(file.read_bytes()[:-1])
    return file


@pytest.mark.parametrize(("make", "words"), [
    (missing, ["missing transformer_blocks.1.ff.linear_in.weight", "change the sizes",
               "wrong proj_out.weight is [7, 32], expected [6, 32]"]),
    (pickled, ["model.pt is not a safetensors file", "can run code"]),
    (truncated, ["model.safetensors", "not a complete safetensors file"])])
def test_a_bad_checkpoint_is_one_line(tmp_path, make, words):
    path = make(tmp_path / "model") or tmp_path / "model"
    with pytest.raises(UserError) as error:
        flux2_weights.read(str(path), abstract())
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


# 200 MB in bfloat16, in klein's proportions
LARGE = flux2.Flux2Config(
    (16, 16), text_width=512, heads=8, double_layers=1, single_layers=4)


def write_random(folder) -> float:
    """Writes a checkpoint of random bfloat16 numbers, a file for each tensor; returns their sum."""
    shapes = flux2_weights._places(flux2_weights.DIFFUSERS,
                                   flatten_dict(abstract(LARGE), sep="/"))[1]
    block = np.random.default_rng(0).normal(size=1 << 20).astype(ml_dtypes.bfloat16)
    folder.mkdir()
    total = 0.0
    for number, (name, shape) in enumerate(shapes.items()):
        values = np.resize(np.roll(block, number)[: min(block.size, math.prod(shape))], shape)
        total += values.astype(np.float64).sum()
        safetensors.numpy.save_file({name: values},
                                    folder / f"diffusion_pytorch_model-{number:05d}.safetensors")
    return total


def anonymous() -> int:
    """This process's anonymous memory, bytes."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))


def main(folder):
    """Reads a checkpoint onto 8 devices and prints the memory that this took, as JSON."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def home(a):
        split = len(a.shape) > 1 and min(a.shape[-2:]) > 200
        axes = (None,) * (len(a.shape) - 2) + ("fsdp", "tensor") if split else ()
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    wanted = jax.tree.map(home, abstract(LARGE))
    sizes = [a.size * a.dtype.itemsize for a in jax.tree.leaves(wanted)]
    jax.block_until_ready([jax.device_put(np.zeros(1), device) for device in jax.devices()])
    peak, start, done = 0, anonymous(), threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    params = flux2_weights.read(folder, wanted)
    done.set()
    thread.join()
    shards = (s.data for a in jax.tree.leaves(params)
              for s in a.addressable_shards if s.replica_id == 0)
    total = sum(np.asarray(data, np.float64).sum() for data in shards)
    print(json.dumps({"peak": peak - start, "model": sum(sizes), "largest": max(sizes),
                      "sum": float(total)}))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"),
                    reason="asks Linux what memory a process has")
def test_the_host_never_holds_the_model(tmp_path):
    total = write_random(tmp_path / "model")
    found = json.loads(python(__file__, str(tmp_path / "model"), devices=8).stdout)
    assert found["model"] < found["peak"] <= found["model"] + 1.5 * found["largest"]
    np.testing.assert_allclose(found["sum"], total, rtol=1e-9)


if __name__ == "__main__":
    main(*sys.argv[1:])
