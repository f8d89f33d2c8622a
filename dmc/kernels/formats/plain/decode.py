"""Decode attention over dense, int8 and fp8 pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dmc.kernels.pages.exact import attend_piece, exact_piece, page_words, store_piece
from dmc.kernels.pages.paged import Paged


def launch(grid: tuple[int, int], arguments: dict, paged: Paged, constants: dict) -> None:
    """Fills the segments of `dmc.kernels.decode.gpu.decode` for pages of a `dmc.kernels.formats.plain.format.PlainFormat`."""
    keys, values = (paged.encoded[paged.format.main(part)] for part in "kv")
    key_scale, value_scale = (paged.encoded.get(f"{part}_scale") for part in "kv")
    if paged.format.name == "fp8":
        keys, values = keys.view(torch.float8_e4m3fn), values.view(torch.float8_e4m3fn)
    _pieces[grid](
        **arguments, keys=keys, values=values, key_scale=key_scale, value_scale=value_scale, kp=page_words(keys),
        vp=page_words(values), ksp=0 if key_scale is None else key_scale.stride(0),
        vsp=0 if value_scale is None else value_scale.stride(0), PAGE=paged.page, SCALED=key_scale is not None, **constants,
    )


@triton.jit
def _pieces(
    query, index, encoded, exact, first_exact, encoded_table, open_table, keys, values, key_scale, value_scale,
    open_keys, open_values, sums, parts, scale, et, ot, kp, vp, ksp, vsp, okp, ovp,
    PAGE: tl.constexpr, PER_OPEN: tl.constexpr, SCALED: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, shifts=None,
    shifts_per_query=0,
):
    """Maximum, sum and weighted values of one piece of one row."""
    row, piece = tl.program_id(0), tl.program_id(1)
    table_row = tl.load(index + row).to(tl.int64)
    if piece < first_exact:
        start, length = piece * PIECE, tl.load(encoded + table_row) * PAGE
        if start < length:
            top, total, acc = attend_piece(
                query, encoded_table + table_row * et, keys, values, key_scale, value_scale, kp, vp, ksp, vsp,
                start, length, scale, PAGE, SCALED, PIECE, TILE, GROUPS, PRECISION, D, BLOCK, G, shifts, shifts_per_query,
            )
            store_piece(sums, parts, top, total, acc, GROUPS, D, BLOCK, G)
    else:
        exact_piece(
            query, open_table + table_row * ot, exact + table_row, first_exact, open_keys, open_values, key_scale, sums, parts,
            scale, okp, ovp, PER_OPEN, PIECE, TILE, GROUPS, PRECISION, D, BLOCK, G,
        )
