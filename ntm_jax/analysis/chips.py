"""The chips that programs are compiled for: their peak rates, and the devices of a topology.

Figures are from docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, whose ICI figures count both
directions. DCN figures of v5p, v6e and tpu7x are from the tpu7x page's comparison (50 Gbit/s for a
v5p chip, 100 for a v6e or tpu7x chip); those of v4 and v5e are from
jax-ml.github.io/scaling-book/tpus.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from ntm_jax.errors import UserError, first_line


@dataclasses.dataclass(frozen=True)
class Chip:
    """What jax counts as one device."""

    hbm: float  # GiB
    flops: float  # bfloat16 FLOP/s
    memory: float  # bytes/s to and from HBM
    ici: float  # bytes/s sent within a slice, over all links
    dcn: float  # bytes/s sent to other slices


# HBM of v5e and v6e is what the compiler allows, less than the 16 and 32 GiB of the chip.
CHIPS = {
    "v4": Chip(32, 275e12, 1228e9, 300e9, 6.25e9),  # two cores as one device; 6 links of 50 GB/s
    "v5e": Chip(15.75, 197e12, 819e9, 200e9, 3.125e9),  # one core; 4 links
    "v5p": Chip(95, 459e12, 2765e9, 600e9, 6.25e9),  # two cores as one device; 6 links of 100 GB/s
    "v6e": Chip(31.25, 918e12, 1638e9, 400e9, 12.5e9),  # one core; 4 links
    "tpu7x": Chip(96, 1153e12, 3690e9, 300e9, 6.25e9),  # half a chip: all figures halved
}
HERE = Chip(math.inf, math.nan, math.nan, math.nan, math.nan)  # cpu and local: unknown limits
EXAMPLES = "v5p:8x8x8, v5e:16x16, v6e:16x16, v4:4x4x4, tpu7x:4x4x4, cpu:8 or local"
# Without these, libtpu looks for a TPU, takes its lock, and logs warnings.
QUIET = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
         "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost",
         "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
TPU = re.compile(r"(v4|v5p|tpu7x):\d+x\d+x\d+|(v5e|v6e):\d+x\d+")  # 3D and 2D meshes of chips


def devices(topology: str, slices: int = 1) -> tuple[list, Chip]:
    """(devices, chip) of a TPU topology that need not exist, such as v5p:8x8x8.

    "local" stands for this machine's devices, and cpu:N for N of its simulated ones. Raises
    UserError for any other topology, and for a TPU's without libtpu.
    """
    if topology == "local":
        return jax.devices(), HERE
    simulated = re.fullmatch(r"cpu:([1-9]\d*)", topology)
    if simulated:
        count, present = int(simulated[1]), jax.devices("cpu")
        if len(present) < count:
            raise UserError(f"--topology={topology}: there are {len(present)} CPU devices; set "
                            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}")
        return present[:count], HERE
    if not TPU.fullmatch(topology):
        raise UserError(f"--topology={topology} is not known: expected {EXAMPLES}")
    return _tpu_devices(topology, slices), CHIPS[topology.split(":")[0]]


def _tpu_devices(topology: str, slices: int) -> list:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={topology} needs the TPU compiler, and libtpu is not "
                        "installed: pip install -e '.[tpu]'")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    options: dict = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4"):
        options["chip_config_name"] = "megacore"  # two cores as one device, as on a real v4
    try:
        return list(topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options).devices)
    except Exception as error:  # libtpu raises several kinds
        raise UserError(f"--topology={topology} is refused by the TPU compiler "
                        f"({first_line(error)}): expected {EXAMPLES}") from None
