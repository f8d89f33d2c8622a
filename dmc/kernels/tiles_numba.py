"""Small products of matrices for the loops on CPUs, written in vectors: numba's own loops do not keep sums in registers.

A tile is `ROWS` rows of A times all rows of B's `WIDTH` columns or fewer: 24 vectors of sums where the CPU has 32 registers and
12 where it has 16, as high-performance BLAS has them. Numbers are fp32; or, where the CPU multiplies bf16 (`PAIRED`), pairs of
bf16 in words of 32 bits, of two neighbours along the sum, with sums in fp32.

What a row of C is does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dmc.kernels.host import host
from dmc.kernels.loops_numba import compiled

LANES, _VECTORS, PAIRED = host().lanes, host().vectors, host().pairs
ROWS, WIDTH = 6, LANES * _VECTORS
if PAIRED:
    binding.initialize_native_asmparser()  # the product of pairs is named as the CPU names it

_SINGLE, _WORD, _ADDRESS = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_SINGLES, _WORDS = ir.VectorType(_SINGLE, LANES), ir.VectorType(_WORD, LANES)


def _tile(vectors: int, paired: bool) -> Callable:
    """``tile(a, a_row, b, b_row, c, c_row, steps, add)``: C = A B, or C += A B with ``add``.

    Args (of what is returned, all int64 but the last):
        a, b, c: addresses of the first numbers.
        a_row, b_row, c_row: bytes from one row to the next.
        steps: rows of B, at least 1; columns of A. Of pairs, half as many.
    """

    @intrinsic
    def tile(context, a, a_row, b, b_row, c, c_row, steps, add):  # noqa: ANN001, ANN202, PLR0913
        signature = types.void(*[types.int64] * 7, types.boolean)

        def generate(context, builder, signature, arguments):  # noqa: ANN001, ANN202
            _write(builder, vectors, paired, *arguments)
            return context.get_dummy_value()

        return signature, generate

    return tile


def _write(builder, vectors, paired, a, a_row, b, b_row, c, c_row, steps, add) -> None:  # noqa: ANN001, PLR0913
    """The instructions of a tile: one block that goes over the rows of B, with the sums as its variables."""
    kind, whole = (_WORD, _WORDS) if paired else (_SINGLE, _SINGLES)
    number = _ADDRESS

    def far(address, by, rows=None):  # noqa: ANN001, ANN202
        by = number(by) if isinstance(by, int) else by
        return builder.add(address, by if rows is None else builder.mul(by, number(rows)))

    def load(address, of):  # noqa: ANN001, ANN202
        value = builder.load(builder.inttoptr(address, of.as_pointer()))
        value.align = 4
        return value

    def times(x, y, sums):  # noqa: ANN001, ANN202
        if paired:
            form = ir.FunctionType(_SINGLES, [_SINGLES, _WORDS, _WORDS])
            return builder.asm(form, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [sums, x, y], False)
        if not host().fma:  # asked for all the same, a function would be called for each number
            return builder.fadd(builder.fmul(x, y), sums)
        fma = ir.FunctionType(_SINGLES, [_SINGLES] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, fma, f"llvm.fma.v{LANES}f32"), [x, y, sums])

    before, loop, done = builder.block, builder.append_basic_block("steps"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(number)
    step.add_incoming(number(0), before)
    sums = [[builder.phi(_SINGLES) for _ in range(vectors)] for _ in range(ROWS)]
    row = builder.add(b, builder.mul(step, b_row))
    columns = [load(far(row, 4 * LANES * v), whole) for v in range(vectors)]
    new = []
    for r, line in enumerate(sums):
        one = load(builder.add(far(a, a_row, r), builder.mul(step, number(4))), kind)
        first = builder.insert_element(whole(ir.Undefined), one, _WORD(0))
        spread = builder.shuffle_vector(first, whole(ir.Undefined), _WORDS([0] * LANES))
        new.append([times(spread, column, old) for column, old in zip(columns, line, strict=True)])
    following = builder.add(step, number(1))
    step.add_incoming(following, loop)
    for line, values in zip(sums, new, strict=True):
        for old, value in zip(line, values, strict=True):
            old.add_incoming(_SINGLES([0.0] * LANES), before)
            old.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, done)

    builder.position_at_end(done)
    places = [(far(far(c, c_row, r), 4 * LANES * v), value) for r, line in enumerate(new) for v, value in enumerate(line)]

    def store(value, place) -> None:  # noqa: ANN001
        builder.store(value, builder.inttoptr(place, _SINGLES.as_pointer())).align = 4

    with builder.if_else(add) as (then, otherwise):
        with then:
            for place, value in places:
                store(builder.fadd(load(place, _SINGLES), value), place)
        with otherwise:
            for place, value in places:
                store(value, place)


_one, _two, _three, _four = (_tile(min(n, _VECTORS), False) for n in (1, 2, 3, 4))
_one_paired, _two_paired, _three_paired, _four_paired = (_tile(n if PAIRED else 1, PAIRED) for n in (1, 2, 3, 4))



@compiled()
def product(a, a_row, b, b_row, c, c_row, steps, columns, paired, add):  # noqa: ANN001, ANN201, PLR0913
    """`ROWS` rows of ``C = A B`` (or ``C += A B``), of any number of columns that `LANES` divides.

    Args:
        a, b, c: addresses; rows of B and C lie `LANES` words apart or a multiple of it, A's anyhow.
        a_row, b_row, c_row: words from one row to the next.
        steps: words of a row of A.
        columns: of C.
        paired: whether A and B hold pairs of bf16; only where `PAIRED`.
        add: to what C holds.
    """
    a_row, b_row, c_row, left = a_row * 4, b_row * 4, c_row * 4, columns // LANES
    while left > 0:
        many = min(left, _VECTORS)
        if paired:
            if many == 4:
                _four_paired(a, a_row, b, b_row, c, c_row, steps, add)
            elif many == 3:
                _three_paired(a, a_row, b, b_row, c, c_row, steps, add)
            elif many == 2:
                _two_paired(a, a_row, b, b_row, c, c_row, steps, add)
            else:
                _one_paired(a, a_row, b, b_row, c, c_row, steps, add)
        elif many == 4:
            _four(a, a_row, b, b_row, c, c_row, steps, add)
        elif many == 3:
            _three(a, a_row, b, b_row, c, c_row, steps, add)
        elif many == 2:
            _two(a, a_row, b, b_row, c, c_row, steps, add)
        else:
            _one(a, a_row, b, b_row, c, c_row, steps, add)
        b, c, left = b + many * LANES * 4, c + many * LANES * 4, left - many
