"""DMC's and DMS's attention by PyTorch's fused causal kernel; `dmc.kernels.attention.attend` explains the method."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from dmc.kernels.attention.band import band_attention


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Causal attention of the last queries of a sequence: query m of n sees keys up to m + (keys - n)."""
    if query.shape[2] == key.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    # Some fused kernels with the shifted mask do not support grouped queries, so keys are repeated here.
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    mask = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def own_exempt(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention of the last queries of a sequence over all earlier keys with their bias, and over their own keys without it."""
    heads, rows = key.shape[1], query.shape[2]
    grouped = query.unflatten(1, (heads, -1))
    own = (grouped * key[:, :, None, -rows:]).sum(-1, dtype=torch.float32).flatten(1, 2)  # [B, Hq, rows], unscaled
    out, share = _anchored(query, key[..., :-1, :], value[..., :-1, :], bias[..., :-1], own, scale)
    return out + (share.unflatten(1, (heads, -1)) * value[:, :, None, -rows:]).flatten(1, 2)


def band_exempt(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, scale: float) -> Tensor:
    """As `own_exempt`, with the ``window`` keys before a query's own exempt as well."""
    rows, behind = query.shape[2], key.shape[2] - window - 1  # keys that the last query sees with a bias
    if behind <= 0:
        return causal_attention(query, key, value, scale=scale)
    out, lse = band_attention(query, key, value, window=window, scale=scale)
    out = out.to(query.dtype)
    near = max(0, rows - behind - 1)  # queries that see only their band; one more query remains, which sees only its anchor
    past = [x[:, :, :behind] for x in (key, value, bias)]
    far, share = _anchored(query[:, :, near:], *past, lse[:, :, near:] / scale, scale)
    joined = far + share * out[:, :, near:]
    return torch.cat([out[:, :, :near], joined], dim=2) if near else joined


def _anchored(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, own: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of queries ``[B, Hq, R, D]`` over N biased keys, of which the last query sees all and each query one less than
    the next, and over an anchor of score ``own [B, Hq, R]`` (before scaling) → (the keys' part of the output, the anchor's weight
    ``[B, Hq, R, 1]``)."""
    size = key.shape[-1]
    own, bias = _split(own, query.dtype), _split(bias / scale, query.dtype)
    extra = 2 * bias.shape[-1]  # features added; GPU kernels need a multiple of 8
    pad = -(size + extra) % 8 if query.is_cuda else 0
    queries = F.pad(torch.cat([query, torch.ones_like(own), own], dim=-1), (0, pad))
    anchor = torch.cat([key.new_zeros(size + bias.shape[-1]), key.new_ones(bias.shape[-1]), key.new_zeros(pad)])
    keys = F.pad(torch.cat([key, bias], dim=-1), (0, bias.shape[-1] + pad))
    keys = torch.cat([anchor.expand(*keys.shape[:2], 1, -1), keys], dim=-2)
    marker = F.pad(value.new_ones(1), (size, extra - 1 + pad))
    values = torch.cat([marker.expand(*value.shape[:2], 1, -1), F.pad(value, (0, extra + pad))], dim=-2)
    out = causal_attention(queries, keys, values, scale=scale)
    return out[..., :size], out[..., size : size + 1]


def _split(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 ``[...]`` → ``[..., parts]`` in ``dtype`` whose sum is x: one part in fp32, two below."""
    if dtype == torch.float32:
        return x[..., None]
    high = x.to(dtype)
    low = (x - high.float()).nan_to_num(0.0, 0.0, 0.0).to(dtype)  # -inf - -inf: no remainder
    return torch.stack([high, low], dim=-1)


def in_span(attend, starts: Tensor | None, first: int, query: Tensor, *keys: Tensor) -> Tensor:
    """Runs ``attend`` on whole rows if a row is one document, and document by document otherwise.

    ``query`` holds the positions from ``first`` to the end of ``keys`` and ``starts``.
    """
    if starts is None or not bool(starts[:, 1:].any()):
        return attend(query, *keys)
    boundaries = starts[:, 1:].any(-1)
    rows: list[Tensor | None] = [None] * len(boundaries)
    whole = (~boundaries).nonzero().flatten()
    if len(whole):
        for row, out in zip(whole.tolist(), attend(*(t[whole] for t in (query, *keys))).split(1), strict=True):
            rows[row] = out
    for row in boundaries.nonzero().flatten().tolist():
        edges = [0, *(starts[row, 1:].nonzero().flatten() + 1).tolist(), starts.shape[1]]
        parts = [
            attend(query[row : row + 1, :, max(0, a - first) : b - first], *(t[row : row + 1, :, a:b] for t in keys))
            for a, b in zip(edges[:-1], edges[1:], strict=True) if b > first
        ]
        rows[row] = torch.cat(parts, dim=2)
    return torch.cat(rows)
