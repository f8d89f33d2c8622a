"""Triton kernels of `dmc.kernels.decode`.

Rows differ in length, by head as much as by sequence. Their entries are cut into equal pieces, and a fixed number of
programs deals the pieces of all rows out among themselves: each finds the row of its next piece in the running count
of pieces. So the work is balanced whatever the lengths are, and no length is ever known to the host. A piece leaves
its maximum, its sum and its weighted values; a second kernel puts the pieces of each row together and adds the query's
own state.

A row's last pieces are its exact entries, the others its encoded pages. A tile gathers its entries page by page through
the block table, so any page size will do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmc.kernels.backend import interpreted
from dmc.kernels.decode import KINDS, Paged

_PROGRAMS = 4  # for each multiprocessor
LOG2E = tl.constexpr(1.4426950408889634)


def decode(
    query: Tensor, own_key: Tensor, own_value: Tensor, index: Tensor, paged: Paged, scale: float,
) -> Tensor:
    """`dmc.kernels.decode.decode_attention`."""
    rows, groups, size = query.shape
    query, own_key, own_value, index = (x.contiguous() for x in (query, own_key, own_value, index))
    tile, piece, programs = _cut(query)
    page, per_open = paged.page, paged.opened["k"].shape[1]
    piece = max(piece, page)

    most = triton.cdiv(paged.encoded_table.shape[1] * page, piece) + triton.cdiv(paged.open_table.shape[1] * per_open, piece)
    encoded, exact = paged.encoded_count[index], paged.exact_count[index]
    encoded_pieces = (encoded * page + (piece - 1)) // piece
    ends = (encoded_pieces + (exact + (piece - 1)) // piece).cumsum(0, dtype=torch.int32)
    sums = torch.empty(rows * most, 2, groups, dtype=torch.float32, device=query.device)
    parts = torch.empty(rows * most, groups, size, dtype=torch.float32, device=query.device)
    out = torch.empty_like(query)
    sizes = dict(D=size, BLOCK=max(16, triton.next_power_of_2(size)), G=groups)
    constants = dict(
        **sizes, PER_OPEN=per_open, PIECE=piece, TILE=tile,
        GROUPS=1 if groups == 1 else max(16, triton.next_power_of_2(groups)),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=4, num_stages=2,
    )
    arguments = dict(
        query=query, index=index, ends=ends, encoded_pieces=encoded_pieces, encoded=encoded, exact=exact,
        encoded_table=paged.encoded_table, open_table=paged.open_table, open_keys=paged.opened["k"],
        open_values=paged.opened["v"], sums=sums, parts=parts, scale=scale * LOG2E.value, R=rows,
        et=paged.encoded_table.stride(0), ot=paged.open_table.stride(0), okp=paged.opened["k"].stride(0),
        ovp=paged.opened["v"].stride(0),
    )
    if paged.kind == "gear":
        from dmc.kernels.gear_triton import launch

        launch((programs,), arguments, paged, constants)
    elif paged.kind == "trellis":
        from dmc.kernels.trellis_triton import launch

        launch((programs,), arguments, paged, constants)
    else:
        keys, values = (paged.encoded[name] for name in _sides(paged.kind))
        key_scale, value_scale = (paged.encoded.get(f"{part}_scale") for part in "kv")
        if paged.kind == "fp8":
            keys, values = keys.view(torch.float8_e4m3fn), values.view(torch.float8_e4m3fn)
        _pieces[(programs,)](
            **arguments, keys=keys, values=values, key_scale=key_scale, value_scale=value_scale, kp=keys.stride(0),
            vp=values.stride(0), ksp=0 if key_scale is None else key_scale.stride(0),
            vsp=0 if value_scale is None else value_scale.stride(0), PAGE=page, SCALED=key_scale is not None, **constants,
        )
    # Trellis pages are summed in their own rotated space; rotating back once is all that remains.
    turned = torch.empty(rows, groups, size, dtype=torch.float32, device=query.device) if paged.kind == "trellis" else None
    _together[(rows, groups)](
        query, own_key, own_value, ends, encoded_pieces, sums, parts, out, out if turned is None else turned,
        scale * LOG2E.value, TURNED=turned is not None, **sizes, num_warps=1,
    )
    return out if turned is None else (out + turned @ paged.gear.rotation.T).to(query.dtype)


def _sides(kind: str) -> tuple[str, str]:
    names = KINDS[kind]
    return names[0], names[len(names) // 2]


def _cut(query: Tensor) -> tuple[int, int, int]:
    """(entries of a tile, entries of a piece, programs)."""
    if interpreted():
        return 16, 32, 3
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 132
    return 64, 256, _PROGRAMS * processors


@triton.jit
def find_row(ends, item, R):
    """The first row whose pieces end behind ``item``."""
    low, high = 0, R - 1
    while low < high:
        middle = (low + high) // 2
        behind = tl.load(ends + middle) > item
        high = tl.where(behind, middle, high)
        low = tl.where(behind, low, middle + 1)
    return low


@triton.jit
def _pieces(
    query, index, ends, encoded_pieces, encoded, exact, encoded_table, open_table, keys, values, key_scale, value_scale,
    open_keys, open_values, sums, parts, scale, R, et, ot, kp, vp, ksp, vsp, okp, ovp,
    PAGE: tl.constexpr, PER_OPEN: tl.constexpr, SCALED: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
):
    """Maximum, sum and weighted values of every piece, the programs taking turns."""
    g = tl.arange(0, GROUPS)
    d = tl.arange(0, BLOCK)
    for item in range(tl.program_id(0), tl.load(ends + R - 1), tl.num_programs(0)):
        row = find_row(ends, item, R)
        piece = item - tl.load(ends + row - 1, row > 0, 0)
        table_row = tl.load(index + row).to(tl.int64)
        q = tl.load(query + (row * G + g)[:, None] * D + d[None, :], (g < G)[:, None] & (d < D)[None, :], 0.0)
        coded = tl.load(encoded_pieces + row)
        if piece < coded:
            top, total, acc = attend_piece(
                q, encoded_table + table_row * et, keys, values, key_scale, value_scale, kp, vp, ksp, vsp,
                piece * PIECE, tl.load(encoded + row) * PAGE, scale, PAGE, SCALED, PIECE, TILE, GROUPS, PRECISION, D, BLOCK,
            )
        else:
            top, total, acc = attend_piece(
                q, open_table + table_row * ot, open_keys, open_values, key_scale, value_scale, okp, ovp, ksp, vsp,
                (piece - coded) * PIECE, tl.load(exact + row), scale, PER_OPEN, False, PIECE, TILE, GROUPS, PRECISION, D,
                BLOCK,
            )
        at = tl.full((), 0, tl.int64) + item
        tl.store(sums + at * 2 * G + g, top, g < G)
        tl.store(sums + at * 2 * G + G + g, total, g < G)
        tl.store(parts + (at * G + g)[:, None] * D + d[None, :], acc, (g < G)[:, None] & (d < D)[None, :])


@triton.jit
def attend_piece(
    q, table, keys, values, key_scale, value_scale, kp, vp, ksp, vsp, start, length, scale,
    PAGE: tl.constexpr, SCALED: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """One piece of a row, in base-2 logarithms: its maximum and sum ``[GROUPS]``, its weighted values."""
    d = tl.arange(0, BLOCK)
    top = tl.full((GROUPS,), float("-inf"), tl.float32)
    total = tl.zeros((GROUPS,), tl.float32)
    acc = tl.zeros((GROUPS, BLOCK), tl.float32)
    for first in range(start, tl.minimum(start + PIECE, length), TILE):
        n = first + tl.arange(0, TILE)
        page = tl.load(table + n // PAGE, n < length, 0).to(tl.int64)
        within = n % PAGE
        mask = (n < length)[:, None] & (d < D)[None, :]
        k = tl.load(keys + (page * kp + within * D)[:, None] + d[None, :], mask, 0.0)
        if GROUPS == 1:
            s = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)[None, :]
        else:
            s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        if SCALED:
            s *= tl.load(key_scale + page * ksp + within, n < length, 0.0).to(tl.float32)[None, :]
        s = tl.where((n < length)[None, :], s * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        if SCALED:
            p *= tl.load(value_scale + page * vsp + within, n < length, 0.0).to(tl.float32)[None, :]
        v = tl.load(values + (page * vp + within * D)[:, None] + d[None, :], mask, 0.0)
        if GROUPS == 1:
            acc = acc * shrink[:, None] + tl.sum(tl.trans(p) * v.to(tl.float32), 0)[None, :]
        else:
            acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return top, total, acc


@triton.jit
def _together(
    query, own_key, own_value, ends, encoded_pieces, sums, parts, out, turned, scale,
    TURNED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
):
    """The pieces of one row and one query of its group, and the query's own state; what is rotated goes apart."""
    row, g = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    at = row.to(tl.int64) * D + d
    q = tl.load(query + (row.to(tl.int64) * G + g) * D + d, d < D, 0.0).to(tl.float32)
    top = tl.sum(q * tl.load(own_key + at, d < D, 0.0).to(tl.float32), 0) * scale
    total = 1.0
    acc = tl.load(own_value + at, d < D, 0.0).to(tl.float32)
    rotated = tl.zeros((BLOCK,), tl.float32)
    first = tl.load(ends + row - 1, row > 0, 0)
    coded = first + tl.load(encoded_pieces + row)
    for item in range(first, tl.load(ends + row)):
        i = tl.full((), 0, tl.int64) + item
        piece_top = tl.load(sums + i * 2 * G + g)
        new_top = tl.maximum(top, piece_top)
        old, new = tl.exp2(top - new_top), tl.exp2(piece_top - new_top)
        total = total * old + tl.load(sums + i * 2 * G + G + g) * new
        part = tl.load(parts + (i * G + g) * D + d, d < D, 0.0) * new
        if TURNED:
            acc = acc * old + tl.where(item < coded, 0.0, part)
            rotated = rotated * old + tl.where(item < coded, part, 0.0)
        else:
            acc = acc * old + part
        top = new_top
    to = (row.to(tl.int64) * G + g) * D + d
    tl.store(out + to, (acc / total).to(out.dtype.element_ty), d < D)
    if TURNED:
        tl.store(turned + to, rotated / total, d < D)
