"""The devices of a cluster of NVIDIA GPUs that need not exist.

A topology is NVLink domains x hosts in a domain x GPUs in a host: h100:8x1x8 is eight HGX nodes.
What the compiler asks of a card follows the specs of OpenXLA
(xla/backends/gpu/target_config/specs).
"""

import contextlib
import dataclasses
import importlib
import os
import re
from unittest import mock

from jax.experimental import topologies

from ntm_jax.runtime.chips import CHIPS
from ntm_jax.tools.pods.chips import PodChip, pod_chip

NAME = re.compile(r"(h100|h200|b200):([1-9]\d*)x[1-9]\d*x[1-9]\d*")  # and its NVLink domains
CUDNN = (9, 10, 0)  # the version that tracing and the compiler assume
COMPILER_OPTIONS = {"xla_gpu_autotune_level": "0"}  # there is no GPU to time kernels on
MEMORY_FRACTION = 0.75  # of a card, which JAX takes at its start


@dataclasses.dataclass(frozen=True)
class Card:
    """What the compiler and a report ask of a GPU besides its peaks, from NVIDIA's data sheets."""

    name: str
    capability: int  # major compute capability
    cores: int  # streaming multiprocessors
    gigahertz: float
    memory: int  # bytes
    cache: int  # bytes of the L2 cache
    pcie: int  # bytes/s
    nvlink: float  # bytes/s sent


CARDS = {
    "h100": Card("NVIDIA H100 80GB HBM3", 9, 132, 1.98, 84942979072, 50 << 20, 32 << 30, 450e9),
    "h200": Card("NVIDIA H200 141GB HBM3e", 9, 132, 1.98, 151397597184, 50 << 20, 32 << 30, 450e9),
    "b200": Card("NVIDIA B200", 10, 148, 1.965, 191514411008, 132644864, 64 << 30, 900e9),
}
# What all cards have in common.
SPEC = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 ecc_enabled: true
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  device_interconnect_info {{ active_links: 18 }}
  name: "{name}" core_count: {cores} clock_rate_ghz: {gigahertz}
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  l2_cache_size: {cache} pcie_bandwidth: {pcie}
  cuda_compute_capability {{ major: {capability} feature_extension: ACCELERATED_FEATURES }}
  dnn_version: "{dnn[0]}.{dnn[1]}.{dnn[2]}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {dnn[0]} minor: {dnn[1]} patch: {dnn[2]} }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""


def chip(card: str) -> PodChip:
    """What a report compares with; hbm is the share of memory that JAX takes.

    The network is one 400 Gbit/s adapter for each GPU, as in DGX nodes.
    """
    share = float(os.environ.get("XLA_CLIENT_MEM_FRACTION", MEMORY_FRACTION))
    return pod_chip(card, hbm=share * CARDS[card].memory / 2**30, ici=CARDS[card].nvlink, dcn=50e9,
                    unit="GPU", near="over NVLink", far="over the network")


def spec(card: str) -> str:
    """The compiler's description of a card, a GpuTargetConfigProto as text."""
    return SPEC.format(**vars(CARDS[card]), bandwidth=int(CHIPS[card].memory), dnn=CUDNN)


def devices(topology: str) -> list:
    """The devices of a topology. Raises an error of several kinds if the compiler refuses."""
    card, grid = topology.split(":")
    return list(topologies.get_topology_desc(
        platform="cuda", topology=grid, target_config=spec(card)).devices)


@contextlib.contextmanager
def cudnn_assumed():
    """Lets cuDNN's attention be traced on a machine without cuDNN or a GPU of its generation.

    JAX chooses the kernel while it traces, and asks the installed library and device.
    """
    module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    major, minor, patch = CUDNN
    with mock.patch.multiple(
            module, check_cudnn_version=lambda: 10_000 * major + 100 * minor + patch,
            check_compute_capability=lambda capability: float(capability) <= 9):
        yield
