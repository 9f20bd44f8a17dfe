"""Chooses the attention function that a model is built with; core knows none but the plain one."""

from ntm_jax.core.layers import plain_attention


def choose():
    """The attention for the present backend: plain everywhere, which XLA fuses."""
    return plain_attention
