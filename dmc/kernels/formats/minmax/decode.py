"""Decode attention over GEAR pages: backbone, outliers and low-rank part in one pass, without writing them to memory.

A tile is one page. The backbone is unpacked in registers, the outliers of each vector are added there by index, and the
low-rank part enters as ``(q B) Aᵀ`` in the scores and as ``(w A) Bᵀ`` in the sum. Full-precision entries and the accumulating
one are handled as in `dmc.kernels.decode.gpu`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dmc.kernels.pages.paged import Paged
from dmc.kernels.pages.segments import full_segment, shifted, store_segment


def launch(grid: tuple[int, int], arguments: dict, paged: Paged, constants: dict) -> None:
    """Fills the segments of `dmc.kernels.decode.gpu.decode` for pages of a `dmc.kernels.formats.minmax.format.MinMaxFormat`."""
    pages = paged.format
    fields = {name: paged.encoded[name] for name in pages.fields}
    bytes_of = {x.stride(0) * x.element_size() for x in fields.values()}
    scales = {fields[name].dtype for name in ("k_scale", "v_scale")}
    if len(bytes_of) > 1 or scales != {torch.bfloat16} or not pages.triton_reads:
        raise ValueError(
            f"the kernel takes GEAR pages of one pool with bf16 scales and a power of two of at least 16 entries, not "
            f"{pages.page} entries, strides {sorted(bytes_of)} and scales {scales}; choose kernels=torch"
        )
    empty = fields["k_scale"]  # replaces missing fields
    stride = bytes_of.pop()
    sides = {}
    for part, upper in (("k", "K"), ("v", "V")):
        groups, size = pages.groups(part)
        sides |= {
            f"{upper}_CHANNEL": pages.channel(part), f"{upper}_GROUPS": groups, f"{upper}_GROUP": size,
            f"{upper}_OUTLIERS": pages.count(f"{part}_outliers"),
        }
    names = ("codes", "scale", "zero", "outliers", "indices", "left", "right")
    pointers = {f"{part}_{name}": fields.get(f"{part}_{name}", empty) for part in "kv" for name in names}
    _gear_segments[grid](
        **arguments, **pointers, page8=stride, page16=stride // 2, PAGE=pages.page, BITS=pages.bits, RANK=pages.count("k_left"),
        **sides, **constants | {"GROUPS": 1 if constants["G"] == 1 else constants["GROUPS"], "num_warps": 2},
    )


@triton.jit
def plane(codes, index, TOTAL: tl.constexpr, WIDTH: tl.constexpr, mask):
    """Plane of WIDTH bits: element ``index`` is in byte ``index % chunk``, as its code number ``index // chunk``; int32."""
    chunk: tl.constexpr = (TOTAL * WIDTH + 7) // 8
    byte = tl.load(codes + index % chunk, mask, 0).to(tl.int32)
    return (byte >> (index // chunk * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def packed(codes, index, TOTAL: tl.constexpr, BITS: tl.constexpr, mask):
    """Codes of BITS bits, cut into planes as in `dmc.kernels.pages.layout.PLANES`; int32."""
    if BITS == 3:
        return plane(codes, index, TOTAL, 2, mask) + plane(codes + (TOTAL * 2 + 7) // 8, index, TOTAL, 1, mask) * 4
    elif BITS > 4 and BITS < 8:
        rest = codes + (TOTAL * 4 + 7) // 8
        low = plane(codes, index, TOTAL, 4, mask)
        if BITS == 5:
            return low + plane(rest, index, TOTAL, 1, mask) * 16
        low += plane(rest, index, TOTAL, 2, mask) * 16
        if BITS == 6:
            return low
        else:
            return low + plane(rest + (TOTAL * 2 + 7) // 8, index, TOTAL, 1, mask) * 64
    else:
        return plane(codes, index, TOTAL, BITS, mask)


@triton.jit
def _base(
    codes, scale, zero, outliers, indices, n, d, mask, KEYS: tl.constexpr, CHANNEL: tl.constexpr, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, OUTLIERS: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
):
    """Backbone and outliers of a page, fp32 ``[PAGE, BLOCK]``."""
    if CHANNEL:
        vector, index, LENGTH = d[None, :], n[:, None], PAGE
    else:
        vector, index, LENGTH = n[:, None], d[None, :], D
    at = vector * GROUPS + index // GROUP
    x = packed(codes, vector * LENGTH + index, PAGE * D, BITS, mask).to(tl.float32)
    x *= tl.load(scale + at, mask, 0.0).to(tl.float32)
    x += tl.load(zero + at, mask, 0.0).to(tl.float32)
    for i in tl.static_range(OUTLIERS):
        if KEYS:  # of each channel, by entry
            where = tl.load(indices + d * OUTLIERS + i, d < D, 0).to(tl.int32)
            much = tl.load(outliers + d * OUTLIERS + i, d < D, 0.0).to(tl.float32)
            x += tl.where(n[:, None] == where[None, :], much[None, :], 0.0)
        else:  # of each entry, by channel
            where = tl.load(indices + n * OUTLIERS + i).to(tl.int32)
            much = tl.load(outliers + n * OUTLIERS + i).to(tl.float32)
            x += tl.where(d[None, :] == where[:, None], much[:, None], 0.0)
    return tl.where(mask, x, 0.0)


@triton.jit
def _gear_segments(
    query, index, encoded_count, full_count, first_full, encoded_table, full_table, full_keys, full_values, sums, parts,
    scale, et, ft, fkp, fvp,
    k_codes, k_scale, k_zero, k_outliers, k_indices, k_left, k_right,
    v_codes, v_scale, v_zero, v_outliers, v_indices, v_left, v_right, page8, page16,
    PAGE: tl.constexpr, BITS: tl.constexpr, RANK: tl.constexpr, PER_FULL: tl.constexpr, SEGMENT: tl.constexpr,
    TILE: tl.constexpr, GROUPS: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    G: tl.constexpr, K_CHANNEL: tl.constexpr, K_GROUPS: tl.constexpr, K_GROUP: tl.constexpr, K_OUTLIERS: tl.constexpr,
    V_CHANNEL: tl.constexpr, V_GROUPS: tl.constexpr, V_GROUP: tl.constexpr, V_OUTLIERS: tl.constexpr,
    shifts=None, shifts_per_query=0, full_key_scale=None, full_value_scale=None, fsp=0, FULL_SCALED: tl.constexpr = False,
):
    """As `dmc.kernels.formats.plain.decode._segments`, for GEAR pages."""
    row, segment = tl.program_id(0), tl.program_id(1)
    table_row = tl.load(index + row).to(tl.int64)
    if segment >= first_full:
        full_segment(
            query, full_table + table_row * ft, full_count + table_row, first_full, full_keys, full_values, k_scale, sums, parts,
            scale, fkp, fvp, PER_FULL, SEGMENT, TILE, GROUPS, PRECISION, D, BLOCK, G,
            full_key_scale, full_value_scale, fsp, FULL_SCALED,
        )
        return
    first, last = segment * (SEGMENT // PAGE), tl.load(encoded_count + table_row)
    if first >= last:
        return
    g, d, n = tl.arange(0, GROUPS), tl.arange(0, BLOCK), tl.arange(0, PAGE)
    mask = (n < PAGE)[:, None] & (d < D)[None, :]
    q = tl.load(query + (row * G + g)[:, None] * D + d[None, :], (g < G)[:, None] & (d < D)[None, :], 0.0)
    top = tl.full((GROUPS,), float("-inf"), tl.float32)
    total = tl.zeros((GROUPS,), tl.float32)
    acc = tl.zeros((GROUPS, BLOCK), tl.float32)
    for column in range(first, tl.minimum(first + SEGMENT // PAGE, last)):
        page = tl.load(encoded_table + table_row * et + column).to(tl.int64)
        at8, at16 = page * page8, page * page16
        k = _base(k_codes + at8, k_scale + at16, k_zero + at16, k_outliers + at16, k_indices + at8, n, d, mask, True,
                  K_CHANNEL, K_GROUPS, K_GROUP, K_OUTLIERS, BITS, PAGE, D)
        if GROUPS == 1:
            s = tl.sum(q.to(tl.float32) * k, 1)[None, :]
        else:
            s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        for r in tl.static_range(RANK):
            right = tl.load(k_right + at16 + d * RANK + r, d < D, 0.0).to(tl.float32)
            left = tl.load(k_left + at16 + n * RANK + r).to(tl.float32)
            s += tl.sum(q.to(tl.float32) * right[None, :], 1)[:, None] * left[None, :]
        s = shifted(s, shifts, shifts_per_query, g, column * PAGE + n, n < PAGE, G) * scale
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = _base(v_codes + at8, v_scale + at16, v_zero + at16, v_outliers + at16, v_indices + at8, n, d, mask, False,
                  V_CHANNEL, V_GROUPS, V_GROUP, V_OUTLIERS, BITS, PAGE, D)
        acc *= shrink[:, None]
        if GROUPS == 1:
            acc += tl.sum(tl.trans(p) * v, 0)[None, :]
        else:
            acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision=PRECISION)
        for r in tl.static_range(RANK):
            left = tl.load(v_left + at16 + n * RANK + r).to(tl.float32)
            right = tl.load(v_right + at16 + d * RANK + r, d < D, 0.0).to(tl.float32)
            acc += tl.sum(p * left[None, :], 1)[:, None] * right[None, :]
        top = new_top
    store_segment(sums, parts, top, total, acc, GROUPS, D, BLOCK, G)
