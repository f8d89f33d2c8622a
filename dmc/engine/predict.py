"""Prediction of the number of pages that a sequence will need, from the sequences so far."""

from __future__ import annotations

import math

import torch

from dmc.cache import KVCache
from dmc.engine.sequence import Sequence

_PRIOR_TOKENS = 512.0  # weight of the prior, in tokens
_MOST_TOKENS = 65536.0  # older measurements fade beyond this
_PRIOR_ENDS = 4.0


class Predictor:
    """Estimates of entries per token for each layer and head, and of the share of ``max_tokens`` that requests use.

    Args:
        cache: the cache whose pages are predicted.
        cr: initial compression ratio: the one that the checkpoint reports, 1 if nothing merges.

    If the policy has a ring of recent tokens, these are entries of every sequence, and the ratio is measured on the tokens behind
    them. If the policy bounds the entries of a row (``max_entries``), nothing is predicted: the pages are the maximum that a
    sequence can need, so no sequence is preempted for memory.
    """

    def __init__(self, cache: KVCache, cr: float) -> None:
        self.cache = cache
        shape = (cache.model_shape.layers, cache.model_shape.heads)
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
        """Update the estimate of entries per token with a sequence of ``tokens`` cached tokens."""
        recent = min(tokens, self._recent)
        self._tokens += tokens - recent
        self._entries += self.cache.entries(slot).cpu().double() - recent
        if self._tokens > _MOST_TOKENS:
            self._entries *= _MOST_TOKENS / self._tokens
            self._tokens = _MOST_TOKENS

    def learn_end(self, sequence: Sequence) -> None:
        """Update the estimate of generated length / ``max_tokens``."""
        self._ends, self._used = self._ends * 0.98 + 1, self._used * 0.98 + len(sequence.tokens) / sequence.params.max_tokens

    def pages(self, tokens: int) -> int:
        """Predicted pages of a sequence of ``tokens`` cached tokens."""
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
