"""Decode attention over the trellis pages that neither `dmc.kernels.formats.trellis.single` nor `.grouped` reads.

These are pages of 6 to 8 bits, long pages, and small heads in groups. Codes are read as words of four, whose indices in the
table of levels are computed together in a few instructions; the table, of at most 2 KiB, stays in the cache nearest to the
cores.

A vector of D codes is one chunk or two of different widths. Features are held by their index in a word, in four tiles whose
columns are words; the words of two chunks alternate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dmc.kernels.formats.trellis.words import plane_words, scales
from dmc.kernels.pages.layout import PLANES
from dmc.kernels.pages.segments import full_segment, shifted


def launch(
    grid: tuple[int, int], shared: dict, constants: dict, key: tuple[tuple[int, int], ...], value: tuple[tuple[int, int], ...],
) -> None:
    """Fills the segments: ``shared`` are the arguments of all kernels, ``constants`` those of `dmc.kernels.decode.gpu.decode`.

    Args:
        grid: programs.
        shared, constants: see above.
        key, value: see `dmc.kernels.formats.trellis.format.TrellisFormat`.
    """
    pairs = len(key), len(value)
    most = max(count for count, _ in key + value)
    words = max(16 // min(pairs), triton.next_power_of_2(most // 4))  # a matmul needs 16 columns or more
    _trellis_segments[grid](
        **shared, WORDS=words, K_COLUMNS=words * pairs[0], V_COLUMNS=words * pairs[1], **constants | {"num_stages": 1},
    )


@triton.constexpr_function
def _widths(bits):
    return PLANES[bits]


@triton.jit
def _plane(codes, n, w, mask, COUNT: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr):
    """Bits of one plane, four codes per word, one per byte: int32, in the broadcast shape of ``n`` and ``w``."""
    ROWS: tl.constexpr = PAGE * WIDTH // 8  # entries at the same bits of their bytes
    MASK: tl.constexpr = 0x01010101 * ((1 << WIDTH) - 1) if WIDTH < 8 else -1
    word = tl.load(codes + (n % ROWS) * (COUNT // 4) + w, mask, 0)
    return (word >> (n // ROWS * WIDTH)) & MASK


@triton.jit
def _lowest(codes, n, w, mask, COUNT: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr):
    """The path: the lowest bit of each code."""
    return _plane(codes, n, w, mask, COUNT, _widths(BITS)[0], PAGE) & 0x01010101


@triton.jit
def _indices(
    codes, n, w, before, COUNT: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr,
):
    """Indices in the table of levels, four per word ``[PAGE, WORDS]``: (all bits, or at 8 bits all except the lowest; that one).

    ``before [PAGE]``: the path's word before the chunk.
    """
    n, w = n[:, None], w[None, :]
    mask = (w < COUNT // 4) & (n >= 0)
    WIDTHS: tl.constexpr = _widths(BITS)
    code = _plane(codes, n, w, mask, COUNT, WIDTHS[0], PAGE)
    path = code & 0x01010101
    if len(WIDTHS) > 1:
        start: tl.constexpr = PAGE * COUNT * WIDTHS[0] // 32
        code |= _plane(codes + start, n, w, mask, COUNT, WIDTHS[1], PAGE) << WIDTHS[0]
    if len(WIDTHS) > 2:
        start2: tl.constexpr = PAGE * COUNT * (WIDTHS[0] + WIDTHS[1]) // 32
        code |= _plane(codes + start2, n, w, mask, COUNT, WIDTHS[2], PAGE) << (WIDTHS[0] + WIDTHS[1])
    earlier = _lowest(codes, n, w - 1, mask & (w > 0), COUNT, BITS, PAGE)
    earlier = tl.where(w > 0, earlier, before[:, None])
    once = (path << 8) | (earlier >> 24)
    twice = (path << 16) | (earlier >> 16)
    high = code ^ twice  # the cell, and path xor twice below it
    if BITS == 8:
        return high, once
    else:
        return (high << 1) | once, once


@triton.jit
def _level(table, indices, once, j: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Levels of the j-th codes of words."""
    index = (indices >> (8 * j)) & 255
    if BITS == 8:
        index = 2 * index + ((once >> (8 * j)) & 1)
    # Hint of contiguity 1 along the words: the compiler then keeps the words' layout for the loads. Without it, every address
    # goes through shared memory. There is no multiple, so loads are scalar, as they have to be.
    return tl.load(table + tl.max_contiguous(index, (1, 2))).to(dtype)


@triton.jit
def _page(
    codes, table, more_table, n, w, dtype: tl.constexpr, FIRST: tl.constexpr, BITS: tl.constexpr, REST: tl.constexpr,
    PAGE: tl.constexpr, WORDS: tl.constexpr, D: tl.constexpr,
):
    """A page's levels by their index in a word, four ``[PAGE, WORDS]``, or ``[PAGE, 2 WORDS]`` where two chunks alternate."""
    a, a_once = _indices(codes, n, w, tl.zeros((PAGE,), tl.int32), FIRST, BITS, PAGE)
    found = ()
    if REST > 0:
        more = codes + plane_words(PAGE * FIRST, BITS)
        b, b_once = _indices(more, n, w, _lowest(codes, n, FIRST // 4 - 1, n >= 0, FIRST, BITS, PAGE), D - FIRST, REST, PAGE)
        for j in tl.static_range(4):
            both = tl.join(_level(table, a, a_once, j, BITS, dtype), _level(more_table, b, b_once, j, REST, dtype))
            found = found + (tl.reshape(both, (PAGE, 2 * WORDS)),)
    else:
        for j in tl.static_range(4):
            found = found + (_level(table, a, a_once, j, BITS, dtype),)
    return found


@triton.jit
def _features(x, FIRST: tl.constexpr, REST: tl.constexpr, D: tl.constexpr):
    """The feature of the first code of each word, in the order of `_page`'s columns ``x``, and True where it exists."""
    if REST > 0:
        w, second = x // 2, x % 2
        return second * FIRST + 4 * w, 4 * w < tl.where(second > 0, D - FIRST, FIRST)
    else:
        return 4 * x, 4 * x < D


@triton.jit
def _trellis_segments(
    query, rotated, index, encoded_count, full_count, first_full, encoded_table, full_table, full_keys, full_values, sums, parts,
    scale, et, ft, fkp, fvp,
    k_codes, k_scale, k_top, k_mean, k_unit, k_levels, k_rest, v_codes, v_scale, v_top, v_levels, v_rest,
    page8, page16, page32, PAGE: tl.constexpr, WORDS: tl.constexpr, K_COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr, PER_FULL: tl.constexpr, SEGMENT: tl.constexpr,
    TILE: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
    K_FIRST: tl.constexpr, K_BITS: tl.constexpr, K_REST: tl.constexpr, K_MEAN: tl.constexpr,
    V_FIRST: tl.constexpr, V_BITS: tl.constexpr, V_REST: tl.constexpr, shifts=None, shifts_per_query=0,
    full_key_scale=None, full_value_scale=None, fsp=0, FULL_SCALED: tl.constexpr = False,
):
    """As `dmc.kernels.formats.plain.decode._segments`, for trellis pages; the weighted values are rotated."""
    row, segment = tl.program_id(0), tl.program_id(1)
    table_row = tl.load(index + row).to(tl.int64)
    if segment >= first_full:
        full_segment(
            query, full_table + table_row * ft, full_count + table_row, first_full, full_keys, full_values, k_top, sums, parts,
            scale, fkp, fvp, PER_FULL, SEGMENT, TILE, GROUPS, PRECISION, D, BLOCK, G,
            full_key_scale, full_value_scale, fsp, FULL_SCALED,
        )
        return
    first, last = segment * (SEGMENT // PAGE), tl.load(encoded_count + table_row)
    if first >= last:
        return
    g, n, w = tl.arange(0, GROUPS), tl.arange(0, PAGE), tl.arange(0, WORDS)
    dtype: tl.constexpr = rotated.dtype.element_ty
    feature, there = _features(tl.arange(0, K_COLUMNS), K_FIRST, K_REST, D)
    at, mask = rotated + (row * G + g)[:, None] * D + feature[None, :], (g < G)[:, None] & there[None, :]
    q = tl.load(at, mask, 0.0), tl.load(at + 1, mask, 0.0), tl.load(at + 2, mask, 0.0), tl.load(at + 3, mask, 0.0)
    blank = tl.zeros((GROUPS, V_COLUMNS), tl.float32)
    acc0, acc1, acc2, acc3 = blank, blank, blank, blank
    top = tl.full((GROUPS,), float("-inf"), tl.float32)
    total = tl.zeros((GROUPS,), tl.float32)
    d = tl.arange(0, BLOCK)
    whole = tl.load(rotated + (row * G + g)[:, None] * D + d[None, :], (g < G)[:, None] & (d < D)[None, :], 0.0).to(tl.float32)
    for column in range(first, tl.minimum(first + SEGMENT // PAGE, last)):
        page = tl.load(encoded_table + table_row * et + column).to(tl.int64)
        at8, at16, at32 = page * page8, page * page16, page * page32
        levels = _page(k_codes + at32, k_levels, k_rest, n, w, dtype, K_FIRST, K_BITS, K_REST, PAGE, WORDS, D)
        s = tl.zeros((GROUPS, PAGE), tl.float32)
        for j in tl.static_range(4):
            s = tl.dot(q[j], tl.trans(levels[j]), s, input_precision=PRECISION)
        s *= scales(k_scale + at8, k_top + at16, n)[None, :]
        if K_MEAN:
            mean = tl.load(k_mean + at8 + d, d < D, 0).to(tl.float32) * tl.load(k_unit + at16).to(tl.float32)
            s += tl.sum(whole * mean[None, :], 1)[:, None]
        s = shifted(s, shifts, shifts_per_query, g, column * PAGE + n, n < PAGE, G) * scale
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        p = (p * scales(v_scale + at8, v_top + at16, n)[None, :]).to(dtype)
        levels = _page(v_codes + at32, v_levels, v_rest, n, w, dtype, V_FIRST, V_BITS, V_REST, PAGE, WORDS, D)
        acc0 = tl.dot(p, levels[0], acc0 * shrink[:, None], input_precision=PRECISION)
        acc1 = tl.dot(p, levels[1], acc1 * shrink[:, None], input_precision=PRECISION)
        acc2 = tl.dot(p, levels[2], acc2 * shrink[:, None], input_precision=PRECISION)
        acc3 = tl.dot(p, levels[3], acc3 * shrink[:, None], input_precision=PRECISION)
        top = new_top
    item = row.to(tl.int64) * tl.num_programs(1) + segment
    tl.store(sums + item * 2 * G + g, top, g < G)
    tl.store(sums + item * 2 * G + G + g, total, g < G)
    feature, there = _features(tl.arange(0, V_COLUMNS), V_FIRST, V_REST, D)
    to, mask = parts + (item * G + g)[:, None] * D + feature[None, :], (g < G)[:, None] & there[None, :]
    tl.store(to, acc0, mask)
    tl.store(to + 1, acc1, mask)
    tl.store(to + 2, acc2, mask)
    tl.store(to + 3, acc3, mask)
