"""glibc keeps the memory that a program frees, so that the next step finds it ready.

XLA's CPU backend allocates a program's temporaries anew at every call. By default glibc returns
them to the kernel after each call, and the next one waits while the kernel maps and clears them.
"""

import ctypes
import functools
import mmap
import os

# mallopt's options in malloc.h: no allocation has pages of its own, none are ever returned, and all
# threads share one pool. In a further pool, allocations of more than 64 MiB have pages of their own
# all the same, and which pool a thread of XLA has differs from run to run.
_OPTIONS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}
_ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")
_COMPILED = "/jax/core/compile/backend_compile_duration"
_BLOCK = 2**15  # bytes that are taken at a time
_HEADER = 16  # bytes of a block that malloc keeps for itself
_LARGEST = 2**22  # bytes of a fragment


def keep_freed() -> bool:
    """Tells glibc to keep freed memory, on a machine that computes on its CPU; whether it did.

    It is to be called before jax starts its devices, since a thread keeps the pool that it has. It
    changes no number: a process only holds its largest use of memory until it ends. The environment
    variable NTM_JAX_KEEP_MEMORY=0 turns it off. From glibc 2.33 on it also has fragments retired
    after every compilation of more than a second.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(os.path.exists, _ACCELERATORS))
    if not on_cpu or os.environ.get("NTM_JAX_KEEP_MEMORY") == "0":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    kept = all(libc.mallopt(*option) for option in _OPTIONS.values())
    if kept and hasattr(libc, "mallinfo2"):
        _retire_after_compilations()
    return kept


@functools.cache
def _retire_after_compilations() -> None:
    import jax

    def compiled(event: str, duration_secs: float, **_):
        if event == _COMPILED and duration_secs > 1:
            retire_fragments()

    jax.monitoring.register_event_duration_secs_listener(compiled)


class _Information(ctypes.Structure):
    """glibc's struct mallinfo2, in bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]


def retire_fragments() -> int:
    """Takes free fragments of 32 KiB to 4 MiB out of the pool, and returns how many bytes.

    A compilation leaves hundreds of MiB of them, of as many sizes, which malloc goes through for
    every temporary of a step: a tenth of a step's time. They are allocated, never to be freed, and
    their pages are given back to the kernel. Larger ones stay, such as a step's temporaries.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.mallinfo2.restype = ctypes.c_void_p, _Information
    # malloc takes the smallest free chunk that is large enough, from its front. So chunks are used
    # up in the order of their sizes, block after block, and the end of the pool after all others.
    found = libc.mallinfo2()
    blocks = (ctypes.c_void_p * ((found.fordblks - found.keepcost) // _BLOCK))()
    first = count = 0  # of the blocks of one chunk; how many blocks there are
    while count < len(blocks) and (count - first) * _BLOCK <= _LARGEST:
        block = libc.malloc(ctypes.c_size_t(_BLOCK - _HEADER))
        if block is None:
            break
        if count and block != blocks[count - 1] + _BLOCK:
            first = count
        blocks[count] = block
        count += 1
    for block in blocks[:first]:
        _give_back(libc, block)
    for block in blocks[first:count]:
        libc.free(ctypes.c_void_p(block))
    return first * _BLOCK


def _give_back(libc, block: int) -> None:
    """Gives the pages inside a block to the kernel; they are zero when they are next read."""
    begin = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (block + _BLOCK - _HEADER) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin),
                     mmap.MADV_DONTNEED)
