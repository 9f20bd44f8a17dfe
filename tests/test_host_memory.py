"""Freed memory stays with the process, so that it is not mapped and cleared anew at every step."""

import os
import subprocess
import sys

import pytest

# Prints how many pages the kernel maps while 2.5 GiB are allocated, 64 MiB of them filled, and
# freed eight times, in another thread than the first, as XLA does.
PAGES = """
import resource
import threading
import numpy as np
from ntm_jax import host_memory
host_memory.keep_freed()
def fill():
    array = np.empty(5 * 2**26)
    array[:2**23] = 1
    return array
def work():
    fill()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        array = fill()
        del array
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""

# Frees every other one of many arrays, after which a long compilation ends. Prints how many new
# arrays take the place of a freed one, and whether the others are as before.
FRAGMENTS = """
import jax
arrays = [np.full(12500 + 250 * i, i) for i in range(400)]
freed = {array.ctypes.data for array in arrays[::2]}
del arrays[::2]
jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 2.0)
new = [np.empty(12500 + 250 * i) for i in range(0, 400, 2)]
print(len(freed & {array.ctypes.data for array in new}))
print(sum((array != 2 * i + 1).any() for i, array in enumerate(arrays)))
"""

on_glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(os, "confstr_names")
    or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")


def printed(program: str, keep: str) -> list[int]:
    """The numbers that a program prints with NTM_JAX_KEEP_MEMORY=keep."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NTM_JAX_KEEP_MEMORY": keep}
    output = subprocess.run([sys.executable, "-c", program], env=environment, check=True,
                            capture_output=True, text=True).stdout
    return list(map(int, output.split()))


@on_glibc
def test_freed_memory_is_kept_but_not_the_fragments_of_a_compilation():
    pages, reused, damaged = printed(PAGES + FRAGMENTS, "1")
    assert pages < 16  # 64 MiB are 32 huge pages or 16,384 small ones
    assert (reused, damaged) == (0, 0)
    assert printed(PAGES, "0")[0] >= 8 * 32
