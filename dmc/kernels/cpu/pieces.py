"""What loops for `dmc.kernels.cpu.threads.run` are written with: pieces of work, and arrays by their addresses."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_NUMBER = ir.IntType(64)


@intrinsic
def take(context, counter, many):  # noqa: ANN001, ANN201
    """Adds to the int64 at an address; what was there. Of several threads each gets another."""
    def generate(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        counter, many = arguments
        return builder.atomic_rmw("add", builder.inttoptr(counter, _NUMBER.as_pointer()), many, "monotonic")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def pointer(context, address):  # noqa: ANN001, ANN201
    """For `numba.carray`."""
    def generate(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


def as_c(loop: Callable, facts: int):  # noqa: ANN201
    """A compiled loop of an int64 array as a C function of a pointer to so many numbers; its code lives as long as this."""
    return numba.cfunc(types.void(types.voidptr))(lambda address: loop(numba.carray(address, (facts,), np.int64)))
