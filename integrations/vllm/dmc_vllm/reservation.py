"""Blocks that vLLM's scheduler reserves for a request.

A block holds one page for each (layer, key/value head) of the model: `Reservation.block_pages`. A request of t tokens reserves

    F + 1 + ceil(max(0, t - window) / tokens_per_block)

blocks. F is the number of pages for a head's full-precision entries: the window of recent tokens, the entries that fill no page
yet. One more page per head is slack for heads and texts that compress less. ``tokens_per_block`` is the cap, in tokens per entry
behind the window, times the entries of a page. All heads and layers of a request share its pages. A policy with more sinks than
the slack holds adds blocks for them to F. A bound on the entries of a head bounds the last term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Reservation:
    """See the head of this file.

    Attributes:
        block_pages: pages of a block.
        fixed_blocks: F + 1.
        tokens_per_block: tokens behind the window for which a block is reserved.
        window: newest tokens that stay unmerged.
        page_bytes: bytes of a page.
        most_blocks: largest number of blocks behind the window; None: no bound.
    """

    block_pages: int
    fixed_blocks: int
    tokens_per_block: int
    window: int
    page_bytes: int
    most_blocks: int | None = None

    @classmethod
    def of(
        cls,
        *,
        heads: int,
        full_precision_pages: int,
        page_size: int,
        page_bytes: int,
        window: int,
        cap: float,
        sinks: int = 0,
        max_entries: int | None = None,
    ) -> Reservation:
        """The reservation under a cap.

        Args:
            heads: key/value heads of all layers.
            full_precision_pages: see `dmc.cache.KVCache.full_precision_pages`.
            page_size: entries of a page.
            page_bytes: its bytes.
            window: see the attribute.
            cap: tokens per reserved entry behind the window, at least 1.
            sinks: first entries of a head that stay whatever the cap is.
            max_entries: largest number of entries of a head behind the window; None: no bound.

        Raises:
            ValueError: if the cap is below 1 or not finite.
        """
        if not (math.isfinite(cap) and cap >= 1):
            raise ValueError(f"cap={cap:g} reserves more than one entry per token: give a finite number of at least 1")
        slack = max(1, -(-sinks // page_size))
        most = None if max_entries is None else -(-max_entries // page_size)
        return cls(heads, full_precision_pages + slack, int(cap * page_size), window, page_bytes, most)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.block_pages * self.page_bytes

    def blocks(self, tokens: int) -> int:
        """Blocks of a request of so many tokens."""
        behind = -(-max(0, tokens - self.window) // self.tokens_per_block)
        return self.fixed_blocks + (behind if self.most_blocks is None else min(behind, self.most_blocks))

    def pages(self, tokens: int) -> int:
        """Pages that a request of so many tokens may hold."""
        return self.blocks(tokens) * self.block_pages
