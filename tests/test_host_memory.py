"""Freed memory stays with the process, so that it is not mapped and cleared anew at every step."""

import os
import subprocess
import sys

import pytest

# Prints how many pages the kernel maps while 2.5 GiB are allocated, 64 MiB of them filled, and
# freed eight times, in another thread than the first, as XLA does.
PROGRAM = """
import resource
import threading
import numpy as np
from ntm_jax import host_memory
print(host_memory.keep_freed())
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


def pages(keep: str) -> tuple[str, int]:
    """(what keep_freed returned, the number of pages) with NTM_JAX_KEEP_MEMORY=keep."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NTM_JAX_KEEP_MEMORY": keep}
    printed = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True,
                             capture_output=True, text=True).stdout.split()
    return printed[0], int(printed[1])


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(os, "confstr_names")
                    or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")
def test_freed_memory_is_kept():
    kept, few = pages("1")
    returned, many = pages("0")
    assert (kept, returned) == ("True", "False")
    # 64 MiB are 32 huge pages or 16,384 small ones.
    assert few < 16
    assert many >= 8 * 32
