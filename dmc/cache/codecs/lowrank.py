"""The low-rank part of GEAR: a page's residual as A Bᵀ."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank(residual: Tensor, rank: int, *, rounds: int, seed: int) -> tuple[Tensor, Tensor]:
    """Best rank-``rank`` approximation of each page's residual, by power iteration with QR in every round.

    The start is drawn from ``seed`` alone and is the same for every page, so the code of a
    page depends on that page alone.

    Args:
        residual: fp32 ``[..., N, D]``.
        rank: r, at most min(N, D).
        rounds: of the iteration, at least 1.
        seed: of the random start.

    Returns:
        A ``[..., N, r]`` with orthonormal columns, and B ``[..., D, r]`` with ``A Bᵀ = A Aᵀ residual``.
    """
    size = residual.abs().amax((-2, -1), keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    residual = residual / size  # norms of huge values would overflow
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(residual.shape[-1], rank, generator=generator)
    right = start.to(residual).expand(*residual.shape[:-2], -1, -1)
    for _ in range(rounds):
        left = torch.linalg.qr(residual @ right).Q
        right = residual.transpose(-1, -2) @ left
    return left, right * size
