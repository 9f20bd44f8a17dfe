"""Normalizing Trajectory Models in JAX: few-step generative models with an exact likelihood."""

import pathlib

from ntm_jax.errors import UserError

__all__ = ["UserError", "load"]

# setup.py installs launch/ and experiments/ as ntm_jax.launch and ntm_jax.experiments. A checkout
# has them beside this package, where the same names find them.
_CHECKOUT = pathlib.Path(__file__).parents[1]
if (_CHECKOUT / "experiments" / "default.py").is_file():
    __path__.append(str(_CHECKOUT))


def load(workdir: str, step: int | None = None, raw: bool = False):
    """The run in a workdir or an export, as `ntm_jax.runtime.load.Run` with `log_prob` and `sample`; see `ntm_jax.runtime.load.load`."""
    from ntm_jax.runtime.load import load as load_run  # here, so that data workers need not import the runtime

    return load_run(workdir, step, raw)
