"""Normalizing Trajectory Models in JAX: images in few steps, with exact trajectory likelihoods."""

import importlib
import pathlib
from typing import TYPE_CHECKING

from ntm_jax.errors import UserError

if TYPE_CHECKING:
    from ntm_jax.api import Run, experiment, load, push, train
    from ntm_jax.sampling import decoders

    __version__: str

__all__ = [
    "Run", "UserError", "__version__", "decoders", "experiment", "load", "push", "train"]

# setup.py installs launch/ and experiments/ as ntm_jax.launch and ntm_jax.experiments. A checkout
# has them beside this package, where the same names find them.
_CHECKOUT = pathlib.Path(__file__).parents[1]
if (_CHECKOUT / "experiments" / "default.py").is_file():
    __path__.append(str(_CHECKOUT))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str):
    """What is public here, imported at first use: data workers need no jax."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("ntm_jax")
    if name == "decoders":
        return importlib.import_module("ntm_jax.sampling.decoders")
    if name in __all__:
        from ntm_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'ntm_jax' has no attribute {name!r}")
