"""The memory and the networks of the chips of a topology, beside their peaks in runtime.chips."""

import dataclasses
import math

from ntm_jax.runtime import chips


@dataclasses.dataclass(frozen=True)
class PodChip(chips.Chip):
    """A chip with its memory and its networks. The defaults hold for a chip that is not known.

    unit, near and far are the words of reports for the device and for its two networks.
    """

    hbm: float = math.inf  # GiB that a program may use
    ici: float = math.nan  # bytes/s sent within a slice, or between the GPUs of an NVLink domain
    dcn: float = math.nan  # bytes/s sent to other slices or domains
    cores: int = 1  # devices of one chip
    unit: str = "chip"
    near: str = "within a slice"
    far: str = "between slices"


def pod_chip(name: str, **more) -> PodChip:
    """The chip of a name in runtime.chips, with the fields that a PodChip has besides."""
    return PodChip(**vars(chips.CHIPS[name]), **more)


UNKNOWN_CHIP = PodChip(math.nan, math.nan)  # cpu and local
# ICI counts both directions: 6 links of 50 GB/s for v4, 6 of 100 GB/s for v5p, 4 for v5e and v6e.
# DCN of v5p, v6e and tpu7x: the comparison on the tpu7x page (50 Gbit/s for a v5p chip, 100 for a
# v6e or tpu7x chip); DCN of v4 and v5e: jax-ml.github.io/scaling-book/tpus. Memory: the limit that
# the compiler states when a program exceeds it.
TPUS = {
    "v4": pod_chip("v4", hbm=30.75, ici=300e9, dcn=6.25e9),
    "v5e": pod_chip("v5e", hbm=15.75, ici=200e9, dcn=3.125e9),
    "v5p": pod_chip("v5p", hbm=95.73, ici=600e9, dcn=6.25e9),
    "v6e": pod_chip("v6e", hbm=31.25, ici=400e9, dcn=12.5e9),
    # A device is one of a chip's two cores, with half of the chip's figures.
    "tpu7x": pod_chip("tpu7x", hbm=94.74, ici=300e9, dcn=6.25e9, cores=2, unit="core"),
}
