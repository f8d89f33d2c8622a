"""Attention of the serving side: of a prompt over compacted keys, and of one new token over pages.

Both end with one extra term, the query's own intermediate state, which no other query sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.rows import Rows

_PROMPT_SCORES = 1 << 24  # scores of a prompt held at once, over all heads
_PAGE_VALUES = 1 << 18  # values of encoded pages unpacked at once: they stay in a core's cache


def compact(closes: Tensor) -> tuple[Tensor, Tensor]:
    """Where the final entries of a prompt are among its intermediate states.

    Args:
        closes: ``[B, H, T]`` bool, True where the next token of the prompt opens a new entry.

    Returns:
        ``(places [B, H, N] int64, counts [B, H] int64)``: the places in rising order, T where a head has fewer
        than N; N is the longest count.
    """
    tokens = closes.shape[-1]
    order = closes.cumsum(-1)
    counts = order[..., -1]
    most = int(counts.max())
    places = order.new_full((*closes.shape[:2], most + 1), tokens)
    target = torch.where(closes, order - 1, most)  # states that do not close all land in the spare last place
    places.scatter_(-1, target, torch.arange(tokens, device=closes.device).expand_as(target))
    return places[..., :most], counts


def prompt_attention(
    query: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, places: Tensor,
) -> Tensor:
    """Each query of a prompt over the entries that closed before it, and its own state.

    Args:
        query: ``[B, Hq, T, D]``, rotated.
        keys, values: ``[B, H, N, D]``, final entries, oldest first, rotated.
        own_keys, own_values: ``[B, H, T, D]``, the state after each token, rotated.
        places: ``[B, H, N]`` of `compact`: entry n is seen by queries after ``places[n]``.

    Returns:
        ``[B, Hq, T, D]``; softmax in fp32 at least.
    """
    batch, query_heads, tokens, size = query.shape
    heads = keys.shape[1]
    query = query.unflatten(1, (heads, -1)) * size**-0.5  # [B, H, G, T, D]
    out = torch.empty_like(query)
    step = max(1, _PROMPT_SCORES // (batch * query_heads * (keys.shape[2] + 1)))
    for start in range(0, tokens, step):
        end = min(start + step, tokens)
        seen = int((places < end - 1).sum(-1).max()) if places.numel() else 0
        part = query[:, :, :, start:end]
        scores = part @ keys[:, :, None, :seen].transpose(-1, -2)
        later = places[:, :, None, :seen] >= torch.arange(start, end, device=query.device)[:, None]
        scores = scores.masked_fill_(later[:, :, None], -torch.inf)
        own = (part * own_keys[:, :, None, start:end]).sum(-1, keepdim=True)
        weights = torch.cat([scores, own], dim=-1)
        weights = weights.softmax(-1, dtype=_work_dtype(weights.dtype)).to(query.dtype)
        out[:, :, :, start:end] = (
            weights[..., :-1] @ values[:, :, None, :seen] + weights[..., -1:] * own_values[:, :, None, start:end]
        )
    return out.flatten(1, 2)


def row_attention(rows: Rows, index: Tensor, query: Tensor, own_key: Tensor, own_value: Tensor) -> Tensor:
    """One query of each head over what a row holds: encoded pages, exact entries, and its own state.

    Pages are attended to page by page and their parts summed by row, so rows of different length cost what they
    hold and no padding.

    Args:
        rows: the cache.
        index: ``[R]``, rows of the queries.
        query: ``[R, G, D]``, rotated, fp32 or fp64.
        own_key, own_value: ``[R, D]``, the tail as it is now, rotated.

    Returns:
        ``[R, G, D]``.
    """
    query = query * query.shape[-1] ** -0.5
    keys, values, valid = rows.exact_entries(index)
    scores = (query @ keys.to(query.dtype).transpose(-1, -2)).masked_fill_(~valid[:, None], -torch.inf)
    scores = torch.cat([scores, query @ own_key[:, :, None]], dim=-1)
    top = scores.amax(-1)  # [R, G]

    pages, owner = rows.closed_pages(index)
    parts = []  # (owner, blocks, scores [n, G, P]) of some pages each
    per_part = max(1, _PAGE_VALUES // (rows.storage.page_size * rows.shape.head_size))
    for some, owners in zip(pages.split(per_part), owner.split(per_part), strict=True):
        blocks = rows.blocks(some)
        paged = rows.storage.codec.scores(blocks, query[owners])
        top.scatter_reduce_(0, owners[:, None].expand(-1, top.shape[1]), paged.amax(-1), "amax")
        parts.append((owners, blocks, paged))

    weights = (scores - top[..., None]).exp_()
    total = weights.sum(-1)
    out = weights[..., :-1] @ values.to(query.dtype) + weights[..., -1:] * own_value[:, None]
    for owners, blocks, paged in parts:
        weights = (paged - top[owners][..., None]).exp_()
        total.index_add_(0, owners, weights.sum(-1))
        out.index_add_(0, owners, rows.storage.codec.combine(blocks, weights))
    return out / total[..., None]


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
