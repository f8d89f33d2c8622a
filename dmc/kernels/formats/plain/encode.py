"""Encoding dense, int8 and fp8 pages on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dmc.kernels.pages.floats import as_bits, load_float, store_float
from dmc.kernels.pages.full_rows import ROUND, first_of, full_at, new_pages, rows_of_a_program
from dmc.kernels.pages.paged import Growing

_STORED = {"dense": 0, "int8": 1, "fp8": 2}
_DENSE, _INT8 = tl.constexpr(0), tl.constexpr(1)


def launch(table: dict, full_precision: dict, state: Growing) -> None:
    """Encodes into the pages that were taken; ``table`` and ``full_precision`` as in `dmc.kernels.encode.gpu.encode`."""
    each = rows_of_a_program()
    _plain[(triton.cdiv(table["R"], each), 2)](
        **table, **full_precision, **_fields(state), sinks=state.sinks, KIND=_STORED[state.format.name], TILE=16, PAGE=state.page,
        ROWS=each, D=state.head_size, BLOCK=triton.next_power_of_2(state.head_size), num_warps=4,
    )


def _fields(state: Growing) -> dict[str, Tensor | int]:
    """Pointers and strides of a page's fields, in elements; scales as bits."""
    out = {}
    for part in "kv":
        codes = as_bits(state.encoded[state.format.main(part)])
        scale = as_bits(state.encoded.get(f"{part}_scale", codes))
        out |= {f"{part}_to": codes, f"{part}_scale": scale, f"{part}t": codes.stride(0), f"{part}s": scale.stride(0)}
    return out


@triton.jit
def _plain(
    index, full_count, encoded_count, encoded_table, R, most, columns, et, full_table, keys, values, ft, kp, vp, k_to, k_scale,
    kt, ks, v_to, v_scale, vt, vs, sinks, KIND: tl.constexpr, PER_FULL: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    row, _, page = new_pages(index, full_count, encoded_count, encoded_table, R, most, columns, et, ROWS)
    left = page > 0
    while tl.max(left.to(tl.int32), 0) > 0:
        here = first_of(left, ROWS)
        table = full_table + tl.sum(tl.where(here, row, 0), 0) * ft
        to = tl.sum(tl.where(here, page, 0), 0).to(tl.int64)
        if tl.program_id(1) == 0:
            _plain_page(table, keys, kp, k_to + to * kt, k_scale + to * ks, sinks, KIND, PER_FULL, PAGE, TILE, D, BLOCK)
        else:
            _plain_page(table, values, vp, v_to + to * vt, v_scale + to * vs, sinks, KIND, PER_FULL, PAGE, TILE, D, BLOCK)
        left = left & ~here


@triton.jit
def _plain_page(
    table, source, stride, to, scales, sinks, KIND: tl.constexpr, PER_FULL: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Encodes keys or values of one page."""
    d = tl.arange(0, BLOCK)
    for first in range(0, PAGE, TILE):
        n = first + tl.arange(0, TILE)
        mask = (n < PAGE)[:, None] & (d < D)[None, :]
        at = full_at(table, sinks + n, n < PAGE, stride, PER_FULL, D)
        x = load_float(source + at[:, None] + d[None, :], mask)
        into = to + n[:, None] * D + d[None, :]
        if KIND == _DENSE:
            store_float(into, x, mask)
        else:
            LARGEST: tl.constexpr = 127.0 if KIND == _INT8 else 448.0
            scale = tl.div_rn(tl.max(tl.abs(x), 1), tl.full((TILE,), LARGEST, tl.float32))
            bits = (scale.to(tl.int32, bitcast=True) + 65535) >> 16  # bf16, rounded up
            step = (bits << 16).to(tl.float32, bitcast=True)
            step = tl.where(step > 0, step, 1.0)
            x = tl.div_rn(x, tl.broadcast_to(step[:, None], (TILE, BLOCK)))
            if KIND == _INT8:
                x = tl.minimum(tl.maximum((x + ROUND) - ROUND, -LARGEST), LARGEST)
                tl.store(into, x.to(tl.int8), mask)
            else:
                tl.store(into, _e4m3(tl.minimum(tl.maximum(x, -LARGEST), LARGEST)), mask)
            tl.store(scales + n, bits.to(tl.int16), n < PAGE)


@triton.jit
def _e4m3(x):
    """The nearest fp8 E4M3 number, ties to even, as a byte; x within its range."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # 3 bits of the fraction; the exponent's bias
    small = ((tl.abs(x) * 512.0 + ROUND) - ROUND).to(tl.int32)  # in steps of 2**-9
    return (tl.where(tl.abs(x) < 0.015625, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)
