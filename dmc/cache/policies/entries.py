"""Arguments of policies: entries of rows, and at the end of a prompt also its keys, values and queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dmc.functional import unrotate


@dataclass(frozen=True)
class Entries:
    """The entries that an evicting policy chooses among: the final entries of R rows, without the accumulating ones.

    Rows are those of one layer, sequence by sequence and head by head within a sequence, so that
    ``tensor.unflatten(0, (-1, heads))`` has a dimension of sequences.

    Attributes:
        positions: int32 ``[R, N]``, position of the newest token of each entry, rising along a row; -1 where there is no entry.
        scores: fp32 ``[R, N]``, attention statistics of `Policy.statistics`, or scores of `Policy.arrival`; None without them.
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
    """x in fp32, or in fp64 if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class Moments:
    """Moments of a prompt's queries before RoPE, summed over its tokens in fp32 or more.

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
        """Moments of queries ``[T, Hq, D]``."""
        heads = at_least_fp32(query).transpose(0, 1)
        return cls(len(query), heads.sum(1), heads.transpose(1, 2) @ heads)

    def __add__(self, other: Moments) -> Moments:
        """Moments of two chunks of a prompt together."""
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> Tensor:
        """Mean ``[Hq, D]``."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Covariance ``[Hq, D, D]`` of the population: divided by the number of tokens."""
        return self.products / self.count - self.mean[:, :, None] * self.mean[:, None, :]


@dataclass(frozen=True)
class PromptEntries(Entries):
    """`Entries` of one sequence at the end of its prompt: R is H. The newest token always stays and is not included.

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
        """Softmax weights of the last queries: ``[H, G, n, N]``. The rest up to 1 is the newest token's."""
        count, size = self.queries.shape[2], self.queries.shape[-1]
        keys = torch.cat([self.keys, self.newest[0][:, None].to(self.keys)], dim=1)
        scores = at_least_fp32(self.queries) @ at_least_fp32(keys)[:, None].transpose(-1, -2) * size**-0.5  # [H, G, n, N + 1]
        at = self.next[:, None] - count + torch.arange(count, device=keys.device)  # [H, n]
        positions = torch.cat([self.positions.long(), self.next[:, None] - 1], dim=1)
        seen = (positions[:, None] <= at[..., None]) & (positions >= 0)[:, None]
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)[..., :-1]

    @property
    def plain_keys(self) -> Tensor:
        """Keys before RoPE: ``[H, N, D]`` in fp32 or more."""
        return unrotate(at_least_fp32(self.keys), self.rope(self.positions.long().clamp(min=0)))
