"""Attention of one new token over pages, and the query's own intermediate state, which no other query sees."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.reading import gathered, onpages
from dmc.cache.reading.gathered import Plan, plans
from dmc.cache.storage.rows import Rows
from dmc.kernels.decode.decode import decode_attention, decode_watched

_PAGE_VALUES = 1 << 18  # values of encoded pages unpacked at once: they stay in a core's cache


def row_attention(
    rows: Rows, index: Tensor, query: Tensor, own_key: Tensor, own_value: Tensor, *, watch: str | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One query of each head over what a row holds: encoded pages, exact entries, and its own state.

    Where a kernel knows the codec (`dmc.cache.reading.onpages`: Triton's on a GPU, numba's loops on a CPU, always in fp32) it
    reads every page in place; the loops also where weights are watched or pages have holes. Elsewhere rows of similar length are
    gathered and attended to whole, a few at a time, or, watched or with holes, page by page, their parts summed by row. In every
    case a row costs what it holds.

    Args:
        rows: the cache.
        index: ``[R]``, rows of the queries.
        query: ``[R, G, D]``, rotated, fp32 or fp64.
        own_key, own_value: ``[R, D]``, the tail as it is now, rotated.
        watch: `Policy.watches`: the weights are then added to the scores of entries, or take their place.
        plan: of these rows, if there is one already.

    Returns:
        ``(out [R, G, D], own [R])``: own is the tail's weight, summed over G; None without ``watch``.
    """
    if onpages.reads(rows, rows.packing(index), watch=watch):
        own, work = (own_key, own_value), rows.shape.dtype if query.device.type == "cuda" else query.dtype
        arguments = query.to(work), *(x.to(work) for x in own), index, onpages.paged(rows, rows.packing(index))
        if watch is not None:
            out, mass = decode_watched(*arguments, watch=watch)
            return out.to(query.dtype), mass
        return decode_attention(*arguments).to(query.dtype), None
    query = query * query.shape[-1] ** -0.5
    if watch is None and not rows.storage.holes:
        plan = plans(rows, index[None])[0] if plan is None else plan
        return gathered.attend(rows, plan, query, own_key, own_value), None
    return _ragged(rows, index, query, own_key, own_value, watch)


def _ragged(
    rows: Rows, index: Tensor, query: Tensor, own_key: Tensor, own_value: Tensor, watch: str | None,
) -> tuple[Tensor, Tensor | None]:
    """`row_attention` page by page; the query is scaled already."""
    keys, values, valid = rows.exact_entries(index)
    scores = (query @ keys.to(query.dtype).transpose(-1, -2)).masked_fill_(~valid[:, None], -torch.inf)
    scores = torch.cat([scores, query @ own_key[:, :, None]], dim=-1)
    top = scores.amax(-1)  # [R, G]

    packing = rows.packing(index)
    pages, owner = rows.closed_pages(index)
    parts = []  # (pages, owner, blocks, scores [n, G, P]) of some pages each
    per_part = max(1, _PAGE_VALUES // (packing.page_size * rows.shape.head_size))
    for some, owners in zip(pages.split(per_part), owner.split(per_part), strict=True):
        blocks, marks = rows.read_closed(some, packing)
        paged = packing.codec.scores(blocks, query[owners])
        if rows.storage.holes:
            paged = paged.masked_fill_((marks["place"] < 0)[:, None], -torch.inf)
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
    if watch:
        own = _watch(rows, index, weights, parts, total, add=watch == "sum")
    return out / total[..., None], own


def _watch(rows: Rows, index: Tensor, weights: Tensor, parts: list, total: Tensor, *, add: bool) -> Tensor:
    """Writes each entry's softmax weight, summed over the queries of its head, to its score → the tail's."""
    layouts = rows.packing(index).layout, rows.open_layout
    closed, opened = (rows.pool.views(layout)["e_score"] for layout in layouts)
    for pages, owners, paged in parts:
        mass = (paged / total[owners][..., None]).sum(1).float()
        closed[pages] = closed[pages] + mass if add else mass
    mass = (weights / total[..., None]).sum(1).float()
    table = rows.open_table[index, : rows.open_pages(weights.shape[-1] - 1)]
    there = table != 0
    fresh = mass[:, :-1].unflatten(-1, (-1, rows.per_open_page))[there]
    opened[table[there]] = opened[table[there]] + fresh if add else fresh
    return mass[:, -1]
