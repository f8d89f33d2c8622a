"""PyramidKV (Cai et al., arXiv 2406.02069): SnapKV with larger budgets in lower layers."""

from __future__ import annotations

from dmc.cache.policies import budget as budgets
from dmc.cache.policies.entries import PromptEntries
from dmc.cache.policies.snapkv import SnapKVPolicy


class PyramidKVPolicy(SnapKVPolicy):
    """Budgets fall linearly from the first layer to the last; their mean is ``budget``.

    Args:
        budget, share, window, kernel: see `dmc.cache.policies.snapkv.SnapKVPolicy`.
        beta: the last layer's budget without the window is the mean one divided by this, at least 1.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "pyramidkv"

    def __init__(
        self, *, budget: int = 256, share: float | None = None, window: int = 32, kernel: int = 5, beta: int = 20
    ) -> None:
        super().__init__(budget=budget, share=share, window=window, kernel=kernel)
        self.beta = budgets.check_count(self.name, "beta", beta, 1)

    def size(self, prompt: PromptEntries) -> int:
        """See `PromptPolicy.size`: budget that exceeds the prompt in the first layer goes to the last one."""
        tokens, whole = int(prompt.next[0]), super().size(prompt)
        window = min(self.window, whole - 1)
        mean = whole - window
        least = mean // self.beta
        if 2 * mean - least > tokens - window:
            least = max(least, 2 * mean - (tokens - window))
        if prompt.layers == 1:
            return whole
        most = 2 * mean - least
        return window + most - (most - least) * prompt.layer // (prompt.layers - 1)
