"""Table lookup in vector registers, on CPUs that have it (AVX-512): LLVM instructions for the CPU kernels."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils

from dmc.kernels.cpu.host import host

WIDE = host().looks_up
BYTE, WORD, ADDRESS, SINGLE = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES, WORDS, SINGLES = (ir.VectorType(kind, 16) for kind in (BYTE, WORD, SINGLE))


def look_up(builder, tables, index):  # noqa: ANN001, ANN201
    """Looks numbers up in one, two or four registers, on CPUs that can (`WIDE`).

    One instruction looks up in one or two registers, by the low bits of the index.
    """

    def call(name, *arguments):  # noqa: ANN001, ANN202
        form = ir.FunctionType(SINGLES, [value.type for value in arguments])
        return builder.call(cgutils.get_or_insert_function(builder.module, form, f"llvm.x86.avx512.{name}.512"), arguments)

    if len(tables) == 1:
        return call("permvar.sf", *tables, index)
    pairs = [call("vpermi2var.ps", first, index, second) for first, second in zip(tables[::2], tables[1::2], strict=True)]
    if len(pairs) == 1:
        return pairs[0]
    return builder.select(builder.icmp_unsigned("<", index, WORDS([32] * 16)), *pairs)
