"""Eviction of entries from rows, and compaction.

An evicted full-precision entry is removed at once. In an encoded page its position becomes -1, and attention skips the slot.
A page without entries returns to the pool. A row whose evicted slots would fill a page is compacted, oldest entries first.
Compaction decodes and encodes again, so with a lossy codec each compaction adds the codec's error once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.policies import Entries
from dmc.cache.storage.pages import NULL_PAGE
from dmc.cache.storage.rows import Rows, ragged


def entries(rows: Rows, index: Tensor, following: Tensor) -> Entries:
    """Final entries of rows ``[R]`` of one layer, encoded ones first; ``following [R]``: the next query's position."""
    metadata, packing = {}, rows.packing(index)
    for name in rows.storage.metadata:
        empty = -1 if name == "position" else 0.0
        parts = []
        for table, count, layout, per in (
            (rows.encoded_table, rows.encoded_count, packing.layout, packing.page_size),
            (rows.full_table, rows.full_count, rows.full_layout, rows.per_full_page),
        ):
            held = count[index] * (per if layout is packing.layout else 1)
            columns = -(-int(held.max()) // per)
            field = rows.pool.views(layout)[f"e_{name}"][table[index, :columns]].flatten(1)
            parts.append(field.masked_fill_(torch.arange(columns * per, device=index.device) >= held[:, None], empty))
        metadata[name] = torch.cat(parts, dim=1)
    layer = int(index[0]) // (rows.slots * rows.shape.heads) if len(index) else 0
    return Entries(metadata["position"], metadata.get("score"), rows.shape.heads, following, layer, rows.shape.layers)


def evict(rows: Rows, index: Tensor, there: Entries, keep: Tensor) -> None:
    """Drops the entries of rows ``[R]`` that ``keep [R, N]`` leaves out; ``there`` is what `entries` gave for them."""
    held = there.positions >= 0
    if not (held & ~keep).any():
        return
    kept = held & keep
    encoded = int(rows.encoded_count[index].max()) * rows.packing(index).page_size
    _from_pages(rows, index, held[:, :encoded], kept[:, :encoded])
    _from_full(rows, index, held[:, encoded:], kept[:, encoded:])


def _from_pages(rows: Rows, index: Tensor, held: Tensor, kept: Tensor) -> None:
    """Marks evicted slots, frees pages without entries, closes the gaps in the table, and compacts."""
    some = (held & ~kept).any(-1)
    if not some.any():
        return
    index, held, kept = index[some], held[some], kept[some]
    packing, size = rows.packing(index), rows.packing(index).page_size
    table = rows.encoded_table[index, : kept.shape[1] // size]
    row, entry = (held & ~kept).nonzero(as_tuple=True)
    rows.pool.views(packing.layout)["e_position"][table[row, entry // size], entry % size] = -1

    live = kept.unflatten(-1, (-1, size)).any(-1)  # [R, C]
    rows.pool.give(table[~live & (table != NULL_PAGE)].long())
    order = live.int().argsort(dim=-1, descending=True, stable=True)
    rows.encoded_count[index] = live.sum(-1).int()
    rows.encoded_table[index, : table.shape[1]] = torch.where(live, table, NULL_PAGE).gather(1, order)
    needed = -(-kept.sum(-1) // size)
    packed = live.sum(-1) > needed
    if packed.any():
        _pack(rows, index[packed], needed[packed])


def _pack(rows: Rows, index: Tensor, needed: Tensor) -> None:
    """Moves the encoded entries of rows into their first ``needed`` pages and frees the others."""
    packing, before = rows.packing(index), rows.encoded_count[index].long()
    size = packing.page_size
    pages, owner = rows.encoded_pages(index)
    blocks, metadata = rows.read_encoded(pages, packing)
    page, offset = (metadata["position"] >= 0).nonzero(as_tuple=True)  # live entries, row after row, oldest first
    live = torch.bincount(owner[page], minlength=len(index))
    first = live.cumsum(0) - live
    owner, column = ragged(needed)
    slot = column[:, None] * size + torch.arange(size, device=index.device)  # [n, P] within the row
    source = first[owner, None] + slot.minimum(live[owner, None] - 1)  # the last entry pads the last page
    keys, values = (part[page[source], offset[source]] for part in packing.codec.decode(blocks))
    moved = {name: field[page[source], offset[source]] for name, field in metadata.items()}
    moved["position"] = moved["position"].masked_fill(slot >= live[owner, None], -1)
    rows.encode_into(rows.encoded_table[index[owner], column].long(), index[owner], keys, values, moved)

    owner, column = ragged(before - needed)
    column = column + needed[owner]
    rows.pool.give(rows.encoded_table[index[owner], column].long())
    rows.encoded_table[index[owner], column] = NULL_PAGE
    rows.encoded_count[index] = needed.int()


def _from_full(rows: Rows, index: Tensor, held: Tensor, kept: Tensor) -> None:
    """Closes the gaps among full-precision entries and frees the pages at their end."""
    some = (held & ~kept).any(-1)
    if not some.any():
        return
    index, kept = index[some], kept[some]
    left = kept.sum(-1)
    owner, offset = ragged(left)
    source = kept.int().argsort(dim=-1, descending=True, stable=True)[owner, offset]
    moved = rows.read_full(index[owner], source)
    rows.write_full(index[owner], offset, *moved)
    table = rows.full_table[index]
    spare = torch.arange(table.shape[1], device=index.device) >= rows.full_pages(left)[:, None]
    rows.pool.give(table[spare & (table != NULL_PAGE)].long())
    rows.full_table[index] = table.masked_fill_(spare, NULL_PAGE)
    rows.full_count[index] = left.int()
