"""A sequence's part of the cache, moved to host memory and back bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.cache.storage.pages import NULL_PAGE
from dmc.cache.storage.rows import Rows


@dataclass(frozen=True)
class Swapped:
    """State of a sequence that was swapped out.

    Attributes:
        pages: uint8 ``[n, page bytes]``, encoded pages, then full-precision ones.
        owners: for each table, (row of the sequence, column) of its pages, int64 ``[.., 2]``.
        state: counts and accumulating entries, ``[L * H, ...]``.
    """

    pages: Tensor
    owners: tuple[Tensor, Tensor]
    state: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.pages, *self.owners, *self.state.values()))


def read(rows: Rows, index: Tensor) -> Swapped:
    """Copies the content of rows ``[L * H]`` to host memory; the rows keep it."""
    tables, rest = rows.state[:2], rows.state[2:]
    owners = tuple((getattr(rows, name)[index] != NULL_PAGE).nonzero() for name in tables)
    pages = torch.cat([getattr(rows, name)[index[owner[:, 0]], owner[:, 1]] for name, owner in zip(tables, owners, strict=True)])
    state = {name: getattr(rows, name)[index].to("cpu", copy=True) for name in rest}
    return Swapped(rows.pool.read(pages).cpu(), tuple(owner.cpu() for owner in owners), state)


def write(rows: Rows, index: Tensor, swapped: Swapped) -> None:
    """Puts a copy into empty rows ``[L * H]``.

    Raises:
        PoolExhausted: if there are not enough pages; nothing is changed then.
    """
    pages = rows.pool.take(len(swapped.pages))
    rows.pool.memory[pages] = swapped.pages.to(pages.device)
    encoded, full = (owner.to(pages.device) for owner in swapped.owners)
    rows.widen(int(encoded[:, 1].max()) + 1 if len(encoded) else 0)
    rows.encoded_table[index[encoded[:, 0]], encoded[:, 1]] = pages[: len(encoded)].int()
    rows.full_table[index[full[:, 0]], full[:, 1]] = pages[len(encoded) :].int()
    for name, tensor in swapped.state.items():
        getattr(rows, name)[index] = tensor.to(pages.device)


def fork_pages(rows: Rows, source: Tensor, *, share: bool) -> int:
    """Pages that `fork` takes."""
    tables = [rows.full_table] if share else [rows.full_table, rows.encoded_table]
    return sum(int((table[source] != NULL_PAGE).sum()) for table in tables)


def fork(rows: Rows, source: Tensor, target: Tensor, *, share: bool) -> None:
    """Copies rows ``source`` to empty rows ``target [L * H]``.

    With ``share`` encoded pages get a second owner, since they never change. Full-precision pages and accumulating entries
    will soon differ and are copied.

    Raises:
        PoolExhausted: if there are not enough pages; nothing is changed then.
    """
    encoded, full = rows.encoded_table[source], rows.full_table[source]
    held = [table != NULL_PAGE for table in (encoded, full)]
    copied = full[held[1]] if share else torch.cat([encoded[held[0]], full[held[1]]])
    pages = rows.pool.take(len(copied))
    rows.pool.memory[pages] = rows.pool.memory[copied.long()]
    if share:
        rows.pool.share(encoded[held[0]].long())
    else:
        encoded[held[0]] = pages[: int(held[0].sum())].int()
    full[held[1]] = pages[len(pages) - int(held[1].sum()) :].int()
    rows.encoded_table[target], rows.full_table[target] = encoded, full
    for name in rows.state[2:]:
        getattr(rows, name)[target] = getattr(rows, name)[source]
