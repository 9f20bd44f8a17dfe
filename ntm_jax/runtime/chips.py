"""What chips can do at their peak, by name: TPUs, NVIDIA GPUs, and a core of a CPU."""

import dataclasses
import math
import os

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
        """FLOP/s of products of a precision, as tools.pods.hlo names it.

        That of float32 at its default precision is taken as bfloat16's, one pass of a TPU, though
        TF32 has half of it on a GPU: no large product of ours is one.
        """
        return self.highest or self.flops / PASSES if precision == "highest" else self.flops


UNKNOWN_CHIP = Chip(math.inf, math.nan, math.nan, math.nan, math.nan)  # cpu and local
# One core of a server's CPU, about; memory is its caches, which hold small networks. Several cores
# have as much more of both, so that their ratio stays. No kernel is launched.
CPU = Chip(math.inf, 100e9, 50e9, math.nan, math.nan, highest=100e9, latency=0.0)
# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, where ICI counts both directions. DCN
# of v5p, v6e and tpu7x: the comparison on the tpu7x page (50 Gbit/s for a v5p chip, 100 for a v6e
# or tpu7x chip); DCN of v4 and v5e: jax-ml.github.io/scaling-book/tpus. Memory: the limit that the
# compiler states when a program exceeds it.
CHIPS = {
    # Two cores as one device; 6 links of 50 GB/s.
    "v4": Chip(30.75, 275e12, 1228e9, 300e9, 6.25e9),
    "v5e": Chip(15.75, 197e12, 819e9, 200e9, 3.125e9),  # one core; 4 links
    # Two cores as one device; 6 links of 100 GB/s.
    "v5p": Chip(95.73, 459e12, 2765e9, 600e9, 6.25e9),
    "v6e": Chip(31.25, 918e12, 1638e9, 400e9, 12.5e9),  # one core; 4 links
    # A device is one of a chip's two cores, with half of the chip's figures.
    "tpu7x": Chip(94.74, 1153e12, 3690e9, 300e9, 6.25e9, cores=2, unit="core"),
}
KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
         "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"}  # by jax's name of the device
UNITS = 128  # float32 multiply-adds of a multiprocessor in one cycle: at `highest`, without TF32
MEMORY_FRACTION = 0.75  # of a card, which JAX takes at its start


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU's figures, from NVIDIA's data sheets of the cards, without sparsity.

    The network is one 400 Gbit/s adapter for each GPU, as in DGX nodes.
    """

    name: str
    capability: int  # major compute capability
    cores: int  # streaming multiprocessors
    gigahertz: float
    memory: int  # bytes
    bandwidth: float  # bytes/s to and from memory
    cache: int  # bytes of the L2 cache
    pcie: int  # bytes/s
    flops: float  # bfloat16 FLOP/s
    nvlink: float  # bytes/s sent

    @property
    def chip(self) -> Chip:
        """What a report compares with; hbm is the share of memory that JAX takes."""
        share = os.environ.get("XLA_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
        return Chip(float(share) * self.memory / 2**30, self.flops, self.bandwidth, self.nvlink,
                    50e9, unit="GPU", near="over NVLink", far="over the network",
                    highest=self.cores * UNITS * 2 * self.gigahertz * 1e9, latency=2e-6)


CARDS = {
    "h100": Card("NVIDIA H100 80GB HBM3", 9, 132, 1.98, 84942979072, 3.35232e12, 50 << 20,
                 32 << 30, 989e12, 450e9),
    "h200": Card("NVIDIA H200 141GB HBM3e", 9, 132, 1.98, 151397597184, 4.8e12, 50 << 20,
                 32 << 30, 989e12, 450e9),
    "b200": Card("NVIDIA B200", 10, 148, 1.965, 191514411008, 7.67232e12, 132644864, 64 << 30,
                 2250e12, 900e9),
}


def chip_of(device) -> Chip:
    """The figures of a device, present or of a topology.

    Those of a CPU core for CPUs; of an H100 for GPUs and of a v5p for TPUs that are not known.
    """
    kind = device.device_kind
    if device.platform == "tpu":
        return CHIPS[KINDS.get(kind, "v5p")]
    if device.platform in ("gpu", "cuda"):
        card = next((name for name in CARDS if name.upper() in kind), "h100")
        return CARDS[card].chip
    return CPU
