"""The kinds of condition: the table that config.model.condition chooses from.

A kind knows what data hold for it, what users may give, how it is described, and how it enters the
networks: its core.conditions.Condition. A new kind is one file here and its line in
KINDS.
"""

import importlib

from ntm_jax.data.conditions.kind import Kind
from ntm_jax.data.pipeline import DataSpec

__all__ = ["KINDS", "SETTINGS", "Kind", "of"]

KINDS = {
    "none": "kind.Kind",
    "class": "label.Label",
    "text": "text.Text",
    "vector": "vector.Vector",
}
# The settings of config.model that belong to one kind.
SETTINGS = {"transporter_text": "text", "condition_layers": "vector", "condition_shift": "vector"}


def of(name: str, spec: DataSpec) -> Kind:
    """The kind of this name, for data of this shape."""
    module, _, kind = KINDS[name].partition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)(spec)
