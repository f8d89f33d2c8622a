"""The view of growing rows that `dmc.kernels.append` and `dmc.kernels.encode` change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NO_PAGE, NO_COLUMN, NOT_ENCODED = 1, 2, 4
"""Bits of `Growing.failed`: no page was free; the table of encoded pages is full; a full row was appended to."""


@dataclass(frozen=True)
class Growing:
    """Rows that grow, as views of the cache's tensors. All of them are written to; nothing is copied.

    A row's exact entries are its first ``sinks``, then those that wait to be encoded. With ``most`` of them it is full:
    the oldest page after the sinks must be encoded before it closes another.

    Attributes:
        sinks, window: entries at the start and at the end of a row that stay exact.
        page: entries of an encoded page, P.
        numerators: fp32 (the twin also fp64) ``[rows, 2 D]``: keys, before their rotation, and values of the open entry,
            summed with their weights.
        z: as numerators ``[rows]``, the sum of these weights; 0 where a row has no open entry, its numerators too.
        exact, closed: int32 ``[rows]``, exact entries and encoded pages.
        open_table, closed_table: int32 ``[rows, columns]``, their pages in order; 0, the null page, where there is none.
        memory: uint8 ``[pages, bytes]``, the pool.
        opened: ``k`` and ``v``, views of it: exact pages ``[pages, E, D]`` in fp32, fp16 or bf16.
        stack: int64 ``[pages - 1]``, the free pages first; the last of them is taken next.
        free: int32 ``[1]``, how many they are.
        owners: int32 ``[pages]``, of each page; 0: free.
        failed: int32 ``[1]``; a failure sets its bit (`NO_PAGE`, `NO_COLUMN`, `NOT_ENCODED`) and nothing clears it here.
            The rows concerned stay as they were.
    """

    sinks: int
    window: int
    page: int
    numerators: Tensor
    z: Tensor
    exact: Tensor
    closed: Tensor
    open_table: Tensor
    closed_table: Tensor
    memory: Tensor
    opened: dict[str, Tensor]
    stack: Tensor
    free: Tensor
    owners: Tensor
    failed: Tensor

    @property
    def most(self) -> int:
        """Exact entries of a full row."""
        return self.sinks + self.window + self.page

    @property
    def per_open(self) -> int:
        """Exact entries of a page, E."""
        return self.opened["k"].shape[1]

    @property
    def head_size(self) -> int:
        """D."""
        return self.opened["k"].shape[2]

    def __post_init__(self) -> None:  # noqa: D105
        for name in ("exact", "closed", "open_table", "closed_table", "free", "owners", "failed"):
            if getattr(self, name).dtype != torch.int32:
                raise ValueError(f"{name} must be int32 on the device, got {getattr(self, name).dtype}")
        if self.open_table.shape[1] * self.per_open < self.most:
            raise ValueError(
                f"a row has up to {self.most} exact entries, but its {self.open_table.shape[1]} open pages hold "
                f"{self.per_open} each; give open_table more columns"
            )
        if self.numerators.shape[1] != 2 * self.head_size or self.numerators.dtype != self.z.dtype:
            raise ValueError(
                f"numerators {tuple(self.numerators.shape)} {self.numerators.dtype} must be [rows, {2 * self.head_size}] "
                f"in the dtype of z, {self.z.dtype}"
            )


def take(state: Growing, wanting: Tensor) -> tuple[Tensor, Tensor]:
    """Free pages for those that want one, bool ``[n]``, as far as there are → (pages int64 ``[given]``, given bool ``[n]``)."""
    free = int(state.free)
    order = wanting.cumsum(0)
    given = wanting & (order <= free)
    if not torch.equal(given, wanting):
        state.failed.bitwise_or_(NO_PAGE)
    pages = state.stack[free - order[given]].long()
    state.free.sub_(len(pages))
    state.owners[pages] = 1
    return pages, given
