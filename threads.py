"""Independent calls side by side on a CPU's processors, which they divide evenly.

Torch divides single operations among processors. What runs on one alone, comparing, sorting, small sums and Python,
leaves the others idle; calls that don't depend on each other don't.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


@functools.cache
def _pool(caller: int, workers: int) -> ThreadPoolExecutor:
    """Of the calling thread alone: calls within calls would wait for threads that wait for them."""
    return ThreadPoolExecutor(workers)


def in_threads[A, B](function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """[function(item) for item in items], begun in this order by as many threads as torch has, or as there are items."""
    threads = torch.get_num_threads()
    workers = min(threads, len(items))
    if workers == 1:
        return [function(item) for item in items]

    def call(item: A) -> B:
        torch.set_num_threads(threads // workers)
        return function(item)

    try:
        return list(_pool(threading.get_ident(), workers).map(call, items))
    finally:
        torch.set_num_threads(threads)  # for threads to come, too, which begin with what was set last
