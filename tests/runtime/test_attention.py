"""The kernels give what plain attention gives: splash in interpret mode, on one device and sharded over four; who serves what."""

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from ntm_jax.core.layers import plain_attention, precision
from ntm_jax.runtime import attention, config, sharding
from tests.common import python, rehearsal
from tests.precision import precisions

TOKENS, CAUSAL, MASKED = 256, (False, True), (False, True)


def inputs():
    """q [B, N, H, C], k and v [B, N, G, C], and keys [B, N] that hide some and, in one example, many."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, TOKENS, heads, 128)), jnp.float32) for heads in (4, 2, 2))
    return q, k, v, jnp.asarray(np.arange(TOKENS) < np.array([[250], [40]]))


def outputs(attend, causal, masked):
    """The attention's output at the tokens that may be seen, and the gradients of a function of it."""
    q, k, v, keys = inputs()
    shown = keys[:, :, None, None] if masked else 1.0  # what hidden tokens get, nobody reads

    def loss(q, k, v):
        y = attend(q, k, v, causal=causal, keys=keys if masked else None) * shown
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(y), *map(np.asarray, gradients)]


def main(out):
    """Writes how far splash is from plain attention, at most, by mesh, causal and masked."""
    found = {}

    def exact(*inputs, **options):
        with precision("highest"):
            return splash(*inputs, **options)

    for shape in ((1, 1, 1, 1), (2, 1, 2, 1), (1, 1, 2, 2)):
        mesh = sharding.make_mesh(config.Mesh(1, *shape), jax.devices()[: np.prod(shape)])
        splash = attention.Attention("splash", mesh, interpret=True)
        for causal in CAUSAL:
            for masked in MASKED:
                with sharding.use(mesh):
                    pairs = zip(outputs(splash, causal, masked), outputs(plain_attention, causal, masked), strict=True)
                    found[f"{shape} {causal} {masked}"] = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]
        with sharding.use(mesh):  # the wrapper that keeps the precision changes nothing on a CPU
            for a, b in zip(outputs(exact, True, True), outputs(splash, True, True), strict=True):
                np.testing.assert_array_equal(a, b)
    with open(out, "w") as file:
        json.dump(found, file)


@rehearsal
def test_splash_is_plain_attention_and_its_gradients(tmp_path):
    python(__file__, str(tmp_path / "out.json"), XLA_FLAGS="--xla_force_host_platform_device_count=4")
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found) == 12
    for case, differences in found.items():
        assert len(differences) == 4
        assert max(differences) < 1e-5, case  # float32 sums of 256 terms in another order


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("dtype", "name", "expected"), [
    ("float32", None, "DEFAULT"), ("float32", "highest", "HIGHEST"), ("bfloat16", "highest", "DEFAULT")])
def test_splash_has_the_precision_that_is_set(dtype, name, expected, gradient):
    """Mosaic compiles no kernel whose bfloat16 products have a precision."""
    splash = attention.Attention("splash", sharding.make_mesh(config.Mesh(1, 1, 1, 1, 1)), interpret=True)

    def total(q, k, v):
        with precision(name):
            y = splash(q, k, v, causal=True)
        return jnp.sum(y.astype(jnp.float32))

    shape = jax.ShapeDtypeStruct((1, 128, 2, 128), dtype)
    found = precisions(jax.jit(jax.grad(total, (0, 1, 2)) if gradient else total).trace(shape, shape, shape))
    assert {precision for _, precision in found} == {expected}
    assert sum(found.values()) == (10 if gradient else 2)  # the forward pass, and what its gradient recomputes and computes


def mesh_of(*shape):
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize(("kind", "mesh", "shape", "dtype", "expected"), [
    ("splash", (2, 1, 2, 1), (4, 256, 4, 64), "bfloat16", "splash"), ("splash", (1, 1, 1, 4), (4, 256, 4, 64), "bfloat16", "plain"),
    ("splash", (1, 1, 1, 1), (4, 16, 4, 64), "float32", "plain"), ("splash", (3, 1, 1, 1), (4, 256, 4, 64), "float32", "plain"),
    ("cudnn", (1, 1, 1, 1), (4, 16, 4, 64), "bfloat16", "cudnn"), ("cudnn", (1, 1, 1, 1), (4, 16, 4, 64), "float32", "plain"),
    ("cudnn", (1, 1, 3, 1), (4, 16, 4, 64), "bfloat16", "plain"), ("cudnn", (1, 1, 1, 2), (4, 16, 4, 64), "bfloat16", "plain"),
])
def test_what_a_kernel_cannot_take_the_plain_one_serves(kind, mesh, shape, dtype, expected):
    assert attention.Attention(kind, mesh_of(*mesh)).kind_for(shape, jnp.dtype(dtype)) == expected


@pytest.mark.parametrize(("platform", "expected"), [("tpu", "splash"), ("gpu", "cudnn"), ("cuda", "cudnn")])
def test_the_devices_choose(platform, expected):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    assert attention.choose(mesh).kind == expected


def test_a_cpu_takes_the_plain_one():
    assert attention.choose(sharding.make_mesh(config.Mesh(1, -1, 1, 1, 1))) is plain_attention


if __name__ == "__main__":
    main(sys.argv[1])
