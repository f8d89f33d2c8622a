"""Triton kernels of `dmc.kernels.encode`: three launches, each over all rows, of which most are not full.

The first finds the full rows, takes a page for each and names it in the table of encoded pages, one column behind those
that count. The second encodes into these pages, keys and values in programs of their own. The third moves the entries
behind them down, gives the emptied pages back and counts the new page. So pages are taken in one launch and given back
in another, and no entry is overwritten that a program may still read.

A program of the last two looks after several rows and goes from one full row to the next, since few are full at a time.

Int8 and fp8 codes equal those of the codecs bit for bit: divisions are exact, roundings go to even, and numbers of fp8 are
made by integer arithmetic, which devices without fp8 have as well. Trellis pages are those of
`dmc.kernels.encode_trellis_triton`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dmc.kernels.append import NO_COLUMN, NO_PAGE, Growing
from dmc.kernels.append_triton import as_bits, load_float, store_float
from dmc.kernels.backend import interpreted
from dmc.kernels.encode import KINDS, Encoding

_NO_PAGE, _NO_COLUMN = tl.constexpr(NO_PAGE), tl.constexpr(NO_COLUMN)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken off again it leaves a whole number, ties to even
_STORED = {"dense": 0, "int8": 1, "fp8": 2}
_DENSE, _INT8 = tl.constexpr(0), tl.constexpr(1)


def encode(state: Growing, index: Tensor, encoding: Encoding) -> None:
    """`dmc.kernels.encode.encode_pages`."""
    index = index.contiguous()
    rows, size, few = len(index), state.head_size, interpreted()
    keys, values = (as_bits(state.opened[part]) for part in "kv")
    table = dict(
        index=index, exact=state.exact, closed=state.closed, closed_table=state.closed_table, R=rows, most=state.most,
        columns=state.closed_table.shape[1], ct=state.closed_table.stride(0),
    )
    opened = dict(open_table=state.open_table, keys=keys, values=values, ot=state.open_table.stride(0), kp=keys.stride(0),
                  vp=values.stride(0), PER_OPEN=state.per_open)
    block = dict(D=size, BLOCK=triton.next_power_of_2(size))
    many = 4 if few else 128
    _take[(triton.cdiv(rows, many),)](
        **table, stack=state.stack, free=state.free, owners=state.owners, failed=state.failed, ROWS=many, num_warps=4,
    )
    each = 4 if few else 16
    grid = triton.cdiv(rows, each)
    if encoding.kind == "trellis":
        from dmc.kernels.encode_trellis_triton import launch

        launch(table, opened, state.sinks, state.page, size, encoding)
    else:
        _plain[(grid, 2)](**table, **opened, **_fields(encoding), sinks=state.sinks, KIND=_STORED[encoding.kind],
                          PAGE=state.page, TILE=16, ROWS=each, **block, num_warps=4)
    spare = -(-(state.sinks + state.window) // state.per_open)
    _settle[(grid,)](
        **table, **opened, stack=state.stack, free=state.free, owners=state.owners, sinks=state.sinks, window=state.window,
        kept=spare, SPARE=triton.next_power_of_2(max(1, state.open_table.shape[1] - spare)), OPEN=state.open_table.shape[1],
        PAGE=state.page, STEP=min(16, state.page), TILE=16, ROWS=each, **block, num_warps=4,
    )


def _fields(encoding: Encoding) -> dict[str, Tensor | int]:
    """Pointers and strides of a page's fields, in elements; scales as bits."""
    names = KINDS[encoding.kind]
    out = {}
    for part, name in (("k", names[0]), ("v", names[len(names) // 2])):
        codes = as_bits(encoding.fields[name])
        scale = as_bits(encoding.fields.get(f"{part}_scale", encoding.fields[name]))
        out |= {f"{part}_to": codes, f"{part}_scale": scale, f"{part}t": codes.stride(0), f"{part}s": scale.stride(0)}
    return out


@triton.jit
def _take(
    index, exact, closed, closed_table, R, most, columns, ct, stack, free, owners, failed, ROWS: tl.constexpr,
):
    """A page for each full row, as far as there are columns and pages."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(index + r, r < R, -1).to(tl.int64)
    full = row >= 0
    full = full & (tl.load(exact + row, full, 0) == most)
    count = tl.load(closed + row, full, 0)
    room = full & (count < columns)
    if tl.max((full & ~room).to(tl.int32), 0) > 0:
        tl.atomic_or(failed, _NO_COLUMN)
    wanted = tl.sum(room.to(tl.int32), 0)
    if wanted > 0:
        left = tl.atomic_add(free, -wanted) - tl.cumsum(room.to(tl.int32), 0)  # below this row's page on the stack
        given = room & (left >= 0)
        lacking = wanted - tl.sum(given.to(tl.int32), 0)
        if lacking > 0:
            tl.atomic_add(free, lacking)
            tl.atomic_or(failed, _NO_PAGE)
        page = tl.load(stack + left, given, 0)
        tl.store(owners + page, tl.full((ROWS,), 1, tl.int32), given)
        tl.store(closed_table + row * ct + count, page.to(tl.int32), given)


@triton.jit
def new_pages(index, exact, closed, closed_table, R, most, columns, ct, ROWS: tl.constexpr):
    """This program's rows, their counts of encoded pages, and the page that each is to be encoded into; 0: none."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(index + r, r < R, -1).to(tl.int64)
    full = row >= 0
    full = full & (tl.load(exact + row, full, 0) == most)
    count = tl.load(closed + row, full, 0)
    return row, count, tl.load(closed_table + row * ct + count, full & (count < columns), 0)


@triton.jit
def first_of(left, ROWS: tl.constexpr):
    """The first true place of bool ``[ROWS]``, as one of these."""
    lane = tl.arange(0, ROWS)
    return lane == tl.min(tl.where(left, lane, ROWS), 0)


@triton.jit
def exact_at(table, place, mask, stride, PER_OPEN: tl.constexpr, D: tl.constexpr):
    """Where exact entries begin in the memory of a row's open pages, in elements; int64."""
    page = tl.load(table + place // PER_OPEN, mask, 0).to(tl.int64)
    return page * stride + (place % PER_OPEN) * D


@triton.jit
def _plain(
    index, exact, closed, closed_table, R, most, columns, ct, open_table, keys, values, ot, kp, vp, k_to, k_scale, kt, ks,
    v_to, v_scale, vt, vs, sinks, KIND: tl.constexpr, PER_OPEN: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    row, _, page = new_pages(index, exact, closed, closed_table, R, most, columns, ct, ROWS)
    left = page > 0
    while tl.max(left.to(tl.int32), 0) > 0:
        here = first_of(left, ROWS)
        table = open_table + tl.sum(tl.where(here, row, 0), 0) * ot
        to = tl.sum(tl.where(here, page, 0), 0).to(tl.int64)
        if tl.program_id(1) == 0:
            _plain_page(table, keys, kp, k_to + to * kt, k_scale + to * ks, sinks, KIND, PER_OPEN, PAGE, TILE, D, BLOCK)
        else:
            _plain_page(table, values, vp, v_to + to * vt, v_scale + to * vs, sinks, KIND, PER_OPEN, PAGE, TILE, D, BLOCK)
        left = left & ~here


@triton.jit
def _plain_page(
    table, source, stride, to, scales, sinks, KIND: tl.constexpr, PER_OPEN: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Keys or values of one page."""
    d = tl.arange(0, BLOCK)
    for first in range(0, PAGE, TILE):
        n = first + tl.arange(0, TILE)
        mask = (n < PAGE)[:, None] & (d < D)[None, :]
        at = exact_at(table, sinks + n, n < PAGE, stride, PER_OPEN, D)
        x = load_float(source + at[:, None] + d[None, :], mask)
        into = to + n[:, None] * D + d[None, :]
        if KIND == _DENSE:
            store_float(into, x, mask)
        else:
            LARGEST: tl.constexpr = 127.0 if KIND == _INT8 else 448.0
            scale = tl.div_rn(tl.max(tl.abs(x), 1), tl.full((TILE,), LARGEST, tl.float32))
            bits = (scale.to(tl.int32, bitcast=True) + 65535) >> 16  # bf16, never below
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


@triton.jit
def _settle(
    index, exact, closed, closed_table, R, most, columns, ct, open_table, keys, values, ot, kp, vp, stack, free, owners,
    sinks, window, kept, SPARE: tl.constexpr, OPEN: tl.constexpr, PER_OPEN: tl.constexpr, PAGE: tl.constexpr,
    STEP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """What is left of the rows that were encoded: their newest entries move to the place behind the sinks."""
    row, count, page = new_pages(index, exact, closed, closed_table, R, most, columns, ct, ROWS)
    left = page > 0
    while tl.max(left.to(tl.int32), 0) > 0:
        here = first_of(left, ROWS)
        table = open_table + tl.sum(tl.where(here, row, 0), 0) * ot
        d = tl.arange(0, BLOCK)
        for first in range(0, window, STEP):  # no more than a page at once, or it would overtake what it reads
            i = tl.arange(0, TILE)
            n = first + i
            one = (i < STEP) & (n < window)
            mask = one[:, None] & (d < D)[None, :]
            k_from = exact_at(table, sinks + PAGE + n, one, kp, PER_OPEN, D)
            v_from = exact_at(table, sinks + PAGE + n, one, vp, PER_OPEN, D)
            k = tl.load(keys + k_from[:, None] + d[None, :], mask)
            v = tl.load(values + v_from[:, None] + d[None, :], mask)
            k_to = exact_at(table, sinks + n, one, kp, PER_OPEN, D)
            v_to = exact_at(table, sinks + n, one, vp, PER_OPEN, D)
            tl.debug_barrier()
            tl.store(keys + k_to[:, None] + d[None, :], k, mask)
            tl.store(values + v_to[:, None] + d[None, :], v, mask)
            tl.debug_barrier()
        column = kept + tl.arange(0, SPARE)
        spare = tl.load(table + column, column < OPEN, 0)
        some = spare > 0
        end = tl.atomic_add(free, tl.sum(some.to(tl.int32), 0))
        tl.store(stack + end + tl.cumsum(some.to(tl.int32), 0) - 1, spare.to(tl.int64), some)
        tl.store(owners + spare, tl.zeros((SPARE,), tl.int32), some)
        tl.store(table + column, tl.zeros((SPARE,), tl.int32), some)
        left = left & ~here
    done = page > 0
    tl.store(exact + row, tl.zeros((ROWS,), tl.int32) + sinks + window, done)
    tl.store(closed + row, count + 1, done)
