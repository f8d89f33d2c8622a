"""How many pages a sequence will really need, from what sequences needed so far."""

from __future__ import annotations

import math

import torch

from dmc.cache import KVCache
from dmc.engine.sequence import Sequence

_PRIOR_TOKENS = 512.0  # what the prior is worth
_MOST_TOKENS = 65536.0  # older measurements fade beyond this
_PRIOR_ENDS = 4.0


class Predictor:
    """Entries per token of each layer and head, and how much of ``max_tokens`` requests use, both as measured.

    Args:
        cache: whose pages are predicted.
        cr: compression ratio to begin with: what the checkpoint reports of itself, 1 where nothing merges.

    Where the newest tokens stay as they are, they are entries of any sequence; the ratio measured is that of the tokens
    behind them. Where the policy bounds the entries of a row (``max_entries``), nothing is predicted: the pages are those that
    a sequence can come to need at most, so none is ever preempted for memory.
    """

    def __init__(self, cache: KVCache, cr: float) -> None:
        self.cache = cache
        shape = (cache.shape.layers, cache.shape.heads)
        self._tokens = _PRIOR_TOKENS
        self._entries = torch.full(shape, _PRIOR_TOKENS / cr, dtype=torch.float64)
        self._ends, self._used = _PRIOR_ENDS, _PRIOR_ENDS  # requests that ended, and the sum of what they used

    @property
    def bounded(self) -> bool:
        """True if the policy bounds the entries of a row."""
        return self.cache.policy.max_entries is not None

    @property
    def _recent(self) -> int:
        return self.cache.policy.ring or 0

    @property
    def cr(self) -> float:
        """Tokens per entry, over all layers and heads."""
        return self._tokens * self._entries.numel() / float(self._entries.sum())

    @property
    def cr_per_head(self) -> list[list[float]]:
        """Tokens per entry of each layer and head."""
        return (self._tokens / self._entries).tolist()

    def learn(self, slot: int, tokens: int) -> None:
        """Takes the entries of a sequence that has cached so many tokens."""
        recent = min(tokens, self._recent)
        self._tokens += tokens - recent
        self._entries += self.cache.entries(slot).cpu().double() - recent
        if self._tokens > _MOST_TOKENS:
            self._entries *= _MOST_TOKENS / self._tokens
            self._tokens = _MOST_TOKENS

    def learn_end(self, sequence: Sequence) -> None:
        """Takes how many tokens a sequence generated of those that it might have."""
        self._ends, self._used = self._ends * 0.98 + 1, self._used * 0.98 + len(sequence.tokens) / sequence.params.max_tokens

    def pages(self, tokens: int) -> int:
        """Pages of a sequence of so many cached tokens."""
        if self.bounded:
            return self.cache.worst_pages(tokens)
        most, recent = max(1, self.cache.policy.most_entries(tokens)), min(tokens, self._recent)
        likely = recent + self._entries / self._tokens * (tokens - recent)
        return self.cache.likely_pages(likely.clamp(min=1, max=most))

    def final_pages(self, sequence: Sequence) -> int:
        """Pages that a sequence will hold when it ends, where others so far have ended; at most, if entries are bounded."""
        if self.bounded:
            return self.pages(sequence.most_tokens)
        params = sequence.params
        new = max(len(sequence.tokens) + 1, math.ceil(params.max_tokens * self._used / self._ends))
        return self.pages(len(sequence.prompt) + min(new, params.max_tokens) - 1)
