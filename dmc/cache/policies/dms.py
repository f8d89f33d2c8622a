"""Dynamic Memory Sparsification (Łańcucki et al., arXiv 2506.05345): tokens are evicted a while after the model marks them."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.policies import budget
from dmc.cache.policies.base import Entries, Policy


class DmsPolicy(Policy):
    """Takes the model's decisions as marks: a marked token is last seen by the query ``window`` tokens after it.

    An entry's score is its mark, 1 or 0. Nothing is merged.

    Args:
        window: tokens between a mark and the eviction, at least 0. What the model was trained with, if `dmc.LLM` is
            given the policy by name alone.

    Raises:
        ValueError: if the window is negative.
    """

    name = "dms"
    merges = False
    by_head = True
    evicts = True
    marks = True

    def __init__(self, *, window: int = 64) -> None:
        self.window = budget.check_count(self.name, "window", window, 0)

    def decide(self, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is merged; see `Policy.decide`."""
        return torch.zeros_like(alpha), torch.ones_like(omega)

    def mark(self, alpha: Tensor, omega: Tensor) -> Tensor:
        """The model's decision; see `Policy.mark`."""
        return alpha

    def sees(self, places: Tensor, marks: Tensor | None, queries: Tensor) -> Tensor:
        """See `Policy.sees`."""
        return (marks == 0)[..., None, :] | (places[..., None, :] >= queries[..., None] - self.window)

    def keep(self, entries: Entries) -> Tensor:
        """What the next query will see; see `Policy.keep`."""
        return self.sees(entries.places, entries.scores, entries.next[:, None])[:, 0]
