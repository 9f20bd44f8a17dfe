"""What the text of a compiled program (HLO) tells: its work, products by precision, arrays."""

from ntm_jax.tools.pods.hlo.count import COLLECTIVES, Work, count

__all__ = ["COLLECTIVES", "Work", "count"]
