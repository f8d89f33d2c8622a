"""Decode attention over dense, int8 and fp8 pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dmc.kernels.pages.paged import Paged
from dmc.kernels.pages.segments import attend_segment, full_segment, page_words, store_segment


def launch(grid: tuple[int, int], arguments: dict, paged: Paged, constants: dict) -> None:
    """Fills the segments of `dmc.kernels.decode.gpu.decode` for pages of a `dmc.kernels.formats.plain.format.PlainFormat`."""
    keys, values = (paged.encoded[paged.format.main(part)] for part in "kv")
    key_scale, value_scale = (paged.encoded.get(f"{part}_scale") for part in "kv")
    if paged.format.name == "fp8":
        keys, values = keys.view(torch.float8_e4m3fn), values.view(torch.float8_e4m3fn)
    _segments[grid](
        **arguments, keys=keys, values=values, key_scale=key_scale, value_scale=value_scale, kp=page_words(keys),
        vp=page_words(values), ksp=0 if key_scale is None else key_scale.stride(0),
        vsp=0 if value_scale is None else value_scale.stride(0), PAGE=paged.page, SCALED=key_scale is not None, **constants,
    )


@triton.jit
def _segments(
    query, index, encoded_count, full_count, first_full, encoded_table, full_table, keys, values, key_scale, value_scale,
    full_keys, full_values, sums, parts, scale, et, ft, kp, vp, ksp, vsp, fkp, fvp,
    PAGE: tl.constexpr, PER_FULL: tl.constexpr, SCALED: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, shifts=None,
    shifts_per_query=0, full_key_scale=None, full_value_scale=None, fsp=0, FULL_SCALED: tl.constexpr = False,
):
    """Maximum, sum and weighted values of one segment of one row."""
    row, segment = tl.program_id(0), tl.program_id(1)
    table_row = tl.load(index + row).to(tl.int64)
    if segment < first_full:
        start, length = segment * SEGMENT, tl.load(encoded_count + table_row) * PAGE
        if start < length:
            top, total, acc = attend_segment(
                query, encoded_table + table_row * et, keys, values, key_scale, value_scale, kp, vp, ksp, vsp,
                start, length, scale, PAGE, SCALED, SEGMENT, TILE, GROUPS, PRECISION, D, BLOCK, G, shifts, shifts_per_query,
            )
            store_segment(sums, parts, top, total, acc, GROUPS, D, BLOCK, G)
    else:
        full_segment(
            query, full_table + table_row * ft, full_count + table_row, first_full, full_keys, full_values, key_scale, sums,
            parts, scale, fkp, fvp, PER_FULL, SEGMENT, TILE, GROUPS, PRECISION, D, BLOCK, G,
            full_key_scale, full_value_scale, fsp, FULL_SCALED,
        )
