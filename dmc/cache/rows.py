"""What the cache holds for each row, that is each (layer, sequence, key/value head).

The entries of a row, oldest first:

    sinks        the first few entries, exact; their number is 0 for lossless codecs
    pages        full pages of entries, encoded once, final
    window       entries that wait for a full page, exact
    tail         the open entry, the only one that can still change: unrotated fp32 numerators and z

With c closed entries (all but the tail), s sinks, a window of at least w and pages of P entries, a row holds
``max(0, c - s - w) // P`` encoded pages, which cover entries s, s + 1, ...; everything else is exact. So what is
encoded follows from c alone, whatever batch, chunk or schedule brought the entries here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmc.cache.codecs import Blocks, Codec
from dmc.cache.pages import NULL_PAGE, Layout, PagePool

_FIRST_COLUMNS = 4  # of the table of encoded pages; doubles when a row outgrows it
_ENCODE_PAGES = 1024  # encoded in one go after a prompt; bounds the memory that encoding needs


@dataclass(frozen=True)
class Shape:
    """Sizes that the model gives the cache: L layers, H key/value heads, head size D, and the model's dtype."""

    layers: int
    heads: int
    head_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """How a row's entries are laid out; see the head of this file.

    Attributes:
        codec: of full pages.
        page_size: P.
        sink_tokens: s.
        window: w.
        exact_dtype: of sinks and window.
    """

    codec: Codec
    page_size: int
    sink_tokens: int
    window: int
    exact_dtype: torch.dtype

    @property
    def most_exact(self) -> int:
        """Exact entries of a row just before a page is closed; the tail not counted."""
        return self.sink_tokens + self.window + self.page_size


class Rows:
    """Tables, counts and tails of all rows, as tensors over a flat row index, and their pages in one pool.

    A row's index is ``(layer * slots + slot) * H + head``; see `index`. Tables are int32 and name pages of `pool`;
    unused places name the null page.

    Args:
        shape, storage: see `Shape`, `Storage`.
        slots: sequences at most.
        memory: bytes of the pool; None lets it grow.
        device: of everything.
    """

    def __init__(
        self, shape: Shape, storage: Storage, *, slots: int, memory: int | None, device: torch.device | str,
    ) -> None:
        self.shape, self.storage, self.slots = shape, storage, slots
        size, dtype = shape.head_size, storage.exact_dtype
        self.closed_layout = Layout(storage.codec.layout(storage.page_size, size, dtype))
        entry = Layout({"k": (dtype, (size,)), "v": (dtype, (size,))}).nbytes
        page_bytes = max(self.closed_layout.nbytes, entry)
        self.per_open_page = page_bytes // (2 * size * dtype.itemsize)  # exact entries that a page takes
        half = (dtype, (self.per_open_page, size))
        self.open_layout = Layout({"k": half, "v": half})
        self.pool = PagePool(page_bytes, limit=None if memory is None else memory // page_bytes, device=device)

        rows = shape.layers * slots * shape.heads
        work = torch.float64 if shape.dtype == torch.float64 else torch.float32
        self.closed_table = torch.full((rows, _FIRST_COLUMNS), NULL_PAGE, dtype=torch.int32, device=device)
        self.open_table = torch.full(
            (rows, self._open_pages(storage.most_exact)), NULL_PAGE, dtype=torch.int32, device=device
        )
        self.closed = torch.zeros(rows, dtype=torch.int32, device=device)  # encoded pages
        self.exact = torch.zeros(rows, dtype=torch.int32, device=device)  # exact entries, the tail not counted
        self.numerators = torch.zeros(rows, 2 * size, dtype=work, device=device)  # of the tail: keys | values
        self.z = torch.zeros(rows, dtype=work, device=device)  # of the tail; 0: no tail, the row is empty

    def index(self, layer: int, slots: Tensor) -> Tensor:
        """Rows of a layer's heads for each slot: int64 ``[S] → [S * H]``."""
        heads = self.shape.heads
        first = (layer * self.slots + slots) * heads
        return (first[:, None] + torch.arange(heads, device=slots.device)).flatten()

    def worst_pages(self, tokens: int) -> int:
        """Pages that one row can come to need for ``tokens`` tokens, if none is merged."""
        store = self.storage
        full = max(0, tokens - store.sink_tokens - store.window) // store.page_size
        return full + self._open_pages(min(tokens, store.most_exact))

    # ------------------------------------------------------------------------------------ reading

    def exact_entries(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sinks and window of rows: ``[R] → (keys [R, N, D], values [R, N, D], valid [R, N])``; the rest is 0."""
        count = self.exact[rows]
        columns = self._open_pages(int(count.max()))
        pages = self.open_table[rows, :columns].flatten()
        valid = torch.arange(columns * self.per_open_page, device=rows.device) < count[:, None]
        views = self.open_layout.views(self.pool.read(pages))
        keys, values = (views[part].reshape(len(rows), -1, self.shape.head_size) for part in ("k", "v"))
        return keys, values, valid

    def closed_pages(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded pages of rows, row after row: ``[R] → (pages [n], index into rows of each [n])``."""
        count = self.closed[rows]
        columns = int(count.max())
        held = torch.arange(columns, device=rows.device) < count[:, None]
        owner, column = held.nonzero(as_tuple=True)
        return self.closed_table[rows[owner], column], owner

    def blocks(self, pages: Tensor) -> Blocks:
        """Copies of encoded pages: ``[n]`` → blocks with leading dimension n."""
        tensors = self.closed_layout.views(self.pool.read(pages))
        return Blocks(tensors, self.storage.page_size, self.shape.head_size)

    # ------------------------------------------------------------------------------------ writing

    def append(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Adds one final entry to each of some rows: rows ``[R]`` distinct, keys and values ``[R, D]``."""
        count = self.exact[rows]
        fresh = count % self.per_open_page == 0
        if fresh.any():
            self._open(rows[fresh], count[fresh] // self.per_open_page)
        self._write_exact(rows, count, keys, values)
        self.exact[rows] = count + 1
        full = count + 1 == self.storage.most_exact
        if full.any():
            self._close_page(rows[full])

    def load(self, rows: Tensor, keys: Tensor, values: Tensor, counts: Tensor) -> None:
        """Fills empty rows with a prompt's final entries.

        Args:
            rows: ``[R]``.
            keys, values: ``[R, N, D]``, oldest first.
            counts: ``[R]`` int64, how many of the N are a row's own.
        """
        store = self.storage
        full = (counts - store.sink_tokens - store.window).clamp(min=0) // store.page_size
        exact = counts - full * store.page_size
        keys, values = keys.to(store.exact_dtype), values.to(store.exact_dtype)

        owner, column = _ragged(full)
        self._widen(int(full.max()))
        for owners, columns in zip(owner.split(_ENCODE_PAGES), column.split(_ENCODE_PAGES), strict=True):
            start = store.sink_tokens + columns * store.page_size
            entry = start[:, None] + torch.arange(store.page_size, device=rows.device)
            self._store(rows[owners], columns, keys[owners[:, None], entry], values[owners[:, None], entry])
        self.closed[rows] = full.int()

        owner, column = _ragged(-(-exact // self.per_open_page))
        self._open(rows[owner], column)
        owner, place = _ragged(exact)
        entry = torch.where(place < store.sink_tokens, place, place + full[owner] * store.page_size)
        self._write_exact(rows[owner], place, keys[owner, entry], values[owner, entry])
        self.exact[rows] = exact.int()

    def release(self, rows: Tensor) -> None:
        """Empties rows and gives their pages back: ``[R]``."""
        pages = torch.cat([self.closed_table[rows].flatten(), self.open_table[rows].flatten()])
        self.pool.give(pages[pages != NULL_PAGE].long())
        for state in (self.closed_table, self.open_table, self.closed, self.exact, self.numerators, self.z):
            state[rows] = 0

    def _close_page(self, rows: Tensor) -> None:
        """Encodes the oldest page of the window of each row, whose exact part is full."""
        store = self.storage
        first, end = store.sink_tokens, store.sink_tokens + store.page_size
        page_keys, page_values = self._read_exact(rows, first, end)
        rest_keys, rest_values = self._read_exact(rows, end, store.most_exact)
        kept = self._open_pages(first + store.window)
        self.pool.give(self.open_table[rows, kept:].flatten().long())
        self.open_table[rows, kept:] = NULL_PAGE
        if store.window:
            place = torch.arange(first, first + store.window, device=rows.device)
            self._write_exact(rows[:, None].expand(-1, store.window), place, rest_keys, rest_values)
        self.exact[rows] = first + store.window
        column = self.closed[rows]
        self._widen(int(column.max()) + 1)
        self._store(rows, column, page_keys, page_values)
        self.closed[rows] = column + 1

    def _store(self, rows: Tensor, columns: Tensor, keys: Tensor, values: Tensor) -> None:
        """Encodes one page ``[R, P, D]`` a row into a new page of the pool, named at ``columns`` of the table."""
        encoded = self.storage.codec.encode(keys, values)
        pages = self.pool.take(len(rows))
        for name, view in self.pool.views(self.closed_layout).items():
            view[pages] = encoded.tensors[name]
        self.closed_table[rows, columns] = pages.int()

    def _open(self, rows: Tensor, columns: Tensor) -> None:
        """Gives each row a zeroed page for exact entries, named at ``columns`` of the table; rows may repeat."""
        pages = self.pool.take(len(rows))
        self.pool.memory[pages] = 0  # what an encoded page left here could read as NaN
        self.open_table[rows, columns] = pages.int()

    def _write_exact(self, rows: Tensor, places: Tensor, keys: Tensor, values: Tensor) -> None:
        pages, offsets = self.open_table[rows, places // self.per_open_page], places % self.per_open_page
        views = self.pool.views(self.open_layout)
        views["k"][pages, offsets] = keys.to(self.storage.exact_dtype)
        views["v"][pages, offsets] = values.to(self.storage.exact_dtype)

    def _read_exact(self, rows: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
        places = torch.arange(first, end, device=rows.device)
        pages, offsets = self.open_table[rows][:, places // self.per_open_page], places % self.per_open_page
        views = self.pool.views(self.open_layout)
        return views["k"][pages, offsets], views["v"][pages, offsets]

    def _open_pages(self, entries: int) -> int:
        return -(-entries // self.per_open_page)

    def _widen(self, columns: int) -> None:
        have = self.closed_table.shape[1]
        if columns > have:
            self.closed_table = F.pad(self.closed_table, (0, max(columns, 2 * have) - have), value=NULL_PAGE)


def _ragged(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Counts ``[R]`` → (owner, place) ``[sum]``: 0, 0, ..., 1, ... and 0, 1, ..., 0, ..."""
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    start = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=counts.device) - start[owner]
