"""What policies choose among: entries of a row, and at the end of a prompt also its keys, values and queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dmc.functional import rotate


@dataclass(frozen=True)
class Entries:
    """What an evicting policy chooses among: the closed entries of R rows, the tail left out.

    Rows are those of one layer, sequence by sequence and head by head within a sequence, so that
    ``tensor.unflatten(0, (-1, heads))`` has a dimension of sequences.

    Attributes:
        positions: int32 ``[R, N]``, position of the newest token of each entry, rising along a row; -1: no entry.
        scores: fp32 ``[R, N]``, what `Policy.statistics` gathered; None if nothing is.
        heads: H.
        next: int64 ``[R]``, position of the next query of the row's sequence.
        layer: number of the layer.
        layers: L.
    """

    positions: Tensor
    scores: Tensor | None
    heads: int
    next: Tensor
    layer: int = 0
    layers: int = 1


def at_least_fp32(x: Tensor) -> Tensor:
    """fp64 stays fp64."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class Moments:
    """Of the queries of a prompt, before RoPE, summed over its tokens in fp32 at least.

    Attributes:
        count: tokens.
        total: ``[Hq, D]``, sum of the queries.
        products: ``[Hq, D, D]``, sum of their outer products.
    """

    count: int
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, query: Tensor) -> Moments:
        """Of queries ``[T, Hq, D]``."""
        heads = at_least_fp32(query).transpose(0, 1)
        return cls(len(query), heads.sum(1), heads.transpose(1, 2) @ heads)

    def __add__(self, other: Moments) -> Moments:
        """Of two chunks of a prompt together."""
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> Tensor:
        """``[Hq, D]``."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """``[Hq, D, D]``, of the population: divided by the number of tokens."""
        return self.products / self.count - self.mean[:, :, None] * self.mean[:, None, :]


@dataclass(frozen=True)
class PromptEntries(Entries):
    """`Entries` of one sequence at the end of its prompt: R is H, and the newest token, which always stays, is not among them.

    Attributes:
        keys: ``[H, N, D]``, rotated.
        values: ``[H, N, D]``.
        newest: key (rotated) and value ``[H, D]`` of the newest token.
        queries: rotated ``[H, G, n, D]``, the last ones of the prompt, oldest first; n is at most `Policy.last_queries`.
        moments: of all queries; None unless `Policy.query_moments`.
        rope: positions → (cos, sin), see `dmc.cache.reading.step.Rope`.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    newest: tuple[Tensor, Tensor] | None = None
    queries: Tensor | None = None
    moments: Moments | None = None
    rope: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    @cached_property
    def attention(self) -> Tensor:
        """Softmax weights of the last queries: ``[H, G, n, N]``. What is missing to 1 is the newest token's."""
        count, size = self.queries.shape[2], self.queries.shape[-1]
        keys = torch.cat([self.keys, self.newest[0][:, None].to(self.keys)], dim=1)
        scores = at_least_fp32(self.queries) @ at_least_fp32(keys)[:, None].transpose(-1, -2) * size**-0.5  # [H, G, n, N + 1]
        at = self.next[:, None] - count + torch.arange(count, device=keys.device)  # [H, n]
        positions = torch.cat([self.positions.long(), self.next[:, None] - 1], dim=1)
        seen = (positions[:, None] <= at[..., None]) & (positions >= 0)[:, None]
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)[..., :-1]

    @property
    def plain_keys(self) -> Tensor:
        """Keys before RoPE: ``[H, N, D]`` in fp32 at least."""
        cos, sin = self.rope(self.positions.long().clamp(min=0))
        scaling = cos.square() + sin.square()  # 1, unless RoPE has an attention factor
        return rotate(at_least_fp32(self.keys), (cos / scaling, -sin / scaling))
