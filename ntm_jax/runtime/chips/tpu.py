"""TPUs: their peak rates, and the devices of a slice that need not exist.

Figures are from docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, whose ICI figures count both
directions. DCN figures of v5p, v6e and tpu7x are from the tpu7x page's comparison (50 Gbit/s for a
v5p chip, 100 for a v6e or tpu7x chip); those of v4 and v5e are from
jax-ml.github.io/scaling-book/tpus. Memory is what the compiler lets a program use, as its error
about a larger one states it.
"""

import os
import re

from jax.experimental import topologies

from ntm_jax.runtime.chips.chip import Chip

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
# Without these, libtpu looks for a TPU, takes its lock, and logs warnings.
QUIET = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
         "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost",
         "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
NAME = re.compile(r"(v4|v5p|tpu7x):\d+x\d+x\d+|(v5e|v6e):\d+x\d+")  # 3D and 2D meshes of chips


def devices(topology: str, slices: int = 1) -> list:
    """The devices of `slices` slices. Raises an error of several kinds if libtpu refuses."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    options: dict = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4"):
        options["chip_config_name"] = "megacore"  # two cores as one device, as on a real v4
    return list(topologies.get_topology_desc(
        platform="tpu", topology_name=topology, **options).devices)
