"""glibc keeps the memory that a program frees, so that the next step finds it ready.

XLA's CPU backend allocates a program's temporaries anew at every call. By default glibc returns
them to the kernel after each call, and the next one waits while the kernel maps and clears them.
"""

import ctypes
import os

# mallopt's options in malloc.h: no allocation has pages of its own, none are ever returned, and all
# threads share one pool. In a further pool, allocations of more than 64 MiB have pages of their own
# all the same, and which pool a thread of XLA has differs from run to run.
_OPTIONS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}
_ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


def keep_freed() -> bool:
    """Tells glibc to keep freed memory, on a machine that computes on its CPU; whether it did.

    It is to be called before jax starts its devices, since a thread keeps the pool that it has. It
    changes no number: a process only holds its largest use of memory until it ends. The environment
    variable NTM_JAX_KEEP_MEMORY=0 turns it off.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(os.path.exists, _ACCELERATORS))
    if not on_cpu or os.environ.get("NTM_JAX_KEEP_MEMORY") == "0":
        return False
    libc = ctypes.CDLL(None)
    return hasattr(libc, "mallopt") and all(libc.mallopt(*pair) for pair in _OPTIONS.values())
