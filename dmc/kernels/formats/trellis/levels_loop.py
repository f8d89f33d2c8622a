"""Trellis codes to levels by vector registers, on CPUs that look 32 numbers up in two of them (AVX-512).

Loops compiled by numba look up one value at a time. Here 16 values are unpacked, and their subsets and levels found at once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from dmc.kernels.cpu.compiled import compiled
from dmc.kernels.cpu.lookup import ADDRESS, BYTES, SINGLES, WIDE, WORD, WORDS, look_up
from dmc.kernels.pages.layout import PLANES

MOST = 5  # largest number of bits of a code: 64 levels


def _row(bits: int) -> Callable:
    """``row(low, low_shift, high, high_shift, groups, begins, path, table, out)`` of codes of so many bits.

    Args (of what is returned, all int64 but one):
        low, high: addresses of the bytes that hold the first code's planes; high of 3 and 5 bits alone.
        low_shift, high_shift: shift of the row's codes in these bytes.
        groups: of 16 codes; at least 1.
        begins: whether the path begins with 0 instead of the last codes at ``path``.
        path: address of 16 words, the last 16 codes' lowest bits; updated.
        table: address of the levels.
        out: address of the first fp32.
    """

    @intrinsic
    def row(context, low, low_shift, high, high_shift, groups, begins, path, table, out):  # noqa: ANN001, ANN202, PLR0913
        whole = [types.int64] * 5
        signature = types.void(*whole, types.boolean, *[types.int64] * 3)

        def generate(context, builder, signature, arguments):  # noqa: ANN001, ANN202
            _write(builder, bits, *arguments)
            return context.get_dummy_value()

        return signature, generate

    return row


def _write(builder, bits, low, low_shift, high, high_shift, groups, begins, path, table, out) -> None:  # noqa: ANN001, PLR0913
    """The instructions of a row."""
    widths = PLANES[bits]

    def load(address, of):  # noqa: ANN001, ANN202
        value = builder.load(builder.inttoptr(address, of.as_pointer()))
        value.align = 1
        return value

    def store(value, address) -> None:  # noqa: ANN001
        builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 4

    def spread(value):  # noqa: ANN001, ANN202
        first = builder.insert_element(WORDS(ir.Undefined), builder.trunc(value, WORD), WORD(0))
        return builder.shuffle_vector(first, WORDS(ir.Undefined), WORDS([0] * 16))

    def same(number):  # noqa: ANN001, ANN202
        return WORDS([number] * 16)

    def moved(before, now, by):  # noqa: ANN001, ANN202
        return builder.shuffle_vector(before, now, WORDS([16 - by + i for i in range(16)]))

    shifts = [spread(shift) for shift in (low_shift, high_shift)[: len(widths)]]
    tables = [load(builder.add(table, ADDRESS(64 * number)), SINGLES) for number in range(max(1, 2 ** (bits + 1) // 16))]
    start = builder.select(begins, same(0), load(path, WORDS))
    before, loop, done = builder.block, builder.append_basic_block("groups"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    group, last = builder.phi(ADDRESS), builder.phi(WORDS)
    group.add_incoming(ADDRESS(0), before)
    last.add_incoming(start, before)
    at, code, shift = builder.mul(group, ADDRESS(16)), None, 0
    for address, shift, width in zip((low, high), shifts, widths, strict=False):
        plane = builder.lshr(builder.zext(load(builder.add(address, at), BYTES), WORDS), shift)
        plane = builder.shl(builder.and_(plane, same((1 << width) - 1)), same(shift))
        code, shift = plane if code is None else builder.or_(code, plane), shift + width
    now = builder.and_(code, same(1))
    index = builder.or_(builder.shl(builder.xor(code, moved(last, now, 2)), same(1)), moved(last, now, 1))
    store(look_up(builder, tables, index), builder.add(out, builder.mul(at, ADDRESS(4))))
    following = builder.add(group, ADDRESS(1))
    group.add_incoming(following, loop)
    last.add_incoming(now, loop)
    builder.cbranch(builder.icmp_signed("<", following, groups), loop, done)
    builder.position_at_end(done)
    store(now, path)


_one, _two, _three, _four, _five = (_row(bits) for bits in range(1, MOST + 1)) if WIDE else (None,) * MOST


def _chunk(codes, page, size, low, high, bits, first, count, begins, path, table, level):  # noqa: ANN001, ANN202, PLR0913
    """Writes the levels of a chunk of a page's values to columns from ``first`` on of ``level [page, size]``.

    Args:
        codes: the page's bytes.
        low, high: where its planes begin; high of 3 and 5 bits alone.
        bits: of a code, up to `MOST`.
        count: values of an entry in the chunk, a multiple of 16; ``page`` is a multiple of 8.
        begins: whether it is the first one.
        path: int32 ``[page, 16]``, kept from one chunk to the next.
        table: fp32, the levels; 16 numbers are read of 1 and 2 bits too.
    """
    low_bits = bits - 1 if bits in (3, 5) else bits
    low_at, high_at, groups = np.int64(codes[low:].ctypes.data), np.int64(codes[high:].ctypes.data), count // 16
    path_at, table_at, out = np.int64(path.ctypes.data), np.int64(table.ctypes.data), np.int64(level.ctypes.data) + 4 * first
    low_rows, high_rows = page * low_bits // 8, page // 8  # with contiguous codes; the next rows are in higher bits of the bytes
    a, move, b, high_move = low_at, 0, high_at, 0
    for n in range(page):
        if a == low_at + low_rows * count:
            a, move = low_at, move + low_bits
        if b == high_at + high_rows * count:
            b, high_move = high_at, high_move + 1
        mine, to = path_at + 64 * n, out + 4 * n * size
        if bits == 5:
            _five(a, move, b, high_move, groups, begins, mine, table_at, to)
        elif bits == 4:
            _four(a, move, b, high_move, groups, begins, mine, table_at, to)
        elif bits == 3:
            _three(a, move, b, high_move, groups, begins, mine, table_at, to)
        elif bits == 2:
            _two(a, move, b, high_move, groups, begins, mine, table_at, to)
        else:
            _one(a, move, b, high_move, groups, begins, mine, table_at, to)
        a, b = a + count, b + count


def _none(codes, page, size, low, high, bits, first, count, begins, path, table, level):  # noqa: ANN001, ANN202, PLR0913
    """Placeholder on CPUs without the instructions; never called."""


chunk = compiled()(_chunk if WIDE else _none)
