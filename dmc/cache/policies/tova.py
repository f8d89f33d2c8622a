"""TOVA (Oren et al., arXiv 2401.06104): after each token, the token that its query attended to least is dropped."""

from __future__ import annotations

from torch import Tensor

from dmc.cache.policies import budget as budgets
from dmc.cache.policies.budgeted import BudgetPolicy
from dmc.cache.policies.entries import Entries


class TovaPolicy(BudgetPolicy):
    """A generated token's query sees ``budget`` tokens, itself and the one before it among them.

    The score of a token is the softmax attention that it got from the newest query, averaged over all query heads of
    the layer; so all heads of a layer keep the same tokens. A prompt's queries see the whole prompt; it is cut to
    the budget by the attention of its last query.

    Args:
        budget: tokens that a query sees, at least 2.
        share: None, or the budget as a part of the tokens so far; ``budget`` is then ignored.

    Raises:
        ValueError: if a setting is out of range.
    """

    name = "tova"
    evicts = True
    statistics = "last"

    def keep(self, entries: Entries) -> Tensor:
        """The entries that the next query will see; see `Policy.keep`."""
        # Nothing merges and all heads of a layer keep the same tokens, so a column is the same token in each head.
        mean = entries.scores.unflatten(0, (-1, entries.heads)).mean(1, keepdim=True)
        scores = mean.expand(-1, entries.heads, -1).flatten(0, 1)
        whole = self.whole(entries.next[:, None] + 1)
        return budgets.top(scores, entries.positions >= 0, whole - 2)  # and the accumulating entry, the next query

    def most_entries(self, tokens: int) -> int:
        """See `Policy.most_entries`."""
        return min(tokens, self.whole(tokens))
