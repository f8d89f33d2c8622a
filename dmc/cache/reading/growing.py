"""What a step can take at most where kernels append and encode: pages, and columns of the table of encoded pages.

The host counts it once before a step and makes that room, so no layer waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.storage.rows import Rows


def needs(rows: Rows, index: Tensor) -> tuple[int, int]:
    """What one more token of each row can take at most, were every open entry to close: ``index [L, R]``, by layer.

    A row behind a ring whose entries are bounded closes none once it has as many.

    Returns:
        ``(pages, columns)``: pages in all, and the columns that the table of encoded pages must have.
    """
    if not index.numel():
        return 0, 0
    full, encoded = rows.full_count[index], rows.encoded_count[index]
    most = rows.page_sizes[:, None] + (rows.storage.first + rows.storage.window)
    # Pages of the ring are there before it is full.
    takes = (full % rows.per_full_page == 0) & (full >= rows.ring_pages * rows.per_full_page)
    fills = full + 1 == most
    if rows.storage.most is not None:
        grows = rows.behind_ring(encoded, full, rows.page_sizes[:, None]) < rows.storage.most
        takes, fills = takes & grows, fills & grows
    # A page that fills is encoded into a new one, and its exact pages may be given back only then.
    counts = torch.stack([takes.sum() + fills.sum(), (encoded + fills.int()).max()])
    pages, columns = counts.tolist()
    return pages, columns


def make_room(rows: Rows, index: Tensor) -> None:
    """Sees to it that one more token of each row finds pages and columns.

    Raises:
        PoolExhausted: if the pool may not grow and has fewer free.
    """
    pages, columns = needs(rows, index)
    rows.widen(columns)
    rows.pool.reserve(pages)
