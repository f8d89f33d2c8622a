"""Every token is its own entry: the uncompressed cache."""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.policies.base import Policy


class FullPolicy(Policy):
    """Ignores the model's decisions: nothing is merged."""

    name = "full"
    by_head = True
    merges = False

    def decide(self, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """See `Policy.decide`."""
        return torch.zeros_like(alpha), torch.ones_like(omega)
