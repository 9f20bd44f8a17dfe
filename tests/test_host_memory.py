"""Freed memory stays with the process, so that it is not mapped and cleared anew at every step."""

import ctypes
import os
import subprocess
import sys

import jax
import pytest

from ntm_jax import host_memory

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


def test_a_machine_with_an_accelerator_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(host_memory, "_ACCELERATORS", (str(tmp_path),))
    assert not host_memory.keep_freed()


# Frees every other one of many arrays, and one of 16 MiB, and retires the fragments. Prints the
# bytes freed in fragments and retired, the decreases of resident memory and of the pool's free
# memory, how far the pool grows for the large array, and whether the other arrays are as before.
FRAGMENTS = """
import ctypes
from pathlib import Path
import numpy as np
from ntm_jax import host_memory
host_memory.keep_freed()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
def pool():
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = host_memory._Information
    return mallinfo()
host_memory.retire_fragments()
arrays = [np.full(12500 + 250 * i, i) for i in range(400)]
large, end = np.ones(2**21), np.ones(12500)
freed = sum(array.nbytes for array in arrays[::2])
del large
arrays[::2] = [None] * 200
before, free, size = resident(), pool().fordblks, pool().arena
retired = host_memory.retire_fragments()
decreases = before - resident(), free - pool().fordblks
large = np.ones(2**21)
same = all((arrays[i] == i).all() for i in range(1, 400, 2))
print(freed, retired, *decreases, pool().arena - size, same)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_fragments_are_retired_and_large_chunks_stay():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NTM_JAX_KEEP_MEMORY": "1"}
    printed = subprocess.run([sys.executable, "-c", FRAGMENTS], env=environment, check=True,
                             capture_output=True, text=True).stdout.split()
    freed, retired, resident, free, grown = map(int, printed[:5])
    assert 0.9 * freed < retired < 1.1 * freed
    assert resident > 0.7 * freed
    assert 0.9 * retired < free < 1.1 * retired
    assert grown < 2**20
    assert printed[5] == "True"


def test_a_long_compilation_is_followed_by_retiring(monkeypatch):
    events, retired = [], []
    monkeypatch.setattr(host_memory, "retire_fragments", lambda: retired.append(True))
    host_memory._retire_after_compilations()
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    jax.jit(lambda x: x + 17)(1.0).block_until_ready()
    assert host_memory._COMPILED in events
    assert not retired  # it took less than a second
    jax.monitoring.record_event_duration_secs(host_memory._COMPILED, 2.0)
    assert retired
