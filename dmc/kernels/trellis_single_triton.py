"""`dmc.kernels.trellis_triton` for models with one query head to each key/value head: a quarter to half of its instructions.

Without a group there is nothing for the matrix units to do: a level is multiplied by its query, or by its entry's weight,
where it was found, in fp32, and never leaves its thread.

A page's entries are eight blocks of N: entry ``b N + i`` is row i of block b. In a plane of width W (`dmc.kernels.layout`) block
b lies in the bits ``W (b // W)`` and up of the words of row ``(b % W) N + i``, four codes a word, one to a byte. So words are
loaded once, and what is common to the blocks of a word, most of finding the place of a level in its table, is computed once.

Tables of levels of 32 numbers or less are held by the lanes of a warp, a number each, and read by a shuffle, which needs no
address; that of 5 bits, of 64, is folded in the middle, where it only changes its sign. All lanes must be there when they
shuffle: whatever branches here branches on numbers that a whole program shares. The interpreter, which has no lanes, reads tables
from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dmc.kernels.backend import interpreted
from dmc.kernels.decode_triton import exact_piece
from dmc.kernels.layout import PLANES
from dmc.kernels.trellis_triton import plane_words, scales

BITS = (1, 2, 3, 4, 5)  # whose tables fit
TILE = 16  # exact entries at a time: one warp holds them


def takes(groups: int, stretches: tuple[tuple[int, int], ...]) -> bool:
    """Whether these kernels read pages of such stretches, of keys and values together, for so many queries a head."""
    return groups == 1 and all(bits in BITS for _, bits in stretches)


def launch(grid: tuple[int, int], shared: dict, constants: dict) -> None:
    """Fills the pieces: ``shared`` is what both kernels take, ``constants`` those of `dmc.kernels.decode_triton.decode`."""
    words, rows = {}, shared["PAGE"] // 8
    for part in "KV":
        first = shared[f"{part}_FIRST"]
        words |= {f"{part}_WORDS": _columns(first), f"{part}_MORE": _columns(constants["D"] - first or 4)}
    _single_pieces[grid](
        **shared, **words, **constants | {"TILE": TILE, "num_warps": max(1, rows // 8), "num_stages": 1}, N=rows,
        SHUFFLE=not interpreted(),
    )


def _columns(count: int) -> int:
    return triton.next_power_of_2(count // 4)


@triton.constexpr_function
def _width(bits):
    """Of the first plane, which holds the path."""
    return PLANES[bits][0]


@triton.constexpr_function
def _in_bytes(value, width):
    """An int32 whose every field of so many bits has this value."""
    word = sum(value << at for at in range(0, 32, width))
    return word - (1 << 32) if word >> 31 else word


@triton.jit
def _table(levels, BITS: tl.constexpr, SHUFFLE: tl.constexpr):
    """A table of levels, at 5 bits its upper half, for `_level`: where it lies, or a number a lane, to Triton ``[1, 1]``."""
    if BITS == 5:
        levels += 32
    if SHUFFLE:
        SIZE: tl.constexpr = 32 if BITS == 5 else 2 << BITS
        lane = tl.inline_asm_elementwise(
            "mov.u32 $0, %laneid;", "=r,r", [tl.zeros((1, 1), tl.int32)], dtype=tl.int32, is_pure=True, pack=1,
        )
        return tl.load(levels + (lane & (SIZE - 1)))
    else:
        return levels


@triton.jit
def _level(table, places, sign, j: tl.constexpr, BITS: tl.constexpr, SHUFFLE: tl.constexpr):
    """Levels of the j-th codes of words; a shuffle looks at the five lowest bits alone."""
    places = places >> (8 * j)
    if SHUFFLE:
        level = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [table, places], dtype=tl.float32, is_pure=True, pack=1,
        )
    else:
        LAST: tl.constexpr = 31 if BITS == 5 else (2 << BITS) - 1
        level = tl.load(table + (places & LAST))
    if BITS == 5:
        level = (level.to(tl.int32, bitcast=True) ^ ((sign << (31 - 8 * j)) & -2147483648)).to(tl.float32, bitcast=True)
    return level


@triton.jit
def _row(codes, i, w, k: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr):
    """Where words of the k-th rows of a plane are: ``[N, W]``."""
    return codes + (k * N + i[:, None]) * (COUNT // 4) + w[None, :]


@triton.jit
def _common(
    codes, i, w, k: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, BEFORE: tl.constexpr, BEFORE_COUNT: tl.constexpr,
    BEFORE_BITS: tl.constexpr, N: tl.constexpr,
):
    """What the blocks in the k-th rows of words share: (own bits with the path xor twice below, once), int32 ``[N, W]``.

    The codes before a stretch's first ones are the last of the stretch before it, whose words begin BEFORE words earlier.
    """
    WIDTH: tl.constexpr = _width(BITS)
    PATH: tl.constexpr = _in_bytes(1, WIDTH)
    mask = (w < COUNT // 4)[None, :] & (i >= 0)[:, None]
    at = _row(codes, i, w, k, COUNT, N)
    word = tl.load(at, mask, 0)
    earlier = tl.load(at - 1, mask & (w > 0)[None, :], 0) & PATH
    if BEFORE > 0:
        WIDER: tl.constexpr = _width(BEFORE_BITS)
        for m in tl.static_range(WIDER // WIDTH):  # a row of ours holds the blocks of this many of theirs
            last = _row(codes - BEFORE, i, w, k + m * WIDTH, BEFORE_COUNT, N) + (BEFORE_COUNT // 4 - 1)
            earlier |= (tl.load(last, mask & (w == 0)[None, :], 0) & _in_bytes(1, WIDER)) << (WIDTH * m)
    path = word & PATH
    once = (path << 8) | ((earlier >> 24) & 255)
    return word ^ ((path << 16) | ((earlier >> 16) & 65535)), once


@triton.jit
def _places(high, once, second, b: tl.constexpr, BITS: tl.constexpr):
    """Of block b: (places in the table of levels, four a word; at 5 bits 1 in the bytes whose level is the negative one)."""
    WIDTH: tl.constexpr = _width(BITS)
    ONE: tl.constexpr = 0x01010101
    OWN: tl.constexpr = (2 << WIDTH) * ONE - 2 * ONE
    SHIFT: tl.constexpr = WIDTH * (b // WIDTH)
    if SHIFT == 0:
        places = ((high << 1) & OWN) | (once & ONE)
    else:
        places = ((high >> (SHIFT - 1)) & OWN) | ((once >> SHIFT) & ONE)
    if BITS == 5:
        below = ONE - ((second >> b) & ONE)
        return places ^ (below * 31), below
    elif BITS > WIDTH:
        return places | (((second >> b) & ONE) << (WIDTH + 1)), places
    else:
        return places, places


@triton.jit
def _second(codes, i, w, COUNT: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr):
    """Words of the second plane, of one bit, if there is one: they hold all blocks."""
    WIDTH: tl.constexpr = _width(BITS)
    if BITS > WIDTH:
        at = _row(codes + N * WIDTH * (COUNT // 4), i, w, 0, COUNT, N)
        return tl.load(at, (w < COUNT // 4)[None, :] & (i >= 0)[:, None], 0)
    else:
        return i


@triton.jit
def _score(
    codes, table, q, i, w, found, COUNT: tl.constexpr, BITS: tl.constexpr, BEFORE: tl.constexpr, BEFORE_COUNT: tl.constexpr,
    BEFORE_BITS: tl.constexpr, N: tl.constexpr, SHUFFLE: tl.constexpr,
):
    """Adds a stretch's part to the products of the query and each entry, eight ``[N]``."""
    WIDTH: tl.constexpr = _width(BITS)
    second = _second(codes, i, w, COUNT, BITS, N)
    rows = ()
    for k in tl.static_range(WIDTH):
        rows = rows + (_common(codes, i, w, k, COUNT, BITS, BEFORE, BEFORE_COUNT, BEFORE_BITS, N),)
    out = ()
    for b in tl.static_range(8):
        places, sign = _places(rows[b % WIDTH][0], rows[b % WIDTH][1], second, b, BITS)
        product = _level(table, places, sign, 0, BITS, SHUFFLE) * q[0]
        for j in tl.static_range(1, 4):
            product += _level(table, places, sign, j, BITS, SHUFFLE) * q[j]
        out = out + (found[b] + tl.sum(product, 1),)
    return out


@triton.jit
def _combine(
    codes, table, weights, acc, i, w, COUNT: tl.constexpr, BITS: tl.constexpr, BEFORE: tl.constexpr,
    BEFORE_COUNT: tl.constexpr, BEFORE_BITS: tl.constexpr, N: tl.constexpr, SHUFFLE: tl.constexpr,
):
    """Adds the entries' levels, each times its weight, of eight ``[N]``, to four ``[N, W]``, one a place in a word."""
    WIDTH: tl.constexpr = _width(BITS)
    second = _second(codes, i, w, COUNT, BITS, N)
    acc0, acc1, acc2, acc3 = acc
    for k in tl.static_range(WIDTH):
        high, once = _common(codes, i, w, k, COUNT, BITS, BEFORE, BEFORE_COUNT, BEFORE_BITS, N)
        for h in tl.static_range(8 // WIDTH):
            places, sign = _places(high, once, second, h * WIDTH + k, BITS)
            weight = weights[h * WIDTH + k][:, None]
            acc0 += _level(table, places, sign, 0, BITS, SHUFFLE) * weight
            acc1 += _level(table, places, sign, 1, BITS, SHUFFLE) * weight
            acc2 += _level(table, places, sign, 2, BITS, SHUFFLE) * weight
            acc3 += _level(table, places, sign, 3, BITS, SHUFFLE) * weight
    return acc0, acc1, acc2, acc3


@triton.jit
def _queries(rotated, w, COUNT: tl.constexpr):
    """The features of a stretch by their place in a word, four fp32 ``[1, W]``."""
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
def _single_pieces(
    query, rotated, index, encoded, exact, first_exact, encoded_table, open_table, open_keys, open_values, sums, parts,
    scale, et, ot, okp, ovp,
    k_codes, k_scale, k_top, k_mean, k_unit, k_levels, k_rest, v_codes, v_scale, v_top, v_levels, v_rest,
    page8, page16, page32, PAGE: tl.constexpr, K_WORDS: tl.constexpr, K_MORE: tl.constexpr, V_WORDS: tl.constexpr,
    V_MORE: tl.constexpr, PER_OPEN: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
    K_FIRST: tl.constexpr, K_BITS: tl.constexpr, K_REST: tl.constexpr, K_MEAN: tl.constexpr,
    V_FIRST: tl.constexpr, V_BITS: tl.constexpr, V_REST: tl.constexpr, N: tl.constexpr, SHUFFLE: tl.constexpr,
):
    row, piece = tl.program_id(0), tl.program_id(1)
    table_row = tl.load(index + row).to(tl.int64)
    if piece >= first_exact:
        exact_piece(
            query, open_table + table_row * ot, exact + table_row, first_exact, open_keys, open_values, k_top, sums, parts, scale,
            okp, ovp, PER_OPEN, PIECE, TILE, GROUPS, PRECISION, D, BLOCK, G,
        )
        return
    first, last = piece * (PIECE // PAGE), tl.load(encoded + table_row)
    if first >= last:
        return
    rotated += row.to(tl.int64) * D
    i, d = tl.arange(0, N), tl.arange(0, BLOCK)
    kw, vw = tl.arange(0, K_WORDS), tl.arange(0, V_WORDS)
    whole = tl.load(rotated + d, d < D, 0.0).to(tl.float32)
    q, k_table, v_table = _queries(rotated, kw, K_FIRST), _table(k_levels, K_BITS, SHUFFLE), _table(v_levels, V_BITS, SHUFFLE)
    blank = tl.zeros((N, V_WORDS), tl.float32)
    acc = blank, blank, blank, blank
    if K_REST > 0:
        K_START: tl.constexpr = plane_words(PAGE * K_FIRST, K_BITS)
        more_kw = tl.arange(0, K_MORE)
        more_q, more_k_table = _queries(rotated + K_FIRST, more_kw, D - K_FIRST), _table(k_rest, K_REST, SHUFFLE)
    if V_REST > 0:
        V_START: tl.constexpr = plane_words(PAGE * V_FIRST, V_BITS)
        more_vw = tl.arange(0, V_MORE)
        more_v_table = _table(v_rest, V_REST, SHUFFLE)
        more_blank = tl.zeros((N, V_MORE), tl.float32)
        more_acc = more_blank, more_blank, more_blank, more_blank
    top, total = float("-inf"), 0.0
    for column in range(first, tl.minimum(first + PIECE // PAGE, last)):
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
            one = (s[b] * scales(k_scale + at8, k_top + at16, b * N + i) + shift) * scale
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
    item = row.to(tl.int64) * tl.num_programs(1) + piece
    tl.store(sums + item * 2, top)
    tl.store(sums + item * 2 + 1, total)
    _put(parts + item * D, acc, vw, V_FIRST)
    if V_REST > 0:
        _put(parts + item * D + V_FIRST, more_acc, more_vw, D - V_FIRST)
