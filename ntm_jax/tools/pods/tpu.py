"""The devices of slices of TPUs that need not exist."""

import os
import re

from jax.experimental import topologies

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
