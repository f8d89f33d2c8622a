"""What a policy is: which entries exist."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Policy(ABC):
    """Decides, from what the model proposes, what each token does to the cache of each key/value head.

    Attributes:
        name: under which `dmc.cache.policy` finds it.
    """

    name: ClassVar[str]

    @abstractmethod
    def decide(self, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        """The decisions that are carried out.

        Args:
            alpha: ``[B, H, T]`` fp32, 1 where the model would merge the token into the open entry, else 0.
            omega: ``[B, H, T]`` fp32, weight of the token in its entry.

        Returns:
            (alpha, omega) of the same shapes; alpha exactly 0 or 1, omega positive.
        """
