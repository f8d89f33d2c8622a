"""The cache of one rank's heads, which decides about pages as the caches of all ranks do together.

Heads hold different numbers of entries, so ranks hold different numbers of pages. Every question whether pages are free has
one answer on all ranks (`ShardedCache._enough`): that of the rank with the least to spare. So schedulers that ask the same
questions make the same decisions. Counts of pages are those of one rank (``limit`` is the same everywhere), bytes and entries
in figures are totals.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dmc.cache import KVCache, Shape
from dmc.model.group import Group


class ShardedCache(KVCache):
    """`KVCache` of one rank.

    Args:
        group: of the ranks. Methods that it takes part in are called on all ranks.
        shape: of this rank's heads.
        settings: as for `KVCache`.

    Attributes:
        prompt_bytes: of prompts that are prefilling, on all ranks, when the last command ended.
    """

    def __init__(self, group: Group, shape: Shape, *arguments: Any, **settings: Any) -> None:
        super().__init__(shape, *arguments, **settings)
        self._group, self.prompt_bytes = group, 0
        self.model_shape = Shape(shape.layers, shape.heads * group.ranks, shape.head_size, shape.dtype)
        self._totals = [0.0, float(super().pages) * group.ranks, *[0.0] * 4]

    def refresh(self, schedule: int, prompt_bytes: int) -> None:
        """Exchanges the figures that any thread may then read at any time, at the end of a command on all ranks.

        Args:
            schedule: fingerprint of this rank's schedule.
            prompt_bytes: of this rank.

        Raises:
            RuntimeError: if a rank has another schedule than rank 0 (an internal error).
        """
        own = [schedule, prompt_bytes, super().used_pages, super().pages, *(x for pair in self.codec_error_sums for x in pair)]
        each = torch.stack(self._group.all(torch.tensor(own, dtype=torch.float64)))
        other = next((rank for rank, value in enumerate(each[:, 0]) if value != each[0, 0]), None)
        if other is not None:
            raise RuntimeError(f"internal error: rank {other} has another schedule than rank 0")
        prompts, *self._totals = each[:, 1:].sum(0).tolist()
        self.prompt_bytes = int(prompts)

    @property
    def used_pages(self) -> int:
        """Pages that sequences hold on all ranks."""
        return int(self._totals[0])

    @property
    def pages(self) -> int:
        """Pages of all ranks."""
        return int(self._totals[1])

    @property
    def codec_error(self) -> tuple[float, float]:
        """See `KVCache.codec_error`; of all ranks together."""
        lost, whole = self._totals[2:4], self._totals[4:]
        keys, values = ((part / of) ** 0.5 if of else 0.0 for part, of in zip(lost, whole, strict=True))
        return keys, values

    def likely_pages(self, entries: Tensor) -> int:
        """See `KVCache.likely_pages`; of all heads → of the rank that needs most."""
        return max(super(ShardedCache, self).likely_pages(part) for part in entries.split(self.shape.heads, dim=1))

    def entries(self, slot: int) -> Tensor:
        """See `KVCache.entries`; of all heads, on the CPU."""
        return torch.cat(self._group.all(super().entries(slot)), dim=1)

    def held(self, slot: int) -> dict[str, int]:
        """See `KVCache.held`; on all ranks."""
        own = super().held(slot)
        return dict(zip(own, self._sum(own.values()), strict=True))

    def shared_bytes(self, slot: int) -> int:
        """See `KVCache.shared_bytes`; on all ranks."""
        return self._sum([super().shared_bytes(slot)])[0]

    def dense_bytes(self, tokens: int) -> int:
        """See `KVCache.dense_bytes`; of all heads."""
        return super().dense_bytes(tokens) * self._group.ranks

    def _enough(self, spare: int) -> bool:
        return self._group.least(spare) >= 0

    def _sum(self, values: Iterable[int]) -> list[int]:
        return torch.stack(self._group.all(torch.tensor(list(values)))).sum(0).tolist()
