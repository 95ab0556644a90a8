"""What glibc does with memory that was freed: by default pages go back to the system in mid-run, or never do.

Does nothing where the C library is another one.
"""

import ctypes
import gc

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # mallopt's names for its parameters


def keep_freed_memory() -> None:
    """For training: arrays up to 32 MiB are made of pages that earlier ones left behind.

    Every step frees and makes the same arrays. Pages that go back to the system in between are faulted in again one by
    one: 12 thousand in a step of 4,096 tokens and latents, 7 % of its time on one slow core. All threads share one arena,
    for those that threads have of their own give pages back whatever the threshold.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(ARENA_MAX, 1)


def give_back_memory() -> None:
    """For evaluation: memory would grow by the batch, since hooks and passes refer to each other and pages are kept."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
