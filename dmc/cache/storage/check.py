"""The integrity check: owner counts of pages equal the table entries that name them; tables and counts agree."""

from __future__ import annotations

import torch

from dmc.cache.storage.pages import NULL_PAGE
from dmc.cache.storage.rows import Rows


def check(rows: Rows, free_slots: list[int], *, evicting: bool) -> None:
    """Checks the whole cache.

    Raises:
        RuntimeError: with the fault; the cache is invalid after that.
    """
    _tables(rows, free_slots)
    _pool(rows)
    store = rows.storage
    waiting = rows.full_count - store.first - store.window
    page_sizes = rows.row_page_sizes(torch.arange(len(waiting), device=waiting.device))
    if (waiting >= page_sizes).any() or (not evicting and ((rows.encoded_count > 0) & (waiting < 0)).any()):
        raise RuntimeError("a row has a page to encode, or encoded one too early")
    if ((rows.z == 0) & ((rows.full_count > (store.ring or 0)) | (rows.encoded_count > 0))).any():
        raise RuntimeError("a row has entries but no accumulating entry")
    free = torch.tensor(free_slots, dtype=torch.int64, device=rows.z.device)
    if len(set(free_slots)) != len(free_slots) or any(slot not in range(rows.slots) for slot in free_slots):
        raise RuntimeError("a slot is free twice, or does not exist")
    for layer in range(rows.shape.layers):
        index = rows.index(layer, free)
        if rows.z[index].any() or rows.full_count[index].any():
            raise RuntimeError("a free slot holds a sequence")
    if evicting:
        for layer in range(rows.shape.layers):
            _positions(rows, rows.index(layer, torch.arange(rows.slots, device=rows.z.device)))


def _tables(rows: Rows, free_slots: list[int]) -> None:
    least = torch.full_like(rows.full_count, rows.ring_pages).view(rows.shape.layers, rows.slots, -1)
    least[:, [slot for slot in free_slots if slot in range(rows.slots)]] = 0
    full = torch.maximum(rows.full_pages(rows.full_count), least.flatten())
    for table, pages in ((rows.encoded_table, rows.encoded_count), (rows.full_table, full)):
        named = torch.arange(table.shape[1], device=table.device) < pages[:, None]
        if ((table != NULL_PAGE) != named).any():
            raise RuntimeError("a block table names more or fewer pages than its row has")


def _pool(rows: Rows) -> None:
    pool = rows.pool
    named = torch.cat([rows.encoded_table.flatten(), rows.full_table.flatten()])
    owners = torch.bincount(named[named != NULL_PAGE].long(), minlength=pool.capacity + 1)
    if not torch.equal(owners, pool.owners.long()):
        raise RuntimeError("a page of the pool has more or fewer owners than it counts")
    full = rows.full_table[rows.full_table != NULL_PAGE].long()
    if (owners[full] > 1).any():
        raise RuntimeError("a page that can still change has two owners")
    free = (owners[1:] == 0).nonzero().flatten() + 1
    if not torch.equal(pool.free_pages().sort().values, free):
        raise RuntimeError("a page of the pool is lost, or free while owned")
    if pool.memory[NULL_PAGE].any():
        raise RuntimeError("the null page was written to")


def _positions(rows: Rows, index: torch.Tensor) -> None:
    """Checks the positions on encoded pages of one layer's rows."""
    pages, owner = rows.encoded_pages(index)
    if not len(pages):
        return
    packing = rows.packing(index)
    live = rows.read_encoded(pages, packing)[1]["position"] >= 0
    if not live.any(-1).all():
        raise RuntimeError("an encoded page without entries is still held")
    entries = torch.zeros_like(index).index_add_(0, owner, live.sum(-1))
    if (rows.encoded_count[index] > -(-entries // packing.page_size)).any():
        raise RuntimeError("a row holds more pages than its entries need")
