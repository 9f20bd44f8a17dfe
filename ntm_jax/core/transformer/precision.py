"""The precision of matrix products of float32 and bfloat16 numbers."""

import contextlib
import functools

import jax
import jax.numpy as jnp


def precision(name: str | None):
    """Context that sets the precision of the float32 matrix products traced in it, by jax's names.

    Their gradients keep it. None changes nothing; jax's own default is the fastest, one bfloat16
    pass on a TPU and TF32 on an NVIDIA GPU.
    """
    return jax.default_matmul_precision(name) if name else contextlib.nullcontext()


def at_config_precision(method):
    """Decorates a module's method to use self.config.precision for float32 products."""
    @functools.wraps(method)
    def precise(self, *args, **options):
        with precision(self.config.precision):
            return method(self, *args, **options)

    return precise


def own_precision(dtype) -> str | None:
    """The precision that products of a dtype need: None, the one set around them, for float32.

    Products of bfloat16 numbers are exact at the lowest precision. At a higher one XLA has fewer
    kernels for GPUs, and a Pallas kernel for TPUs does not compile.
    """
    return None if jnp.dtype(dtype) == jnp.float32 else "default"
