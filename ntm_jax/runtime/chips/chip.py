"""What a chip can do at its peak: the figures that a report compares a program with."""

import dataclasses
import math

PASSES = 6  # bfloat16 products of a TPU in a float32 product at precision `highest`


@dataclasses.dataclass(frozen=True)
class Chip:
    """What jax counts as one device.

    unit, near and far are the words of reports for the device and for its two networks.
    """

    hbm: float  # GiB that a program may use
    flops: float  # bfloat16 FLOP/s
    memory: float  # bytes/s to and from HBM
    ici: float  # bytes/s sent within a slice, or between the GPUs of an NVLink domain
    dcn: float  # bytes/s sent to other slices or domains
    cores: int = 1  # devices of one chip
    unit: str = "chip"
    near: str = "within a slice"
    far: str = "between slices"
    # FLOP/s of float32 products at precision `highest`: bfloat16's over PASSES by default.
    highest: float = 0
    latency: float = 1e-6  # seconds of the shortest kernel, about: assumed, not measured

    def rate(self, precision: str) -> float:
        """FLOP/s of products of a precision, as analysis.hlo names it.

        That of float32 at its default precision is taken as bfloat16's, one pass of a TPU, though
        TF32 has half of it on a GPU: no large product of ours is one.
        """
        return self.highest or self.flops / PASSES if precision == "highest" else self.flops


UNKNOWN_CHIP = Chip(math.inf, math.nan, math.nan, math.nan, math.nan)  # cpu and local
# One core of a server's CPU, about; memory is its caches, which hold small networks. Several cores
# have as much more of both, so that their ratio stays. No kernel is launched.
CPU = Chip(math.inf, 100e9, 50e9, math.nan, math.nan, highest=100e9, latency=0.0)
