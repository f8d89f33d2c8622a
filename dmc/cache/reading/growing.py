"""Upper bounds of a step in which kernels append and encode: pages, and columns of the table of encoded pages.

The host computes them once before a step and reserves the pages, so no layer waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.storage.rows import Rows


def needs(rows: Rows, index: Tensor, closed: Tensor | None = None) -> tuple[int, int]:
    """Upper bounds for one more token per row, if every accumulating entry becomes final: ``index [L, R]``, by layer.

    With a ring and a bound on entries, a row that has reached the bound gets no further final entry. Neither do rows that
    ``closed``, bool ``[L, R]``, names.

    Returns:
        ``(pages, columns)``: the total number of pages, and the columns that the table of encoded pages must have.
    """
    if not index.numel():
        return 0, 0
    takes, fills = _growth(rows, index)
    if closed is not None:
        takes, fills = takes & ~closed, fills & ~closed
    encoded = rows.encoded_count[index]
    # A page that fills is encoded into a new page; the full-precision pages that this frees are given back later.
    counts = torch.stack([takes.sum() + fills.sum(), (encoded + fills.int()).max()])
    pages, columns = counts.tolist()
    return pages, columns


def crowded(rows: Rows, index: Tensor, limits: Tensor) -> Tensor | None:
    """Rows that may not get another final entry, since their sequence would exceed its pages.

    Args:
        rows: of the cache.
        index: ``[L, S * H]``, by layer.
        limits: int64 ``[S]``, pages that each sequence may hold.

    Returns:
        bool ``[L, S * H]``: of sequences whose pages and those of one more token together exceed the limit, the rows whose next
        entry takes a page. None: no such sequence.
    """
    takes, fills = _growth(rows, index)
    more = takes.int() + fills.int()
    full = rows.full_pages(rows.full_count[index]).clamp(min=rows.ring_pages)
    held = (rows.encoded_count[index] + full + more).unflatten(1, (len(limits), -1)).sum((0, 2))
    tight = held > limits
    if not bool(tight.any()):
        return None
    return (more > 0) & tight.repeat_interleave(index.shape[1] // len(limits))


def _growth(rows: Rows, index: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[L, R]`` whose next final entry takes a full-precision page, and rows in which it fills a page to be encoded."""
    full = rows.full_count[index]
    most = rows.page_sizes[:, None] + (rows.storage.first + rows.storage.window)
    # A row has the pages of its ring before the ring is full.
    takes = (full % rows.per_full_page == 0) & (full >= rows.ring_pages * rows.per_full_page)
    fills = full + 1 == most
    if rows.storage.most is not None:
        grows = rows.behind_ring(rows.encoded_count[index], full, rows.page_sizes[:, None]) < rows.storage.most
        takes, fills = takes & grows, fills & grows
    return takes, fills


def make_room(rows: Rows, index: Tensor, closed: Tensor | None = None) -> None:
    """Reserves pages and columns for one more token of each row; ``closed``: see `needs`.

    Raises:
        PoolExhausted: if the pool may not grow and has fewer free.
    """
    pages, columns = needs(rows, index, closed)
    rows.widen(columns)
    rows.pool.reserve(pages)
