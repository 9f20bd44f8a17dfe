"""The chips that programs are compiled for: their peak rates, and the devices of a topology."""

from ntm_jax.analysis.chips.chip import HERE, Chip
from ntm_jax.analysis.chips.gpu import cudnn_assumed
from ntm_jax.analysis.chips.topology import Topology, find

__all__ = ["HERE", "Chip", "Topology", "cudnn_assumed", "find"]
