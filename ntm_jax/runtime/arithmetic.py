"""The arithmetic chosen by the mesh's devices; see core.transformer."""

from ntm_jax.core.transformer import PLAIN, Arithmetic
from ntm_jax.runtime import cpu_arithmetic
from ntm_jax.runtime.attention import Attention


def choose(mesh, tokens: int) -> Arithmetic:
    """The arithmetic for images of this number of tokens on a mesh."""
    platform = mesh.devices.flat[0].platform
    if platform == "cpu":  # merging examples and sharded tokens into one axis would gather them
        return cpu_arithmetic.arithmetic(tokens) if mesh.shape["sequence"] == 1 else PLAIN
    kind = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform)
    return Arithmetic(attention=Attention(kind, mesh)) if kind else PLAIN
