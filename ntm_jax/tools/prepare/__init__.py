"""Captioned images to records of pixels or latents, text states, captions and labels.

This is what launch/prepare.py runs: `prepare(PrepareOptions(...), folder)`.
"""

from ntm_jax.tools.prepare.plan import PrepareOptions
from ntm_jax.tools.prepare.run import prepare

__all__ = ["PrepareOptions", "prepare"]
