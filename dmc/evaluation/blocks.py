"""Causal attention of one sequence in blocks of queries, in memory linear in its length.

Dimension letters: H key/value heads, G query heads per key/value head, T tokens, D head size, b queries of a block, K tokens
that a block's queries see.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

See = Callable[[Tensor, int], None]
"""Takes attention ``[H, G, b, K]`` of queries ``first``, ``first + 1``, ... on the first K tokens."""


def attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, *, block: int, see: See | None = None, gone: Tensor | None = None, window: int = 0
) -> Tensor:
    """Attention of one sequence, ``block`` queries at a time.

    Args:
        query: ``[H, G, T, D]``, RoPE applied, fp32.
        key, value: ``[H, T, D]``, the same.
        see: is shown the attention of each block, as it would be without ``gone``.
        gone: bool ``[H, T]``, tokens that are evicted once they are more than ``window`` tokens back; None: none.
        window: w.

    Returns:
        ``[H, G, T, D]``.
    """
    tokens, scale = query.shape[2], query.shape[-1] ** -0.5
    out = torch.empty_like(query)
    for first in range(0, tokens, block):
        last = min(first + block, tokens)
        scores = (query[:, :, first:last] * scale) @ key[:, None, :last].mT
        later = torch.ones(last - first, last, dtype=torch.bool, device=query.device).triu(first + 1)
        scores.masked_fill_(later, -math.inf)
        attention = scores.softmax(-1) if see is not None or gone is None else None
        if see is not None:
            see(attention, first)
        if gone is not None:
            far = ~near(first, last - first, last, window, query.device)
            attention = scores[..., : far.shape[1]].masked_fill_(gone[:, None, None, : far.shape[1]] & far, -math.inf)
            attention = scores.softmax(-1)
        out[:, :, first:last] = attention @ value[:, None, :last]
    return out


def mask_near(attention: Tensor, first: int, window: int) -> Tensor:
    """Attention ``[..., b, K]`` of queries from ``first`` on, without the tokens that every query has in its window
    (``[..., b, K']``), and 0 where a query has a token in its window."""
    mask = near(first, *attention.shape[-2:], window, attention.device)
    return attention[..., : mask.shape[1]].masked_fill(mask, 0.0)


def near(first: int, queries: int, tokens: int, window: int, device: torch.device) -> Tensor:
    """Bool ``[b, K']``: token at most ``window`` before the query; K' tokens that some query has behind its window."""
    tokens = min(tokens, max(0, first + queries - 1 - window))
    behind = torch.arange(first, first + queries, device=device)[:, None] - torch.arange(tokens, device=device)
    return behind <= window
