"""Compiled functions that other compiled code calls by their address, and arrays at addresses.

`dmc.kernels.decode.loop.attend` reads pages of any format this way: one call costs some nanoseconds, and a page hundreds. So
`attend` is compiled once for all formats, and a format may come from outside of this package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from dmc.kernels.cpu import compiled
from dmc.kernels.cpu.compiled import FAST

_ADDRESSES = 7  # page, facts, constants, input, groups, output, room: see `dmc.kernels.pages.format.CpuReader`
_SIGNATURE = (types.int64,) * _ADDRESSES, types.void


class Callback:
    """A function of seven int64, compiled when its address is first read."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    @functools.cached_property
    def _made(self) -> CFunc:
        def new() -> CFunc:
            options = dict(nopython=True, fastmath=set(FAST), error_model="numpy")
            return CFunc(self.function, _SIGNATURE, locals={}, options=options)

        made = new()
        made = made if compiled.keep(made, made.enable_caching) else new()
        made.compile()
        return made

    @property
    def address(self) -> int:
        """Address of the machine code, valid while this object lives."""
        return self._made.address

    @property
    def cache_hits(self) -> int:
        """1 if the machine code was read from disk, else 0."""
        return self._made.cache_hits


def callback(function: Callable) -> Callback:
    """A decorator for functions as `dmc.kernels.pages.format.CpuReader` has them."""
    return Callback(function)


@intrinsic
def call(context, function, page, facts, constants, given, groups, out, room):  # noqa: ANN001, ANN201, PLR0913
    """Calls a `callback` by its address."""

    def generate(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        form = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * _ADDRESSES)
        builder.call(builder.inttoptr(arguments[0], form.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * (_ADDRESSES + 1)), generate


def _pointer(kind: types.Type) -> Callable:
    pointer = types.CPointer(kind)

    @intrinsic
    def at(context, address):  # noqa: ANN001, ANN202
        def generate(context, builder, signature, arguments):  # noqa: ANN001, ANN202
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), generate

    return at


_bytes, _halves, _words, _singles, _longs = (
    _pointer(kind) for kind in (types.uint8, types.uint16, types.uint32, types.float32, types.int64)
)


@compiled.compiled()
def bytes_at(address, count):  # noqa: ANN001, ANN201
    """uint8 ``[count]`` at an address, without a copy."""
    return carray(_bytes(np.int64(address)), (count,))


@compiled.compiled()
def halves_at(address, count):  # noqa: ANN001, ANN201
    """uint16 ``[count]`` at an address, without a copy."""
    return carray(_halves(np.int64(address)), (count,))


@compiled.compiled()
def words_at(address, count):  # noqa: ANN001, ANN201
    """uint32 ``[count]`` at an address, without a copy."""
    return carray(_words(np.int64(address)), (count,))


@compiled.compiled()
def singles_at(address, count):  # noqa: ANN001, ANN201
    """fp32 ``[count]`` at an address, without a copy."""
    return carray(_singles(np.int64(address)), (count,))


@compiled.compiled()
def matrix_at(address, rows, columns):  # noqa: ANN001, ANN201
    """fp32 ``[rows, columns]`` at an address, without a copy."""
    return carray(_singles(np.int64(address)), (rows, columns))


@compiled.compiled()
def longs_at(address, count):  # noqa: ANN001, ANN201
    """int64 ``[count]`` at an address, without a copy."""
    return carray(_longs(np.int64(address)), (count,))
