"""What a chip can do at its peak: the figures that a report compares a program with."""

import dataclasses
import math


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


HERE = Chip(math.inf, math.nan, math.nan, math.nan, math.nan)  # cpu and local: unknown limits
