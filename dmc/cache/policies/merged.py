"""Merging the entries that a policy drops from a prompt into those that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.policies.adakv import AdaKVPolicy
from dmc.cache.policies.entries import PromptEntries
from dmc.cache.policies.expected import ExpectedAttentionPolicy
from dmc.cache.policies.prompted import PromptPolicy
from dmc.cache.policies.pyramidkv import PyramidKVPolicy
from dmc.cache.policies.snapkv import SnapKVPolicy
from dmc.functional import rotate

INNER = {policy.name: policy for policy in (SnapKVPolicy, PyramidKVPolicy, AdaKVPolicy, ExpectedAttentionPolicy)}


class MergedPolicy(PromptPolicy):
    """Another policy of prompts, with each token that it drops merged into the nearest kept position of its head.

    Key and value of an entry become the mean of its tokens': keys before RoPE, rotated to the kept position. Of two equally near
    positions the older one is used.

    Args:
        of: name of the policy.
        budget, share: of that policy.

    Raises:
        ValueError: if a setting is out of range, or there is no such policy.
    """

    name = "merged"

    def __init__(self, *, of: str = "snapkv", budget: int = 256, share: float | None = None) -> None:
        super().__init__(budget=budget, share=share)
        if of not in INNER:
            raise ValueError(f"merged policy: of={of!r} must be one of {', '.join(INNER)}")
        self.inner = INNER[of](budget=budget, share=share)
        for name in ("by_head", "last_queries", "query_moments"):
            setattr(self, name, getattr(self.inner, name))

    def scores(self, prompt: PromptEntries) -> Tensor:
        """Scores of the inner policy."""
        return self.inner.scores(prompt)

    def keep_prompt(self, prompt: PromptEntries) -> Tensor:
        """Entries that the inner policy keeps."""
        return self.inner.keep_prompt(prompt)

    def rewrite(self, prompt: PromptEntries, kept: Tensor) -> tuple[Tensor, Tensor]:
        """See `Policy.rewrite`; a head that keeps nothing is unchanged."""
        positions, held = prompt.positions.long(), prompt.positions >= 0
        both = torch.cat([prompt.plain_keys, prompt.values.to(prompt.plain_keys.dtype)], dim=-1)
        merged = torch.empty_like(both)
        for head, (row, own, stay) in enumerate(zip(positions, held, kept, strict=True)):
            chosen = stay.nonzero().flatten()
            merged[head] = both[head]
            if not len(chosen):
                continue
            middle = (row[chosen[1:]] + row[chosen[:-1]]) // 2  # up to here the older of two neighbours is nearer
            to = chosen[torch.searchsorted(middle, row[own])]
            sums = torch.zeros_like(both[head]).index_add_(0, to, both[head][own])
            count = torch.bincount(to, minlength=len(row))
            merged[head] = torch.where(stay[:, None], sums / count.clamp(min=1)[:, None], both[head])
        size = prompt.keys.shape[-1]
        table = tuple(x.to(merged.dtype) for x in prompt.rope(positions.clamp(min=0)))
        return rotate(merged[..., :size], table), merged[..., size:]
