"""Scalar quantisation of the coordinates of a vector that points anywhere: the codebook of TurboQuant, computed.

A coordinate t of a random unit vector of D channels has the density ``(1 - t²)^((D - 3) / 2)`` on (-1, 1). With
t = cos θ the density of θ is ``sin(θ)^(D - 2)``, which has no poles from D = 2 on. The levels are Lloyd's and Max's:
each is the mean of the coordinates that are nearest to it. They are scaled to coordinates of variance 1, the mean
square of a vector of norm √D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_GRID = 1 << 14  # angles of the numerical integration
_ROUNDS = 1000  # of Lloyd's iteration, at most
_SETTLED = 1e-8


@dataclass(frozen=True)
class LloydMax:
    """A coder for `dmc.cache.codecs.rotated.Rotated` instead of the trellis; the methods are described there.

    Attributes:
        head_size: D; the distribution of a coordinate depends on it.
    """

    head_size: int

    def chunks(self, rate: float, length: int) -> list[tuple[int, int]]:
        """All values of a vector have the same bits."""
        return [(length, int(rate))]

    def choose(self, x: Tensor, rate: float) -> Tensor:
        """The nearest levels: fp32 ``[..., T]``, of about variance 1 → uint8 codes."""
        table = levels(int(rate), self.head_size).to(x.device)
        return torch.bucketize(x.contiguous(), (table[1:] + table[:-1]) / 2).to(torch.uint8)

    def read(self, codes: Tensor, rate: float) -> Tensor:
        """The levels that codes stand for: uint8 → fp32 of the same shape."""
        table = levels(int(rate), self.head_size).to(codes.device)
        return table.index_select(0, codes.flatten().int()).view(codes.shape)


@lru_cache
def levels(bits: int, head_size: int) -> Tensor:
    """The ``2**bits`` levels for the coordinates of a vector of ``head_size`` channels and norm √D, fp32, rising."""
    if head_size == 1:  # a coordinate is 1 or -1
        return torch.linspace(-1, 1, 2**bits)
    count = 2**bits
    angle = torch.linspace(math.pi, 0, _GRID + 1, dtype=torch.float64)
    points = angle.cos()  # rises from -1 to 1
    density = angle.sin().clamp_(min=0) ** (head_size - 2)
    mass = _cumulated(density)
    moment = -(angle.sin() ** (head_size - 1)) / (head_size - 1)  # the integral of cos θ sin(θ)^(D - 2), exactly
    moment = moment / (density.sum() * math.pi / _GRID)
    quantile = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    # To begin with, as dense as the cube root of the density of t, which is best for many levels (Panter and Dite).
    table = _at(quantile, _cumulated(angle.sin().clamp_(min=0) ** (head_size / 3)), points)
    for _ in range(_ROUNDS):
        middle = (table[1:] + table[:-1]) / 2
        edges = torch.cat([points[:1], middle, points[-1:]])
        below, first = _at(edges, points, mass), _at(edges, points, moment)
        new = (first[1:] - first[:-1]) / (below[1:] - below[:-1])
        new = (new - new.flip(0)) / 2  # the distribution is symmetric
        moved = (new - table).abs().max()
        table = new
        if moved < _SETTLED:
            break
    return (table * math.sqrt(head_size)).float()


def _cumulated(density: Tensor) -> Tensor:
    mass = torch.cat([density.new_zeros(1), torch.cumulative_trapezoid(density)])
    return mass / mass[-1]


def _at(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Linear interpolation of rising ``xs``."""
    right = torch.searchsorted(xs, x).clamp_(1, len(xs) - 1)
    low, high = xs[right - 1], xs[right]
    share = torch.where(high > low, (x - low) / (high - low), 0.5)
    return torch.lerp(ys[right - 1], ys[right], share.clamp_(0, 1))
