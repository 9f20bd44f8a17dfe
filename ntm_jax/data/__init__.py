"""Data: sources, text encoders, prepared records, and the batches made of them.

`register` adds a kind of data source of your own; `ntm_jax.data.text.register` a text encoder.
"""

from ntm_jax.data.sources import register

__all__ = ["register"]
