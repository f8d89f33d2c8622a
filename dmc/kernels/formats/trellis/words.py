"""Levels of a page's codes, for `dmc.kernels.formats.trellis.single` and `dmc.kernels.formats.trellis.grouped`.

A page's entries are eight blocks of N: entry ``b N + i`` is row i of block b. In a plane of width W (`dmc.kernels.pages.layout`)
block b is in the bits from ``W (b // W)`` on of the words of row ``(b % W) N + i``, four codes per word, one per byte. So words
are loaded once, and the common part of a word's blocks, most of the computation of a level's index, is computed once.

The lanes of a warp hold a table of up to 32 levels, one number each, and read it by a shuffle, which needs no address. The table
of 5 bits, with 64 levels, is folded in the middle, since its halves differ only in sign. All lanes must take part in a shuffle,
so branches here depend only on numbers that a whole program shares. The interpreter has no lanes and reads tables from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dmc.kernels.pages.layout import NO_SCALE, PLANES, SCALE_STEPS

NONE, FALL = tl.constexpr(NO_SCALE), tl.constexpr(-1 / SCALE_STEPS)
BITS = (1, 2, 3, 4, 5)  # whose tables fit


def columns(count: int) -> int:
    """Number of words of so many codes."""
    return triton.next_power_of_2(count // 4)


@triton.constexpr_function
def width(bits):
    """Width of the first plane, which holds the path."""
    return PLANES[bits][0]


@triton.constexpr_function
def _in_bytes(value, width):
    """An int32 with this value in every field of so many bits."""
    word = sum(value << at for at in range(0, 32, width))
    return word - (1 << 32) if word >> 31 else word


@triton.jit
def table_of(levels, BITS: tl.constexpr, SHUFFLE: tl.constexpr):
    """A table of levels, at 5 bits its upper half, for `_level`: a pointer, or one number per lane, in Triton ``[1, 1]``."""
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
def level(table, indices, sign, j: tl.constexpr, BITS: tl.constexpr, SHUFFLE: tl.constexpr):
    """Levels of the j-th codes of words; a shuffle uses only the five lowest bits."""
    indices = indices >> (8 * j)
    if SHUFFLE:
        level = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [table, indices], dtype=tl.float32, is_pure=True, pack=1,
        )
    else:
        LAST: tl.constexpr = 31 if BITS == 5 else (2 << BITS) - 1
        level = tl.load(table + (indices & LAST))
    if BITS == 5:
        level = (level.to(tl.int32, bitcast=True) ^ ((sign << (31 - 8 * j)) & -2147483648)).to(tl.float32, bitcast=True)
    return level


@triton.jit
def _row(codes, i, w, k: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr):
    """Offsets of the words of the k-th rows of a plane: ``[N, W]``."""
    return codes + (k * N + i[:, None]) * (COUNT // 4) + w[None, :]


@triton.jit
def shared_by_blocks(
    codes, i, w, k: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, BEFORE: tl.constexpr, BEFORE_COUNT: tl.constexpr,
    BEFORE_BITS: tl.constexpr, N: tl.constexpr,
):
    """Shared part of the blocks in the k-th rows of words: (own bits with the path xor twice below, once), int32 ``[N, W]``.

    The codes before a chunk's first ones are the last of the chunk before it, whose words begin BEFORE words earlier.
    """
    WIDTH: tl.constexpr = width(BITS)
    PATH: tl.constexpr = _in_bytes(1, WIDTH)
    mask = (w < COUNT // 4)[None, :] & (i >= 0)[:, None]
    at = _row(codes, i, w, k, COUNT, N)
    word = tl.load(at, mask, 0)
    earlier = tl.load(at - 1, mask & (w > 0)[None, :], 0) & PATH
    if BEFORE > 0:
        WIDER: tl.constexpr = width(BEFORE_BITS)
        for m in tl.static_range(WIDER // WIDTH):  # a row of ours holds the blocks of this many of theirs
            last = _row(codes - BEFORE, i, w, k + m * WIDTH, BEFORE_COUNT, N) + (BEFORE_COUNT // 4 - 1)
            earlier |= (tl.load(last, mask & (w == 0)[None, :], 0) & _in_bytes(1, WIDER)) << (WIDTH * m)
    path = word & PATH
    once = (path << 8) | ((earlier >> 24) & 255)
    return word ^ ((path << 16) | ((earlier >> 16) & 65535)), once


@triton.jit
def indices_of(high, once, second, b: tl.constexpr, BITS: tl.constexpr):
    """For block b: (indices in the table of levels, four per word; at 5 bits 1 in the bytes of negative levels)."""
    WIDTH: tl.constexpr = width(BITS)
    ONE: tl.constexpr = 0x01010101
    OWN: tl.constexpr = (2 << WIDTH) * ONE - 2 * ONE
    SHIFT: tl.constexpr = WIDTH * (b // WIDTH)
    if SHIFT == 0:
        indices = ((high << 1) & OWN) | (once & ONE)
    else:
        indices = ((high >> (SHIFT - 1)) & OWN) | ((once >> SHIFT) & ONE)
    if BITS == 5:
        below = ONE - ((second >> b) & ONE)
        return indices ^ (below * 31), below
    elif BITS > WIDTH:
        return indices | (((second >> b) & ONE) << (WIDTH + 1)), indices
    else:
        return indices, indices


@triton.jit
def second_plane(codes, i, w, COUNT: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr):
    """Words of the second plane, of one bit, if there is one: they hold all blocks."""
    WIDTH: tl.constexpr = width(BITS)
    if BITS > WIDTH:
        at = _row(codes + N * WIDTH * (COUNT // 4), i, w, 0, COUNT, N)
        return tl.load(at, (w < COUNT // 4)[None, :] & (i >= 0)[:, None], 0)
    else:
        return i


@triton.constexpr_function
def plane_words(count, bits):
    """Words of ``count`` codes; every plane is rounded up to a byte."""
    return sum((count * width + 7) // 8 for width in PLANES[bits]) // 4


@triton.jit
def scales(scale, top, n):
    """fp32 ``[PAGE]``; see `dmc.kernels.pages.layout`."""
    code = tl.load(scale + n)
    return tl.where(code == NONE, 0.0, tl.exp2(code.to(tl.float32) * FALL) * tl.load(top).to(tl.float32))
