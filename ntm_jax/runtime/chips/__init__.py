"""Chips: their peak rates, and the devices of a topology that programs are compiled for."""

from ntm_jax.runtime.chips.chip import CPU, PASSES, UNKNOWN_CHIP, Chip
from ntm_jax.runtime.chips.gpu import cudnn_assumed
from ntm_jax.runtime.chips.topology import Topology, chip_of, find

__all__ = ["CPU", "PASSES", "UNKNOWN_CHIP", "Chip", "Topology", "chip_of", "cudnn_assumed", "find"]
