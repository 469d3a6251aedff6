"""How the process keeps memory between training steps on a CPU, and how it gives it back between stages."""

import ctypes
import sys

# Names and numbers of <malloc.h> in the GNU C library.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Makes the C library's malloc reuse freed memory instead of giving it back; True where that could be set.

    XLA:CPU allocates the temporaries of every step anew. Large blocks come from the system and go back to it, so each
    step pays for page faults over all of them: 20 of the 105 ms of CPU time that a layer's forward and backward pass
    take (LSTM of 128, batch 128, length 50). It is for the program to call, not for a library: it holds for the whole
    process, which keeps its peak memory until it ends. Does nothing outside Linux with the GNU C library.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One arena, grown at its end in large pieces and never trimmed: no block is mapped by itself.
    settings = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])


def give_back_freed_memory() -> None:
    """Gives memory that is free now back to the system, also after `keep_freed_memory`: for between two stages.

    Arrays of a stage are of other sizes than those of the stage before, and seldom fit where these were. Does nothing
    outside Linux with the GNU C library.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
