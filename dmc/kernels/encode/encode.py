"""Encodes a full row's oldest page; the host does not know which rows are full.

`encode_reference` is the reference implementation, which calls the codec itself; `dmc.kernels.encode.gpu` has the kernels, and
`encode_pages` chooses. It is called after each `dmc.kernels.append.append.append_tokens`, with the same views of the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.kernels.backend import choose
from dmc.kernels.pages.paged import NO_COLUMN, Growing, take


def encode_pages(state: Growing, index: Tensor, *, backend: str | None = None) -> None:
    """Encodes the oldest page after the sinks of every row that is full, into a page of the pool.

    The entries behind that page move down, and full-precision pages that become empty are free again. They are given back after
    the new pages are taken, so a step takes at most one page for each row that needs a full-precision page and one for each full
    row. Without a free page, or a column in the table of encoded pages, `Growing.failed` is set and the row stays full; once
    there is room, another call encodes it.

    With Triton nothing waits for the device and the launches depend on shapes alone, so they can be captured in a CUDA
    graph.

    Args:
        state: changed in place.
        index: int64 ``[R]``, distinct rows; -1: none.
        backend: see `dmc.kernels.backend`; every other name runs the reference implementation.
    """
    if choose(state.full_precision["k"], backend) == "triton":
        from dmc.kernels.encode.gpu import encode

        encode(state, index)
    else:
        encode_reference(state, index)


def encode_reference(state: Growing, index: Tensor) -> None:
    """The reference implementation; it waits for the device."""
    rows = index[index >= 0]
    rows = rows[state.full_count[rows] == state.most]
    room = state.encoded_count[rows] < state.encoded_table.shape[1]
    if not room.all():
        state.failed.bitwise_or_(NO_COLUMN)
    pages, given = take(state, room)
    rows = rows[given]
    if not len(rows):
        return
    offsets = torch.arange(state.sinks, state.most, device=index.device)
    entries = {part: state.full_precision[part][_at(state, rows, offsets)] for part in "kv"}
    for name, x in state.format.encode(*(entries[part][:, : state.page] for part in "kv")).items():
        state.encoded[name][pages] = x
    for part in "kv":
        state.full_precision[part][_at(state, rows, offsets[: state.window])] = entries[part][:, state.page :]
    kept = -(-(state.sinks + state.window) // state.per_full_page)
    _give(state, state.full_table[rows, kept:])
    state.full_table[rows, kept:] = 0
    state.encoded_table[rows, state.encoded_count[rows].long()] = pages.int()
    state.full_count[rows] = state.sinks + state.window
    state.encoded_count[rows] += 1


def _at(state: Growing, rows: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return state.full_table[rows[:, None], offsets // state.per_full_page].long(), offsets % state.per_full_page


def _give(state: Growing, pages: Tensor) -> None:
    pages, free = pages[pages != 0].long(), int(state.free)
    state.owners[pages] = 0
    state.stack[free : free + len(pages)] = pages
    state.free.add_(len(pages))
