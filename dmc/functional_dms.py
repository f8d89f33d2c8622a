"""The maths of Dynamic Memory Sparsification in plain differentiable PyTorch: the reference for everything else.

Source: Łańcucki et al., "Inference-Time Hyper-Scaling with KV Cache Compression", NeurIPS 2025, arXiv 2506.05345 ("the
paper"). Decisions are those of `dmc.functional` (`sample_alpha`, `round_alpha`, `compression_loss`); what they mean is
another: token j with alpha_j = 1 is **evicted** once it is more than ``window`` tokens back, instead of merged at once.
There is no importance and no accumulation. Dimension letters are those of `dmc.functional`.

    query i sees key j <= i    exactly                       where i - j <= window
                               weighted by 1 - alpha_j       where i - j > window

So a marked token is last seen by the query ``window`` tokens after it, and then leaves the cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmc.functional import _work, rotate


def key_bias(alpha: Tensor, *, log_keep: Tensor | None = None) -> Tensor:
    """What is added to every score on key j from a query more than ``window`` later: ``log(1 - alpha_j)``.

    Args:
        alpha: ``[B, H, T]``. Exactly 1 gives -inf, with no gradient there.
        log_keep: ``log(1 - alpha)`` from `dmc.functional.sample_log_keep`, where alpha comes from logits.

    Returns:
        ``[B, H, T]``, fp32 or fp64.
    """
    if log_keep is not None:
        return log_keep
    alpha = _work(alpha)
    gone = alpha >= 1
    return torch.log1p(-alpha.masked_fill(gone, 0.0)).masked_fill(gone, -math.inf)


def undecided(tokens: int, window: int, *, device: torch.device | str | None = None) -> Tensor:
    """bool ``[T]``: the last ``window`` tokens, which a sequence holds at its end whatever was decided about them."""
    return torch.arange(tokens, device=device) >= tokens - window


def cache_lengths(alpha: Tensor, window: int) -> Tensor:
    """Entries that each head holds after T tokens: the last ``window`` of them, and older ones that are not marked.

    Args:
        alpha: ``[..., T]`` hard decisions.

    Returns:
        int64 ``[...]``.
    """
    return (1 - alpha.masked_fill(undecided(alpha.shape[-1], window, device=alpha.device), 0.0)).sum(-1).round().long()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor,
    *,
    window: int,
    rope: tuple[Tensor, Tensor] | None = None,
    starts: Tensor | None = None,
    scale: float | None = None,
    log_keep: Tensor | None = None,
) -> Tensor:
    """Causal attention of DMS, O(T^2) memory: see the head of this file. Nothing of another document is seen.

    With alpha in {0, 1} this is attention over a cache that evicts, to rounding.

    Args:
        query: ``[B, Hq, T, D]``, before RoPE. Hq is a multiple of H.
        key, value: ``[B, H, T, D]``; key as query.
        alpha: ``[B, H, T]``.
        window: w, at least 0 (0: a marked token is seen by its own query alone).
        rope: (cos, sin), each ``[T, D]``.
        starts: ``[B, T]`` bool, first tokens of documents.
        scale: of the scores, ``1 / sqrt(D)`` if None.
        log_keep: see `key_bias`.

    Returns:
        ``[B, Hq, T, D]`` in the dtype of ``query``.

    Raises:
        ValueError: if the head counts do not divide, the shapes of alpha and key differ, or the window is negative.
    """
    batch, query_heads, tokens, size = query.shape
    heads = key.shape[1]
    if query_heads % heads or alpha.shape != key.shape[:3]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, alpha {tuple(alpha.shape)}: query heads must be a multiple "
            "of key heads, and alpha [B, H, T]"
        )
    if window < 0:
        raise ValueError(f"window must be at least 0, got {window}")
    queries, keys, values = _work(query), _work(key), _work(value)
    if rope is not None:
        keys, queries = rotate(keys, rope), rotate(queries, rope)
    queries = queries.unflatten(1, (heads, -1))  # [B, H, G, T, D]
    scores = queries @ keys[:, :, None].transpose(-1, -2) * (size**-0.5 if scale is None else scale)
    place = torch.arange(tokens, device=query.device)
    behind = place[:, None] - place
    bias = key_bias(alpha, log_keep=log_keep)[:, :, None, None, :].masked_fill(behind <= window, 0.0)
    visible = behind >= 0
    if starts is not None:
        document = starts.cumsum(-1)
        visible = visible & (document[:, :, None] == document[:, None, :])[:, None, None]
    scores = (scores + bias).masked_fill(~visible, -math.inf)
    out = scores.softmax(-1) @ values[:, :, None]
    return out.flatten(1, 2).to(query.dtype)
