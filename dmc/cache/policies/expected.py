"""Expected Attention (Devoto et al., arXiv 2510.00636): a prompt keeps entries that future queries will likely attend to."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.policies import budget as budgets
from dmc.cache.policies.entries import PromptEntries, at_least_fp32
from dmc.cache.policies.prompted import PromptPolicy
from dmc.functional import rotate


class ExpectedAttentionPolicy(PromptPolicy):
    """Scores entries by mean and covariance of the prompt's queries, which are assumed to be normally distributed.

    The expectation of ``exp(q k / sqrt(D))`` is ``exp(m k / sqrt(D) + k C k / (2 D))``. m and C are rotated by the mean RoPE of
    the next ``future`` positions. A softmax over entries, averaged over query heads, times the length of the entry's value is
    its score.

    Args:
        budget: tokens of a prompt that each head keeps.
        share: None, or the budget as a part of the prompt's tokens.
        future: number of next positions at which queries are expected, at least 1.
        sinks: first tokens that always stay.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "expected"
    query_moments = True

    def __init__(self, *, budget: int = 256, share: float | None = None, future: int = 512, sinks: int = 4) -> None:
        super().__init__(budget=budget, share=share)
        self.future = budgets.check_count(self.name, "future", future, 1)
        self.sinks = budgets.check_count(self.name, "sinks", sinks, 0)
        if sinks > (least := (budget if share is None else budgets.LEAST) - 2):
            raise ValueError(
                f"{self.name} policy: sinks={sinks} must be at most {least}: a budget of {least + 2} tokens also holds the "
                "newest token and one behind the sinks"
            )

    def scores(self, prompt: PromptEntries) -> Tensor:
        """See `PromptPolicy.scores`."""
        keys, size = at_least_fp32(prompt.keys), prompt.keys.shape[-1]
        at = torch.arange(self.future, device=keys.device) + prompt.next[0]
        table = tuple(x.to(keys.dtype).mean(0) for x in prompt.rope(at))
        mean = rotate(prompt.moments.mean, table)
        covariance = rotate(rotate(prompt.moments.covariance, table).transpose(1, 2), table)
        heads = len(keys)
        mean, covariance = mean.view(heads, -1, size), covariance.view(heads, -1, size, size)  # [H, G, ...]
        linear = mean @ keys.transpose(1, 2) * size**-0.5  # [H, G, N]
        square = torch.einsum("hnd,hgde,hne->hgn", keys, covariance, keys) / (2 * size)
        expected = (linear + square).masked_fill((prompt.positions < 0)[:, None], -torch.inf).softmax(-1).mean(1)
        scores = expected * at_least_fp32(prompt.values).norm(dim=-1)
        return scores.masked_fill(prompt.positions < self.sinks, torch.inf)
