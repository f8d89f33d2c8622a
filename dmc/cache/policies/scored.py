"""Policies with a constant budget whose scores are known at arrival: the norm of the key, or a random number."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.policies import budget as budgets
from dmc.cache.policies.budgeted import BudgetPolicy
from dmc.cache.policies.entries import Entries


class ArrivalPolicy(BudgetPolicy):
    """A generated token's query sees ``budget`` tokens: itself, the one before it, and the older ones with the highest scores.

    A prompt's queries see the whole prompt; it is cut after prefilling.

    Args:
        budget: tokens that a query sees, at least 2.
        share: None, or the budget as a part of the tokens so far; ``budget`` is then ignored.

    Raises:
        ValueError: if a setting is out of range.
    """

    evicts = True
    by_head = True

    def keep(self, entries: Entries) -> Tensor:
        """The entries that the next query will see; see `Policy.keep`."""
        whole = self.whole(entries.next[:, None] + 1)
        return budgets.top(entries.scores, entries.positions >= 0, whole - 2)  # the newest token and the next one are the others

    def most_entries(self, tokens: int) -> int:
        """See `Policy.most_entries`."""
        return min(tokens, self.whole(tokens))


class KNormPolicy(ArrivalPolicy):
    """KNorm (Devoto et al., arXiv 2406.11430): the keys with the smallest L2 norms stay. Here in all layers; the paper leaves the
    first two out."""

    name = "knorm"

    def arrival(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """See `Policy.arrival`."""
        return -keys.float().norm(dim=-1)


class RandomPolicy(ArrivalPolicy):
    """Random tokens stay: the lower baseline of every other policy.

    Args:
        budget, share: see `ArrivalPolicy`.
        seed: of the scores, which follow from it, the position and the head alone.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "random"
    by_head = False  # a rank numbers its heads from 0
    across_heads = "numbers all heads of a layer for its random draws"

    def __init__(self, *, budget: int = 256, share: float | None = None, seed: int = 0) -> None:
        super().__init__(budget=budget, share=share)
        self.seed = budgets.check_count(self.name, "seed", seed, 0)

    def arrival(self, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """See `Policy.arrival`: the last 24 bits of a multiplicative hash, as numbers from 0 to 1."""
        heads = torch.arange(keys.shape[-2], device=keys.device)
        x = positions[..., None] * 0x9E3779B1 + heads * 0x85EBCA6B + self.seed * 0xC2B2AE35
        for shift, by in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
            x = ((x ^ (x >> shift)) * by) & 0xFFFFFFFF
        return ((x ^ (x >> 15)) & 0xFFFFFF).float() / 0x1000000
