"""The Inception network of FID in JAX: its 2,048 pooled features of images.

It is the network of Heusel et al. 2017 (arXiv 1706.08500), which torch-fidelity calls
'inception-v3-compat': average pools do not count their padding, the last block has a maximum in
place of the average, and images are resized as in TensorFlow 1. Symbols: n images; H, W, C image
height, width, channels.
"""

import hashlib
import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ntm_jax import files
from ntm_jax.errors import UserError, first_line

WEIGHTS = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
           "weights-inception-2015-12-05-6726825d.pth")
DIMENSIONS = 2048
_SIDE = 299  # to which images are resized
_BATCH_NORM_EPSILON = 1e-3
_ARRAYS = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def read_weights(path: str) -> tuple[dict, str]:
    """(parameters of `pool_features`, digest) of torch-fidelity's weights, .pth or .safetensors.

    The digest is of the numbers, and the same for both kinds of file. Only .pth needs torch, which
    executes nothing in the file. Raises UserError for a file of anything else, or without torch.
    """
    content = files.regular(path).read_bytes()
    try:
        params, digest = _fold(_arrays(content, path.endswith(".safetensors")))
        image = jax.ShapeDtypeStruct((1, _SIDE, _SIDE, 3), jnp.uint8)
        found = jax.eval_shape(pool_features, params, image).shape
        if found != (1, DIMENSIONS):
            raise ValueError(f"its features have shape {found}")
    except ModuleNotFoundError:
        raise UserError(f"inception_weights={path} is read with torch, which is not installed: "
                        "pip install -e '.[fid]', or give the weights as .safetensors") from None
    except Exception as error:  # torch raises a dozen kinds
        raise UserError(f"inception_weights={path} cannot be used ({first_line(error)}): expected "
                        f"{WEIGHTS} or its safetensors") from None
    return params, digest


def _arrays(content: bytes, safe: bool) -> dict[str, np.ndarray]:
    """The arrays of a file by their names in PyTorch."""
    if safe:
        import safetensors.numpy

        return safetensors.numpy.load(content)
    import torch

    weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return {name: array.numpy() for name, array in weights.items()}


def _fold(arrays: dict[str, np.ndarray]) -> tuple[dict, str]:
    """({layer: (kernel [h, w, in, out], bias [out])} with the batch norms folded in, digest)."""
    params, digest = {}, hashlib.sha256()
    for layer in sorted(name.removesuffix(".conv.weight") for name in arrays
                        if name.endswith(".conv.weight")):
        own = [np.asarray(arrays[f"{layer}.{name}"], np.float32) for name in _ARRAYS]
        for array in (layer.encode(), *own):
            digest.update(array if isinstance(array, bytes) else array.tobytes())
        kernel, scale, bias, mean, variance = (array.astype(np.float64) for array in own)
        scale = scale / np.sqrt(variance + _BATCH_NORM_EPSILON)
        folded = kernel.transpose(2, 3, 1, 0) * scale, bias - mean * scale
        params[layer] = tuple(array.astype(np.float32) for array in folded)
    return params, digest.hexdigest()[:16]


@jax.jit
def pool_features(params: dict, images) -> jax.Array:
    """The pooled features [n, 2048] float32 of uint8 images [n, H, W, 1 or 3], values 0 to 255."""
    x = images.astype(jnp.float32)
    x = _resized(_resized(x, 1), 2)
    x = jnp.broadcast_to((x - 128) / 128, (*x.shape[:3], 3))

    def conv(name, x, stride=1, padding="SAME"):
        kernel, bias = params[name]
        bias = bias[None, None, None]
        # The default precision would round to bfloat16 on a TPU, and to TF32 on a GPU.
        y = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest")
        return nn.relu(y + bias)

    def chain(block, x, *names):
        for name in names:
            x = conv(f"{block}.{name}", x)
        return x

    def average(x):
        return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)

    def halved(x):
        return nn.max_pool(x, (3, 3), (2, 2))

    def numbered(branch, count):
        return [f"{branch}_{i + 1}" for i in range(count)]

    x = conv("Conv2d_1a_3x3", x, 2, "VALID")
    x = conv("Conv2d_2a_3x3", x, padding="VALID")
    x = halved(conv("Conv2d_2b_3x3", x))
    x = conv("Conv2d_3b_1x1", x)
    x = halved(conv("Conv2d_4a_3x3", x, padding="VALID"))
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = jnp.concatenate([
            chain(block, x, "branch1x1"), chain(block, x, *numbered("branch5x5", 2)),
            chain(block, x, *numbered("branch3x3dbl", 3)),
            chain(block, average(x), "branch_pool")], -1)
    double = chain("Mixed_6a", x, *numbered("branch3x3dbl", 2))
    x = jnp.concatenate([
        conv("Mixed_6a.branch3x3", x, 2, "VALID"),
        conv("Mixed_6a.branch3x3dbl_3", double, 2, "VALID"), halved(x)], -1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = jnp.concatenate([
            chain(block, x, "branch1x1"), chain(block, x, *numbered("branch7x7", 3)),
            chain(block, x, *numbered("branch7x7dbl", 5)),
            chain(block, average(x), "branch_pool")], -1)
    single = chain("Mixed_7a", x, "branch3x3_1")
    double = chain("Mixed_7a", x, *numbered("branch7x7x3", 3))
    x = jnp.concatenate([
        conv("Mixed_7a.branch3x3_2", single, 2, "VALID"),
        conv("Mixed_7a.branch7x7x3_4", double, 2, "VALID"), halved(x)], -1)
    for block in ("Mixed_7b", "Mixed_7c"):
        single = chain(block, x, "branch3x3_1")
        double = chain(block, x, *numbered("branch3x3dbl", 2))
        pooled = average(x) if block == "Mixed_7b" else nn.max_pool(x, (3, 3), padding="SAME")
        x = jnp.concatenate([
            chain(block, x, "branch1x1"),
            *(chain(block, single, f"branch3x3_2{end}") for end in "ab"),
            *(chain(block, double, f"branch3x3dbl_3{end}") for end in "ab"),
            chain(block, pooled, "branch_pool")], -1)
    return x.mean((1, 2))


def _resized(x, axis: int):
    """x with an axis resized to 299 as in TensorFlow 1: bilinear, corner to corner, no antialias.
    """
    size = x.shape[axis]
    place = np.arange(_SIDE, dtype=np.float32) * np.float32(size / _SIDE)
    low = place.astype(np.int32)
    weight = np.expand_dims(place - low, [i for i in range(4) if i != axis])
    lower = jnp.take(x, low, axis)
    return lower + (jnp.take(x, np.minimum(low + 1, size - 1), axis) - lower) * weight
