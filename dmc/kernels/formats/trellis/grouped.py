"""Trellis pages for models whose query heads share key/value heads, in half of the general kernel's instructions.

Levels are found as `dmc.kernels.formats.trellis.words` does it, and go to the matrix units in tiles of some blocks on top of each
other, 16 entries or more, one for each index in a word.
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
_GROUPS = 16  # largest number of queries per head
_LEAST = 16  # columns, entries and queries of a product
_PAGE = 64  # largest number of entries: more take two warps, which would do the same work twice
_WASTE = 1.5  # largest ratio of columns to columns with words: above it the general kernel is as fast


def takes(groups: int, page: int, *sides: tuple[tuple[int, int], ...]) -> bool:
    """True if this kernel reads pages of so many entries, keys and values in such chunks, for so many queries per head."""
    def fits(side: tuple[tuple[int, int], ...]) -> bool:
        held = sum(count for count, _ in side)
        return 4 * sum(_columns(count) for count, _ in side) <= _WASTE * held and all(bits in BITS for _, bits in side)

    return groups <= _GROUPS and page <= _PAGE and all(map(fits, sides))


def launch(grid: tuple[int, int], shared: dict, constants: dict) -> None:
    """Fills the segments: ``shared`` are the arguments of all kernels, ``constants`` those of `dmc.kernels.decode.gpu.decode`."""
    words, rows = {}, shared["PAGE"] // 8
    for part in "KV":
        first = shared[f"{part}_FIRST"]
        words |= {f"{part}_WORDS": _columns(first), f"{part}_MORE": _columns(constants["D"] - first or 4)}
    _grouped_segments[grid](
        **shared, **words, **constants | {"TILE": TILE, "num_warps": 1, "num_stages": 1}, N=rows, JOIN=_LEAST // rows,
        SHUFFLE=not interpreted(),
    )


def _columns(count: int) -> int:
    return max(_LEAST, columns(count))


@triton.jit
def _pair(a, b):
    """Stacks one tile on the other."""
    return tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), (2 * a.shape[0], a.shape[1]))


@triton.jit
def _stack(tiles, j: tl.constexpr, COUNT: tl.constexpr):
    """Stacks the j-th tiles of 2, 4 or 8 tuples."""
    if COUNT == 2:
        return _pair(tiles[0][j], tiles[1][j])
    elif COUNT == 4:
        return _pair(_pair(tiles[0][j], tiles[1][j]), _pair(tiles[2][j], tiles[3][j]))
    else:
        first = _pair(_pair(tiles[0][j], tiles[1][j]), _pair(tiles[2][j], tiles[3][j]))
        return _pair(first, _pair(_pair(tiles[4][j], tiles[5][j]), _pair(tiles[6][j], tiles[7][j])))


@triton.jit
def _tiles(
    rows, table, second, part: tl.constexpr, BITS: tl.constexpr, JOIN: tl.constexpr, SHUFFLE: tl.constexpr, dtype: tl.constexpr,
):
    """Levels of the part-th JOIN blocks: a tuple of four ``[N, W]``, one per index in a word, for each."""
    WIDTH: tl.constexpr = width(BITS)
    tiles = ()
    for m in tl.static_range(JOIN):
        high, once = rows[(part * JOIN + m) % WIDTH]
        indices, sign = indices_of(high, once, second, part * JOIN + m, BITS)
        four = ()
        for j in tl.static_range(4):
            four = four + (level(table, indices, sign, j, BITS, SHUFFLE).to(dtype),)
        tiles = tiles + (four,)
    return tiles


@triton.jit
def _rows(
    codes, i, w, COUNT: tl.constexpr, BITS: tl.constexpr, BEFORE: tl.constexpr, BEFORE_COUNT: tl.constexpr,
    BEFORE_BITS: tl.constexpr, N: tl.constexpr,
):
    WIDTH: tl.constexpr = width(BITS)
    rows = ()
    for k in tl.static_range(WIDTH):
        rows = rows + (shared_by_blocks(codes, i, w, k, COUNT, BITS, BEFORE, BEFORE_COUNT, BEFORE_BITS, N),)
    return rows


@triton.jit
def _score(
    codes, table, q, i, w, found, COUNT: tl.constexpr, BITS: tl.constexpr, BEFORE: tl.constexpr, BEFORE_COUNT: tl.constexpr,
    BEFORE_BITS: tl.constexpr, N: tl.constexpr, JOIN: tl.constexpr, PRECISION: tl.constexpr, SHUFFLE: tl.constexpr,
):
    """Adds a chunk's part to the products of queries and entries, 8 / JOIN of ``[GROUPS, JOIN * N]``."""
    second = second_plane(codes, i, w, COUNT, BITS, N)
    rows = _rows(codes, i, w, COUNT, BITS, BEFORE, BEFORE_COUNT, BEFORE_BITS, N)
    out = ()
    for part in tl.static_range(8 // JOIN):
        tiles = _tiles(rows, table, second, part, BITS, JOIN, SHUFFLE, q[0].dtype)
        s = found[part]
        for j in tl.static_range(4):
            s = tl.dot(q[j], tl.trans(_stack(tiles, j, JOIN)), s, input_precision=PRECISION)
        out = out + (s,)
    return out


@triton.jit
def _combine(
    codes, table, weights, acc, i, w, COUNT: tl.constexpr, BITS: tl.constexpr, BEFORE: tl.constexpr,
    BEFORE_COUNT: tl.constexpr, BEFORE_BITS: tl.constexpr, N: tl.constexpr, JOIN: tl.constexpr, PRECISION: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """Adds the entries' levels, each times its weights, to four ``[GROUPS, W]``, one per index in a word."""
    second = second_plane(codes, i, w, COUNT, BITS, N)
    rows = _rows(codes, i, w, COUNT, BITS, BEFORE, BEFORE_COUNT, BEFORE_BITS, N)
    acc0, acc1, acc2, acc3 = acc
    for part in tl.static_range(8 // JOIN):
        tiles = _tiles(rows, table, second, part, BITS, JOIN, SHUFFLE, weights[0].dtype)
        acc0 = tl.dot(weights[part], _stack(tiles, 0, JOIN), acc0, input_precision=PRECISION)
        acc1 = tl.dot(weights[part], _stack(tiles, 1, JOIN), acc1, input_precision=PRECISION)
        acc2 = tl.dot(weights[part], _stack(tiles, 2, JOIN), acc2, input_precision=PRECISION)
        acc3 = tl.dot(weights[part], _stack(tiles, 3, JOIN), acc3, input_precision=PRECISION)
    return acc0, acc1, acc2, acc3


@triton.jit
def _shift(mean, q, w, found, COUNT: tl.constexpr, JOINED: tl.constexpr, PRECISION: tl.constexpr):
    """Adds the queries' products with a chunk of the keys' mean, in its unit, in every column of ``[GROUPS, JOINED]``."""
    for j in tl.static_range(4):
        part = tl.load(mean + 4 * w + j, 4 * w < COUNT, 0).to(q[0].dtype)
        found = tl.dot(q[j], tl.broadcast_to(part[:, None], (w.shape[0], JOINED)), found, input_precision=PRECISION)
    return found


@triton.jit
def _queries(rotated, g, w, COUNT: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """The features of a chunk by their index in a word, four ``[GROUPS, W]``."""
    at, there = rotated + g[:, None] * D + 4 * w[None, :], (4 * w < COUNT)[None, :] & (g < G)[:, None]
    found = ()
    for j in tl.static_range(4):
        found = found + (tl.load(at + j, there, 0.0),)
    return found


@triton.jit
def _put(parts, acc, g, w, COUNT: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    at, there = parts + g[:, None] * D + 4 * w[None, :], (4 * w < COUNT)[None, :] & (g < G)[:, None]
    for j in tl.static_range(4):
        tl.store(at + j, acc[j], there)


@triton.jit
def _grouped_segments(
    query, rotated, index, encoded_count, full_count, first_full, encoded_table, full_table, full_keys, full_values, sums, parts,
    scale, et, ft, fkp, fvp,
    k_codes, k_scale, k_top, k_mean, k_unit, k_levels, k_rest, v_codes, v_scale, v_top, v_levels, v_rest,
    page8, page16, page32, PAGE: tl.constexpr, K_WORDS: tl.constexpr, K_MORE: tl.constexpr, V_WORDS: tl.constexpr,
    V_MORE: tl.constexpr, PER_FULL: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
    K_FIRST: tl.constexpr, K_BITS: tl.constexpr, K_REST: tl.constexpr, K_MEAN: tl.constexpr,
    V_FIRST: tl.constexpr, V_BITS: tl.constexpr, V_REST: tl.constexpr, N: tl.constexpr, JOIN: tl.constexpr,
    SHUFFLE: tl.constexpr, shifts=None, shifts_per_query=0,
    full_key_scale=None, full_value_scale=None, fsp=0, FULL_SCALED: tl.constexpr = False,
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
    JOINED: tl.constexpr = JOIN * N
    rotated += row.to(tl.int64) * G * D
    dtype: tl.constexpr = rotated.dtype.element_ty
    g, i, n = tl.arange(0, GROUPS), tl.arange(0, N), tl.arange(0, JOINED)
    kw, vw = tl.arange(0, K_WORDS), tl.arange(0, V_WORDS)
    k_table, v_table = table_of(k_levels, K_BITS, SHUFFLE), table_of(v_levels, V_BITS, SHUFFLE)
    q = _queries(rotated, g, kw, K_FIRST, D, G)
    blank = tl.zeros((GROUPS, V_WORDS), tl.float32)
    acc = blank, blank, blank, blank
    if K_REST > 0:
        K_START: tl.constexpr = plane_words(PAGE * K_FIRST, K_BITS)
        more_kw = tl.arange(0, K_MORE)
        more_q, more_k_table = _queries(rotated + K_FIRST, g, more_kw, D - K_FIRST, D, G), table_of(k_rest, K_REST, SHUFFLE)
    if V_REST > 0:
        V_START: tl.constexpr = plane_words(PAGE * V_FIRST, V_BITS)
        more_vw = tl.arange(0, V_MORE)
        more_v_table = table_of(v_rest, V_REST, SHUFFLE)
        more_blank = tl.zeros((GROUPS, V_MORE), tl.float32)
        more_acc = more_blank, more_blank, more_blank, more_blank
    top, total = tl.full((GROUPS,), float("-inf"), tl.float32), tl.zeros((GROUPS,), tl.float32)
    for column in range(first, tl.minimum(first + SEGMENT // PAGE, last)):
        page = tl.load(encoded_table + table_row * et + column).to(tl.int64)
        at8, at16, at32 = page * page8, page * page16, page * page32
        zero = tl.zeros((GROUPS, JOINED), tl.float32)
        s = _score(
            k_codes + at32, k_table, q, i, kw, (zero, zero, zero, zero, zero, zero, zero, zero), K_FIRST, K_BITS, 0, 0, 0, N,
            JOIN, PRECISION, SHUFFLE,
        )
        if K_REST > 0:
            s = _score(
                k_codes + at32 + K_START, more_k_table, more_q, i, more_kw, s, D - K_FIRST, K_REST, K_START, K_FIRST, K_BITS, N,
                JOIN, PRECISION, SHUFFLE,
            )
        shift = zero
        if K_MEAN:
            shift = _shift(k_mean + at8, q, kw, shift, K_FIRST, JOINED, PRECISION)
            if K_REST > 0:
                shift = _shift(k_mean + at8 + K_FIRST, more_q, more_kw, shift, D - K_FIRST, JOINED, PRECISION)
            shift *= tl.load(k_unit + at16).to(tl.float32)
        scaled, new_top = (), top
        for part in tl.static_range(8 // JOIN):
            one = s[part] * scales(k_scale + at8, k_top + at16, part * JOINED + n)[None, :] + shift
            one = shifted(one, shifts, shifts_per_query, g, column * PAGE + part * JOINED + n, n < JOINED, G) * scale
            new_top = tl.maximum(new_top, tl.max(one, 1))
            scaled = scaled + (one,)
        shrink = tl.exp2(top - new_top)
        weights, total = (), total * shrink
        for part in tl.static_range(8 // JOIN):
            one = tl.exp2(scaled[part] - new_top[:, None])
            total += tl.sum(one, 1)
            weights = weights + ((one * scales(v_scale + at8, v_top + at16, part * JOINED + n)[None, :]).to(dtype),)
        less = shrink[:, None]
        acc = acc[0] * less, acc[1] * less, acc[2] * less, acc[3] * less
        acc = _combine(v_codes + at32, v_table, weights, acc, i, vw, V_FIRST, V_BITS, 0, 0, 0, N, JOIN, PRECISION, SHUFFLE)
        if V_REST > 0:
            more_acc = more_acc[0] * less, more_acc[1] * less, more_acc[2] * less, more_acc[3] * less
            more_acc = _combine(
                v_codes + at32 + V_START, more_v_table, weights, more_acc, i, more_vw, D - V_FIRST, V_REST, V_START, V_FIRST,
                V_BITS, N, JOIN, PRECISION, SHUFFLE,
            )
        top = new_top
    item = row.to(tl.int64) * tl.num_programs(1) + segment
    tl.store(sums + item * 2 * G + g, top, g < G)
    tl.store(sums + item * 2 * G + G + g, total, g < G)
    _put(parts + item * G * D, acc, g, vw, V_FIRST, D, G)
    if V_REST > 0:
        _put(parts + item * G * D + V_FIRST, more_acc, g, more_vw, D - V_FIRST, D, G)
