"""Trellis pages for models with one query head to each key/value head, in less than half of the general kernel's instructions.

Without a group the matrix units have no use: the thread that finds a level (`dmc.kernels.formats.trellis.words`) multiplies
it by its query, or by its entry's weight, in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dmc.kernels.backend import interpreted
from dmc.kernels.formats.trellis.words import (
    BITS,
    columns,
    indices_of,
    level,
    plane_words,
    scales,
    second_plane,
    shared_by_blocks,
    table_of,
    width,
)
from dmc.kernels.pages.segments import full_segment, shifted

TILE = 16  # full-precision entries at a time: one warp holds them


def takes(groups: int, chunks: tuple[tuple[int, int], ...]) -> bool:
    """True if these kernels read pages of such chunks, of keys and values together, for so many queries per head."""
    return groups == 1 and all(bits in BITS for _, bits in chunks)


def launch(grid: tuple[int, int], shared: dict, constants: dict) -> None:
    """Fills the segments: ``shared`` are arguments of both kernels, ``constants`` those of `dmc.kernels.decode.gpu.decode`."""
    words, rows = {}, shared["PAGE"] // 8
    for part in "KV":
        first = shared[f"{part}_FIRST"]
        words |= {f"{part}_WORDS": columns(first), f"{part}_MORE": columns(constants["D"] - first or 4)}
    _single_segments[grid](
        **shared, **words, **constants | {"TILE": TILE, "num_warps": max(1, rows // 8), "num_stages": 1}, N=rows,
        SHUFFLE=not interpreted(),
    )


@triton.jit
def _score(
    codes, table, q, i, w, found, COUNT: tl.constexpr, BITS: tl.constexpr, BEFORE: tl.constexpr, BEFORE_COUNT: tl.constexpr,
    BEFORE_BITS: tl.constexpr, N: tl.constexpr, SHUFFLE: tl.constexpr,
):
    """Adds a chunk's part to the products of the query and each entry, eight ``[N]``."""
    WIDTH: tl.constexpr = width(BITS)
    second = second_plane(codes, i, w, COUNT, BITS, N)
    rows = ()
    for k in tl.static_range(WIDTH):
        rows = rows + (shared_by_blocks(codes, i, w, k, COUNT, BITS, BEFORE, BEFORE_COUNT, BEFORE_BITS, N),)
    out = ()
    for b in tl.static_range(8):
        indices, sign = indices_of(rows[b % WIDTH][0], rows[b % WIDTH][1], second, b, BITS)
        product = level(table, indices, sign, 0, BITS, SHUFFLE) * q[0]
        for j in tl.static_range(1, 4):
            product += level(table, indices, sign, j, BITS, SHUFFLE) * q[j]
        out = out + (found[b] + tl.sum(product, 1),)
    return out


@triton.jit
def _combine(
    codes, table, weights, acc, i, w, COUNT: tl.constexpr, BITS: tl.constexpr, BEFORE: tl.constexpr,
    BEFORE_COUNT: tl.constexpr, BEFORE_BITS: tl.constexpr, N: tl.constexpr, SHUFFLE: tl.constexpr,
):
    """Adds the entries' levels, each times its weight, of eight ``[N]``, to four ``[N, W]``, one per index in a word."""
    WIDTH: tl.constexpr = width(BITS)
    second = second_plane(codes, i, w, COUNT, BITS, N)
    acc0, acc1, acc2, acc3 = acc
    for k in tl.static_range(WIDTH):
        high, once = shared_by_blocks(codes, i, w, k, COUNT, BITS, BEFORE, BEFORE_COUNT, BEFORE_BITS, N)
        for h in tl.static_range(8 // WIDTH):
            indices, sign = indices_of(high, once, second, h * WIDTH + k, BITS)
            weight = weights[h * WIDTH + k][:, None]
            acc0 += level(table, indices, sign, 0, BITS, SHUFFLE) * weight
            acc1 += level(table, indices, sign, 1, BITS, SHUFFLE) * weight
            acc2 += level(table, indices, sign, 2, BITS, SHUFFLE) * weight
            acc3 += level(table, indices, sign, 3, BITS, SHUFFLE) * weight
    return acc0, acc1, acc2, acc3


@triton.jit
def _queries(rotated, w, COUNT: tl.constexpr):
    """The features of a chunk by their index in a word, four fp32 ``[1, W]``."""
    at, there = rotated + 4 * w[None, :], (4 * w < COUNT)[None, :]
    found = ()
    for j in tl.static_range(4):
        found = found + (tl.load(at + j, there, 0.0).to(tl.float32),)
    return found


@triton.jit
def _put(parts, acc, w, COUNT: tl.constexpr):
    for j in tl.static_range(4):
        tl.store(parts + 4 * w + j, tl.sum(acc[j], 0), 4 * w < COUNT)


@triton.jit
def _single_segments(
    query, rotated, index, encoded_count, full_count, first_full, encoded_table, full_table, full_keys, full_values, sums, parts,
    scale, et, ft, fkp, fvp,
    k_codes, k_scale, k_top, k_mean, k_unit, k_levels, k_rest, v_codes, v_scale, v_top, v_levels, v_rest,
    page8, page16, page32, PAGE: tl.constexpr, K_WORDS: tl.constexpr, K_MORE: tl.constexpr, V_WORDS: tl.constexpr,
    V_MORE: tl.constexpr, PER_FULL: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
    K_FIRST: tl.constexpr, K_BITS: tl.constexpr, K_REST: tl.constexpr, K_MEAN: tl.constexpr,
    V_FIRST: tl.constexpr, V_BITS: tl.constexpr, V_REST: tl.constexpr, N: tl.constexpr, SHUFFLE: tl.constexpr,
    shifts=None, shifts_per_query=0, full_key_scale=None, full_value_scale=None, fsp=0, FULL_SCALED: tl.constexpr = False,
):
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
    rotated += row.to(tl.int64) * D
    i, d = tl.arange(0, N), tl.arange(0, BLOCK)
    kw, vw = tl.arange(0, K_WORDS), tl.arange(0, V_WORDS)
    whole = tl.load(rotated + d, d < D, 0.0).to(tl.float32)
    q, k_table, v_table = _queries(rotated, kw, K_FIRST), table_of(k_levels, K_BITS, SHUFFLE), table_of(v_levels, V_BITS, SHUFFLE)
    blank = tl.zeros((N, V_WORDS), tl.float32)
    acc = blank, blank, blank, blank
    if K_REST > 0:
        K_START: tl.constexpr = plane_words(PAGE * K_FIRST, K_BITS)
        more_kw = tl.arange(0, K_MORE)
        more_q, more_k_table = _queries(rotated + K_FIRST, more_kw, D - K_FIRST), table_of(k_rest, K_REST, SHUFFLE)
    if V_REST > 0:
        V_START: tl.constexpr = plane_words(PAGE * V_FIRST, V_BITS)
        more_vw = tl.arange(0, V_MORE)
        more_v_table = table_of(v_rest, V_REST, SHUFFLE)
        more_blank = tl.zeros((N, V_MORE), tl.float32)
        more_acc = more_blank, more_blank, more_blank, more_blank
    top, total = float("-inf"), 0.0
    for column in range(first, tl.minimum(first + SEGMENT // PAGE, last)):
        page = tl.load(encoded_table + table_row * et + column).to(tl.int64)
        at8, at16, at32 = page * page8, page * page16, page * page32
        zero = tl.zeros((N,), tl.float32)
        s = _score(
            k_codes + at32, k_table, q, i, kw, (zero, zero, zero, zero, zero, zero, zero, zero), K_FIRST, K_BITS, 0, 0, 0, N,
            SHUFFLE,
        )
        if K_REST > 0:
            s = _score(
                k_codes + at32 + K_START, more_k_table, more_q, i, more_kw, s, D - K_FIRST, K_REST, K_START, K_FIRST, K_BITS, N,
                SHUFFLE,
            )
        shift = 0.0
        if K_MEAN:
            mean = tl.load(k_mean + at8 + d, d < D, 0).to(tl.float32) * tl.load(k_unit + at16).to(tl.float32)
            shift = tl.sum(whole * mean, 0)
        scaled, new_top = (), top
        for b in tl.static_range(8):
            one = s[b] * scales(k_scale + at8, k_top + at16, b * N + i) + shift
            one = shifted(one[None, :], shifts, shifts_per_query, tl.arange(0, 1), column * PAGE + b * N + i, i < N, 1)
            one = tl.sum(one, 0) * scale
            new_top = tl.maximum(new_top, tl.max(one, 0))
            scaled = scaled + (one,)
        shrink = tl.exp2(top - new_top)
        weights, mass = (), tl.zeros((N,), tl.float32)
        for b in tl.static_range(8):
            one = tl.exp2(scaled[b] - new_top)
            mass += one
            weights = weights + (one * scales(v_scale + at8, v_top + at16, b * N + i),)
        total = total * shrink + tl.sum(mass, 0)
        acc = acc[0] * shrink, acc[1] * shrink, acc[2] * shrink, acc[3] * shrink
        acc = _combine(v_codes + at32, v_table, weights, acc, i, vw, V_FIRST, V_BITS, 0, 0, 0, N, SHUFFLE)
        if V_REST > 0:
            more_acc = more_acc[0] * shrink, more_acc[1] * shrink, more_acc[2] * shrink, more_acc[3] * shrink
            more_acc = _combine(
                v_codes + at32 + V_START, more_v_table, weights, more_acc, i, more_vw, D - V_FIRST, V_REST, V_START, V_FIRST,
                V_BITS, N, SHUFFLE,
            )
        top = new_top
    item = row.to(tl.int64) * tl.num_programs(1) + segment
    tl.store(sums + item * 2, top)
    tl.store(sums + item * 2 + 1, total)
    _put(parts + item * D, acc, vw, V_FIRST)
    if V_REST > 0:
        _put(parts + item * D + V_FIRST, more_acc, more_vw, D - V_FIRST)
