"""What many requests cost the cache, summed as they come."""

from __future__ import annotations

from collections import Counter

from dmc.engine import Stats


class Usage:
    """Running totals; of each request the cache as it was at its end."""

    def __init__(self) -> None:
        self.requests = self.tokens = self.dense_bytes = 0
        self.entries = 0.0
        self.held: Counter[str] = Counter()

    def add(self, stats: Stats) -> None:
        """Counts one more request."""
        self.requests += 1
        self.tokens += stats.cached_tokens
        self.entries += int(stats.entries.sum()) / stats.entries.numel()
        self.dense_bytes += stats.dense_bytes
        self.held.update(stats.held)

    def as_dict(self) -> dict:
        """Means a request; ``cr`` is tokens / entries and ``byte_ratio`` dense bf16 bytes / held bytes, of all together."""
        if not self.requests:
            return {"requests": 0}
        held = sum(self.held.values())
        return {
            "requests": self.requests,
            "tokens": self.tokens / self.requests,
            "cr": self.tokens / self.entries,
            "held_bytes": held / self.requests,
            "held": {kind: size / self.requests for kind, size in self.held.items()},
            "dense_bytes": self.dense_bytes / self.requests,
            "byte_ratio": self.dense_bytes / held,
        }
