"""Compilation as quick as can be, for tests that compile for seconds and run for milliseconds."""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib

if (
    importlib.util.find_spec("libtpu")
    and not os.path.exists("/dev/accel0")
    and not os.path.exists("/dev/vfio/0")
):
    # The TPU compiler is here and no TPU: jax would look for one and complain.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

# These hold in the programs that tests start, too.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # idle threads would spin beside other tests
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # most tests compile longer than they run

if importlib.metadata.version("jaxlib").startswith("0.10."):
    # XLA's older code generator compiles small programs in half the time. Versions without these
    # flags refuse them, and so does libtpu: programs that load it are started without them.
    os.environ["XLA_FLAGS"] = " ".join([
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ])

import jax
import pytest

gc.set_threshold(50_000)  # as programs do

# The gate's: compiled programs and the names of skipped tests, for its second call of pytest.
CACHE = os.environ.get("NTM_JAX_TEST_CACHE")
SKIPPED = pathlib.Path(CACHE, "skipped") if CACHE else None
LONGEST = ("test_bucket.py", "test_imagenet.py", "test_without_projects.py", "test_accelerators.py",
           "test_flux2.py", "test_docs.py", "test_processes.py", "test_own_data.py",
           "test_sharding.py", "test_installed.py", "test_programs.py")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Starts the modules that take longest first, so that pytest's workers end together.

    In the gate's second environment, tests that the first one skipped run with the slow ones.
    """
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))
    skipped = SKIPPED.read_text().splitlines() if SKIPPED and SKIPPED.exists() else ()
    for item in items:
        if item.nodeid in skipped:
            item.add_marker(pytest.mark.slow)


def pytest_runtest_logreport(report):
    """Writes the names of skipped tests for the gate's second environment."""
    if SKIPPED and report.skipped and "PYTEST_XDIST_WORKER" not in os.environ:
        with SKIPPED.open("a") as file:
            print(report.nodeid, file=file)


def pytest_collection_finish():
    gc.freeze()  # what is imported is never garbage


@pytest.fixture(scope="module", autouse=True)
def freed_programs():
    """Frees compiled programs after a module that nears Linux's limit of 65,530 mapped regions.

    XLA aborts at the limit, and a module adds up to 10,000.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Compiled programs are shared by pytest's workers and the processes that tests start."""
    folder, seconds = tmp_path_factory.getbasetemp(), 0.1
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"
    folder = CACHE or str(folder)
    os.environ.update(
        JAX_COMPILATION_CACHE_DIR=folder, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=str(seconds)
    )
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
