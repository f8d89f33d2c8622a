"""The loops of `dmc.kernels.rows.cpu`, compiled by numba when first called and kept on disk.

Each goes over rows once, in vectors. Numbers are fp32, or bf16, which is rounded where PyTorch's operations one after the other
round. What a row becomes depends on it alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dmc.kernels.cpu.compiled import compiled
from dmc.kernels.cpu.pieces import take
from dmc.kernels.cpu.threads import CHUNK, TAKEN, UNITS
from dmc.kernels.cpu.vectors import Vectors, over

HALVES, X, OUT, SIZE = range(3, 7)
"""Facts of all: whether numbers are bf16, addresses of x and of the output, numbers of an output's row. Units are rows."""
WEIGHT, EPS, MORE, SUM = range(7, 11)
"""Of `norm`: addresses of the weight, of eps (fp32), of what is added to x first (0: nothing) and of where that sum goes."""
TOKENS, HEAD_ROW, TOKEN_ROW, COS, SIN = range(7, 12)
"""Of `turn`: tokens of a head, numbers of x from one head to the next and one token to the next, addresses of fp32 tables."""
FACTS = 12

_NUMBER, _SINGLE = ir.IntType(64), ir.FloatType()


def _row(write: Callable, arguments: int) -> Callable:
    """``row(half, size, address, ...)``: what ``write(builder, half, size, addresses)`` writes, with so many addresses."""
    @intrinsic(prefer_literal=True)
    def row(context, half, size, addresses):  # noqa: ANN001, ANN202
        def generate(context, builder, signature, values):  # noqa: ANN001, ANN202
            parts = cgutils.unpack_tuple(builder, values[2], arguments)
            write(builder, bool(half.literal_value), values[1], *parts)
            return context.get_dummy_value()

        return types.void(half, types.int64, types.UniTuple(types.int64, arguments)), generate

    return row


def _write_norm(builder, half, size, x, weight, eps, out) -> None:  # noqa: ANN001, PLR0913
    def square(vectors, i, sums):  # noqa: ANN001, ANN202
        value = vectors.load(x, i, half)
        return [vectors.fused(value, value, sums[0])]

    def scale(vectors, i, _):  # noqa: ANN001, ANN202
        value = vectors.rounded(builder.fmul(vectors.load(x, i, half), vectors.all(by)), half)
        vectors.store(builder.fmul(value, vectors.load(weight, i, half)), out, i, half)

    total = over(builder, size, square, [ir.Constant(_SINGLE, 0.0)])[0]
    mean = builder.fdiv(total, builder.sitofp(size, _SINGLE))
    more = builder.load(builder.inttoptr(eps, _SINGLE.as_pointer()))
    root = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_SINGLE, [_SINGLE]), "llvm.sqrt.f32")
    by = builder.fdiv(_SINGLE(1.0), builder.call(root, [builder.fadd(mean, more)]))
    over(builder, size, scale)


def _write_sum(builder, half, size, x, more, out) -> None:  # noqa: ANN001, PLR0913
    def add(vectors, i, _):  # noqa: ANN001, ANN202
        vectors.store(builder.fadd(vectors.load(x, i, half), vectors.load(more, i, half)), out, i, half)

    over(builder, size, add)


def _write_gate(builder, half, size, x, more, out) -> None:  # noqa: ANN001, PLR0913
    def gate(vectors: Vectors, i, _) -> None:  # noqa: ANN001
        number, one = vectors.load(x, i, half), vectors.all(1.0)
        fall = vectors.exponential(builder.fneg(vectors.magnitude(number)))  # which does not overflow
        share = vectors.select(builder.fcmp_unordered(">=", number, vectors.all(0.0)), one, fall)
        silu = builder.fdiv(builder.fmul(number, share), builder.fadd(one, fall))
        vectors.store(builder.fmul(vectors.rounded(silu, half), vectors.load(more, i, half)), out, i, half)

    over(builder, size, gate)


def _write_turn(builder, half, size, x, cos, sin, out) -> None:  # noqa: ANN001, PLR0913
    middle = builder.sdiv(size, _NUMBER(2))

    def turn(vectors, i, _):  # noqa: ANN001, ANN202
        other = builder.add(i, middle)
        first, second = vectors.load(x, i, half), vectors.load(x, other, half)
        left = builder.fsub(builder.fmul(first, vectors.load(cos, i, False)), builder.fmul(second, vectors.load(sin, i, False)))
        right = builder.fmul(second, vectors.load(cos, other, False))
        right = builder.fadd(right, builder.fmul(first, vectors.load(sin, other, False)))
        vectors.store(left, out, i, half)
        vectors.store(right, out, other, half)

    over(builder, middle, turn)


_norm_row, _sum_row, _gate_row, _turn_row = (
    _row(write, count) for write, count in ((_write_norm, 4), (_write_sum, 3), (_write_gate, 3), (_write_turn, 4))
)


@compiled(exact=True)
def norm(facts):  # noqa: ANN001, ANN201
    """Root-mean-square norm of rows, after something is added or not."""
    size, counter, step = facts[SIZE], np.int64(facts.ctypes.data) + 8 * TAKEN, facts[SIZE] * (2 if facts[HALVES] else 4)
    begin = take(counter, facts[CHUNK])
    while begin < facts[UNITS]:
        for r in range(begin, min(begin + facts[CHUNK], facts[UNITS])):
            x, out = facts[X] + r * step, facts[OUT] + r * step
            if facts[MORE]:
                added = (x, facts[MORE] + r * step, facts[SUM] + r * step)
                x = added[2]
                if facts[HALVES]:
                    _sum_row(1, size, added)
                else:
                    _sum_row(0, size, added)
            if facts[HALVES]:
                _norm_row(1, size, (x, facts[WEIGHT], facts[EPS], out))
            else:
                _norm_row(0, size, (x, facts[WEIGHT], facts[EPS], out))
        begin = take(counter, facts[CHUNK])


@compiled(exact=True)
def gate(facts):  # noqa: ANN001, ANN201
    """``silu(first half) * second half`` of rows."""
    size, counter, step = facts[SIZE], np.int64(facts.ctypes.data) + 8 * TAKEN, facts[SIZE] * (2 if facts[HALVES] else 4)
    begin = take(counter, facts[CHUNK])
    while begin < facts[UNITS]:
        for r in range(begin, min(begin + facts[CHUNK], facts[UNITS])):
            x = facts[X] + 2 * r * step
            if facts[HALVES]:
                _gate_row(1, size, (x, x + step, facts[OUT] + r * step))
            else:
                _gate_row(0, size, (x, x + step, facts[OUT] + r * step))
        begin = take(counter, facts[CHUNK])


@compiled(exact=True)
def turn(facts):  # noqa: ANN001, ANN201
    """Rotary embedding in the half-split layout; rows of x lie anywhere, the output's one after the other."""
    size, tokens, counter, width = facts[SIZE], facts[TOKENS], np.int64(facts.ctypes.data) + 8 * TAKEN, 2 if facts[HALVES] else 4
    begin = take(counter, facts[CHUNK])
    while begin < facts[UNITS]:
        for r in range(begin, min(begin + facts[CHUNK], facts[UNITS])):
            x = facts[X] + (r // tokens * facts[HEAD_ROW] + r % tokens * facts[TOKEN_ROW]) * width
            t = r % tokens * size * 4
            places = (x, facts[COS] + t, facts[SIN] + t, facts[OUT] + r * size * width)
            if facts[HALVES]:
                _turn_row(1, size, places)
            else:
                _turn_row(0, size, places)
        begin = take(counter, facts[CHUNK])
