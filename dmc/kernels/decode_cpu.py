"""Decode attention over pages on a CPU, where they lie: loops that numba compiles to vector instructions.

PyTorch has no attention over pages, so there each row's pages are copied together first, and codes are unpacked by a dozen
passes over memory. Here a page is read once, unpacked into a buffer that stays in the core's cache, and met by all queries of its
head. Scores and the weighted sum are two passes with PyTorch's exponential between; rows lie one behind the other, so each costs
what it holds and comes out the same whatever is beside it. Threads share the rows by what they hold, as many as PyTorch has.

`decode` takes the same cache as the Triton kernels (`dmc.kernels.decode.Paged`), of the kinds `KINDS`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dmc.kernels import loops_numba as loops
from dmc.kernels.decode import Paged, Trellis
from dmc.kernels.layout import NO_SCALE, PLANES, SCALE_STEPS

KINDS = {"dense": loops.DENSE, "int8": loops.INT8, "fp8": loops.FP8, "trellis": loops.TRELLIS}
_log = logging.getLogger("dmc.kernels")
_LEAST = 1 << 17  # products of a query and a feature for which another thread is worth waking


def decode(query: Tensor, own_key: Tensor, own_value: Tensor, index: Tensor, paged: Paged, scale: float) -> Tensor:
    """`dmc.kernels.decode.decode_attention` for fp32 on a CPU; no gradients."""
    rows, groups, size = query.shape
    trellis = paged.gear if isinstance(paged.gear, Trellis) else None
    query, own_key, own_value = (x.detach().float() for x in (query, own_key, own_value))
    if not rows:
        return torch.empty_like(query)
    places = index.numpy()
    tables = _tables(paged)
    entries = tables[2][places].astype(np.int64) * paged.page + tables[3][places] + 1
    starts = np.zeros(rows + 1, np.int64)  # of each row's scores, [G, its entries and own state]
    np.cumsum(entries * groups, out=starts[1:])
    scaled = query * scale
    turned = scaled @ trellis.rotation if trellis else scaled
    scores, out = query.new_empty(int(starts[-1])), query.new_empty(rows, groups, size)
    coded = query.new_empty(rows, groups, size) if trellis else out
    common = starts, places, *tables
    arguments = (scaled.contiguous().numpy(), turned.contiguous().numpy(), own_key.contiguous().numpy(), scores.numpy())
    most = int(starts[-1]) * size // _LEAST
    share(starts, lambda a, b: loops.scores(a, b, *arguments, *common, _side(paged, "k")), most=most)
    scores.exp_()
    arguments = (scores.numpy(), own_value.contiguous().numpy(), out.numpy(), coded.numpy())
    share(starts, lambda a, b: loops.combine(a, b, *arguments, *common, _side(paged, "v")), most=most)
    return out + coded @ trellis.rotation.T if trellis else out


@lru_cache
def prepare(*, trellis: bool = False) -> None:
    """Compiles the loops, or reads what an earlier process compiled, so that no request has to wait for it.

    Args:
        trellis: those too that encode trellis pages.
    """
    began = time.perf_counter()
    if trellis:
        from dmc.kernels.trellis_cpu import choose

        choose(torch.zeros(1, 1), [(1, 1)], {1: torch.zeros(4)})
    else:
        table, count = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        pages = {part: torch.zeros(1, 1, 4) for part in "kv"}
        decode(torch.zeros(1, 1, 4), *torch.zeros(2, 1, 4), torch.zeros(1, dtype=torch.int64), Paged(
            "dense", pages, pages, table, table, count, count), 1.0)
    if (seconds := time.perf_counter() - began) > 3:
        what = "trellis" if trellis else "attention"
        kept = "the next process finds them ready" if loops.KEPT else "NUMBA_CACHE_DIR, a folder to write to, would keep them"
        _log.warning("dmc: compiled the %s loops for this CPU in %.0f s; %s", what, seconds, kept)


def share(starts: np.ndarray, run: Callable[[int, int], None], *, most: int) -> None:
    """``run(begin, end)`` by threads, for stretches of rows that are about as much work; the loops let go of Python's lock.

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


@lru_cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="dmc-decode")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process has none of its parent's threads


def _tables(paged: Paged) -> tuple[np.ndarray, ...]:
    return tuple(x.numpy() for x in (paged.encoded_table, paged.open_table, paged.encoded_count, paged.exact_count))


# ------------------------------------------------------------------------------------------- what a side's pages are


@dataclass(frozen=True)
class _Memory:
    """A field's whole storage as numbers of one width, and where in it page p's part begins: ``offset + p * stride``."""

    flat: np.ndarray
    offset: int
    stride: int


def _memory(field: Tensor, kind: torch.dtype, as_numpy: type) -> _Memory:
    flat = torch.empty(0, dtype=kind).set_(field.untyped_storage())
    ratio = field.element_size() / kind.itemsize
    return _Memory(flat.numpy().view(as_numpy), int(field.storage_offset() * ratio), int(field.stride(0) * ratio))


def _side(paged: Paged, part: str) -> tuple:
    """The keys' or values' pages as `dmc.kernels.loops_numba` takes them; kept with ``paged``."""
    known = paged.__dict__.setdefault("_sides", {})
    if part not in known:
        known[part] = _made(paged, part)
    return known[part]


def _made(paged: Paged, part: str) -> tuple:
    fields, none = paged.encoded, _Memory(np.zeros(1, np.uint8), 0, 0)
    main = fields[{"dense": part, "int8": f"{part}_codes", "fp8": f"{part}_numbers", "trellis": f"{part}_codes"}[paged.kind]]
    exact = paged.opened[part]
    half = torch.int16, np.uint16  # numba has no bf16: read as bits
    assert all(x.dtype == torch.bfloat16 for name, x in fields.items() if x.is_floating_point() and name not in ("k", "v"))
    by_kind = {torch.float32: (torch.float32, np.float32), torch.bfloat16: half}
    scale = fields.get(f"{part}_scale")
    used = {
        "encoded32": _memory(main, *by_kind[torch.float32]) if main.dtype == torch.float32 else none,
        "encoded16": _memory(main, *half) if main.dtype == torch.bfloat16 else none,
        "encoded8": _memory(main, torch.uint8, np.uint8) if main.element_size() == 1 else none,
        "scale16": _memory(scale, *half) if scale is not None and scale.element_size() == 2 else none,
        "scale8": _memory(scale, torch.uint8, np.uint8) if scale is not None and scale.element_size() == 1 else none,
        "top": _memory(fields[f"{part}_top"], *half) if f"{part}_top" in fields else none,
        "mean": _memory(fields[f"{part}_mean"], torch.uint8, np.int8) if f"{part}_mean" in fields else none,
        "unit": _memory(fields[f"{part}_unit"], *half) if f"{part}_unit" in fields else none,
        "exact32": _memory(exact, *by_kind[torch.float32]) if exact.dtype == torch.float32 else none,
        "exact16": _memory(exact, *half) if exact.dtype == torch.bfloat16 else none,
    }
    types = {"encoded32": np.float32, "encoded16": np.uint16, "encoded8": np.uint8, "scale16": np.uint16, "scale8": np.uint8,
             "top": np.uint16, "mean": np.int8, "unit": np.uint16, "exact32": np.float32, "exact16": np.uint16}
    flats = tuple(used[name].flat if used[name] is not none else np.zeros(1, types[name]) for name in types)
    where = np.array([(used[name].offset, used[name].stride) for name in types], np.int64)
    sizes = np.array([
        KINDS[paged.kind], paged.page, paged.opened[part].shape[1], main.dtype == torch.bfloat16, exact.dtype == torch.bfloat16,
        f"{part}_mean" in fields,
    ], np.int64)
    return flats, where, sizes, *_codes(paged, part)


def _codes(paged: Paged, part: str) -> tuple[np.ndarray, np.ndarray]:
    """What codes stand for: a table; and for trellis pages a line for each plane of each stretch."""
    if paged.kind == "fp8":
        numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return numbers.nan_to_num_(0.0).numpy(), np.zeros((1, 6), np.int64)
    if paged.kind != "trellis":
        return np.zeros(1, np.float32), np.zeros((1, 6), np.int64)
    layout, tables, lines, start, first = paged.gear, [], [], 0, 0
    for count, bits in layout.stretches(part):
        table, shift = sum(len(known) for known in tables), 0
        for width in PLANES[bits]:
            lines.append((first, count, width, shift, start, table))
            start, shift = start + -(-layout.page * count * width // 8), shift + width
        tables.append(layout.levels[bits].numpy())
        first += count
    falls = np.exp2(np.arange(256) / -SCALE_STEPS).astype(np.float32)
    falls[NO_SCALE] = 0.0
    return np.concatenate([falls, *tables]).astype(np.float32), np.array(lines, np.int64)
