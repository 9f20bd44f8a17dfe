"""The reader of FLUX.2's checkpoints: both namings, dtypes, and bad files."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from ntm_jax.errors import UserError
from ntm_jax.projects.flux2 import weights as flux2_weights
from tests.projects.flux2.common import abstract, as_diffusers, random_tensors, write_folder


@pytest.mark.filterwarnings("default")  # others' deprecations warn
def test_both_namings_are_the_same_parameters(tmp_path):
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    original = random_tensors(flux2_weights.ORIGINAL)
    converted = as_diffusers({name: torch.from_numpy(a) for name, a in original.items()})
    tensors = {name: np.ascontiguousarray(a) for name, a in converted.items()}
    write_folder(tmp_path / "klein" / "transformer", tensors)
    safetensors.numpy.save_file(original, tmp_path / "klein" / "tiny.safetensors")
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
    tensors = {name: a.astype(ml_dtypes.bfloat16) for name, a in random_tensors().items()}
    safetensors.numpy.save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    half = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), abstract())
    for wanted in (abstract(), half):
        params = flux2_weights.read(str(tmp_path), wanted)
        found, expected = ({a.dtype for a in jax.tree.leaves(tree)} for tree in (params, wanted))
        assert found == expected
        np.testing.assert_array_equal(params["image_in"]["kernel"],
                                      tensors["x_embedder.weight"].T.astype(np.float32))


def missing(folder):
    tensors = random_tensors()
    del tensors["transformer_blocks.1.ff.linear_in.weight"]
    tensors["proj_out.weight"] = np.zeros((7, 32), np.float32)
    write_folder(folder, tensors)


def truncated(folder):
    file = folder.with_suffix(".safetensors")
    safetensors.numpy.save_file(random_tensors(), file)
    file.write_bytes(file.read_bytes()[:-1])
    return file


@pytest.mark.parametrize(("make", "words"), [
    (missing, ["missing transformer_blocks.1.ff.linear_in.weight", "change the sizes",
               "wrong proj_out.weight is [7, 32], expected [6, 32]"]),
    (truncated, ["model.safetensors", "not a complete safetensors file"])])
def test_a_bad_checkpoint_is_one_line(tmp_path, make, words):
    path = make(tmp_path / "model") or tmp_path / "model"
    with pytest.raises(UserError) as error:
        flux2_weights.read(str(path), abstract())
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value
