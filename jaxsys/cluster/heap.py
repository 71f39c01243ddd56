"""A process that keeps the memory it has freed, so that a step's arrays need no new pages.

The C library gives large freed blocks back to the system at once and gets them again as pages that
must be cleared, on a virtual machine fetched from its host. Where a worker frees a step's arrays
and asks for as many again, that costs a part of the step which depends on what ran before.
"""

import ctypes
import sys

_TRIM, _MMAP, _ARENAS = -1, -3, -8  # numbers of glibc's mallopt
_BLOCK_BYTES = 2**24
_LARGEST_BYTES = 2**25  # most that glibc takes as the bound of what is mapped by itself


def keep_freed_memory(ready_bytes: int = 0) -> bool:
    """Have this process keep freed blocks of up to 32 MiB for itself, all in one heap.

    Call it before threads begin. The process never gets smaller again.

    Args:
      ready_bytes: so much is taken from the system, and put to use once, now.

    Returns:
      Whether the C library is one that can (glibc); another is left as it is.

    >>> keep_freed_memory.__name__  # for the whole process, so not in that of the tests
    'keep_freed_memory'
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_ARENAS, 1), (_MMAP, _LARGEST_BYTES), (_TRIM, 2**31 - 1))
    done = [bool(mallopt(number, value)) for number, value in settings]
    taken = [b"x" * _BLOCK_BYTES for _ in range(ready_bytes // _BLOCK_BYTES)]
    taken.clear()
    return all(done)
