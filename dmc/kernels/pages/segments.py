"""Shared device functions of the Triton kernels of decode attention: full-precision entries, and results of segments."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def page_words(field: Tensor) -> int:
    """Distance of a field from page to page in units of 8 bytes: pages begin at multiples of 8, which allows wide loads.

    Raises:
        ValueError: if they do not.
    """
    words, rest = divmod(field.stride(0) * field.element_size(), 8)
    if rest:
        raise ValueError(f"pages are {8 * words + rest} bytes apart: the kernels take pages of a multiple of 8 bytes")
    return words


@triton.jit
def first_of_page(base, page, words):
    """Pointer to a field of page number ``page``; ``words``: from `page_words`."""
    return base + page * words * (64 // base.dtype.element_ty.primitive_bitwidth)


@triton.jit
def store_segment(
    sums, parts, top, total, acc, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
):
    """Stores the results of a segment."""
    item = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    g, d = tl.arange(0, GROUPS), tl.arange(0, BLOCK)
    tl.store(sums + item * 2 * G + g, top, g < G)
    tl.store(sums + item * 2 * G + G + g, total, g < G)
    tl.store(parts + (item * G + g)[:, None] * D + d[None, :], acc, (g < G)[:, None] & (d < D)[None, :])


@triton.jit
def shifted(s, shifts, shifts_per_query, g, entry, there, G: tl.constexpr):
    """Scores ``[GROUPS, N]`` plus the shifts of entries ``[N]``, which are counted from the row's first.

    ``shifts``: ``[R, G, shifts_per_query]``, or None.
    """
    if shifts is None:
        return s
    else:
        at = (tl.program_id(0).to(tl.int64) * G + g)[:, None] * shifts_per_query + entry[None, :]
        return s + tl.load(shifts + at, (g < G)[:, None] & there[None, :], 0.0)


@triton.jit
def full_segment(
    query, table, full_count, first_full, full_keys, full_values, any_scale, sums, parts, scale, fkp, fvp,
    PER_FULL: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, full_key_scale=None, full_value_scale=None, fsp=0,
    FULL_SCALED: tl.constexpr = False,
):
    """A program whose segment is among a row's full-precision entries: their ``table``, and a pointer to their number."""
    start, length = (tl.program_id(1) - first_full) * SEGMENT, tl.load(full_count)
    if FULL_SCALED:
        key_scale = full_key_scale
        value_scale = full_value_scale
    else:
        key_scale = any_scale
        value_scale = any_scale
    if start < length:
        top, total, acc = attend_segment(
            query, table, full_keys, full_values, key_scale, value_scale, fkp, fvp, fsp, fsp, start, length, scale, PER_FULL,
            FULL_SCALED, SEGMENT, TILE, GROUPS, PRECISION, D, BLOCK, G,
        )
        store_segment(sums, parts, top, total, acc, GROUPS, D, BLOCK, G)


@triton.jit
def attend_segment(
    query, table, keys, values, key_scale, value_scale, kp, vp, ksp, vsp, start, length, scale,
    PAGE: tl.constexpr, SCALED: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, shifts=None, shifts_per_query=0,
):
    """One segment of a row, in base-2 logarithms: its maximum and sum ``[GROUPS]``, its weighted values."""
    d, g = tl.arange(0, BLOCK), tl.arange(0, GROUPS)
    q = tl.load(query + (tl.program_id(0) * G + g)[:, None] * D + d[None, :], (g < G)[:, None] & (d < D)[None, :], 0.0)
    top = tl.full((GROUPS,), float("-inf"), tl.float32)
    total = tl.zeros((GROUPS,), tl.float32)
    acc = tl.zeros((GROUPS, BLOCK), tl.float32)
    for first in range(start, tl.minimum(start + SEGMENT, length), TILE):
        n = first + tl.arange(0, TILE)
        page = tl.load(table + n // PAGE, n < length, 0).to(tl.int64)
        within = n % PAGE
        mask = (n < length)[:, None] & (d < D)[None, :]
        k = tl.load((first_of_page(keys, page, kp) + within * D)[:, None] + d[None, :], mask, 0.0)
        v = tl.load((first_of_page(values, page, vp) + within * D)[:, None] + d[None, :], mask, 0.0)
        if GROUPS == 1:
            s = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :]
        else:
            s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        if SCALED:
            s *= tl.load(key_scale + page * ksp + within, n < length, 0.0).to(tl.float32)[None, :]
        s = shifted(s, shifts, shifts_per_query, g, n, n < length, G)
        s = tl.where((n < length)[None, :], s * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        if SCALED:
            p *= tl.load(value_scale + page * vsp + within, n < length, 0.0).to(tl.float32)[None, :]
        if GROUPS == 1:
            acc = acc * shrink[:, None] + tl.sum(tl.trans(p) * v.to(tl.float32), 0)[None, :]
        else:
            acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return top, total, acc
