"""A full row's oldest page is encoded, without the host knowing which rows are full.

`encode_reference` is the reference implementation, which calls the codec itself; `dmc.kernels.encode.gpu` holds the kernels, and
`encode_pages` chooses. It follows each `dmc.kernels.append.append.append_tokens`, whose views of the cache it shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.kernels.backend import choose
from dmc.kernels.pages.paged import NO_COLUMN, Growing, take


def encode_pages(state: Growing, index: Tensor, *, backend: str | None = None) -> None:
    """Encodes the oldest page after the sinks of every row that is full, into a page of the pool.

    The entries behind move down, and open pages that this empties are free again; they are given back after the new pages
    are taken, so a step takes at most one page for each row that opens one and one for each row that is full. Where there
    is no page, or no column in the table of encoded pages, `Growing.failed` tells and the row stays full: with room made,
    another call encodes it.

    With Triton nothing waits for the device and the launches depend on shapes alone, so they can be captured in a CUDA
    graph.

    Args:
        state: changed in place.
        index: int64 ``[R]``, distinct rows; -1: none.
        backend: see `dmc.kernels.backend`; what is not "triton" is the reference implementation.
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
