"""Policies that cut a prompt down when it has been read, and what they can ask for: keys, values, and the prompt's queries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dmc.cache.policies import budget as budgets
from dmc.cache.policies.base import Entries, Policy
from dmc.functional import rotate


@dataclass(frozen=True)
class Moments:
    """Of the queries of a prompt, before RoPE, summed over its tokens in fp32.

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
        heads = query.float().transpose(0, 1)
        return cls(len(query), heads.sum(1), heads.transpose(1, 2) @ heads)

    def __add__(self, other: Moments) -> Moments:
        """Of two stretches of a prompt together."""
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> Tensor:
        """fp32 ``[Hq, D]``."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """fp32 ``[Hq, D, D]``, of the population: divided by the number of tokens."""
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
        """Softmax weights of the last queries: fp32 ``[H, G, n, N]``. What is missing to 1 is the newest token's."""
        count, size = self.queries.shape[2], self.queries.shape[-1]
        keys = torch.cat([self.keys, self.newest[0][:, None].to(self.keys)], dim=1)
        scores = self.queries.float() @ keys.float()[:, None].transpose(-1, -2) * size**-0.5  # [H, G, n, N + 1]
        at = self.next[:, None] - count + torch.arange(count, device=keys.device)  # [H, n]
        places = torch.cat([self.places.long(), self.next[:, None] - 1], dim=1)
        seen = (places[:, None] <= at[..., None]) & (places >= 0)[:, None]
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)[..., :-1]

    @property
    def plain_keys(self) -> Tensor:
        """Keys before RoPE: fp32 ``[H, N, D]``."""
        cos, sin = self.rope(self.places.long().clamp(min=0))
        scaling = cos.square() + sin.square()  # 1, unless RoPE has an attention factor
        return rotate(self.keys.float(), (cos / scaling, -sin / scaling))


class PromptPolicy(Policy):
    """Keeps the entries of a prompt with the highest scores when it has been read; all generated tokens stay.

    Args:
        budget: tokens of a prompt that each head keeps, the newest among them; at least 2.
        share: None, or the budget as a part of the prompt's tokens; ``budget`` then says nothing.

    Raises:
        ValueError: if a setting is out of range.
    """

    merges = False
    evicts = True
    prompt_only = True
    by_head = True

    def __init__(self, *, budget: int = 256, share: float | None = None) -> None:
        self.budget = budgets.check_count(self.name, "budget", budget, 2)
        self.share = budgets.check_share(self.name, share)

    def decide(self, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is merged; see `Policy.decide`."""
        return torch.zeros_like(alpha), torch.ones_like(omega)

    def size(self, prompt: PromptEntries) -> int:
        """Tokens of the prompt that each head of this layer keeps, the newest among them."""
        return self.budget if self.share is None else budgets.of_tokens(self.share, int(prompt.next[0]))

    @abstractmethod
    def scores(self, prompt: PromptEntries) -> Tensor:
        """fp32 ``[H, N]``: the entries with the highest ones stay; infinity: always."""

    def keep_prompt(self, prompt: PromptEntries) -> Tensor:
        """See `Policy.keep_prompt`."""
        return budgets.top(self.scores(prompt), prompt.places >= 0, self.size(prompt) - 1)
