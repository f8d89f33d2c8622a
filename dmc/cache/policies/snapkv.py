"""SnapKV (Li et al., arXiv 2404.14469): a prompt keeps the tokens that the queries at its end attended to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmc.cache.policies import budget as budgets
from dmc.cache.policies.entries import PromptEntries
from dmc.cache.policies.prompted import PromptPolicy


class SnapKVPolicy(PromptPolicy):
    """Keeps the last ``window`` tokens of a prompt, and the older ones with the most attention from their queries.

    The score of an older token is the mean softmax attention over these queries and over the query heads of its key/value head,
    averaged with its neighbours.

    Args:
        budget: tokens of a prompt that each head keeps, the window included.
        share: None, or the budget as a part of the prompt's tokens.
        window: last tokens of the prompt, at least 1. All stay if the budget is larger.
        kernel: neighbouring tokens that a score is averaged over, an odd number.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "snapkv"

    def __init__(self, *, budget: int = 256, share: float | None = None, window: int = 32, kernel: int = 5) -> None:
        super().__init__(budget=budget, share=share)
        self.last_queries = self.window = budgets.check_count(self.name, "window", window, 1)
        self.kernel = budgets.check_count(self.name, "kernel", kernel, 1)
        if kernel % 2 == 0:
            raise ValueError(f"{self.name} policy: kernel={kernel} must be odd, so that it has a middle")
        if share is None and budget <= window:
            raise ValueError(f"{self.name} policy: budget={budget} must be more than the window of {window}, which always stays")

    def scores(self, prompt: PromptEntries) -> Tensor:
        """See `PromptPolicy.scores`; of equal budgets and windows the newest tokens of the window stay."""
        attention = prompt.attention.mean(dim=(1, 2))  # [H, N]
        older = prompt.positions < prompt.next[:, None] - self.window
        pooled = F.avg_pool1d((attention * older)[:, None], self.kernel, stride=1, padding=self.kernel // 2)[:, 0]
        return torch.where(older, pooled, 1.0 + prompt.positions)  # attention is 1 at most
