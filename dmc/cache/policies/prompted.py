"""Policies that cut a prompt by scores after prefilling."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from dmc.cache.policies import budget as budgets
from dmc.cache.policies.budgeted import BudgetPolicy
from dmc.cache.policies.entries import PromptEntries


class PromptPolicy(BudgetPolicy):
    """Keeps the entries of a prompt with the highest scores after prefilling; all generated tokens stay.

    Args:
        budget: tokens of a prompt that each head keeps, the newest included; at least 2.
        share: None, or the budget as a part of the prompt's tokens; ``budget`` is then ignored.

    Raises:
        ValueError: if a setting is out of range.
    """

    evicts = True
    prompt_only = True
    by_head = True

    def size(self, prompt: PromptEntries) -> int:
        """Tokens of the prompt that each head of this layer keeps, the newest included."""
        return self.whole(int(prompt.next[0]))

    @abstractmethod
    def scores(self, prompt: PromptEntries) -> Tensor:
        """Scores ``[H, N]``; the entries with the highest scores stay, those with infinity always."""

    def keep_prompt(self, prompt: PromptEntries) -> Tensor:
        """See `Policy.keep_prompt`."""
        return budgets.top(self.scores(prompt), prompt.positions >= 0, self.size(prompt) - 1)
