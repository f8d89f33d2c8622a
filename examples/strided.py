import torch
from torch import Tensor

from dmc.cache import Entries, Policy


class Strided(Policy):
    """Keeps the newest ``recent`` tokens, and of the older ones each whose position is a multiple of ``stride``."""

    name = "strided"
    merges = False
    evicts = True
    by_head = True

    def __init__(self, *, recent: int = 64, stride: int = 4) -> None:
        if recent < 2 or stride < 1:
            raise ValueError(f"strided policy: recent={recent} must be at least 2, stride={stride} at least 1")
        self.recent, self.stride = recent, stride

    def decide(self, alpha: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(omega)  # no token merges

    def keep(self, entries: Entries) -> Tensor:
        newest = entries.positions > entries.next[:, None] - self.recent
        return newest | (entries.positions % self.stride == 0)
