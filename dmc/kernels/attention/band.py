"""Exact causal attention over a band: each query over the newest keys, in memory linear in T.

What eviction never touches. The logarithm of each softmax's sum comes with the result, so that it can be joined with
attention over the keys behind the band (`dmc.kernels.attention.attend`). Rows are cut into blocks of at least ``window``
queries, each of which meets its own keys and the last ``window`` before them; the weights are computed again in the
backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_BLOCK = 64  # queries of a block: fewer make the products too small


def band_attention(query: Tensor, key: Tensor, value: Tensor, *, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """Query i over keys i - window .. i; arithmetic in fp32 at least; differentiable once.

    Args:
        query: ``[B, Hq, R, D]``, of the last R of the T tokens; Hq a multiple of H.
        key, value: ``[B, H, T, D]``.
        window: keys before its own that a query sees, at least 1.

    Returns:
        ``(out [B, Hq, R, D], lse [B, Hq, R])``, fp32 or fp64: lse is the logarithm of the sum of exponentials.
    """
    heads = key.shape[1]
    out, lse = _Band.apply(query.unflatten(1, (heads, -1)), key, value, window, scale)
    return out.flatten(1, 2), lse.flatten(1, 2)


class _Band(torch.autograd.Function):
    """query ``[B, H, G, R, D]``, out and lse alike."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
        blocks = _Blocks(query, key, window)
        scores = blocks.scores(query, key, scale)
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp_() @ blocks.keys(value)
        out, lse = blocks.whole(out), blocks.whole(lse[..., None])[..., 0]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        blocks, scale = ctx.blocks, ctx.scale
        weights = (blocks.scores(query, key, scale) - blocks.queries(lse[..., None])).exp_()
        down = blocks.queries(d_out)
        d_value = blocks.sum_keys(weights.mT @ down)
        inner = blocks.queries((d_lse - (d_out * out).sum(-1))[..., None])
        d_scores = (down @ blocks.keys(value).mT + inner).mul_(weights).mul_(scale)
        d_query = blocks.whole(d_scores @ blocks.keys(key))
        d_key = blocks.sum_keys(d_scores.mT @ blocks.queries(query))
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), None, None


class _Blocks:
    """Cuts rows into n blocks of C queries, and keys into the W + C that each block meets."""

    def __init__(self, query: Tensor, key: Tensor, window: int) -> None:
        self.rows, self.tokens, self.window = query.shape[-2], key.shape[-2], window
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.size = max(window, min(_LEAST_BLOCK, self.rows))
        self.count = -(-self.rows // self.size)
        first = self.tokens - self.rows - window  # of the first block's keys; before 0 there are none
        row = torch.arange(self.size, device=query.device)[:, None]
        column = torch.arange(window + self.size, device=query.device)
        there = torch.arange(self.count, device=query.device)[:, None] * self.size + column + first >= 0  # [n, W + C]
        self.seen = ((column >= row) & (column <= row + window)) & there[:, None]  # [n, C, W + C]

    def queries(self, x: Tensor) -> Tensor:
        """``[B, H, G, R, F] → [B, H, G, n, C, F]``, rows beyond the last 0."""
        pad = self.count * self.size - self.rows
        return F.pad(x.to(self.dtype), (0, 0, 0, pad)).unflatten(-2, (self.count, self.size))

    def whole(self, x: Tensor) -> Tensor:
        """The inverse of `queries`."""
        return x.flatten(-3, -2)[..., : self.rows, :]

    def keys(self, x: Tensor) -> Tensor:
        """``[B, H, T, F] → [B, H, 1, n, W + C, F]``, tokens that there are not 0."""
        before, after = self._margins()
        x = F.pad(x[..., max(0, -before) :, :].to(self.dtype), (0, 0, max(0, before), after))
        return x.unfold(-2, self.window + self.size, self.size).mT[:, :, None]

    def sum_keys(self, x: Tensor) -> Tensor:
        """The transpose of `keys`, summed over the query heads of a group: ``[B, H, G, n, W + C, F] → [B, H, T, F]``."""
        before, after = self._margins()
        x = x.sum(2)
        own = F.pad(x[..., self.window :, :].flatten(-3, -2), (0, 0, self.window, 0))
        # The last `window` keys of a block are the next one's first: their second share.
        shared = F.pad(x[..., : self.window, :], (0, 0, 0, self.size - self.window)).flatten(-3, -2)
        own[..., : shared.shape[-2], :] += shared
        own = own[..., max(0, before) : own.shape[-2] - after, :]
        return F.pad(own, (0, 0, max(0, -before), 0))

    def scores(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """``[B, H, G, n, C, W + C]``, -inf where a query does not see a key; a row beyond the last sees what is 0."""
        return (self.queries(query) @ self.keys(key).mT * scale).masked_fill_(~self.seen, -torch.inf)

    def _margins(self) -> tuple[int, int]:
        """Zeros before the first token (negative: tokens left out) and after the last."""
        return self.window - (self.tokens - self.rows), self.count * self.size - self.rows
