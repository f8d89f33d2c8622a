"""Small matmuls for the CPU kernels in vector instructions: loops compiled by numba do not keep sums in registers.

A tile is some rows of A times all rows of some vectors of B's columns. Its sums stay in registers: at most 24 vectors if the
CPU has 32 registers and 12 if it has 16, as in high-performance BLAS. A and B hold fp32, or if `PAIRED` pairs of bf16 in words
of 32 bits, two neighbours along the sum. Sums are fp32, along B's rows in their order, so a row of C does not depend on the
other rows or their number.
"""

from __future__ import annotations

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dmc.kernels.cpu.compiled import compiled
from dmc.kernels.cpu.host import host

LANES, _VECTORS, PAIRED = host().lanes, host().vectors, host().pairs
ROWS, WIDTH = 6, LANES * _VECTORS
if PAIRED:
    binding.initialize_native_asmparser()  # bf16 instructions have the CPU's own names

_SINGLE, _WORD, _ADDRESS = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_SINGLES, _WORDS = (ir.VectorType(of, LANES) for of in (_SINGLE, _WORD))


def far(builder, address, by, times=None):  # noqa: ANN001, ANN201
    """``address + by * times``, each a number or a value."""
    by, times = (_ADDRESS(x) if isinstance(x, int) else x for x in (by, 1 if times is None else times))
    return builder.add(address, builder.mul(by, times))


def load(builder, address, of, align=4):  # noqa: ANN001, ANN201
    """Loads a value of an LLVM type from an address."""
    value = builder.load(builder.inttoptr(address, of.as_pointer()))
    value.align = align
    return value


def store(builder, value, address, align=4) -> None:  # noqa: ANN001
    """Stores a value to an address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = align


def sums_of(builder, rows, vectors, paired, a, a_row, b, b_row, steps) -> list[list]:  # noqa: ANN001, PLR0913
    """The instructions of A's ``rows`` rows times ``vectors`` vectors of B's columns.

    Args:
        rows, vectors: numbers.
        paired: whether A and B hold pairs of bf16.
        a, b: addresses.
        a_row, b_row: bytes from one row to the next.
        steps: rows of B, at least 1; of pairs, half as many.

    Returns:
        The sums, a list of vectors for each row.
    """
    paired = paired and PAIRED  # other CPUs never run this
    before, loop, done = builder.block, builder.append_basic_block("steps"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_ADDRESS)
    step.add_incoming(_ADDRESS(0), before)
    sums = [[builder.phi(_SINGLES) for _ in range(vectors)] for _ in range(rows)]
    row, whole, one = far(builder, b, b_row, step), _WORDS if paired else _SINGLES, _WORD if paired else _SINGLE
    columns, new = [load(builder, far(builder, row, 4 * LANES * v), whole) for v in range(vectors)], []
    for r, line in enumerate(sums):
        value = load(builder, far(builder, far(builder, a, a_row, r), 4, step), one)
        first = builder.insert_element(whole(ir.Undefined), value, _WORD(0))
        spread = builder.shuffle_vector(first, whole(ir.Undefined), _WORDS([0] * LANES))
        new.append([_times(builder, paired, spread, column, old) for column, old in zip(columns, line, strict=True)])
    following = builder.add(step, _ADDRESS(1))
    step.add_incoming(following, loop)
    for line, values in zip(sums, new, strict=True):
        for old, value in zip(line, values, strict=True):
            old.add_incoming(_SINGLES([0.0] * LANES), before)
            old.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, done)
    builder.position_at_end(done)
    return new


def _times(builder, paired, x, y, sums):  # noqa: ANN001, ANN202
    """``x y + sums``."""
    if paired:
        form = ir.FunctionType(_SINGLES, [_SINGLES, _WORDS, _WORDS])
        return builder.asm(form, "vdpbf16ps $3, $2, $0", "=v,0,v,v", [sums, x, y], False)
    if not host().fma:  # without the instruction LLVM would call a function for each number
        return builder.fadd(builder.fmul(x, y), sums)
    fma = ir.FunctionType(_SINGLES, [_SINGLES] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, fma, f"llvm.fma.v{LANES}f32"), [x, y, sums])


@intrinsic(prefer_literal=True)
def _tile(context, vectors, paired, a, a_row, b, b_row, c, c_row, steps, add):  # noqa: ANN001, ANN202, PLR0913
    """C = A B, or C += A B with ``add``, of `ROWS` rows; ``c_row`` bytes from row to row of C, see `sums_of`."""
    signature = types.void(vectors, paired, *[types.int64] * 7, types.boolean)
    many, which = min(vectors.literal_value, _VECTORS), bool(paired.literal_value)

    def generate(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        _, _, a, a_row, b, b_row, c, c_row, steps, add = arguments
        rows = sums_of(builder, ROWS, many, which, a, a_row, b, b_row, steps)
        targets = [(far(builder, far(builder, c, c_row, r), 4 * LANES * v), value)
                  for r, line in enumerate(rows) for v, value in enumerate(line)]
        with builder.if_else(add) as (then, otherwise):
            with then:
                for target, value in targets:
                    store(builder, builder.fadd(load(builder, target, _SINGLES), value), target)
            with otherwise:
                for target, value in targets:
                    store(builder, value, target)
        return context.get_dummy_value()

    return signature, generate


@compiled()
def product(a, a_row, b, b_row, c, c_row, steps, columns, paired, add):  # noqa: ANN001, ANN201, PLR0913
    """`ROWS` rows of ``C = A B`` (or ``C += A B``), of any number of columns that `LANES` divides.

    Args:
        a, b, c: addresses; strides of rows of B and C are multiples of `LANES` words; those of A are arbitrary.
        a_row, b_row, c_row: words from one row to the next.
        steps: words of a row of A.
        columns: of C.
        paired: whether A and B hold pairs of bf16; only where `PAIRED`.
        add: whether to add to C.
    """
    a_row, b_row, c_row, left = a_row * 4, b_row * 4, c_row * 4, columns // LANES
    while left > 0:
        many = min(left, _VECTORS)
        if paired:
            if many == 4:
                _tile(4, 1, a, a_row, b, b_row, c, c_row, steps, add)
            elif many == 3:
                _tile(3, 1, a, a_row, b, b_row, c, c_row, steps, add)
            elif many == 2:
                _tile(2, 1, a, a_row, b, b_row, c, c_row, steps, add)
            else:
                _tile(1, 1, a, a_row, b, b_row, c, c_row, steps, add)
        elif many == 4:
            _tile(4, 0, a, a_row, b, b_row, c, c_row, steps, add)
        elif many == 3:
            _tile(3, 0, a, a_row, b, b_row, c, c_row, steps, add)
        elif many == 2:
            _tile(2, 0, a, a_row, b, b_row, c, c_row, steps, add)
        else:
            _tile(1, 0, a, a_row, b, b_row, c, c_row, steps, add)
        b, c, left = b + many * LANES * 4, c + many * LANES * 4, left - many
