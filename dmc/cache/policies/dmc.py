"""Dynamic Memory Compression: tokens are merged as the model decides, at once or when they leave a window."""

from __future__ import annotations

from torch import Tensor

from dmc.cache.policies import budget
from dmc.cache.policies.base import Policy


class DmcPolicy(Policy):
    """Uses the model's decisions unchanged. A plain model makes none; its cache is then uncompressed.

    Args:
        window: newest tokens that stay as they are (late merging); None merges at once. If `dmc.LLM` gets the policy
            by name alone, it is the window of training.
        max_entries: largest number of entries of each head behind the window, at least 1. Once there are so many, every token
            that leaves the window is merged. Needs a window; None sets no bound. See `dmc.cache.KVCache` for sinks.

    Raises:
        ValueError: if a number is out of range, or ``max_entries`` comes without a window.
    """

    name = "dmc"
    by_head = True

    def __init__(self, *, window: int | None = None, max_entries: int | None = None) -> None:
        self.ring = self.window = None if window is None else budget.check_count(self.name, "window", window, 0)
        self.max_entries = budget.check_entries(self.name, max_entries)
        if max_entries is not None and window is None:
            raise ValueError(
                f"dmc policy: max_entries={max_entries} bounds what late merging holds, and merging at once has no window: "
                "use a model retrofitted with dmc.window, or leave max_entries out"
            )

    def decide(self, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """See `Policy.decide`."""
        return alpha, omega
