"""Threads for the loops on CPUs, as many as PyTorch has. The loops let go of Python's lock.

Two ways. `share` cuts rows into one stretch for each thread, threads of Python's: about 50 µs to wake one. `run` wakes those that
PyTorch has itself (OpenMP's, which wait for work awake: 2 µs; always all of them, since libgomp ends those that a smaller
team leaves over), for loops that are told all by one array of numbers. They take their next piece when they are ready for it, so
that a thread which the machine takes away is not waited for.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

UNITS, CHUNK, TAKEN = range(3)
"""The first facts of a loop of `run`: pieces of work, how many a thread takes at a time and how many have been taken."""
_PIECES = 8  # that a thread takes, if all are as fast


def share(starts: np.ndarray, run: Callable[[int, int], None], *, most: int) -> None:
    """``run(begin, end)`` by threads, for stretches of rows that are about as much work.

    Args:
        starts: ``[R + 1]``, work before each row and in all.
        run: of rows ``begin`` to ``end``.
        most: threads worth waking; never more than PyTorch's or rows.
    """
    threads = int(min(torch.get_num_threads(), len(starts) - 1, most))
    if threads < 2:
        run(0, len(starts) - 1)
        return
    edges = np.searchsorted(starts, starts[-1] * np.arange(1, threads) / threads)
    edges = [0, *edges.tolist(), len(starts) - 1]
    list(_pool().map(run, edges[:-1], edges[1:]))


def run(loop: Callable[[np.ndarray], None], facts: np.ndarray, *, most: int) -> None:
    """``loop(facts)`` by this thread, or by all that PyTorch has, which share its pieces.

    Args:
        loop: compiled; takes pieces (`dmc.kernels.cpu.pieces.take`) until there are none.
        facts: int64; `UNITS` is set, the next two are not.
        most: threads that the work is enough for; below 2 it stays with this one.
    """
    units = int(facts[UNITS])
    threads = torch.get_num_threads() if min(units, most) > 1 else 1
    facts[TAKEN], facts[CHUNK] = 0, units if threads < 2 else -(-units // (_PIECES * threads))
    if threads < 2:
        loop(facts)
    elif (parallel := _openmp()) is not None:
        parallel(_region(loop, len(facts)), facts.ctypes.data, threads, 0)
    else:
        list(_pool().map(loop, [facts] * threads))


@lru_cache
def _openmp():  # noqa: ANN202
    """How PyTorch's threads are called: ``(function, its argument, threads, 0)``. None where it has others than OpenMP's."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return function


_regions: dict[tuple[Callable, int], object] = {}
_lock = threading.Lock()


def prepare(loop: Callable, facts: int) -> None:
    """Compiles what `run` needs of a loop with so many facts, if there is more than one thread."""
    if torch.get_num_threads() > 1 and _openmp() is not None:
        _region(loop, facts)


def _region(loop: Callable, facts: int) -> int:
    """The address of a loop as a C function of a pointer to its facts."""
    if (loop, facts) not in _regions:
        from dmc.kernels.cpu.pieces import as_c

        with _lock:
            if (loop, facts) not in _regions:
                _regions[loop, facts] = as_c(loop, facts)
    return _regions[loop, facts].address


@lru_cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="dmc-loops")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads; OpenMP's are lost to it
