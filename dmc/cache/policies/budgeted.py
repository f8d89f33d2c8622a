"""What evicting policies with one budget share: the setting, as a number or a share of the tokens, and that nothing merges."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.policies import budget as budgets
from dmc.cache.policies.base import Policy


class BudgetPolicy(Policy):
    """A subclass says what the budget counts, and evicts.

    Args:
        budget: number of tokens, at least 2.
        share: None, or the budget as a part of the tokens; ``budget`` is then ignored.

    Raises:
        ValueError: if a setting is out of range.
    """

    merges = False

    def __init__(self, *, budget: int = 256, share: float | None = None) -> None:
        self.budget = budgets.check_count(self.name, "budget", budget, 2)
        self.share = budgets.check_share(self.name, share)

    def decide(self, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is merged; see `Policy.decide`."""
        return torch.zeros_like(alpha), torch.ones_like(omega)

    def whole(self, tokens: budgets.Count) -> budgets.Count:
        """The budget when so many tokens have been read: a number, or int64 of the shape of ``tokens``."""
        return self.budget if self.share is None else budgets.of_tokens(self.share, tokens)
