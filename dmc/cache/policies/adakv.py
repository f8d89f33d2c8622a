"""AdaKV (Feng et al., arXiv 2407.11550): SnapKV whose heads share the budget of their layer."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.policies import budget as budgets
from dmc.cache.policies.entries import PromptEntries
from dmc.cache.policies.snapkv import SnapKVPolicy


class AdaKVPolicy(SnapKVPolicy):
    """The heads of a layer keep ``budget`` tokens on average: those with the highest scores over all heads together.

    Args:
        budget, share, window, kernel: see `dmc.cache.policies.snapkv.SnapKVPolicy`.
        least: part of the mean budget that each head has at least.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "adakv"
    by_head = False

    def __init__(
        self, *, budget: int = 256, share: float | None = None, window: int = 32, kernel: int = 5, least: float = 0.2
    ) -> None:
        super().__init__(budget=budget, share=share, window=window, kernel=kernel)
        if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least <= 1:
            raise ValueError(f"{self.name} policy: least={least} must be between 0 and 1, a part of the budget")
        self.least = float(least)

    def keep_prompt(self, prompt: PromptEntries) -> Tensor:
        """See `Policy.keep_prompt`."""
        scores, held, count = self.scores(prompt), prompt.positions >= 0, self.size(prompt) - 1
        window = min(self.window - 1, count)  # the newest token is not among the entries
        kept = budgets.top(scores, held, window + int((count - window) * self.least))
        rest = torch.where(kept, -torch.inf, scores).view(1, -1)
        left = max(0, count * len(scores) - int(kept.sum()))
        return kept | budgets.top(rest, (held & ~kept).view(1, -1), left).view_as(kept)
