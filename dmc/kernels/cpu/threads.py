"""Threads for the CPU kernels, as many as PyTorch has. The compiled functions release Python's lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch


def share(starts: np.ndarray, run: Callable[[int, int], None], *, most: int) -> None:
    """Runs ``run(begin, end)`` in threads, for ranges of rows with about equal work.

    Args:
        starts: ``[R + 1]``, work before each row, then the total.
        run: computes rows ``begin`` to ``end``.
        most: largest useful number of threads; the number is also bounded by PyTorch's threads and by the rows.
    """
    threads = int(min(torch.get_num_threads(), len(starts) - 1, most))
    if threads < 2:
        run(0, len(starts) - 1)
        return
    edges = np.searchsorted(starts, starts[-1] * np.arange(1, threads) / threads)
    edges = [0, *edges.tolist(), len(starts) - 1]
    list(_pool().map(run, edges[:-1], edges[1:]))


@lru_cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="dmc-kernels")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of its parent's threads
