"""What the peers in JAX share: a jitted AdamW step, a jitted inverse, and the product rate."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ntm_jax.runtime import flops, sharding
from ntm_jax.runtime.config import Mesh
from tests.peers.work import Sizes, Work


def noise(sizes: Sizes, *shape: int) -> jax.Array:
    """Standard normal numbers [images, *shape], the same for every peer of that shape."""
    draws = np.random.default_rng(0).normal(size=(sizes.images, *shape))
    return jnp.asarray(draws, jnp.float32)


def ends(key: jax.Array, kernel: jax.Array) -> jax.Array:
    """Random numbers in place of a zero-initialised last projection [..., W, 2 D].

    Outputs of size 0.3 for normalised inputs.
    """
    return 0.3 / kernel.shape[-2] ** 0.5 * jax.random.normal(key, kernel.shape)


def adamw(loss: Callable, params, x: jax.Array, count: int) -> Work:
    """AdamW steps on loss(params, x), from one to the next. count: their FLOPs."""
    transform = optax.adamw(1e-4, b1=0.9, b2=0.95, weight_decay=1e-4)

    def update(state, x):
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, x)
        updates, moments = transform.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    step = jax.jit(update, donate_argnums=0)
    state = jax.tree.map(jnp.array, (params, transform.init(params)))  # a step donates it

    def once():
        nonlocal state
        state, value = step(state, x)
        jax.block_until_ready((state, value))

    return Work(once, count)


def inverting(forward: Callable, inverse: Callable, params, x: jax.Array, count: int) -> Work:
    """inverse(params, u) of u = forward(params, x)."""
    run = jax.jit(inverse)
    u = jax.block_until_ready(jax.jit(forward)(params, x))
    return Work(lambda: jax.block_until_ready(run(params, u)), count,
                error=lambda: float(jnp.max(jnp.abs(run(params, u) - x))))


def products() -> Callable[[], float]:
    """A function that measures the FLOP/s of large float32 products, the best of several sizes."""
    return flops.matmul_rate_probe("float32", sharding.make_mesh(Mesh(1, -1, 1, 1, 1)), 0.3)
