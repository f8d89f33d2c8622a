"""The loops for CPUs compiled before they are needed."""

from __future__ import annotations

import logging
import time
from functools import lru_cache

import torch

from dmc.kernels import (
    decode_cpu,
    linear_cpu,
    linear_numba,
    loops_numba,
    prefill_cpu,
    rotated_cpu,
    rows_cpu,
    rows_numba,
    threads,
    trellis_cpu,
)
from dmc.kernels.decode import Paged

_log = logging.getLogger("dmc.kernels")


@lru_cache
def prepare(which: str) -> None:
    """Compiles loops, or reads what an earlier process compiled, so that no request has to wait for it.

    Args:
        which: "decode", "linear", "prefill", "rows" (what is between products), or "trellis" (those that encode such pages).
    """
    began = time.perf_counter()
    {"decode": _decode, "linear": _linear, "prefill": _prefill, "rows": _rows, "trellis": _trellis}[which]()
    if (seconds := time.perf_counter() - began) > 3:
        kept = "the next process finds them ready"
        if not loops_numba.KEPT:
            kept = "NUMBA_CACHE_DIR, a folder to write to, would keep them"
        _log.warning("dmc: compiled the %s loops for this CPU in %.0f s; %s", which, seconds, kept)


def _decode() -> None:
    table, count = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    pages = dict(zip("kv", torch.zeros(2, 1, 1, 4), strict=True))
    paged = Paged("dense", pages, pages, table, table, count, count)
    decode_cpu.decode(torch.zeros(1, 1, 4), *torch.zeros(2, 1, 4), torch.zeros(1, dtype=torch.int64), paged, 1.0)


def _linear() -> None:
    linear_cpu.Panels(torch.zeros(1, 1))(torch.zeros(1, 1))
    threads.prepare(linear_numba.multiply, linear_numba.FACTS)


def _prefill() -> None:
    places = torch.zeros(1, 1, dtype=torch.int32)
    for one in (torch.zeros(1, 1, 4), torch.zeros(1, 1, 4, dtype=torch.bfloat16)):
        prefill_cpu.prefill(one[None], one, one, places, one, one, places[0], 1.0)


def _rows() -> None:
    x = torch.zeros(1, 1, 2)
    rows_cpu.norm(x, x[0, 0], 1e-5)
    rows_cpu.gate(x)
    rows_cpu.turn(x, (x[0], x[0]))
    for loop in (rows_numba.norm, rows_numba.gate, rows_numba.turn):
        threads.prepare(loop, rows_numba.FACTS)


def _trellis() -> None:
    trellis_cpu.choose(torch.zeros(1, 1), [(1, 1)], {1: torch.zeros(4)})
    one = torch.ones(1, 1, dtype=torch.float64)
    rotated_cpu.encode(torch.zeros(1, 1, 1), one, [(1, 1)], {1: torch.zeros(4)}, mean=True, hadamard=True)
