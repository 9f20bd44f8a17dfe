"""Normalizing Trajectory Models in JAX: few-step generative models with an exact likelihood."""

from ntm_jax.errors import UserError

__all__ = ["UserError", "load"]


def load(workdir: str, step: int | None = None, raw: bool = False):
    """The run in a workdir or an export, as `ntm_jax.runtime.load.Run` with `log_prob` and `sample`; see `ntm_jax.runtime.load.load`."""
    from ntm_jax.runtime.load import load as load_run  # here, so that data workers need not import the runtime

    return load_run(workdir, step, raw)
