"""A decoder: sample.decoder=level_1."""

from ntm_jax import decoders
from ntm_jax.core import denoising


def denoise_level_1(sampler, params, trajectory, denoiser_params):
    """Score denoising of the level above x_0, which keeps less of its detail."""
    _, xs, t, y = trajectory
    return denoising.denoise_levels(sampler.model, params, xs, t, y)["trajectory_score"][:, 1]


decoders.register(
    "level_1", decoders.from_trajectory(denoise_level_1, needs_levels=True))
