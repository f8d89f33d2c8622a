"""Generated tokens enter the rows through kernels (`dmc.kernels.append`, `dmc.kernels.encode`): no layer waits for the device.

The kernels take and give pages of the pool themselves. Before a step the host counts once what the step can take at most,
in pages and in columns of the table of encoded pages, and makes that room.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from dmc.cache.reading import onpages
from dmc.cache.storage.packing import Packing
from dmc.cache.storage.rows import Rows
from dmc.kernels.append.append import append_tokens
from dmc.kernels.cpu.runs import runs_on_cpu
from dmc.kernels.decode.decode import decode_attention
from dmc.kernels.encode.encode import encode_pages
from dmc.kernels.pages.paged import Growing, Paged


@dataclass(frozen=True)
class Grown:
    """What the kernels need of the rows of layers that are stored alike. It is kept by their pool, so it names no rows itself."""

    state: Growing
    read: Paged  # what `onpages.paged` gave, of which it is made

    def append(
        self, index: Tensor, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, positions: Tensor,
        rope: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """`append_tokens`; `encode` must follow."""
        return append_tokens(self.state, index, key, value, alpha, omega, positions, rope)

    def encode(self, rows: Rows, packing: Packing, index: Tensor) -> None:
        """The pages that this filled; now and then one of them is compared with what was encoded."""
        full = self._full(rows, index) if packing.codec.lossy and rows.error.due() else None
        encode_pages(self.state, index)
        if full is not None:
            row, (keys, values) = full
            page = rows.closed_table[row, rows.closed[row] - 1].long()
            rows.error.compare(packing.codec, rows.blocks(page[None], packing), keys, values)

    def _full(self, rows: Rows, index: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
        """One of the rows to be encoded, and the exact keys and values ``[P, D]`` of its page; this waits for the device."""
        full = index[self.state.exact_count[index] == self.state.most]
        if not len(full):
            return None
        row = full[rows.error.pages % len(full)]  # heads that fill together take turns
        places = torch.arange(self.state.sinks, self.state.sinks + self.state.page, device=index.device)
        return row, rows.read_exact(row.expand_as(places), places)[:2]

    def attend(self, index: Tensor, query: Tensor, own_key: Tensor, own_value: Tensor) -> Tensor:
        """`decode_attention`, all in the dtype of the query."""
        return decode_attention(query, own_key.to(query.dtype), own_value.to(query.dtype), index, self.state)


def grows(rows: Rows, packing: Packing) -> bool:
    """Whether generated tokens enter the rows of layers of one packing through kernels.

    So it is where Triton's kernels read these rows and know how to encode their pages. Entries that carry more than key and
    value (policies that evict, the eigen codec) are written by PyTorch, as everything is on a CPU.
    """
    if runs_on_cpu(rows.z) or rows.storage.marks or rows.z.dtype != torch.float32 or not onpages.reads(rows, packing):
        return False
    return packing.format(rows.z.device).triton_writes


def grown(rows: Rows, packing: Packing) -> Grown:
    """What the kernels need of rows that `grows` says yes to: views of everything, until `widen` or the pool replace a tensor."""
    rows.pool.lend()
    paged = onpages.paged(rows, packing)
    key = "grown", id(packing)
    known = rows.pool.kept.get(key)
    if known is None or known.read is not paged:
        rows.pool.kept[key] = known = _grown(rows, packing, paged)
    return known


def _grown(rows: Rows, packing: Packing, paged: Paged) -> Grown:
    pool, store = rows.pool, rows.storage
    stack, free, failed = pool.lend()
    parts = {field.name: getattr(paged, field.name) for field in dataclasses.fields(paged)}
    state = Growing(
        **parts, sinks=store.first, window=store.window, numerators=rows.numerators, z=rows.z, memory=pool.memory, stack=stack,
        free=free, owners=pool.owners, failed=failed,
    )
    return Grown(state, paged)


def needs(rows: Rows, index: Tensor) -> tuple[int, int]:
    """What one more token of each row can take at most, were every open entry to close: ``index [L, R]``, by layer.

    A row behind a ring whose entries are bounded closes none once it has as many.

    Returns:
        ``(pages, columns)``: pages in all, and the columns that the table of encoded pages must have.
    """
    if not index.numel():
        return 0, 0
    exact, closed = rows.exact[index], rows.closed[index]
    most = rows.page_sizes[:, None] + (rows.storage.first + rows.storage.window)
    # Pages of the ring are there before it is full.
    opens = (exact % rows.per_open_page == 0) & (exact >= rows.ring_pages * rows.per_open_page)
    fills = exact + 1 == most
    if rows.storage.most is not None:
        grows = rows.behind_ring(closed, exact, rows.page_sizes[:, None]) < rows.storage.most
        opens, fills = opens & grows, fills & grows
    # A page that fills is encoded into a new one, and its exact pages may be given back only then.
    counts = torch.stack([opens.sum() + fills.sum(), (closed + fills.int()).max()])
    pages, columns = counts.tolist()
    return pages, columns


def make_room(rows: Rows, index: Tensor) -> None:
    """Sees to it that one more token of each row finds pages and columns.

    Raises:
        PoolExhausted: if the pool may not grow and has fewer free.
    """
    pages, columns = needs(rows, index)
    rows.widen(columns)
    rows.pool.reserve(pages)
