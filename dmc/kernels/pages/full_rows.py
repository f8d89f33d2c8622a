"""Shared device functions of the Triton kernels that encode pages: full rows, their new pages and their entries."""

from __future__ import annotations

import triton
import triton.language as tl

from dmc.kernels.backend import interpreted

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to a whole number, ties to even


def rows_of_a_program() -> int:
    """Rows per program: few are full at a time."""
    return 4 if interpreted() else 16


@triton.jit
def new_pages(index, full_count, encoded_count, encoded_table, R, most, columns, et, ROWS: tl.constexpr):
    """This program's rows, their counts of encoded pages, and the page that each is encoded into; 0: none."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(index + r, r < R, -1).to(tl.int64)
    filled = row >= 0
    filled = filled & (tl.load(full_count + row, filled, 0) == most)
    count = tl.load(encoded_count + row, filled, 0)
    return row, count, tl.load(encoded_table + row * et + count, filled & (count < columns), 0)


@triton.jit
def first_of(left, ROWS: tl.constexpr):
    """The first true element of bool ``[ROWS]``, as a mask of the same shape."""
    lane = tl.arange(0, ROWS)
    return lane == tl.min(tl.where(left, lane, ROWS), 0)


@triton.jit
def full_at(table, offset, mask, stride, PER_FULL: tl.constexpr, D: tl.constexpr):
    """Offsets of full-precision entries in the memory of a row's full-precision pages, in elements; int64."""
    page = tl.load(table + offset // PER_FULL, mask, 0).to(tl.int64)
    return page * stride + (offset % PER_FULL) * D
