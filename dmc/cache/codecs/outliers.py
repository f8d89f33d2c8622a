"""The sparse part of GEAR: a fixed number of outliers for each vector, so that access stays regular."""

from __future__ import annotations

import torch
from torch import Tensor


def outlier_count(share: float, length: int) -> int:
    """Outliers of a vector of ``length`` values: the nearest whole number, at least 1 where the share is not 0."""
    return 0 if share == 0 else min(max(1, round(share * length)), length - 1)


def find(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest and the lowest values of each vector: half of ``count`` each.

    Where ``count`` is odd, the last one is whichever of the next highest and the next lowest is farther from the mean.

    Args:
        vectors: ``[..., n]``.
        count: below n.

    Returns:
        ``(where [..., count] int64, rest [..., n])``: rest has the outliers clamped into the range of the other
        values, so that they widen no quantisation group.
    """
    order, half = vectors.argsort(dim=-1), count // 2
    length = vectors.shape[-1]
    where = torch.cat([order[..., :half], order[..., length - half :]], dim=-1)
    if count % 2:
        ends = order[..., [half, length - half - 1]]
        low, high = (vectors.gather(-1, ends) - vectors.mean(-1, keepdim=True)).abs().unbind(-1)
        where = torch.cat([where, torch.where(high > low, ends[..., 1], ends[..., 0])[..., None]], dim=-1)
    outlying = torch.zeros_like(vectors, dtype=torch.bool).scatter_(-1, where, True)
    low = vectors.masked_fill(outlying, torch.inf).amin(-1, keepdim=True)
    high = vectors.masked_fill(outlying, -torch.inf).amax(-1, keepdim=True)
    return where, vectors.clamp(low, high)


def index_dtype(length: int) -> torch.dtype:
    """The narrowest dtype that indexes a vector of ``length`` values."""
    return torch.uint8 if length <= 256 else torch.int16 if length <= 2**15 else torch.int32
