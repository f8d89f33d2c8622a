"""Removing entries from rows, and giving back the pages that this frees.

An evicted entry leaves the exact part at once. Inside an encoded page its place becomes -1 and attention passes over
it; a page without entries goes back to the pool, and a row with holes enough for a whole page is packed anew, oldest
first. Packing decodes and encodes again: with a lossy codec entries pay its loss once more each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.cache.policies import Entries
from dmc.cache.storage.pages import NULL_PAGE
from dmc.cache.storage.rows import Rows, ragged


def entries(rows: Rows, index: Tensor, following: Tensor) -> Entries:
    """Closed entries of rows ``[R]`` of one layer, encoded ones first; ``following [R]``: the next query's position."""
    marks, packing = {}, rows.packing(index)
    for name in rows.storage.marks:
        empty = -1 if name == "place" else 0.0
        parts = []
        for table, count, layout, per in (
            (rows.closed_table, rows.closed, packing.layout, packing.page_size),
            (rows.open_table, rows.exact, rows.open_layout, rows.per_open_page),
        ):
            held = count[index] * (per if layout is packing.layout else 1)
            columns = -(-int(held.max()) // per)
            mark = rows.pool.views(layout)[f"e_{name}"][table[index, :columns]].flatten(1)
            parts.append(mark.masked_fill_(torch.arange(columns * per, device=index.device) >= held[:, None], empty))
        marks[name] = torch.cat(parts, dim=1)
    layer = int(index[0]) // (rows.slots * rows.shape.heads) if len(index) else 0
    return Entries(marks["place"], marks.get("score"), rows.shape.heads, following, layer, rows.shape.layers)


def evict(rows: Rows, index: Tensor, there: Entries, keep: Tensor) -> None:
    """Drops the entries of rows ``[R]`` that ``keep [R, N]`` leaves out; ``there`` is what `entries` gave for them."""
    held = there.places >= 0
    if not (held & ~keep).any():
        return
    kept = held & keep
    encoded = int(rows.closed[index].max()) * rows.packing(index).page_size
    _from_pages(rows, index, held[:, :encoded], kept[:, :encoded])
    _from_exact(rows, index, held[:, encoded:], kept[:, encoded:])


def _from_pages(rows: Rows, index: Tensor, held: Tensor, kept: Tensor) -> None:
    """Marks holes, frees pages without entries, closes the gaps that these leave in the table, and packs."""
    some = (held & ~kept).any(-1)
    if not some.any():
        return
    index, held, kept = index[some], held[some], kept[some]
    packing, size = rows.packing(index), rows.packing(index).page_size
    table = rows.closed_table[index, : kept.shape[1] // size]
    row, entry = (held & ~kept).nonzero(as_tuple=True)
    rows.pool.views(packing.layout)["e_place"][table[row, entry // size], entry % size] = -1

    live = kept.unflatten(-1, (-1, size)).any(-1)  # [R, C]
    rows.pool.give(table[~live & (table != NULL_PAGE)].long())
    order = live.int().argsort(dim=-1, descending=True, stable=True)
    rows.closed[index] = live.sum(-1).int()
    rows.closed_table[index, : table.shape[1]] = torch.where(live, table, NULL_PAGE).gather(1, order)
    needed = -(-kept.sum(-1) // size)
    packed = live.sum(-1) > needed
    if packed.any():
        _pack(rows, index[packed], needed[packed])


def _pack(rows: Rows, index: Tensor, needed: Tensor) -> None:
    """Moves the encoded entries of rows into their first ``needed`` pages and frees the others."""
    packing, before = rows.packing(index), rows.closed[index].long()
    size = packing.page_size
    pages, owner = rows.closed_pages(index)
    blocks, marks = rows.read_closed(pages, packing)
    page, offset = (marks["place"] >= 0).nonzero(as_tuple=True)  # live entries, row after row, oldest first
    live = torch.bincount(owner[page], minlength=len(index))
    first = live.cumsum(0) - live
    owner, column = ragged(needed)
    slot = column[:, None] * size + torch.arange(size, device=index.device)  # [n, P] within the row
    source = first[owner, None] + slot.minimum(live[owner, None] - 1)  # the last entry fills the last page up
    keys, values = (part[page[source], offset[source]] for part in packing.codec.decode(blocks))
    moved = {name: mark[page[source], offset[source]] for name, mark in marks.items()}
    moved["place"] = moved["place"].masked_fill(slot >= live[owner, None], -1)
    rows.encode_into(rows.closed_table[index[owner], column].long(), index[owner], keys, values, moved)

    owner, column = ragged(before - needed)
    column = column + needed[owner]
    rows.pool.give(rows.closed_table[index[owner], column].long())
    rows.closed_table[index[owner], column] = NULL_PAGE
    rows.closed[index] = needed.int()


def _from_exact(rows: Rows, index: Tensor, held: Tensor, kept: Tensor) -> None:
    """Closes the gaps in the exact part and frees the pages at its end."""
    some = (held & ~kept).any(-1)
    if not some.any():
        return
    index, kept = index[some], kept[some]
    left = kept.sum(-1)
    owner, place = ragged(left)
    source = kept.int().argsort(dim=-1, descending=True, stable=True)[owner, place]
    moved = rows.read_exact(index[owner], source)
    rows.write_exact(index[owner], place, *moved)
    table = rows.open_table[index]
    spare = torch.arange(table.shape[1], device=index.device) >= rows.open_pages(left)[:, None]
    rows.pool.give(table[spare & (table != NULL_PAGE)].long())
    rows.open_table[index] = table.masked_fill_(spare, NULL_PAGE)
    rows.exact[index] = left.int()
