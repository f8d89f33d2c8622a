"""Triton kernels of `dmc.kernels.decode`.

Rows differ in length, by head as much as by sequence. Their entries are cut into equal pieces, and a program is launched
for each piece that the block tables have room for: one whose row ends before it returns at once, which costs next to
nothing, the device deals out the others as they come, and no length is ever known to the host. A piece leaves its
maximum, its sum and its weighted values; a second kernel puts the pieces of each row together and adds the query's own
state.

A row's first pieces are its encoded pages, the last ones its exact entries. A tile gathers its entries page by page
through the block table, so any page size will do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmc.kernels.backend import interpreted
from dmc.kernels.decode import KINDS, Paged

LOG2E = tl.constexpr(1.4426950408889634)
PIECE, TILE, WARPS = 256, 64, 4  # entries of a piece, of a tile; warps of a program: measured, docs/results/kernels.md
LEAST_GROUPS = 16  # queries that are computed at least: a single one goes through the matrix units too


def decode(
    query: Tensor, own_key: Tensor, own_value: Tensor, index: Tensor, paged: Paged, scale: float,
) -> Tensor:
    """`dmc.kernels.decode.decode_attention`."""
    rows, groups, size = query.shape
    query, own_key, own_value, index = (x.contiguous() for x in (query, own_key, own_value, index))
    tile, piece = (16, 32) if interpreted() else (TILE, PIECE)
    page, per_open = paged.page, paged.opened["k"].shape[1]
    piece = triton.cdiv(max(piece, page), tile) * tile  # a tile is not cut where a piece ends
    encoded_pieces = triton.cdiv(paged.encoded_table.shape[1] * page, piece)
    pieces = encoded_pieces + triton.cdiv(paged.open_table.shape[1] * per_open, piece)

    sums = torch.empty(rows * pieces, 2, groups, dtype=torch.float32, device=query.device)
    parts = torch.empty(rows * pieces, groups, size, dtype=torch.float32, device=query.device)
    out = torch.empty_like(query)
    sizes = dict(D=size, BLOCK=max(16, triton.next_power_of_2(size)), G=groups)
    where = dict(index=index, encoded=paged.encoded_count, exact=paged.exact_count, first_exact=encoded_pieces)
    constants = dict(
        **sizes, PER_OPEN=per_open, PIECE=piece, TILE=tile,
        GROUPS=LEAST_GROUPS if groups == 1 else max(16, triton.next_power_of_2(groups)),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=WARPS, num_stages=2,
    )
    arguments = dict(
        query=query, **where, encoded_table=paged.encoded_table, open_table=paged.open_table,
        open_keys=paged.opened["k"], open_values=paged.opened["v"], sums=sums, parts=parts, scale=scale * LOG2E.value,
        et=paged.encoded_table.stride(0), ot=paged.open_table.stride(0),
        okp=page_words(paged.opened["k"]), ovp=page_words(paged.opened["v"]),
    )
    grid = rows, pieces
    if paged.kind == "gear":
        from dmc.kernels.gear_triton import launch

        launch(grid, arguments, paged, constants)
    elif paged.kind == "trellis":
        from dmc.kernels.trellis_triton import launch

        launch(grid, arguments, paged, constants)
    else:
        keys, values = (paged.encoded[name] for name in _sides(paged.kind))
        key_scale, value_scale = (paged.encoded.get(f"{part}_scale") for part in "kv")
        if paged.kind == "fp8":
            keys, values = keys.view(torch.float8_e4m3fn), values.view(torch.float8_e4m3fn)
        _pieces[grid](
            **arguments, keys=keys, values=values, key_scale=key_scale, value_scale=value_scale, kp=page_words(keys),
            vp=page_words(values), ksp=0 if key_scale is None else key_scale.stride(0),
            vsp=0 if value_scale is None else value_scale.stride(0), PAGE=page, SCALED=key_scale is not None, **constants,
        )
    # Trellis pages are summed in their own rotated space; rotating back once is all that remains.
    turned = torch.empty(rows, groups, size, dtype=torch.float32, device=query.device) if paged.kind == "trellis" else None
    _together[(rows, groups)](
        query, own_key, own_value, **where, sums=sums, parts=parts, out=out, turned=out if turned is None else turned,
        scale=scale * LOG2E.value, pieces=pieces, PAGE=page, PIECE=piece, TURNED=turned is not None, **sizes, num_warps=1,
    )
    return out if turned is None else (out + turned @ paged.gear.rotation.T).to(query.dtype)


def page_words(field: Tensor) -> int:
    """Bytes from page to page of a field, in eights: pages of the pool begin at multiples of 8, which lets loads be wide.

    Raises:
        ValueError: if they do not.
    """
    words, rest = divmod(field.stride(0) * field.element_size(), 8)
    if rest:
        raise ValueError(f"pages are {8 * words + rest} bytes apart: the kernels take pages of a multiple of 8 bytes")
    return words


def _sides(kind: str) -> tuple[str, str]:
    names = KINDS[kind]
    return names[0], names[len(names) // 2]


@triton.jit
def first_of_page(base, page, words):
    """Where page number ``page`` of a field begins; ``words`` as `page_words` gives it."""
    return base + page * words * (64 // base.dtype.element_ty.primitive_bitwidth)


@triton.jit
def store_piece(
    sums, parts, top, total, acc, GROUPS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
):
    """What a piece leaves."""
    item = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    g, d = tl.arange(0, GROUPS), tl.arange(0, BLOCK)
    tl.store(sums + item * 2 * G + g, top, g < G)
    tl.store(sums + item * 2 * G + G + g, total, g < G)
    tl.store(parts + (item * G + g)[:, None] * D + d[None, :], acc, (g < G)[:, None] & (d < D)[None, :])


@triton.jit
def exact_piece(
    query, table, exact, first_exact, open_keys, open_values, any_scale, sums, parts, scale, okp, ovp,
    PER_OPEN: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
):
    """A program whose piece lies among a row's exact entries: their ``table``, and where their number is."""
    start, length = (tl.program_id(1) - first_exact) * PIECE, tl.load(exact)
    if start < length:
        top, total, acc = attend_piece(
            query, table, open_keys, open_values, any_scale, any_scale, okp, ovp, 0, 0, start, length, scale, PER_OPEN, False,
            PIECE, TILE, GROUPS, PRECISION, D, BLOCK, G,
        )
        store_piece(sums, parts, top, total, acc, GROUPS, D, BLOCK, G)


@triton.jit
def _pieces(
    query, index, encoded, exact, first_exact, encoded_table, open_table, keys, values, key_scale, value_scale,
    open_keys, open_values, sums, parts, scale, et, ot, kp, vp, ksp, vsp, okp, ovp,
    PAGE: tl.constexpr, PER_OPEN: tl.constexpr, SCALED: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
):
    """Maximum, sum and weighted values of one piece of one row."""
    row, piece = tl.program_id(0), tl.program_id(1)
    table_row = tl.load(index + row).to(tl.int64)
    if piece < first_exact:
        start, length = piece * PIECE, tl.load(encoded + table_row) * PAGE
        if start < length:
            top, total, acc = attend_piece(
                query, encoded_table + table_row * et, keys, values, key_scale, value_scale, kp, vp, ksp, vsp,
                start, length, scale, PAGE, SCALED, PIECE, TILE, GROUPS, PRECISION, D, BLOCK, G,
            )
            store_piece(sums, parts, top, total, acc, GROUPS, D, BLOCK, G)
    else:
        exact_piece(
            query, open_table + table_row * ot, exact + table_row, first_exact, open_keys, open_values, key_scale, sums, parts,
            scale, okp, ovp, PER_OPEN, PIECE, TILE, GROUPS, PRECISION, D, BLOCK, G,
        )


@triton.jit
def attend_piece(
    query, table, keys, values, key_scale, value_scale, kp, vp, ksp, vsp, start, length, scale,
    PAGE: tl.constexpr, SCALED: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
):
    """One piece of a row, in base-2 logarithms: its maximum and sum ``[GROUPS]``, its weighted values."""
    d, g = tl.arange(0, BLOCK), tl.arange(0, GROUPS)
    q = tl.load(query + (tl.program_id(0) * G + g)[:, None] * D + d[None, :], (g < G)[:, None] & (d < D)[None, :], 0.0)
    top = tl.full((GROUPS,), float("-inf"), tl.float32)
    total = tl.zeros((GROUPS,), tl.float32)
    acc = tl.zeros((GROUPS, BLOCK), tl.float32)
    for first in range(start, tl.minimum(start + PIECE, length), TILE):
        n = first + tl.arange(0, TILE)
        page = tl.load(table + n // PAGE, n < length, 0).to(tl.int64)
        within = n % PAGE
        mask = (n < length)[:, None] & (d < D)[None, :]
        k = tl.load((first_of_page(keys, page, kp) + within * D)[:, None] + d[None, :], mask, 0.0)
        v = tl.load((first_of_page(values, page, vp) + within * D)[:, None] + d[None, :], mask, 0.0)
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
        if GROUPS == 1:
            acc = acc * shrink[:, None] + tl.sum(tl.trans(p) * v.to(tl.float32), 0)[None, :]
        else:
            acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return top, total, acc


@triton.jit
def _together(
    query, own_key, own_value, index, encoded, exact, first_exact, sums, parts, out, turned, scale, pieces,
    PAGE: tl.constexpr, PIECE: tl.constexpr, TURNED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
):
    """The pieces of one row and one query of its group, and the query's own state; what is rotated goes apart."""
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    q = tl.load(query + (row * G + g) * D + d, d < D, 0.0).to(tl.float32)
    top = tl.sum(q * tl.load(own_key + row * D + d, d < D, 0.0).to(tl.float32), 0) * scale
    total = 1.0
    acc = tl.load(own_value + row * D + d, d < D, 0.0).to(tl.float32)
    rotated = tl.zeros((BLOCK,), tl.float32)
    table_row = tl.load(index + row).to(tl.int64)
    coded = tl.cdiv(tl.load(encoded + table_row) * PAGE, PIECE)
    for place in range(0, coded + tl.cdiv(tl.load(exact + table_row), PIECE)):
        item = row * pieces + tl.where(place < coded, place, first_exact + place - coded)
        piece_top = tl.load(sums + item * 2 * G + g)
        new_top = tl.maximum(top, piece_top)
        old, new = tl.exp2(top - new_top), tl.exp2(piece_top - new_top)
        total = total * old + tl.load(sums + item * 2 * G + G + g) * new
        part = tl.load(parts + (item * G + g) * D + d, d < D, 0.0) * new
        if TURNED:
            acc = acc * old + tl.where(place < coded, 0.0, part)
            rotated = rotated * old + tl.where(place < coded, part, 0.0)
        else:
            acc = acc * old + part
        top = new_top
    to = (row * G + g) * D + d
    tl.store(out + to, (acc / total).to(out.dtype.element_ty), d < D)
    if TURNED:
        tl.store(turned + to, rotated / total, d < D)
