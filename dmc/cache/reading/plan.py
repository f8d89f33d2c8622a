"""`Plan`: which pages are gathered, and which rows together (`dmc.cache.reading.gathered`).

A plan depends on counts and tables alone. If nothing is merged all layers have equal counts, so one transfer of the counts
gives the plans of all layers.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.cache.storage.packing import Packing
from dmc.cache.storage.rows import Rows

_VALUES = {"cpu": 1 << 19}  # keys gathered at once: measured, see docs/results/serve-kernels.md
_VALUES_ELSEWHERE = 1 << 24
_ALIKE = 0.75  # rows are gathered together if they have at least this part of the longest row's entries ...
_NEAR = 64  # ... or at most so many entries less


@dataclass(frozen=True)
class Group:
    """Rows ``start`` to ``end`` of a plan, gathered together.

    Attributes:
        pages: int32 ``[r * C]``, C pages per row; empty if the rows have none.
        columns: C.
        gone: bool ``[r or 1, 1, C * P]``, True where a row has no entry; None: every row has one everywhere.
    """

    start: int
    end: int
    pages: Tensor
    columns: int
    gone: Tensor | None


@dataclass(frozen=True)
class Plan:
    """The division of the rows of one layer into groups.

    Attributes:
        packing: of the layer's encoded pages.
        order, back: int64 ``[R]``, from the caller's order to the plan's, and back; None if they are the same.
        groups: together all rows.
        full_pages: int32 ``[R * O]``, full-precision pages; None if the groups read them too.
        full_gone: bool ``[R, 1, O * per page]``, as `Group.gone`.
    """

    packing: Packing
    order: Tensor | None
    back: Tensor | None
    groups: list[Group]
    full_pages: Tensor | None
    full_gone: Tensor | None


def plans(rows: Rows, index: Tensor) -> list[Plan]:
    """Plans of layers with equal storage, whose rows have equal numbers of entries: ``index [L, R]``."""
    packing = rows.packing(index[0])
    size, joined = packing.page_size, rows.joined(packing)
    encoded, full = rows.encoded_count[index[0]].long(), rows.full_count[index[0]].long()
    entries = encoded * size + full * joined
    lengths, order, back = entries.tolist(), None, None
    if min(lengths) < max(lengths):
        order = entries.argsort(descending=True, stable=True)
        back, index = order.argsort(), index[:, order]
        encoded, full, entries = encoded[order], full[order], entries[order]
        lengths.sort(reverse=True)
    columns = -(-lengths[0] // size)
    table = _joined(rows, index, encoded, columns) if joined else rows.encoded_table[:, :columns][index]
    parts = []
    most = _VALUES.get(index.device.type, _VALUES_ELSEWHERE) // rows.shape.head_size
    for start, end in _cuts(lengths, most):
        columns = -(-lengths[start] // size)
        pages = table[:, start:end, :columns].flatten(1).unbind()
        gone = _gone(entries[start:end], lengths[start], lengths[end - 1], columns * size)
        parts.append([Group(start, end, some, columns, gone) for some in pages])
    full_pages, full_gone = [None] * len(index), None
    if not joined:
        longest = int(full.max())
        held = rows.full_pages(longest)
        full_pages = rows.full_table[:, :held][index].flatten(1).unbind()
        full_gone = _gone(full, longest, int(full.min()), held * rows.per_full_page)
    groups = zip(*parts, strict=True)
    return [Plan(packing, order, back, list(group), pages, full_gone) for group, pages in zip(groups, full_pages, strict=True)]


def _cuts(lengths: list[int], most: int) -> list[tuple[int, int]]:
    """Cuts rows of falling lengths into groups of at most ``most`` entries; a longer row is a group of its own."""
    cuts, start = [], 0
    while start < len(lengths):
        longest = lengths[start]
        least = min(_ALIKE * longest, longest - _NEAR)
        alike = bisect_right(lengths, -least, key=lambda length: -length)
        end = min(alike, start + max(1, most // max(1, longest)))
        cuts.append((start, end))
        start = end
    return cuts


def _gone(counts: Tensor, longest: int, shortest: int, width: int) -> Tensor | None:
    """Mask of the padding of rows of so many entries, padded to ``width``; one row if all are equally long."""
    if shortest == width:
        return None
    counts = counts[:1] if shortest == longest else counts
    return (torch.arange(width, device=counts.device) >= counts[:, None])[:, None]


def _joined(rows: Rows, index: Tensor, encoded: Tensor, columns: int) -> Tensor:
    """Encoded pages, then full-precision pages, ``[L, R, C]``."""
    widest = int(encoded.max())
    both = torch.cat([rows.encoded_table[:, :widest][index], rows.full_table[index]], dim=-1)
    column = torch.arange(columns, device=index.device).expand(len(encoded), -1)
    column = torch.where(column < encoded[:, None], column, column - encoded[:, None] + widest)
    return both.gather(-1, column.clamp_(max=both.shape[-1] - 1).expand(len(index), -1, -1))
