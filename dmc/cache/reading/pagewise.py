"""Attention of new tokens page by page, in PyTorch: for evicted slots and attention statistics, without kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.reading.plan import Plan
from dmc.cache.reading.reader import Reader
from dmc.cache.storage.packing import Packing
from dmc.cache.storage.rows import Rows

_PAGE_VALUES = 1 << 18  # values of encoded pages unpacked at once: they stay in a core's cache


class PageByPage(Reader):
    """Computes scores page by page, and sums the partial results by row.

    Args:
        packing: of the layers.
        statistics: `Policy.statistics`.
    """

    def __init__(self, packing: Packing, statistics: str | None = None) -> None:
        self.packing, self.statistics = packing, statistics

    def attend(
        self, rows: Rows, index: Tensor, query: Tensor, own_key: Tensor, own_value: Tensor, plan: Plan | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Reader.attend`."""
        query = query * query.shape[-1] ** -0.5
        keys, values, valid = rows.full_entries(index)
        scores = (query @ keys.to(query.dtype).transpose(-1, -2)).masked_fill_(~valid[:, None], -torch.inf)
        scores = torch.cat([scores, query @ own_key[:, :, None]], dim=-1)
        top = scores.amax(-1)  # [R, G]

        packing = self.packing
        pages, owner = rows.encoded_pages(index)
        parts: list = []  # (pages, owner, blocks, scores [n, G, P]) of some pages each
        per_part = max(1, _PAGE_VALUES // (packing.page_size * rows.shape.head_size))
        for some, owners in zip(pages.split(per_part), owner.split(per_part), strict=True):
            blocks, metadata = rows.read_encoded(some, packing)
            paged = packing.codec.scores(blocks, query[owners])
            if rows.storage.evicted_slots:
                paged = paged.masked_fill_((metadata["position"] < 0)[:, None], -torch.inf)
            top.scatter_reduce_(0, owners[:, None].expand(-1, top.shape[1]), paged.amax(-1), "amax")
            parts.append((some, owners, blocks, paged))

        weights = (scores - top[..., None]).exp_()
        total = weights.sum(-1)
        out = weights[..., :-1] @ values.to(query.dtype) + weights[..., -1:] * own_value[:, None]
        for number, (some, owners, blocks, paged) in enumerate(parts):
            paged = paged.sub_(top[owners][..., None]).exp_()
            total.index_add_(0, owners, paged.sum(-1))
            out.index_add_(0, owners, packing.codec.combine(blocks, paged))
            parts[number] = (some, owners, paged)
        own = None
        if self.statistics:
            own = _add_statistics(rows, self.packing, index, weights, parts, total, add=self.statistics == "sum")
        return out / total[..., None], own


def _add_statistics(
    rows: Rows, packing: Packing, index: Tensor, weights: Tensor, parts: list, total: Tensor, *, add: bool
) -> Tensor:
    """Adds each entry's softmax weight, summed over the queries of its head, to its score, or replaces the score.

    Returns:
        The weight of the accumulating entry, fp32 ``[R]``."""
    layouts = packing.layout, rows.full_layout
    encoded, full = (rows.pool.views(layout)["e_score"] for layout in layouts)
    for pages, owners, paged in parts:
        mass = (paged / total[owners][..., None]).sum(1).float()
        encoded[pages] = encoded[pages] + mass if add else mass
    mass = (weights / total[..., None]).sum(1).float()
    table = rows.full_table[index, : rows.full_pages(weights.shape[-1] - 1)]
    there = table != 0
    fresh = mass[:, :-1].unflatten(-1, (-1, rows.per_full_page))[there]
    full[table[there]] = full[table[there]] + fresh if add else fresh
    return mass[:, -1]
