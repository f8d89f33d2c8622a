"""How many dimensions a matrix needs, from its singular values."""

from __future__ import annotations

import torch
from torch import Tensor

ENERGY = 0.99
_ROUNDING = 1e-9  # relative; the sum of squares of an exact case must not miss its share by rounding


def spectrum(matrix: Tensor, size: int | None = None) -> Tensor:
    """Singular values ``[..., n]`` of ``[..., N, D]``, largest first, filled up with zeros to ``size`` values.

    Arithmetic is in the dtype of the matrix: fp32 or fp64.
    """
    values = torch.linalg.svdvals(matrix)
    if size is None or values.shape[-1] >= size:
        return values
    return torch.nn.functional.pad(values, (0, size - values.shape[-1]))


def effective_rank(values: Tensor, energy: float = ENERGY) -> Tensor:
    """The least number of singular values whose squares sum up to a share of all squares.

    Args:
        values: ``[..., n]``, largest first.
        energy: the share, above 0 and at most 1.

    Returns:
        ``[...]`` int64; 0 where all are zero.

    Raises:
        ValueError: if the share is out of range.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, got {energy}")
    sums = values.double().square().cumsum(-1)
    total = sums[..., -1:]
    return ((sums < energy * (1 - _ROUNDING) * total).sum(-1) + 1) * (total[..., 0] > 0)


def stable_rank(values: Tensor) -> Tensor:
    """``||A||_F^2 / ||A||_2^2`` from singular values ``[..., n]``, largest first → ``[...]`` fp64; 0 for a zero matrix."""
    squares = values.double().square()
    return torch.where(squares[..., 0] > 0, squares.sum(-1) / squares[..., 0], 0.0)
