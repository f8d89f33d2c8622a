"""Upper bounds of a step in which kernels append and encode: pages, and columns of the table of encoded pages.

The host computes them once before a step and reserves the pages, so no layer waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.storage.rows import Rows


def needs(rows: Rows, index: Tensor) -> tuple[int, int]:
    """Upper bounds for one more token per row, if every accumulating entry becomes final: ``index [L, R]``, by layer.

    With a ring and a bound on entries, a row that has reached the bound gets no further final entry.

    Returns:
        ``(pages, columns)``: the total number of pages, and the columns that the table of encoded pages must have.
    """
    if not index.numel():
        return 0, 0
    full, encoded = rows.full_count[index], rows.encoded_count[index]
    most = rows.page_sizes[:, None] + (rows.storage.first + rows.storage.window)
    # A row has the pages of its ring before the ring is full.
    takes = (full % rows.per_full_page == 0) & (full >= rows.ring_pages * rows.per_full_page)
    fills = full + 1 == most
    if rows.storage.most is not None:
        grows = rows.behind_ring(encoded, full, rows.page_sizes[:, None]) < rows.storage.most
        takes, fills = takes & grows, fills & grows
    # A page that fills is encoded into a new page; the full-precision pages that this frees are given back later.
    counts = torch.stack([takes.sum() + fills.sum(), (encoded + fills.int()).max()])
    pages, columns = counts.tolist()
    return pages, columns


def make_room(rows: Rows, index: Tensor) -> None:
    """Reserves pages and columns for one more token of each row.

    Raises:
        PoolExhausted: if the pool may not grow and has fewer free.
    """
    pages, columns = needs(rows, index)
    rows.widen(columns)
    rows.pool.reserve(pages)
