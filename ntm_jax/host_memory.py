"""glibc keeps the memory that a program frees, so that the next step finds it ready.

XLA's CPU backend allocates a program's temporaries anew at every call. By default glibc returns
them to the kernel after each call, and the next one waits while the kernel maps and clears them.
"""

import ctypes
import functools
import os

# mallopt's options in malloc.h: no allocation has pages of its own, none are ever returned, and all
# threads share one pool. In a further pool, allocations of more than 64 MiB have pages of their own
# all the same, and which pool a thread of XLA has differs from run to run.
_OPTIONS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}
_ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


@functools.cache
def keep_freed() -> None:
    """Tells glibc to keep freed memory, on a machine that computes on its CPU.

    It is to be called before jax starts its devices, since a thread keeps the pool that it has. It
    changes no number: a process only holds its largest use of memory until it ends. The environment
    variable NTM_JAX_KEEP_MEMORY=0 turns it off.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(os.path.exists, _ACCELERATORS))
    libc = ctypes.CDLL(None)
    if (on_cpu and os.environ.get("NTM_JAX_KEEP_MEMORY") != "0" and hasattr(libc, "mallopt")
            and all(libc.mallopt(*pair) for pair in _OPTIONS.values())):
        import jax

        jax.monitoring.register_event_duration_secs_listener(functools.partial(_retire, libc))


def _retire(libc: ctypes.CDLL, event: str, duration_secs: float, **_) -> None:
    """Returns the fragmented heap memory of a long compilation to the kernel.

    It takes the fragments out of the allocator's pool and frees their pages, hundreds of MiB.
    Temporaries that lie scattered in them make a step on two cores a quarter slower.
    """
    if event.endswith("backend_compile_duration") and duration_secs > 1:
        libc.malloc.restype, block, row = ctypes.c_void_p, 0, 0
        while row < 128:  # blocks of 32 KiB one after another; malloc takes small fragments first
            last, block = block, libc.malloc(2**15 - 16)
            row = row + 1 if block == last + 2**15 else 0
            libc.madvise(ctypes.c_void_p(-(-block // 4096) * 4096), 7 * 4096, 4)  # MADV_DONTNEED
