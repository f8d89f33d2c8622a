"""Dynamic Memory Compression: tokens are merged as the model decides."""

from __future__ import annotations

from torch import Tensor

from dmc.cache.policies.base import Policy


class DmcPolicy(Policy):
    """Takes the model's decisions as they are; a plain Llama makes none, and is then cached in full."""

    name = "dmc"
    by_head = True

    def decide(self, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """See `Policy.decide`."""
        return alpha, omega
