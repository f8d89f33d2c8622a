"""Triton kernels of `dmc.kernels.encode.encode`: three launches, each over all rows, of which most are not full.

The first finds the full rows, takes a page for each and writes it to the table of encoded pages, one column behind the counted
ones. The second encodes into these pages, keys and values in separate programs. The third moves the entries behind them
down, gives the emptied pages back and counts the new page. So pages are taken in one launch and given back in another, and
no entry is overwritten that a program may still read.

A program of the last two processes several rows, since few are full at a time.

Int8 and fp8 codes equal those of the codecs bit for bit: divisions are correctly rounded, ties go to even, and fp8 numbers
are computed by integer arithmetic, which devices without fp8 have too. Trellis pages are those of
`dmc.kernels.formats.trellis.encode`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dmc.kernels.backend import interpreted
from dmc.kernels.pages.floats import as_bits
from dmc.kernels.pages.full_rows import first_of, full_at, new_pages, rows_of_a_program
from dmc.kernels.pages.paged import NO_COLUMN, NO_PAGE, Growing

_NO_PAGE, _NO_COLUMN = tl.constexpr(NO_PAGE), tl.constexpr(NO_COLUMN)


def encode(state: Growing, index: Tensor) -> None:
    """`dmc.kernels.encode.encode.encode_pages`."""
    index = index.contiguous()
    rows, size = len(index), state.head_size
    keys, values = (as_bits(state.full_precision[part]) for part in "kv")
    table = dict(
        index=index, full_count=state.full_count, encoded_count=state.encoded_count, encoded_table=state.encoded_table, R=rows,
        most=state.most, columns=state.encoded_table.shape[1], et=state.encoded_table.stride(0),
    )
    full_precision = dict(
        full_table=state.full_table, keys=keys, values=values, ft=state.full_table.stride(0), kp=keys.stride(0),
        vp=values.stride(0), PER_FULL=state.per_full_page,
    )
    many = 4 if interpreted() else 128
    _take[(triton.cdiv(rows, many),)](
        **table, stack=state.stack, free=state.free, owners=state.owners, failed=state.failed, ROWS=many, num_warps=4,
    )
    state.format.triton_write(table, full_precision, state)
    each, spare = rows_of_a_program(), -(-(state.sinks + state.window) // state.per_full_page)
    _settle[(triton.cdiv(rows, each),)](
        **table, **full_precision, stack=state.stack, free=state.free, owners=state.owners, sinks=state.sinks,
        window=state.window, kept=spare, SPARE=triton.next_power_of_2(max(1, state.full_table.shape[1] - spare)),
        FULL=state.full_table.shape[1], PAGE=state.page, STEP=min(16, state.page), TILE=16, ROWS=each, D=size,
        BLOCK=triton.next_power_of_2(size), num_warps=4,
    )


@triton.jit
def _take(
    index, full_count, encoded_count, encoded_table, R, most, columns, et, stack, free, owners, failed, ROWS: tl.constexpr,
):
    """Takes a page for each full row, as far as there are columns and pages."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(index + r, r < R, -1).to(tl.int64)
    filled = row >= 0
    filled = filled & (tl.load(full_count + row, filled, 0) == most)
    count = tl.load(encoded_count + row, filled, 0)
    room = filled & (count < columns)
    if tl.max((filled & ~room).to(tl.int32), 0) > 0:
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
        tl.store(encoded_table + row * et + count, page.to(tl.int32), given)


@triton.jit
def _settle(
    index, full_count, encoded_count, encoded_table, R, most, columns, et, full_table, keys, values, ft, kp, vp, stack, free,
    owners, sinks, window, kept, SPARE: tl.constexpr, FULL: tl.constexpr, PER_FULL: tl.constexpr, PAGE: tl.constexpr,
    STEP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Finishes the rows that were encoded: moves their newest entries to the slots behind the sinks, and frees pages."""
    row, count, page = new_pages(index, full_count, encoded_count, encoded_table, R, most, columns, et, ROWS)
    left = page > 0
    while tl.max(left.to(tl.int32), 0) > 0:
        here = first_of(left, ROWS)
        table = full_table + tl.sum(tl.where(here, row, 0), 0) * ft
        d = tl.arange(0, BLOCK)
        for first in range(0, window, STEP):  # at most one page at once, or unread entries would be overwritten
            i = tl.arange(0, TILE)
            n = first + i
            one = (i < STEP) & (n < window)
            mask = one[:, None] & (d < D)[None, :]
            k_from = full_at(table, sinks + PAGE + n, one, kp, PER_FULL, D)
            v_from = full_at(table, sinks + PAGE + n, one, vp, PER_FULL, D)
            k = tl.load(keys + k_from[:, None] + d[None, :], mask)
            v = tl.load(values + v_from[:, None] + d[None, :], mask)
            k_to = full_at(table, sinks + n, one, kp, PER_FULL, D)
            v_to = full_at(table, sinks + n, one, vp, PER_FULL, D)
            tl.debug_barrier()
            tl.store(keys + k_to[:, None] + d[None, :], k, mask)
            tl.store(values + v_to[:, None] + d[None, :], v, mask)
            tl.debug_barrier()
        column = kept + tl.arange(0, SPARE)
        spare = tl.load(table + column, column < FULL, 0)
        some = spare > 0
        end = tl.atomic_add(free, tl.sum(some.to(tl.int32), 0))
        tl.store(stack + end + tl.cumsum(some.to(tl.int32), 0) - 1, spare.to(tl.int64), some)
        tl.store(owners + spare, tl.zeros((SPARE,), tl.int32), some)
        tl.store(table + column, tl.zeros((SPARE,), tl.int32), some)
        left = left & ~here
    done = page > 0
    tl.store(full_count + row, tl.zeros((ROWS,), tl.int32) + sinks + window, done)
    tl.store(encoded_count + row, count + 1, done)
