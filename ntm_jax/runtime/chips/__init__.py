"""Chips: their peak rates, and the devices of a topology that programs are compiled for."""

from ntm_jax.runtime.chips.chip import Chip
from ntm_jax.runtime.chips.topology import Topology, chip_of, find

__all__ = ["Chip", "Topology", "chip_of", "find"]
