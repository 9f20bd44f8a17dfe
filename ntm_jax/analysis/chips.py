"""TODO ntm_jax.analysis.chips."""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from ntm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as jax counts them: HBM in GiB, bfloat16 FLOP/s, HBM bytes/s, and bytes/s it can send to its slice and to other slices."""

    hbm: float
    flops: float
    memory: float
    ici: float  # all links, one way
    dcn: float


# From docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, whose ICI figures are of both ways together; DCN from the tpu7x page's
# comparison (50 Gbit/s a v5p chip, 100 a v6e or tpu7x chip) and, v4 and v5e, from jax-ml.github.io/scaling-book/tpus. HBM of v5e and v6e
# is what the compiler allows, less than the 16 and 32 GiB of the chip.
CHIPS = {
    "v4": Chip(32, 275e12, 1228e9, 300e9, 6.25e9),  # a device is a chip, two cores as one; 6 links of 50 GB/s
    "v5e": Chip(15.75, 197e12, 819e9, 200e9, 3.125e9),  # one core; 4 links
    "v5p": Chip(95, 459e12, 2765e9, 600e9, 6.25e9),  # a device is a chip, two cores as one; 6 links of 100 GB/s
    "v6e": Chip(31.25, 918e12, 1638e9, 400e9, 12.5e9),  # one core; 4 links
    "tpu7x": Chip(96, 1153e12, 3690e9, 300e9, 6.25e9),  # a device is half a chip: all figures halved
}
HERE = Chip(math.inf, math.nan, math.nan, math.nan, math.nan)  # cpu and local: nothing is known of their limits
EXAMPLES = "v5p:8x8x8, v5e:16x16, v6e:16x16, v4:4x4x4, tpu7x:4x4x4, cpu:8 or local"
# libtpu would look for the machine, take its lock, and complain on the terminal of what it does not find.
QUIET = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost",
         "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
KNOWN = re.compile(r"(v4|v5e|v5p|v6e|tpu7x):\d+(x\d+){1,2}")


def devices(topology: str, slices: int = 1) -> tuple[list, Chip]:
    """The devices of a topology, which need not be there, and their kind. local: those of this machine; cpu:N: N of its simulated ones."""
    if topology == "local" or re.fullmatch(r"cpu:[1-9]\d*", topology):
        wanted = 0 if topology == "local" else int(topology[4:])
        if wanted and len(jax.devices("cpu")) < wanted:
            raise UserError(f"--topology={topology}: there are {len(jax.devices('cpu'))} CPU devices; set "
                            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted}")
        return (jax.devices("cpu")[:wanted] if wanted else jax.devices()), HERE
    if not KNOWN.fullmatch(topology):
        raise UserError(f"--topology={topology} is not known: expected {EXAMPLES}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={topology} needs the TPU compiler, and libtpu is not installed: pip install -e '.[tpu]'")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    options = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4"):
        options["chip_config_name"] = "megacore"  # two cores as one device, as jax sees a real v4
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:  # libtpu raises several kinds
        raise UserError(f"--topology={topology} is refused by the TPU compiler ({_first_line(error)}): expected {EXAMPLES}") from None
    return list(found), CHIPS[topology.split(":")[0]]


def _first_line(error) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
