"""Decisions that follow from a token's position alone, for baselines that learn weights only (docs/methods/baselines.md).

    all         every token that leaves the window goes: with eviction this is StreamingLLM
    periodic    of the tokens behind the window each n-th stays and the others merge or go: with merging this is mean pooling
    random      a token behind the window merges or goes with one probability, by a hash of position, head and layer

Positions count from the start of a document. Its first ``sinks`` tokens stay as entries of their own. The numbers follow from the
target CR at the length of a training sequence, so they change along the ramp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.kernels.decisions.noise import uniform

RULES = ("all", "periodic", "random")
_ROUNDING = 1e-9  # a ratio of tokens this close below a whole number of entries is that number


@dataclass(frozen=True)
class Rule:
    """One rule with its settings.

    Attributes:
        name: of `RULES`.
        evicts: whether tokens go; else they merge, with equal weights.
        window: newest tokens before a query that stay as they are; None with "all", whose window follows from the target CR.
        sinks: first tokens of a document that stay, at least 1.
        length: tokens of the document that the target CR refers to.
    """

    name: str
    evicts: bool
    window: int | None
    sinks: int
    length: int

    @property
    def always(self) -> int:
        """Entries of a document of `length` tokens at every target CR: sinks and newest tokens, but the window of "all"."""
        return self.sinks + (0 if self.name == "all" else self.window + (not self.evicts))

    @property
    def fewest(self) -> int:
        """Entries at the largest target CR: one more, behind the window or, with "all", inside it."""
        return self.always + 1

    def check(self, target_cr: float) -> None:
        """Refuse a target CR that sinks and window make impossible.

        Raises:
            ValueError: with the arithmetic and the largest possible one.
        """
        if self._entries(target_cr) >= self.fewest:
            return
        raise ValueError(
            f"dmc.decision={self.name} holds at least {self.fewest} entries of data.sequence_length {self.length} tokens "
            f"(dmc.sinks {self.sinks}, {self.always - self.sinks} newest tokens, 1 more), so the largest possible CR is "
            f"{self.length} / {self.fewest} = {self.length / self.fewest:.3g} and dmc.target_cr {target_cr:g} is out of reach: "
            f"lower dmc.target_cr{'' if self.name == 'all' else ', dmc.window'} or dmc.sinks, or raise data.sequence_length"
        )

    def window_at(self, target_cr: float) -> int:
        """The window in force at a target CR."""
        if self.name != "all":
            return self.window
        return max(1, self._entries(target_cr) - self.sinks)

    def share(self, target_cr: float) -> float:
        """Entries per token behind window and sinks; 0 with "all"."""
        if self.name == "all":
            return 0.0
        behind = self.length - self.always
        return min(1.0, max(0.0, (self._entries(target_cr) - self.always) / behind)) if behind > 0 else 1.0

    def alpha(self, target_cr: float, positions: Tensor, layer: int, heads: Tensor) -> Tensor:
        """Decisions, of tokens inside the window too.

        Args:
            target_cr: in force.
            positions: int64 ``[B, T]``, from the start of each token's document.
            layer: global index.
            heads: int64 ``[H]``, global indices of key/value heads.

        Returns:
            fp32 ``[B, H, T]``, 1 where a token merges or is evicted. With merging the first token behind the sinks opens an
            entry, so that nothing merges into a sink.
        """
        behind, share = positions - self.sinks, self.share(target_cr)
        goes = (behind >= (not self.evicts))[:, None].expand(-1, len(heads), -1)
        if self.name == "random":
            goes = goes & (uniform(layer, heads=heads, positions=positions) >= share)
        elif self.name == "periodic":  # n = 1 / share need not be whole
            number, before = ((x.double() * share).floor() for x in (behind, behind - 1))
            goes = goes & (number == before)[:, None]
        return goes.float()

    def _entries(self, target_cr: float) -> int:
        return math.floor(self.length / target_cr + _ROUNDING)


def positions(starts: Tensor) -> Tensor:
    """First tokens of documents, bool ``[B, T]`` → positions from the start of each token's document, int64 ``[B, T]``."""
    index = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    first = torch.where(starts, index, 0).cummax(1).values
    return index - first
