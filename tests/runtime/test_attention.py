"""The kernels compute plain attention: splash in interpret mode, and which kernel serves what."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from ntm_jax.core.transformer import plain_attention
from ntm_jax.runtime import attention, config, sharding
from tests.common import python

TOKENS = 256
# (the shape of a mesh, causal, masked)
CASES = [((1, 1, 1, 1), True, False), ((2, 1, 2, 1), False, True),
         *(((1, 1, 2, 2), causal, masked) for causal in (False, True) for masked in (False, True))]
QUICK = [((2, 1, 2, 1), True, True)]


def inputs():
    """q [B, N, H, C], k and v [B, N, G, C], and keys [B, N] that hide tokens, many in example 1."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, TOKENS, heads, 128)), jnp.float32)
               for heads in (4, 2, 2))
    return q, k, v, jnp.asarray(np.arange(TOKENS) < np.array([[250], [40]]))


def outputs(attend, causal, masked):
    """The attention's output at visible tokens, and the gradients of a function of it."""
    q, k, v, keys = inputs()
    shown = keys[:, :, None, None] if masked else 1.0  # nothing reads the output at hidden tokens

    def loss(q, k, v):
        y = attend(q, k, v, causal=causal, keys=keys if masked else None) * shown
        return jnp.sum(jnp.sin(y)), y

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, y), gradients = gradient(q, k, v)
    return [np.asarray(y), *map(np.asarray, gradients)]


def main(out, which):
    """Writes the largest relative differences of splash to plain attention in CASES or QUICK.

    {"mesh causal masked": [output, q, k, v]}
    """
    found = {}
    for shape, causal, masked in {"all": CASES, "quick": QUICK}[which]:
        mesh = sharding.make_mesh(config.Mesh(1, *shape), jax.devices()[: np.prod(shape)])
        splash = attention.Attention("splash", mesh, interpret=True)
        with sharding.use(mesh):
            pairs = zip(outputs(splash, causal, masked),
                        outputs(plain_attention, causal, masked), strict=True)
            found[f"{shape} {causal} {masked}"] = [
                float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]
    with open(out, "w") as file:
        json.dump(found, file)


@pytest.mark.parametrize("which", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_splash_is_plain_attention_and_so_are_its_gradients(tmp_path, which):
    out = tmp_path / "out.json"
    python(__file__, str(out), which, devices=4)
    found = json.loads(out.read_text())
    assert len(found) == (1 if which == "quick" else 6)
    for case, differences in found.items():
        assert len(differences) == 4
        assert max(differences) < 1e-5, case  # float32 sums of 256 terms in another order


def mesh_of(*shape):
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize(("kind", "mesh", "shape", "dtype", "expected"), [
    ("splash", (2, 1, 2, 1), (4, 256, 4, 64), "bfloat16", "splash"),
    ("splash", (1, 1, 1, 4), (4, 256, 4, 64), "bfloat16", "plain"),
    ("cudnn", (1, 1, 1, 1), (4, 16, 4, 64), "bfloat16", "cudnn"),
    ("cudnn", (1, 1, 1, 1), (4, 16, 4, 64), "float32", "plain"),
    ("cudnn", (1, 1, 1, 2), (4, 16, 4, 64), "bfloat16", "plain"),
    ("cudnn", (1, 1, 1, 1), (4, 16, 4, 12), "bfloat16", "plain"),
])
def test_plain_attention_serves_what_a_kernel_cannot(kind, mesh, shape, dtype, expected):
    assert attention.Attention(kind, mesh_of(*mesh)).kind_for(shape, jnp.dtype(dtype)) == expected


if __name__ == "__main__":
    main(*sys.argv[1:])
