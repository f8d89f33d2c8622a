"""H2O (Zhang et al., arXiv 2306.14048): the tokens that got the most attention so far, and the newest."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.policies import budget
from dmc.cache.policies.base import Policy
from dmc.cache.policies.entries import Entries


class H2OPolicy(Policy):
    """A generated token's query sees the newest ``recent`` tokens, itself among them, and the ``heavy`` best older ones.

    The score of a token is the softmax attention that it got from all queries so far, its own included, summed over
    the query heads that read its key/value head; so each key/value head keeps its own tokens. A prompt's queries
    see the whole prompt; it is cut to the budget after prefilling.

    Args:
        heavy: older tokens that stay, those with the highest scores; at least 1.
        recent: newest tokens that stay; at least 2, the query and the token before it.
        share: None, or the budget as a part of the tokens so far. ``heavy`` and ``recent`` then only give the ratio in which
            it is divided.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "h2o"
    merges = False
    evicts = True
    by_head = True
    statistics = "sum"

    def __init__(self, *, heavy: int = 128, recent: int = 128, share: float | None = None) -> None:
        self.heavy = budget.check_count(self.name, "heavy", heavy, 1)
        self.recent = budget.check_count(self.name, "recent", recent, 2)
        self.share = budget.check_share(self.name, share)

    def decide(self, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is merged; see `Policy.decide`."""
        return torch.zeros_like(alpha), torch.ones_like(omega)

    def keep(self, entries: Entries) -> Tensor:
        """The entries that the next query will see; see `Policy.keep`."""
        following, heavy, recent = entries.next[:, None], self.heavy, self.recent
        if self.share is not None:
            whole = budget.of_tokens(self.share, following + 1)
            recent = (whole * self.recent // (self.heavy + self.recent)).clamp(min=2)
            heavy = whole - recent
        newest = entries.positions > following - recent
        return newest | budget.top(entries.scores, (entries.positions >= 0) & ~newest, heavy)

    def most_entries(self, tokens: int) -> int:
        """See `Policy.most_entries`."""
        whole = self.heavy + self.recent if self.share is None else budget.of_tokens(self.share, tokens)
        return min(tokens, whole)
