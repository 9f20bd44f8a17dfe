"""What a device computes and reads at its peak, by name: TPUs, NVIDIA GPUs, and a core of a CPU."""

import dataclasses

PASSES = 6  # bfloat16 products of a TPU in a float32 product at precision `highest`


@dataclasses.dataclass(frozen=True)
class Chip:
    """What jax counts as one device. tools.pods adds its networks and the size of its memory."""

    flops: float  # bfloat16 FLOP/s
    memory: float  # bytes/s to and from HBM
    # FLOP/s of float32 products at precision `highest`: bfloat16's over PASSES by default.
    highest: float = 0
    latency: float = 1e-6  # seconds of the shortest kernel, about: assumed, not measured

    def rate(self, precision: str) -> float:
        """FLOP/s of products of a precision, as tools.pods.hlo names it.

        That of float32 at its default precision is taken as bfloat16's, one pass of a TPU, though
        TF32 has half of it on a GPU: no large product of ours is one.
        """
        return self.highest or self.flops / PASSES if precision == "highest" else self.flops


# One core of a server's CPU, about; memory is its caches, which hold small networks. Several cores
# have as much more of both, so that their ratio stays. No kernel is launched.
CPU = Chip(100e9, 50e9, highest=100e9, latency=0.0)
CHIPS = {
    # docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. Two cores of a v4 or v5p are one
    # device; of a tpu7x each of the two is one.
    "v4": Chip(275e12, 1228e9),
    "v5e": Chip(197e12, 819e9),
    "v5p": Chip(459e12, 2765e9),
    "v6e": Chip(918e12, 1638e9),
    "tpu7x": Chip(1153e12, 3690e9),
    # NVIDIA's data sheets, without sparsity. At `highest`, without TF32, a multiprocessor has 128
    # float32 multiply-adds in one cycle.
    "h100": Chip(989e12, 3.35232e12, highest=132 * 128 * 2 * 1.98e9, latency=2e-6),
    "h200": Chip(989e12, 4.8e12, highest=132 * 128 * 2 * 1.98e9, latency=2e-6),
    "b200": Chip(2250e12, 7.67232e12, highest=148 * 128 * 2 * 1.965e9, latency=2e-6),
}
KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
         "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"}  # by jax's name of the device


def chip_of(device) -> Chip:
    """The figures of a device, present or of a topology.

    Those of a CPU core for CPUs; of an H100 for GPUs and of a v5p for TPUs that are not known.
    """
    kind = device.device_kind
    if device.platform == "tpu":
        return CHIPS[KINDS.get(kind, "v5p")]
    if device.platform in ("gpu", "cuda"):
        return CHIPS[next((name for name in ("h200", "b200") if name.upper() in kind), "h100")]
    return CPU
