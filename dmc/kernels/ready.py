"""The CPU kernels, compiled before they are needed. This file can be imported without numba."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch

from dmc.kernels.backend import give_up_cpu_kernels
from dmc.kernels.formats.plain.format import PlainFormat
from dmc.kernels.pages.format import PageFormat
from dmc.kernels.pages.paged import Paged

_log = logging.getLogger("dmc.kernels")


def compiles(*which: str, formats: Iterable[PageFormat] = ()) -> bool:
    """Compiles CPU kernels before they are needed (`prepare`); if that fails, PyTorch replaces them in this process.

    Args:
        which: see `prepare`.
        formats: of pages that the CPU kernels will read.

    Returns:
        True if they are compiled.
    """
    try:
        for name in which:
            prepare(name)
        for one in formats:
            if one.cpu_reads:
                prepare_format(one)
        return True
    except Exception as error:  # of the compiler, or of what it keeps on disk
        give_up_cpu_kernels(f"{type(error).__name__}: {error}")
        return False


@lru_cache
def prepare(which: str) -> None:
    """Compiles CPU kernels, or reads the machine code of an earlier process, so that no request waits for it.

    Args:
        which: "decode", "prefill", or "trellis" (kernels that encode such pages).
    """
    known = {"decode": _decode, "prefill": _prefill, "trellis": _trellis}
    _timed(which, known[which])


def prepare_format(one: PageFormat) -> None:
    """The same for the functions that read pages of a format."""
    reader = one.cpu_reader(dict.fromkeys(one.fields, 0))
    _timed(f"{one.name} pages'", lambda: (reader.keys.address, reader.values.address))


def _timed(which: str, compile: Callable[[], object]) -> None:  # noqa: A002
    from dmc.kernels.cpu import compiled

    began = time.perf_counter()
    compile()
    if (seconds := time.perf_counter() - began) > 3:
        kept = "the next process finds them compiled"
        if not compiled.KEPT:
            kept = "NUMBA_CACHE_DIR, a folder to write to, would keep them"
        _log.warning("dmc: compiling or loading the %s CPU kernels took %.0f s; %s", which, seconds, kept)


def _decode() -> None:
    from dmc.kernels.decode import cpu

    table, count = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    pages = dict(zip("kv", torch.zeros(2, 1, 1, 4), strict=True))
    made = PlainFormat("dense", 1, 4, {part: (torch.float32, (1, 4)) for part in "kv"}, lambda k, v: {"k": k, "v": v})
    paged = Paged(made, pages, pages, table, table, count, count)
    cpu.decode(torch.zeros(1, 1, 4), *torch.zeros(2, 1, 4), torch.zeros(1, dtype=torch.int64), paged, 1.0)


def _prefill() -> None:
    from dmc.kernels.prefill import cpu

    positions = torch.zeros(1, 1, dtype=torch.int32)
    for one in (torch.zeros(1, 1, 4), torch.zeros(1, 1, 4, dtype=torch.bfloat16)):
        cpu.prefill(one[None], one, one, positions, one, one, positions[0], 1.0)


def _trellis() -> None:
    from dmc.kernels.formats.trellis import cpu, viterbi_cpu

    viterbi_cpu.choose(torch.zeros(1, 1), [(1, 1)], {1: torch.zeros(4)})
    one = torch.ones(1, 1, dtype=torch.float64)
    cpu.encode(torch.zeros(1, 1, 1), one, [(1, 1)], {1: torch.zeros(4)}, mean=True, hadamard=True)
