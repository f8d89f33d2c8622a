"""The loop of `dmc.kernels.linear.cpu`, compiled by numba when first called and kept on disk.

A weight lies in panels of `WIDTH` outputs, each a stretch of memory that is read from its first byte to its last: once for a
decode step's few rows, which is as fast as memory is, and out of the core's cache again for more.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from dmc.kernels.cpu.compiled import compiled
from dmc.kernels.cpu.host import host
from dmc.kernels.cpu.pieces import take
from dmc.kernels.cpu.threads import CHUNK, TAKEN, UNITS
from dmc.kernels.cpu.tiles import FP16, HALVES, LANES, PAIRED, PAIRS, SINGLES, bytes_of, far, load, store, sums_of

_VECTORS = 2
WIDTH = _VECTORS * LANES  # outputs of a panel
_MANY = (12, 8, 4, 2, 1) if host().vectors == 4 else (6, 4, 2, 1)  # rows of a tile: its sums fit the registers
_AHEAD = 2048  # bytes fetched before they are needed, as a core by itself does not do in time

X, X_ROW, ROWS, STEPS, WEIGHT, BIAS, OUT, OUT_ROW, KIND = range(3, 12)
"""Facts of `multiply`, whose units are panels: addresses of x, the weight, the bias (fp32) and the output; bytes from one row to
the next; rows of x and their words; what is multiplied, of `dmc.kernels.cpu.tiles`."""
FACTS = 12

_ADDRESS = ir.IntType(64)
_SINGLES, _HALVES = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(16), LANES)


@intrinsic(prefer_literal=True)
def _outputs(context, kind, x, x_row, rows, steps, weight, bias, out, out_row):  # noqa: ANN001, ANN202, PLR0913
    """All rows' outputs of one panel: fp32, or of pairs bf16."""
    signature, which = types.void(kind, *[types.int64] * 8), kind.literal_value

    def generate(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        x, x_row, rows, steps, weight, bias, out, out_row = arguments[1:]
        done, step = _ADDRESS(0), bytes_of(which) * WIDTH
        for many in _MANY:
            before = builder.block
            test, body, after = (builder.append_basic_block(name) for name in ("test", "rows", "after"))
            builder.branch(test)
            builder.position_at_end(test)
            row = builder.phi(_ADDRESS)
            row.add_incoming(done, before)
            upto = builder.add(row, _ADDRESS(many))
            builder.cbranch(builder.icmp_signed("<=", upto, rows), body, after)
            builder.position_at_end(body)
            sums = sums_of(builder, many, _VECTORS, which, far(builder, x, x_row, row), x_row, weight, step, steps, _AHEAD)
            added = [load(builder, far(builder, bias, 4 * LANES * v), _SINGLES) for v in range(_VECTORS)]
            for r, line in enumerate(sums):
                place = far(builder, out, out_row, builder.add(row, _ADDRESS(r)))
                for v, value in enumerate(line):
                    _put(builder, builder.fadd(value, added[v]), place, v, which)
            row.add_incoming(upto, builder.block)
            builder.branch(test)
            builder.position_at_end(after)
            done = row
        return context.get_dummy_value()

    return signature, generate


def _put(builder, value, place, vector, kind) -> None:  # noqa: ANN001
    """One vector of an output's row."""
    if kind == PAIRS and PAIRED:
        value = builder.asm(ir.FunctionType(_HALVES, [_SINGLES]), "vcvtneps2bf16 $1, $0", "=v,v", [value], False)
        store(builder, value, far(builder, place, 2 * LANES * vector), 2)
    else:
        store(builder, value, far(builder, place, 4 * LANES * vector))


@compiled()
def multiply(facts):  # noqa: ANN001, ANN201
    """``x Wᵀ + b``."""
    panels, counter = facts[UNITS], np.int64(facts.ctypes.data) + 8 * TAKEN
    begin = take(counter, facts[CHUNK])
    while begin < panels:
        for panel in range(begin, min(begin + facts[CHUNK], panels)):
            _one(facts, panel)
        begin = take(counter, facts[CHUNK])


@compiled()
def _one(facts, panel):  # noqa: ANN001, ANN202
    x, x_row, rows, steps, out_row, kind = facts[X], facts[X_ROW], facts[ROWS], facts[STEPS], facts[OUT_ROW], facts[KIND]
    wide = WIDTH * panel
    weight = facts[WEIGHT] + wide * steps * (2 if kind == HALVES or kind == FP16 else 4)
    bias, out = facts[BIAS] + wide * 4, facts[OUT] + wide * (2 if kind == PAIRS else 4)
    if kind == PAIRS:
        _outputs(PAIRS, x, x_row, rows, steps, weight, bias, out, out_row)
    elif kind == HALVES:
        _outputs(HALVES, x, x_row, rows, steps, weight, bias, out, out_row)
    elif kind == FP16:
        _outputs(FP16, x, x_row, rows, steps, weight, bias, out, out_row)
    else:
        _outputs(SINGLES, x, x_row, rows, steps, weight, bias, out, out_row)
