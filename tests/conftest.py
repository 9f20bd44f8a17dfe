"""Compilation as quick as can be, for tests that compile for seconds and run for milliseconds."""

import gc
import importlib.util
import os
import pathlib

if importlib.util.find_spec("libtpu") and not os.path.exists("/dev/accel0") and not os.path.exists("/dev/vfio/0"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the TPU compiler is here and no TPU: jax would look for one and complain

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def freed_programs():
    """Compiled programs are freed after a module where they near Linux's limit of 65,530 mapped regions a process, at which XLA aborts; a
    module adds up to 10,000."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """A folder of compiled programs that this session's processes share, and this process uses."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def quick_compilation(compilation_cache):
    """Few XLA optimisations while a module's tests run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield compilation_cache
    jax.config.update("jax_disable_most_optimizations", False)
