"""Sums that a linear regression needs, and its solution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Sums over samples of features X ``[n, F]``, the last of them constant 1, and targets Y ``[n, C]``; fp64.

    Attributes:
        xx: Xᵀ X, ``[F, F]``.
        xy: Xᵀ Y, ``[F, C]``.
        yy: sums of squares of Y, ``[C]``.
    """

    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """Sums of one batch of samples, multiplied in the dtype of ``x``."""
        return cls((x.T @ x).double(), (x.T @ y).double(), y.square().sum(0).double())

    def __add__(self, other: Moments) -> Moments:
        """Sums over the samples of both."""
        return Moments(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)

    def ridge(self, strength: float) -> Tensor:
        """Weights ``[F, C]`` that minimise ``|Y - X W|² + strength · mean(diag XᵀX) · |W|²``; the constant is not shrunk."""
        smallest = torch.finfo(self.xx.dtype).tiny  # for features that are all 0
        penalty = torch.full_like(self.xx[0], max(smallest, strength * float(self.xx.diagonal()[:-1].mean())))
        penalty[-1] = 0
        return torch.linalg.solve(self.xx + penalty.diag(), self.xy)

    def r2(self, weights: Tensor) -> Tensor:
        """Explained share of the variance of Y by ``X W``, ``[C]``; 1 for a target that is constant and met."""
        left = self.yy - 2 * (weights * self.xy).sum(0) + (weights * (self.xx @ weights)).sum(0)
        variance = self.yy - self.xy[-1].square() / self.xx[-1, -1]
        return 1 - left / variance.clamp(min=torch.finfo(variance.dtype).tiny)
