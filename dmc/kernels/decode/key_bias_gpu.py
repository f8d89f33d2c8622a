"""The part of encoded entries' scores that the bias of keys adds (`dmc.kernels.pages.key_bias`), for the Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmc.kernels.pages.paged import Paged


def shifts(query: Tensor, index: Tensor, paged: Paged) -> Tensor:
    """The added scores of each query and each slot of the pages in its row's table.

    Args:
        query: ``[R, G, D]``, rotated, not scaled.
        index: ``[R]``, rows of ``paged``.
        paged: with a `KeyBias`.

    Returns:
        fp32 ``[R, G, columns * P]``; undefined in columns where a row has no page.
    """
    rows, groups, size = query.shape
    columns, page, positions = paged.encoded_table.shape[1], paged.page, paged.encoded["position"]
    coefficients = paged.key_bias.coefficients(query.float(), paged.heads[index]).contiguous()
    out = torch.empty(rows, groups, columns * page, dtype=torch.float32, device=query.device)
    _shifts[(rows, columns)](
        coefficients, paged.key_bias.features(), index, paged.encoded_count, paged.encoded_table, positions, out,
        paged.encoded_table.stride(0), positions.stride(0), columns, PAGE=page, P=triton.next_power_of_2(page), G=groups, D=size,
        BLOCK=triton.next_power_of_2(size), num_warps=4,
    )
    return out


@triton.jit
def _shifts(
    coefficients, features, index, encoded_count, table, positions, out, et, pp, columns, PAGE: tl.constexpr, P: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Added scores of one page of one row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1)
    table_row = tl.load(index + row).to(tl.int64)
    if column >= tl.load(encoded_count + table_row):
        return
    page = tl.load(table + table_row * et + column).to(tl.int64)
    n, d = tl.arange(0, P), tl.arange(0, BLOCK)
    at = tl.maximum(tl.load(positions + page * pp + n, n < PAGE, 0), 0).to(tl.int64)
    mine = tl.load(features + at[:, None] * D + d[None, :], (n < PAGE)[:, None] & (d < D)[None, :], 0.0)
    for g in range(G):
        c = tl.load(coefficients + (row * G + g) * D + d, d < D, 0.0)
        tl.store(out + ((row * G + g) * columns + column) * PAGE + n, tl.sum(mine * c[None, :], 1), n < PAGE)
