"""Triton kernels of `dmc.kernels.decode.decode`.

Rows differ in length, by sequence and by head. Their entries are cut into equal segments, and one program is launched for
each segment that the block tables have room for. A program whose row ends before its segment returns at once, which costs
almost nothing, and the host needs no lengths. A program writes the maximum, the sum and the weighted values of its segment;
a second kernel combines the segments of each row and adds the query's own state.

The first segments of a row are its encoded pages, the last ones its full-precision entries. A tile gathers its entries page
by page through the block table, so any page size works.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmc.kernels.backend import interpreted
from dmc.kernels.decode.key_bias_gpu import shifts
from dmc.kernels.pages.paged import Paged
from dmc.kernels.pages.segments import page_words

LOG2E = tl.constexpr(1.4426950408889634)
SEGMENT, TILE, WARPS = 256, 64, 4  # entries of a segment, of a tile; warps per program: measured, docs/results/kernels.md
LEAST_GROUPS = 16  # smallest number of queries: a single one uses the matrix units too


def decode(
    query: Tensor, own_key: Tensor, own_value: Tensor, index: Tensor, paged: Paged, scale: float,
) -> Tensor:
    """`dmc.kernels.decode.decode.decode_attention`."""
    rows, groups, size = query.shape
    query, own_key, own_value, index = (x.contiguous() for x in (query, own_key, own_value, index))
    tile, segment = (16, 32) if interpreted() else (TILE, SEGMENT)
    page, per_full_page = paged.page, paged.per_full_page
    segment = triton.cdiv(max(segment, page), tile) * tile  # a segment is whole tiles
    encoded_segments = triton.cdiv(paged.encoded_table.shape[1] * page, segment)
    segments = encoded_segments + triton.cdiv(paged.full_table.shape[1] * per_full_page, segment)

    sums = torch.empty(rows * segments, 2, groups, dtype=torch.float32, device=query.device)
    parts = torch.empty(rows * segments, groups, size, dtype=torch.float32, device=query.device)
    out = torch.empty_like(query)
    sizes = dict(D=size, BLOCK=max(16, triton.next_power_of_2(size)), G=groups)
    where = dict(index=index, encoded_count=paged.encoded_count, full_count=paged.full_count, first_full=encoded_segments)
    constants = dict(
        **sizes, PER_FULL=per_full_page, SEGMENT=segment, TILE=tile,
        GROUPS=LEAST_GROUPS if groups == 1 else max(16, triton.next_power_of_2(groups)),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=WARPS, num_stages=2,
    )
    arguments = dict(
        query=query, **where, encoded_table=paged.encoded_table, full_table=paged.full_table,
        full_keys=paged.full_precision["k"], full_values=paged.full_precision["v"], sums=sums, parts=parts,
        scale=scale * LOG2E.value,
        et=paged.encoded_table.stride(0), ft=paged.full_table.stride(0),
        fkp=page_words(paged.full_precision["k"]), fvp=page_words(paged.full_precision["v"]),
    )
    if paged.full_scaled:
        key_scale, value_scale = (paged.full_precision[f"{part}_scale"] for part in "kv")
        arguments |= dict(full_key_scale=key_scale, full_value_scale=value_scale, fsp=key_scale.stride(0))
        constants["FULL_SCALED"] = True
    if paged.key_bias is not None:
        arguments["shifts"] = added = shifts(query, index, paged)
        arguments["shifts_per_query"] = added.shape[-1]
    paged.format.triton_read((rows, segments), arguments, paged, constants)
    # Pages with a rotation are summed in their rotated space, so one rotation back remains.
    rotation = paged.format.rotation
    turned = None if rotation is None else torch.empty(rows, groups, size, dtype=torch.float32, device=query.device)
    _together[(rows, groups)](
        query, own_key, own_value, **where, sums=sums, parts=parts, out=out, turned=out if turned is None else turned,
        scale=scale * LOG2E.value, segments=segments, PAGE=page, SEGMENT=segment, TURNED=turned is not None, **sizes, num_warps=1,
    )
    return out if turned is None else (out + turned @ rotation.T).to(query.dtype)


@triton.jit
def _together(
    query, own_key, own_value, index, encoded_count, full_count, first_full, sums, parts, out, turned, scale, segments,
    PAGE: tl.constexpr, SEGMENT: tl.constexpr, TURNED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
):
    """Combines the segments of one row and one query of its group, and the query's own state; rotated sums are separate."""
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    q = tl.load(query + (row * G + g) * D + d, d < D, 0.0).to(tl.float32)
    top = tl.sum(q * tl.load(own_key + row * D + d, d < D, 0.0).to(tl.float32), 0) * scale
    total = 1.0
    acc = tl.load(own_value + row * D + d, d < D, 0.0).to(tl.float32)
    rotated = tl.zeros((BLOCK,), tl.float32)
    table_row = tl.load(index + row).to(tl.int64)
    coded = tl.cdiv(tl.load(encoded_count + table_row) * PAGE, SEGMENT)
    for number in range(0, coded + tl.cdiv(tl.load(full_count + table_row), SEGMENT)):
        item = row * segments + tl.where(number < coded, number, first_full + number - coded)
        segment_top = tl.load(sums + item * 2 * G + g)
        new_top = tl.maximum(top, segment_top)
        old, new = tl.exp2(top - new_top), tl.exp2(segment_top - new_top)
        total = total * old + tl.load(sums + item * 2 * G + G + g) * new
        part = tl.load(parts + (item * G + g) * D + d, d < D, 0.0) * new
        if TURNED:
            acc = acc * old + tl.where(number < coded, 0.0, part)
            rotated = rotated * old + tl.where(number < coded, part, 0.0)
        else:
            acc = acc * old + part
        top = new_top
    to = (row * G + g) * D + d
    tl.store(out + to, (acc / total).to(out.dtype.element_ty), d < D)
    if TURNED:
        tl.store(turned + to, rotated / total, d < D)
