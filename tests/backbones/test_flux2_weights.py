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


def _edited(tmp_path, edit):
    tensors = random_diffusers()
    edit(tensors)
    write_folder(tmp_path / "model", tensors)
    return tmp_path / "model"


def missing(tmp_path):
    return _edited(tmp_path, lambda t: t.pop("transformer_blocks.1.ff.linear_in.weight"))


def misshapen(tmp_path):
    return _edited(tmp_path, lambda t: t.update({"proj_out.weight": np.zeros((7, 32), np.float32)}))


def pickled(tmp_path):
    (tmp_path / "flux.pt").write_bytes(b"\x80\x04.")
    return tmp_path / "flux.pt"


def truncated(tmp_path):
    safetensors.numpy.save_file(random_diffusers(), tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:-1])
    return tmp_path / "a.safetensors"


def not_there(tmp_path):
    return tmp_path / "nothing"


@pytest.mark.parametrize(("make", "words"), [
    (missing, ["missing transformer_blocks.1.ff.linear_in.weight", "change the sizes"]),
    (misshapen, ["wrong proj_out.weight is [7, 32], expected [6, 32]"]),
    (pickled, ["flux.pt is not a safetensors file", "can run code"]),
    (truncated, ["a.safetensors", "not a complete safetensors file"]),
    (not_there, ["nothing is no FLUX.2 checkpoint"]),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_checkpoint_is_one_line(tmp_path, make, words):
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        flux2_weights.read(str(path), abstract())
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value
    assert sorted(tmp_path.rglob("*")) == before


def sized(megabytes: int) -> flux2.Flux2Config:
    """A network of about so many megabytes in bfloat16, in klein's proportions."""
    heads = 8 if megabytes < 800 else 16
    square = 2 * (heads * 128) ** 2 / 1e6
    layers = max(1, round((megabytes / square - 17) / 78))
    return flux2.Flux2Config(
        (16, 16), text_width=512, heads=heads, double_layers=layers, single_layers=4 * layers)


def write_random(folder, settings: flux2.Flux2Config) -> float:
    """Writes a checkpoint of random bfloat16 numbers, a file for each tensor; returns their sum."""
    shapes = flux2_weights._places(flux2_weights.DIFFUSERS,
                                   flatten_dict(abstract(settings), sep="/"))[1]
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


def main(folder, megabytes):
    """Reads a checkpoint onto 8 devices and prints the memory that this took, as JSON."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def home(a):
        split = len(a.shape) > 1 and min(a.shape[-2:]) > 200
        axes = (None,) * (len(a.shape) - 2) + ("fsdp", "tensor") if split else ()
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    wanted = jax.tree.map(home, abstract(sized(int(megabytes))))
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


@pytest.mark.skipif(not os.path.exists("/proc/self/status"),
                    reason="asks Linux what memory a process has")
def test_the_host_never_holds_the_model(tmp_path):
    """FLUX2_MEGABYTES=2000 reads 2 GB of bfloat16 as 4 GB of float32."""
    megabytes = os.environ.get("FLUX2_MEGABYTES", "200")
    total = write_random(tmp_path / "model", sized(int(megabytes)))
    done = python(__file__, str(tmp_path / "model"), megabytes, devices=8)
    found = json.loads(done.stdout)
    print({name: f"{value / 1e6:.0f} MB" for name, value in found.items() if name != "sum"})
    assert found["model"] < found["peak"] <= found["model"] + 1.5 * found["largest"]
    np.testing.assert_allclose(found["sum"], total, rtol=1e-9)


if __name__ == "__main__":
    main(*sys.argv[1:])
