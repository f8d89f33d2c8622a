"""StreamingLLM (Xiao et al., arXiv 2309.17453): the first tokens and the newest; everything between is evicted."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.policies import budget
from dmc.cache.policies.base import Policy
from dmc.cache.policies.entries import Entries


class StreamingPolicy(Policy):
    """A query sees the first ``sinks`` tokens and the newest ``recent``, itself among them; those of a prompt too.

    Tokens keep the positions that they have in the text, so a text cannot be longer than the model's positions. The
    paper numbers them again inside the cache, without a limit.

    Args:
        sinks: first tokens that stay.
        recent: newest tokens that stay; at least 2, the query and the token before it.
        share: None, or sinks and newest together as a part of the tokens so far; ``recent`` is then ignored.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "streaming"
    merges = False
    evicts = True
    by_head = True

    def __init__(self, *, sinks: int = 4, recent: int = 252, share: float | None = None) -> None:
        self.sinks = budget.check_count(self.name, "sinks", sinks, 0)
        self.recent = budget.check_count(self.name, "recent", recent, 2)
        self.share = budget.check_share(self.name, share)
        if share is not None and sinks > budget.LEAST - 2:
            raise ValueError(
                f"streaming policy: sinks={sinks} must be at most {budget.LEAST - 2} with a share, "
                f"which can be as little as {budget.LEAST} tokens"
            )

    def decide(self, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is merged; see `Policy.decide`."""
        return torch.zeros_like(alpha), torch.ones_like(omega)

    def visible(self, positions: Tensor, queries: Tensor) -> Tensor:
        """See `Policy.visible`."""
        recent = self.recent if self.share is None else budget.of_tokens(self.share, queries + 1)[..., None] - self.sinks
        return (positions < self.sinks)[..., None, :] | (positions[..., None, :] > queries[..., None] - recent)

    def keep(self, entries: Entries) -> Tensor:
        """The entries that the next query will see; see `Policy.keep`."""
        return self.visible(entries.positions, entries.next[:, None])[:, 0]

    def most_entries(self, tokens: int) -> int:
        """See `Policy.most_entries`."""
        return min(tokens, self.sinks + self.recent if self.share is None else budget.of_tokens(self.share, tokens))
