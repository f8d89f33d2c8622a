"""KVzap (arXiv 2601.07891): a linear head per layer predicts from hidden states which tokens are needed."""

from __future__ import annotations

import math

from torch import Tensor

from dmc.cache.policies import budget as budgets
from dmc.cache.policies.budgeted import BudgetPolicy
from dmc.cache.policies.entries import Entries
from dmc.fitted import read_heads


class KVzapPolicy(BudgetPolicy):
    """The score of a token is ``weight · h + bias``, h the input of the attention projections. A prompt's queries see all of it.

    Args:
        file: safetensors with ``weight [L, H, hidden]`` and ``bias [L, H]``, or of `dmc calibrate --decisions --arrival-only`.
        threshold: an older token with a lower score is dropped, as in the paper. None: those with the highest scores stay.
        budget, share: without a threshold, tokens that a query sees, the newest included; see `BudgetPolicy`.
        window: newest tokens that stay, at least 2, but at most the share.
    """

    name, evicts, across_heads = "kvzap", True, "has scores for all heads of a layer"

    def __init__(
        self, *, file: str, threshold: float | None = None, budget: int = 256, share: float | None = None, window: int = 32
    ) -> None:
        super().__init__(budget=budget, share=share)
        if not isinstance(file, str):
            raise ValueError(f"kvzap policy: file={file!r} must be the path of a file of linear heads")
        self.file, self.threshold, self.window = file, threshold, budgets.check_count(self.name, "window", window, 2)
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool) and math.isfinite(threshold)
        if threshold is not None and not number:
            raise ValueError(f"kvzap policy: threshold={threshold} must be a finite number: the smallest score that stays")
        if threshold is not None and share is not None:
            raise ValueError(f"kvzap policy: threshold={threshold} and share={share} are two budgets: leave one out")
        if threshold is None and share is None and budget < window:
            raise ValueError(f"kvzap policy: budget={budget} must be at least the window of {window}, which always stays")
        self.weight, self.bias, self.made_for = read_heads(file)

    def check_model(self, layers: int, heads: int, hidden: int) -> None:
        """See `Policy.check_model`."""
        if (made := tuple(self.weight.shape)) != (wanted := (layers, heads, hidden)):
            raise ValueError(f"kvzap policy: file={self.file} is for {made} layers, heads and hidden size, not {wanted}")

    def arrival_hidden(self, layer: int, hidden: Tensor) -> Tensor:
        """See `Policy.arrival_hidden`."""
        self.weight, self.bias = self.weight.to(hidden.device), self.bias.to(hidden.device)
        return hidden.float() @ self.weight[layer].T + self.bias[layer]

    def keep(self, entries: Entries) -> Tensor:
        """See `Policy.keep`."""
        following = entries.next[:, None]
        if self.threshold is not None:
            return (entries.positions > following - self.window) | (entries.scores >= self.threshold)
        whole = self.whole(following + 1)
        window = self.window if self.share is None else whole.clamp(max=self.window)
        newest = entries.positions > following - window
        return newest | budgets.top(entries.scores, (entries.positions >= 0) & ~newest, whole - window)

    def most_entries(self, tokens: int) -> int:
        """See `Policy.most_entries`."""
        return tokens if self.threshold is not None else min(tokens, self.whole(tokens))
