"""State of the cache for each row, that is each (layer, sequence, key/value head).

The entries of a row, oldest first:

    sinks           the first few entries, in full precision; none for lossless codecs
    encoded pages   full pages of final entries, encoded once
    window          entries that wait for a full page, in full precision
    accumulating    the only entry that can still change: unrotated fp32 numerators and z

With a ring of recent tokens (`Storage.ring`), the ring and the accumulating entry precede the sinks
(`dmc.cache.reading.late`), and count as sinks below.

With c final entries, s sinks, a window of at least w and pages of P entries, a row holds ``max(0, c - s - w) // P`` encoded
pages, which cover entries s, s + 1, ...; all other entries are in full precision. The encoded entries depend on c alone,
and not on batch, chunks or schedule.

All pages have the same size. Layers may have different codecs, and then different P (`Packing`): a layer that takes fewer
bytes per entry stores more entries per page.

Under an evicting policy, or with a codec that needs it, a page also holds each entry's position, that of its newest token;
-1 marks an evicted slot. `dmc.cache.storage.evict` removes entries and frees their pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmc.cache.codecs import Blocks, Codec
from dmc.cache.storage.error import CodecError
from dmc.cache.storage.full import full_layout, read, rounded, stored
from dmc.cache.storage.packing import Packing, Storage, packings
from dmc.cache.storage.pages import NULL_PAGE, PagePool

_FIRST_COLUMNS = 4  # of the table of encoded pages; doubles when a row outgrows it
_ENCODE_PAGES = 1024  # encoded at once; bounds the memory of encoding


@dataclass(frozen=True)
class Shape:
    """Sizes that the model gives the cache: L layers, H key/value heads, head size D, and the model's dtype."""

    layers: int
    heads: int
    head_size: int
    dtype: torch.dtype


Metadata = dict[str, Tensor]
"""Per-entry metadata: tensors by the names of `Storage.metadata`."""


class Rows:
    """Tables, counts and accumulating entries of all rows, as tensors over a flat row index, and their pages in one pool.

    A row's index is ``(layer * slots + slot) * H + head``; see `index`. Tables are int32 and name pages of `pool`;
    unused columns name the null page.

    Args:
        shape, storage: see `Shape`, `Storage`.
        codecs: of each layer; one object for layers with equal storage.
        page_size: entries of an encoded page; None: each codec's own. See `packings` for layers that differ.
        slots: largest number of sequences.
        memory: bytes of the pool; None: it grows.
        device: of everything.
    """

    def __init__(
        self,
        shape: Shape,
        storage: Storage,
        codecs: Sequence[Codec],
        *,
        page_size: int | None,
        slots: int,
        memory: int | None,
        device: torch.device | str,
    ) -> None:
        self.shape, self.storage, self.slots = shape, storage, slots
        size = shape.head_size
        self.packings, page_bytes = packings(codecs, page_size, size, storage)
        self.page_sizes = torch.tensor([packing.page_size for packing in self.packings], device=device)  # [L]
        self._alike = len({id(packing) for packing in self.packings}) == 1
        entry = storage.entry_bytes(size)
        self.per_full_page = page_bytes // entry  # full-precision entries per page
        self.full_layout = full_layout(storage, self.per_full_page, size)
        self.pool = PagePool(page_bytes, limit=None if memory is None else memory // page_bytes, device=device)
        self.error = CodecError()

        rows = shape.layers * slots * shape.heads
        work = torch.float64 if shape.dtype == torch.float64 else torch.float32
        self.encoded_table = torch.full((rows, _FIRST_COLUMNS), NULL_PAGE, dtype=torch.int32, device=device)
        columns = max(self.full_pages(self.most_full(packing)) for packing in self.packings)
        self.full_table = torch.full((rows, columns), NULL_PAGE, dtype=torch.int32, device=device)
        self.encoded_count = torch.zeros(rows, dtype=torch.int32, device=device)  # encoded pages
        self.full_count = torch.zeros(rows, dtype=torch.int32, device=device)  # full-precision entries but the accumulating
        self.numerators = torch.zeros(rows, 2 * size, dtype=work, device=device)  # of the accumulating entry: keys | values
        self.z = torch.zeros(rows, dtype=work, device=device)  # of the accumulating entry; 0: the row is empty
        self.accumulating_score = torch.zeros(rows if storage.scored else 0, device=device)
        self.notes = torch.zeros(rows, storage.ring or 0, storage.noted, dtype=work, device=device)  # see `Storage`
        # Position of the newest token in the accumulating entry; only read if entries carry positions and tokens can be dropped.
        positioned = storage.with_positions and storage.ring is not None
        self.newest = torch.zeros(rows if positioned else 0, dtype=torch.int32, device=device)

    @property
    def state(self) -> tuple[str, ...]:
        """Names of the tensors with all state of a row except its pages' content; the first two are tables."""
        more = [name for name in ("accumulating_score", "notes", "newest") if getattr(self, name).numel()]
        return ("encoded_table", "full_table", "encoded_count", "full_count", "numerators", "z", *more)

    def index(self, layer: int, slots: Tensor) -> Tensor:
        """Rows of a layer's heads for each slot: int64 ``[S] → [S * H]``."""
        heads = self.shape.heads
        first = (layer * self.slots + slots) * heads
        return (first[:, None] + torch.arange(heads, device=slots.device)).flatten()

    def indices(self, slots: Tensor) -> Tensor:
        """`index` of every layer: int64 ``[S] → [L, S * H]``."""
        step = self.slots * self.shape.heads
        return self.index(0, slots) + torch.arange(self.shape.layers, device=slots.device)[:, None] * step

    def all_layers(self, slot: int) -> Tensor:
        """All rows of a slot, layer by layer: int64 ``[L * H]``."""
        heads = self.shape.heads
        layer = torch.arange(self.shape.layers, device=self.z.device)[:, None]
        return ((layer * self.slots + slot) * heads + torch.arange(heads, device=self.z.device)).flatten()

    def heads_of(self, rows: Tensor) -> Tensor:
        """Key/value heads of rows, counted over all layers: ``layer * H + head``, int64 like ``rows``."""
        heads = self.shape.heads
        return rows // (self.slots * heads) * heads + rows % heads

    def packing(self, rows: Tensor) -> Packing:
        """Layout of the encoded pages of rows ``[R]`` of one layer; at least one row."""
        return self.packings[0 if self._alike else int(rows[0]) // (self.slots * self.shape.heads)]

    def layers_alike(self) -> list[list[int]]:
        """Layers grouped by the layout of their encoded pages."""
        together: dict[int, list[int]] = {}
        for layer, packing in enumerate(self.packings):
            together.setdefault(id(packing), []).append(layer)
        return list(together.values())

    def joined(self, packing: Packing) -> bool:
        """True if full-precision and encoded pages have the same layout, so that a row can be read as one run of pages."""
        return not self.storage.first and self.full_layout.fields == packing.layout.fields

    def row_page_sizes(self, rows: Tensor) -> Tensor:
        """Entries per encoded page of any rows: int64 ``[R] → [R]``."""
        return self.page_sizes[rows // (self.slots * self.shape.heads)]

    def most_full(self, packing: Packing) -> int:
        """Full-precision entries of a row just before a page is encoded, without the accumulating one."""
        return self.storage.first + self.storage.window + packing.page_size

    def split(self, entries: Tensor, page_size: int | Tensor) -> tuple[Tensor, Tensor]:
        """Final entries of a row → (encoded pages, full-precision entries)."""
        encoded = (entries - self.storage.first - self.storage.window).clamp(min=0) // page_size
        return encoded, entries - encoded * page_size

    def pages_of(self, entries: Tensor, page_size: int | Tensor) -> Tensor:
        """Pages of rows with so many final entries, if none was evicted; int64, any shape."""
        encoded, full = self.split(entries, page_size)
        return encoded + self.full_pages(full).clamp(min=self.ring_pages)

    @property
    def ring_pages(self) -> int:
        """Pages of ring and accumulating entry; a row has them from its first token."""
        return 0 if self.storage.ring is None else self.full_pages(self.storage.ring + 1)

    def behind_ring(self, encoded: Tensor, full: Tensor, page_size: int | Tensor) -> Tensor:
        """Entries behind the ring, the accumulating one included, of rows with so many encoded pages and full-precision entries;
        0 or less if the ring is not full."""
        return encoded * page_size + full - (self.storage.ring or 0)

    def worst_pages(self, entries: int, *, evicting: bool) -> int:
        """Largest number of pages, summed over one row of each layer, on the way to so many final entries."""
        store, pages = self.storage, 0
        for packing in self.packings:
            encoded = max(0, entries - store.first - store.window) // packing.page_size
            full = self.full_pages(min(entries + evicting, self.most_full(packing)))
            pages += encoded + 2 * evicting + max(full, self.ring_pages)
        return pages

    def full_pages(self, entries: Any) -> Any:
        """Pages of so many full-precision entries: an int, or a tensor of them."""
        return -(-entries // self.per_full_page)

    # ------------------------------------------------------------------------------------ reading

    def full_entries(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Full-precision entries of rows: ``[R] → (keys [R, N, D], values [R, N, D], valid [R, N])``; the rest is 0."""
        count = self.full_count[rows]
        columns = self.full_pages(int(count.max()))
        valid = torch.arange(columns * self.per_full_page, device=rows.device) < count[:, None]
        return *self.read_full_pages(self.full_table[rows, :columns].flatten(), len(rows)), valid

    def read_full_pages(self, pages: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Copies of keys and values ``[R, N, D]`` on full-precision pages ``[R * columns]``."""
        views = self.full_layout.views(self.pool.read(pages))
        keys, values = (read(part, views).reshape(rows, -1, self.shape.head_size) for part in "kv")
        return keys, values

    def encoded_pages(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded pages of rows, row after row: ``[R] → (pages [n], index into rows of each [n])``."""
        count = self.encoded_count[rows]
        columns = int(count.max())
        held = torch.arange(columns, device=rows.device) < count[:, None]
        owner, column = held.nonzero(as_tuple=True)
        return self.encoded_table[rows[owner], column], owner

    def blocks(self, pages: Tensor, packing: Packing) -> Blocks:
        """Copies of encoded pages: ``[n]`` → blocks with leading dimension n."""
        return self.read_encoded(pages, packing)[0]

    def read_encoded(self, pages: Tensor, packing: Packing) -> tuple[Blocks, Metadata]:
        """`blocks`, and the per-entry metadata ``[n, P]``; copies."""
        if len(packing.layout.fields) == 2:  # few and large: selected one by one they are contiguous
            views = {name: view.index_select(0, pages) for name, view in self.pool.views(packing.layout).items()}
        else:
            views = packing.layout.views(self.pool.read(pages))
        metadata = {name: views[f"e_{name}"] for name in self.storage.metadata}
        own = {name: view for name, view in views.items() if name in packing.fields}
        return Blocks(own, packing.page_size, self.shape.head_size), metadata

    # ------------------------------------------------------------------------------------ writing

    def append(self, rows: Tensor, keys: Tensor, values: Tensor, metadata: Metadata) -> None:
        """Adds one final entry to each of some rows: rows ``[R]`` distinct, keys and values ``[R, D]``, metadata ``[R]``."""
        count = self.full_count[rows]
        fresh = count % self.per_full_page == 0
        if fresh.any():
            self._new_full_pages(rows[fresh], count[fresh] // self.per_full_page)
        self.write_full(rows, count, keys, values, metadata)
        self.full_count[rows] = count + 1
        filled = count + 1 == self.most_full(self.packing(rows))
        if filled.any():
            for some in rows[filled].split(_ENCODE_PAGES):
                self._encode_page(some)

    def load(
        self,
        rows: Tensor,
        keys: Tensor,
        values: Tensor,
        counts: Tensor,
        metadata: Metadata,
        *,
        donors: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> None:
        """Fills empty rows with a prompt's final entries.

        Args:
            rows: ``[R]``.
            keys, values: ``[R, N, D]``, oldest first.
            counts: ``[R]`` int64, how many of the N entries are of the row.
            metadata: ``[R, N]`` each.
            donors: ``[R]``, rows whose first pages hold the same entries.
            shared: ``[R]`` int64, how many of these pages are shared instead of encoded again.
        """
        store, size = self.storage, self.packing(rows).page_size
        encoded, full = self.split(counts, size)
        keys, values = rounded(keys, store), rounded(values, store)

        self.widen(int(encoded.max()))
        owner, column = ragged(encoded)
        if donors is not None:
            taken = column < shared[owner]
            pages = self.encoded_table[donors[owner[taken]], column[taken]]
            self.pool.share(pages.long())
            self.encoded_table[rows[owner[taken]], column[taken]] = pages
            owner, column = owner[~taken], column[~taken]
        for owners, columns in zip(owner.split(_ENCODE_PAGES), column.split(_ENCODE_PAGES), strict=True):
            start = store.first + columns * size
            which = owners[:, None], start[:, None] + torch.arange(size, device=rows.device)
            own = {name: field[which] for name, field in metadata.items()}
            self._store(rows[owners], columns, keys[which], values[which], own)
        self.encoded_count[rows] = encoded.int()

        owner, column = ragged(self.full_pages(full).clamp(min=self.ring_pages))
        self._new_full_pages(rows[owner], column)
        owner, offset = ragged(full)
        which = owner, torch.where(offset < store.first, offset, offset + encoded[owner] * size)
        own = {name: field[which] for name, field in metadata.items()}
        self.write_full(rows[owner], offset, keys[which], values[which], own)
        self.full_count[rows] = full.int()

    def release(self, rows: Tensor) -> None:
        """Empties rows and gives their pages back: ``[R]``."""
        pages = torch.cat([self.encoded_table[rows].flatten(), self.full_table[rows].flatten()])
        self.pool.give(pages[pages != NULL_PAGE].long())
        for name in self.state:
            getattr(self, name)[rows] = 0

    def encode_into(self, pages: Tensor, rows: Tensor, keys: Tensor, values: Tensor, metadata: Metadata) -> Blocks:
        """Encodes entries ``[n, P, D]`` of rows ``[n]`` with their metadata ``[n, P]`` into pages of the pool, ``[n]``."""
        packing = self.packing(rows)
        if packing.codec.needs_positions:
            encoded = packing.codec.encode_at(keys, values, self.heads_of(rows), metadata["position"])
        else:
            encoded = packing.codec.encode(keys, values)
        views = self.pool.views(packing.layout)
        for name, tensor in encoded.tensors.items():
            views[name][pages] = tensor
        for name, field in metadata.items():
            views[f"e_{name}"][pages] = field
        return encoded

    def write_full(self, rows: Tensor, offsets: Tensor, keys: Tensor, values: Tensor, metadata: Metadata) -> None:
        """Writes full-precision entries at ``offsets`` of rows, whose pages are there; all of one shape, keys ``[..., D]``."""
        pages, slots = self.full_table[rows, offsets // self.per_full_page], offsets % self.per_full_page
        views = self.pool.views(self.full_layout)
        for part, x in (("k", keys), ("v", values)):
            for name, field in stored(part, x, self.storage).items():
                views[name][pages, slots] = field
        for name, field in metadata.items():
            views[f"e_{name}"][pages, slots] = field.to(self.storage.metadata[name])

    def read_full(self, rows: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Metadata]:
        """Full-precision entries at ``offsets`` of rows, both of one shape: copies; offsets beyond a row's pages read as 0."""
        pages, slots = self.full_table[rows, offsets // self.per_full_page], offsets % self.per_full_page
        views = self.pool.views(self.full_layout)
        metadata = {name: views[f"e_{name}"][pages, slots] for name in self.storage.metadata}
        keys, values = (read(part, views, (pages, slots)) for part in "kv")
        return keys, values, metadata

    def _encode_page(self, rows: Tensor) -> None:
        """Encodes the oldest page of the window of each row; the rows have `most_full` full-precision entries."""
        store, packing = self.storage, self.packing(rows)
        first, end = store.first, store.first + packing.page_size
        offsets = torch.arange(first, self.most_full(packing), device=rows.device).expand(len(rows), -1)
        read = self.read_full(rows[:, None].expand_as(offsets), offsets)
        kept = self.full_pages(first + store.window)
        spare = self.full_table[rows, kept:]
        self.pool.give(spare[spare != NULL_PAGE].long())
        self.full_table[rows, kept:] = NULL_PAGE
        (keys, values), metadata = ((part[:, : end - first] for part in read[:2]), read[2])
        if store.window:
            rest = [part[:, end - first :] for part in read[:2]]
            later = {name: field[:, end - first :] for name, field in metadata.items()}
            self.write_full(rows[:, None].expand(-1, store.window), offsets[:, : store.window], *rest, later)
        self.full_count[rows] = first + store.window
        column = self.encoded_count[rows]
        self.widen(int(column.max()) + 1)
        self._store(rows, column, keys, values, {name: field[:, : end - first] for name, field in metadata.items()})
        self.encoded_count[rows] = column + 1

    def _store(self, rows: Tensor, columns: Tensor, keys: Tensor, values: Tensor, metadata: Metadata) -> None:
        """Encodes one page per row, ``[R, P, D]``, into new pages of the pool, named at ``columns`` of the table."""
        if not len(rows):
            return
        pages = self.pool.take(len(rows))
        try:
            encoded = self.encode_into(pages, rows, keys, values, metadata)
        except BaseException:  # of a codec, which can be a user's: no table names these pages yet
            self.pool.give(pages)
            raise
        self.error.sample(self.packing(rows).codec, encoded, keys, values)
        self.encoded_table[rows, columns] = pages.int()

    def _new_full_pages(self, rows: Tensor, columns: Tensor) -> None:
        """Gives each row a zeroed page for full-precision entries, named at ``columns`` of the table; rows may repeat."""
        pages = self.pool.take(len(rows))
        self.pool.memory[pages] = 0  # the bytes of a former encoded page could read as NaN
        self.full_table[rows, columns] = pages.int()

    def widen(self, columns: int) -> None:
        """Widens the table of encoded pages to at least so many columns."""
        have = self.encoded_table.shape[1]
        if columns > have:
            self.encoded_table = F.pad(self.encoded_table, (0, max(columns, 2 * have) - have), value=NULL_PAGE)


def ragged(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Counts ``[R]`` → (owner, offset) ``[sum]``: 0, 0, ..., 1, ... and 0, 1, ..., 0, ..."""
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    start = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=counts.device) - start[owner]
