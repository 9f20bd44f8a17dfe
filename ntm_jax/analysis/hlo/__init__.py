"""What the text of a compiled program (HLO) tells: its work, products by precision, arrays."""

from ntm_jax.analysis.hlo.count import COLLECTIVES, FREE, Work, count

__all__ = ["COLLECTIVES", "FREE", "Work", "count"]
