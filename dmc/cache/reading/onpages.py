"""Kernels that read pages in place (`dmc.kernels.decode`), and write them (`dmc.kernels.append`, `dmc.kernels.encode`).

No layer waits for the device: the kernels take pages from the pool and give pages back themselves. Before a step the host
computes once how many pages the step can take at most (`dmc.cache.reading.growing`) and reserves them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dmc.cache.reading.plan import Plan
from dmc.cache.reading.reader import Reader
from dmc.cache.storage.packing import Packing
from dmc.cache.storage.rows import Rows
from dmc.kernels.append.append import append_tokens
from dmc.kernels.backend import Backend
from dmc.kernels.decode.decode import decode_attention, decode_with_statistics
from dmc.kernels.encode.encode import encode_pages
from dmc.kernels.pages.paged import Growing, Paged


class OnPages(Reader):
    """Reader with kernels that read pages in place.

    Args:
        packing: of the layers.
        backend: Triton, the CPU kernels, or in tests the reference implementation.
        statistics: `Policy.statistics`.
        writes: whether kernels write these rows too.
    """

    on_pages = True

    def __init__(self, packing: Packing, backend: Backend, *, statistics: str | None = None, writes: bool = False) -> None:
        self.packing, self.backend, self.statistics, self.writes = packing, backend, statistics, writes

    def attend(
        self, rows: Rows, index: Tensor, query: Tensor, own_key: Tensor, own_value: Tensor, plan: Plan | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Reader.attend`; Triton's kernels compute in the model's dtype, the CPU kernels in fp32."""
        work = rows.shape.dtype if self.backend is Backend.TRITON else query.dtype
        parts = *(x.to(work) for x in (query, own_key, own_value)), index, self.view(rows)
        if self.statistics is not None:
            out, mass = decode_with_statistics(*parts, statistics=self.statistics)
            return out.to(query.dtype), mass
        return decode_attention(*parts, backend=self.backend).to(query.dtype), None

    def append(
        self,
        rows: Rows,
        index: Tensor,
        key: Tensor,
        value: Tensor,
        alpha: Tensor,
        omega: Tensor,
        positions: Tensor,
        rope: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """`dmc.kernels.append.append.append_tokens`; `encode` must follow."""
        return append_tokens(self.growing(rows), index, key, value, alpha, omega, positions, rope, backend=self.backend)

    def encode(self, rows: Rows, index: Tensor) -> None:
        """Encodes the pages that `append` filled. A sample of them is compared with the entries before encoding."""
        state, codec = self.growing(rows), self.packing.codec
        filled = _filled(rows, state, index) if codec.lossy and rows.error.due() else None
        encode_pages(state, index, backend=self.backend)
        if filled is not None:
            row, (keys, values) = filled
            page = rows.encoded_table[row, rows.encoded_count[row] - 1].long()
            rows.error.compare(codec, rows.blocks(page[None], self.packing), keys, values)

    # ------------------------------------------------------------------------------------ views of the rows

    def view(self, rows: Rows) -> Paged:
        """Tables and pages of all rows; kept until the pool grows or a table is widened."""
        parts = rows.pool.memory, rows.encoded_table, rows.full_table, rows.encoded_count, rows.full_count
        known = rows.pool.kept.get(id(self.packing))
        if known is None or any(a is not b for a, b in zip(known[0], parts, strict=True)):
            rows.pool.kept[id(self.packing)] = known = parts, self._view(rows)
        return known[1]

    def growing(self, rows: Rows) -> Growing:
        """`view` with the tensors that writing kernels need. The free pages belong to the kernels until the host takes, gives
        back or counts pages."""
        lent, read = rows.pool.lend(), self.view(rows)
        key = "growing", id(self.packing)
        known = rows.pool.kept.get(key)
        if known is None or known[0] is not read:
            rows.pool.kept[key] = known = read, _growing(rows, read, *lent)
        return known[1]

    def _view(self, rows: Rows) -> Paged:
        views, full_views = rows.pool.views(self.packing.layout), rows.pool.views(rows.full_layout)
        encoded = {name: view for name, view in views.items() if name in self.packing.fields}
        full_precision = {name: view for name, view in full_views.items() if not name.startswith("e_")}
        key_bias = getattr(self.packing.codec, "key_bias", None)
        if rows.storage.evicted_slots or key_bias is not None:
            encoded["position"] = views["e_position"]
        if rows.storage.scored:
            encoded["score"], full_precision["score"] = views["e_score"], full_views["e_score"]
        made = self.packing.format(rows.z.device)
        tables = rows.encoded_table, rows.full_table, rows.encoded_count, rows.full_count
        heads = None if key_bias is None else rows.heads_of(torch.arange(len(rows.z), device=rows.z.device))
        return Paged(made, encoded, full_precision, *tables, key_bias=key_bias, heads=heads)


def _growing(rows: Rows, read: Paged, stack: Tensor, free: Tensor, failed: Tensor) -> Growing:
    parts = {field.name: getattr(read, field.name) for field in dataclasses.fields(read)}
    return Growing(
        **parts,
        sinks=rows.storage.first,
        window=rows.storage.window,
        numerators=rows.numerators,
        z=rows.z,
        memory=rows.pool.memory,
        stack=stack,
        free=free,
        owners=rows.pool.owners,
        failed=failed,
    )


def _filled(rows: Rows, state: Growing, index: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
    """One of the rows to be encoded, and keys and values ``[P, D]`` of its page before encoding. Waits for the device."""
    filled = index[state.full_count[index] == state.most]
    if not len(filled):
        return None
    row = filled[rows.error.pages % len(filled)]  # heads whose pages fill at the same time alternate
    offsets = torch.arange(state.sinks, state.sinks + state.page, device=index.device)
    return row, rows.read_full(row.expand_as(offsets), offsets)[:2]
