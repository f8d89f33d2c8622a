"""Dynamic Memory Sparsification (Łańcucki et al., arXiv 2506.05345): late eviction of tokens."""

from __future__ import annotations

from torch import Tensor

from dmc.cache.policies import budget
from dmc.cache.policies.base import Policy


class DmsPolicy(Policy):
    """The last query that sees a token with an eviction decision is ``window`` tokens after it.

    The newest ``window`` tokens stay in a ring (`dmc.cache.reading.late`), and only tokens that are kept go from it to a page, so
    pages have no evicted slots. Nothing is merged.

    Args:
        window: tokens between a token and its eviction, at least 0. If `dmc.LLM` gets the policy by name
            alone, it is the window of training.
        sinks: first tokens of a sequence that are never evicted, at least 0. For a model that decides late, `dmc.LLM`
            sets 1: training keeps the first token.
        max_entries: largest number of entries of each head behind the window, more than the sinks. Once there are so many,
            every token that leaves the window is dropped. None sets no bound.

    Raises:
        ValueError: if a number is out of range.
    """

    name = "dms"
    merges = False
    by_head = True

    def __init__(self, *, window: int = 64, sinks: int = 0, max_entries: int | None = None) -> None:
        self.ring = self.window = budget.check_count(self.name, "window", window, 0)
        self.sinks = budget.check_count(self.name, "sinks", sinks, 0)
        self.max_entries = budget.check_entries(self.name, max_entries, self.sinks)

    def decide(self, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """See `Policy.decide`: the model's logits, which `dmc.cache.reading.late` reads when a token leaves the ring."""
        return alpha, omega
