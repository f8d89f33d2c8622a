"""Exact causal attention over a band: each query over the newest keys, in memory linear in T.

Eviction does not affect the band. The result includes the logarithm of each softmax's sum, so that it can be combined with
attention over the keys behind the band (`dmc.kernels.attention.attend`). Rows are cut into blocks of at least ``window``
queries; a block attends to its own keys and the last ``window`` keys before them. The backward pass recomputes the weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_BLOCK = 64  # queries of a block: with fewer the matmuls are too small


def band_attention(query: Tensor, key: Tensor, value: Tensor, *, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of query i over keys i - window .. i; arithmetic in fp32 or more; differentiable once.

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
    """query ``[B, H, G, R, D]``, out and lse alike.

    The scores are the largest tensor by far, so each pass over them counts: a mask is the addend of their matmul, and softmax is
    one pass where ``exp`` would be slow on -inf. The query heads of a group are rows of one matmul.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
        blocks = _Blocks(query, key, window)
        scores = blocks.scores(blocks.queries(query), blocks.keys(key), scale)
        weights = scores.softmax(-1)
        # The largest weight is 1 / the sum of exponentials, since the exponential of the largest score is 1.
        lse = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
        out, lse = blocks.whole(torch.bmm(weights, blocks.keys(value))), blocks.whole(lse)[..., 0]
        ctx.save_for_backward(query, key, value, out)
        ctx.blocks, ctx.scale = blocks, scale
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        blocks, scale = ctx.blocks, ctx.scale
        rows, keys, down = blocks.queries(query), blocks.keys(key), blocks.queries(d_out)
        weights = blocks.scores(rows, keys, scale).softmax(-1)
        d_value = blocks.sum_keys(torch.bmm(weights.mT, down))
        inner = blocks.queries((d_lse - (d_out * out).sum(-1))[..., None])
        d_scores = torch.baddbmm(inner, down, blocks.keys(value).mT).mul_(weights)
        d_query = blocks.whole(torch.bmm(d_scores, keys)) * scale
        d_key = blocks.sum_keys(torch.bmm(d_scores.mT, rows)) * scale
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), None, None


class _Blocks:
    """Cuts rows into n blocks of C queries, and keys into the W + C of each block: a batch of B * H * n matrices."""

    def __init__(self, query: Tensor, key: Tensor, window: int) -> None:
        (self.batch, self.heads, self.groups, self.rows, _), self.tokens, self.window = query.shape, key.shape[-2], window
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.size = max(window, min(_LEAST_BLOCK, self.rows))
        self.count = -(-self.rows // self.size)
        row = torch.arange(self.size, device=query.device).repeat(self.groups)[:, None]
        column = torch.arange(window + self.size, device=query.device)
        seen = (column >= row) & (column <= row + window)  # [G * C, W + C]
        self.mask = torch.zeros(seen.shape, dtype=self.dtype, device=query.device).masked_fill_(~seen, -torch.inf)

    def queries(self, x: Tensor) -> Tensor:
        """``[B, H, G, R, F] → [B * H * n, G * C, F]``, rows beyond the last 0."""
        pad = self.count * self.size - self.rows
        x = F.pad(x.to(self.dtype), (0, 0, 0, pad)).unflatten(-2, (self.count, self.size))
        return x.transpose(2, 3).reshape(-1, self.groups * self.size, x.shape[-1])

    def whole(self, x: Tensor) -> Tensor:
        """The inverse of `queries`."""
        x = x.view(self.batch, self.heads, self.count, self.groups, self.size, -1).transpose(2, 3)
        return x.flatten(-3, -2)[..., : self.rows, :]

    def keys(self, x: Tensor) -> Tensor:
        """``[B, H, T, F] → [B * H * n, W + C, F]``, 0 for missing tokens."""
        before, after = self._margins()
        x = F.pad(x[..., max(0, -before) :, :].to(self.dtype), (0, 0, max(0, before), after))
        return x.unfold(-2, self.window + self.size, self.size).mT.reshape(-1, self.window + self.size, x.shape[-1])

    def sum_keys(self, x: Tensor) -> Tensor:
        """The transpose of `keys`."""
        before, after = self._margins()
        x = x.view(self.batch, self.heads, self.count, self.window + self.size, -1)
        own = F.pad(x[..., self.window :, :].flatten(-3, -2), (0, 0, self.window, 0))
        # The last `window` keys of a block are the first of the next block, which adds their second part.
        shared = F.pad(x[..., : self.window, :], (0, 0, 0, self.size - self.window)).flatten(-3, -2)
        own[..., : shared.shape[-2], :] += shared
        own = own[..., max(0, before) : own.shape[-2] - after, :]
        return F.pad(own, (0, 0, max(0, -before), 0))

    def scores(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """``[B * H * n, G * C, W + C]`` of `queries` and `keys`, -inf where a query does not see a key; rows beyond the last
        see keys of 0."""
        scores = torch.baddbmm(self.mask, query, key.mT, alpha=scale)
        before = max(0, self._margins()[0])  # missing keys of the first block; other blocks have none
        if before:
            scores.view(self.batch * self.heads, self.count, *self.mask.shape)[:, 0, :, :before] = -torch.inf
        return scores

    def _margins(self) -> tuple[int, int]:
        """Zeros before the first token (negative: tokens left out) and after the last."""
        return self.window - (self.tokens - self.rows), self.count * self.size - self.rows
