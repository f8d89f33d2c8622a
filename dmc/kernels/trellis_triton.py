"""Decode over GEAR pages with the rotated backbone: trellis-coded, read in registers, never rotated back by entry.

A tile is one page. The level of a code depends on its own bits and on the lowest bits of the two codes before it; all
three are unpacked from the page, the level comes from a table of a few hundred bytes. Queries are rotated beforehand
(``q·k = qR·kR``), sums of values come out rotated, and `dmc.kernels.decode_triton.decode` rotates them back at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dmc.kernels.decode_triton import attend_piece, find_row
from dmc.kernels.gear_triton import packed, plane
from dmc.kernels.layout import NO_SCALE, PLANES, SCALE_STEPS

NONE, FALL = tl.constexpr(NO_SCALE), tl.constexpr(-1 / SCALE_STEPS)


def launch(grid: tuple[int], arguments: dict, paged, constants: dict) -> None:  # noqa: ANN001
    """Fills the pieces of `dmc.kernels.decode_triton.decode` for ``paged.kind == "trellis"``."""
    fields, pages = paged.encoded, paged.gear
    bytes_of = {x.stride(0) * x.element_size() for x in fields.values()}
    if len(bytes_of) > 1 or pages.page & (pages.page - 1) or pages.page < 16:
        raise ValueError(
            f"the kernel takes trellis pages of one pool with a power of two of at least 16 entries, not {pages.page} "
            f"entries and strides {sorted(bytes_of)}; choose kernels=sdpa"
        )
    query, stride, sides = arguments["query"], bytes_of.pop(), {}
    for part, upper in (("k", "K"), ("v", "V")):
        (count, bits), *rest = pages.stretches(part)
        sides |= {
            f"{upper}_FIRST": count, f"{upper}_BITS": bits, f"{upper}_REST": rest[0][1] if rest else 0,
            f"{upper}_MEAN": f"{part}_mean" in fields,
            f"{part}_levels": pages.levels[bits], f"{part}_rest": pages.levels[rest[0][1]] if rest else pages.levels[bits],
        }
        for name in ("codes", "scale", "top", "mean", "unit"):
            sides[f"{part}_{name}"] = fields.get(f"{part}_{name}", fields[f"{part}_top"])
    rotated = (query.float() @ pages.rotation).to(query.dtype).contiguous()
    _trellis_pieces[grid](
        **arguments, rotated=rotated, **sides, page8=stride, page16=stride // 2, PAGE=pages.page, **constants | {"num_warps": 8},
    )


@triton.jit
def _lowest(codes, n, d, FIRST: tl.constexpr, BITS: tl.constexpr, REST: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, mask):
    """The lowest bit of the codes at ``d``; 0 where d is negative."""
    LOW: tl.constexpr = 4 if BITS > 4 and BITS < 8 else (2 if BITS == 3 else BITS)
    bit = plane(codes, n * FIRST + d, PAGE * FIRST, LOW, mask & (d >= 0) & (d < FIRST))
    if REST > 0:
        BYTES: tl.constexpr = _bytes(PAGE * FIRST, BITS)
        LOW_REST: tl.constexpr = 4 if REST > 4 and REST < 8 else (2 if REST == 3 else REST)
        bit += plane(codes + BYTES, n * (D - FIRST) + d - FIRST, PAGE * (D - FIRST), LOW_REST, mask & (d >= FIRST))
    return bit & 1


@triton.constexpr_function
def _bytes(count, bits):
    """Bytes that ``count`` codes take: every plane is rounded up."""
    return sum((count * width + 7) // 8 for width in PLANES[bits])


@triton.jit
def _levels(
    codes, levels, levels_rest, n, d, mask, FIRST: tl.constexpr, BITS: tl.constexpr, REST: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr,
):
    """The levels of a page, fp32 ``[PAGE, BLOCK]``; 0 outside of the mask."""
    n, d = n[:, None], d[None, :]
    once = _lowest(codes, n, d - 1, FIRST, BITS, REST, PAGE, D, mask)
    twice = _lowest(codes, n, d - 2, FIRST, BITS, REST, PAGE, D, mask)
    here = mask & (d < FIRST)
    code = packed(codes, n * FIRST + d, PAGE * FIRST, BITS, here)
    level = tl.load(levels + 2 * ((code & 1) ^ twice) + once + 2 * (code - (code & 1)), here, 0.0)
    if REST > 0:
        there = mask & (d >= FIRST)
        code = packed(codes + _bytes(PAGE * FIRST, BITS), n * (D - FIRST) + d - FIRST, PAGE * (D - FIRST), REST, there)
        level += tl.load(levels_rest + 2 * ((code & 1) ^ twice) + once + 2 * (code - (code & 1)), there, 0.0)
    return level


@triton.jit
def _scales(scale, top, n):
    """fp32 ``[PAGE]``; see `dmc.kernels.layout`."""
    code = tl.load(scale + n)
    return tl.where(code == NONE, 0.0, tl.exp2(code.to(tl.float32) * FALL) * tl.load(top).to(tl.float32))


@triton.jit
def _trellis_pieces(
    query, rotated, index, ends, encoded_pieces, encoded, exact, encoded_table, open_table, open_keys, open_values, sums,
    parts, scale, R, et, ot, okp, ovp,
    k_codes, k_scale, k_top, k_mean, k_unit, k_levels, k_rest, v_codes, v_scale, v_top, v_mean, v_unit, v_levels, v_rest,
    page8, page16, PAGE: tl.constexpr, PER_OPEN: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr,
    GROUPS: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr,
    K_FIRST: tl.constexpr, K_BITS: tl.constexpr, K_REST: tl.constexpr, K_MEAN: tl.constexpr,
    V_FIRST: tl.constexpr, V_BITS: tl.constexpr, V_REST: tl.constexpr, V_MEAN: tl.constexpr,
):
    """As `dmc.kernels.decode_triton._pieces`, for trellis pages; their pieces leave rotated values."""
    g = tl.arange(0, GROUPS)
    d = tl.arange(0, BLOCK)
    n = tl.arange(0, PAGE)
    mask = (n < PAGE)[:, None] & (d < D)[None, :]
    for item in range(tl.program_id(0), tl.load(ends + R - 1), tl.num_programs(0)):
        row = find_row(ends, item, R)
        piece = item - tl.load(ends + row - 1, row > 0, 0)
        table_row = tl.load(index + row).to(tl.int64)
        inside = (g < G)[:, None] & (d < D)[None, :]
        coded = tl.load(encoded_pieces + row)
        top = tl.full((GROUPS,), float("-inf"), tl.float32)
        total = tl.zeros((GROUPS,), tl.float32)
        acc = tl.zeros((GROUPS, BLOCK), tl.float32)
        if piece < coded:
            q = tl.load(rotated + (row * G + g)[:, None] * D + d[None, :], inside, 0.0)
            for column in range(piece * (PIECE // PAGE), tl.minimum((piece + 1) * (PIECE // PAGE), tl.load(encoded + row))):
                page = tl.load(encoded_table + table_row * et + column).to(tl.int64)
                at8, at16 = page * page8, page * page16
                k = _levels(k_codes + at8, k_levels, k_rest, n, d, mask, K_FIRST, K_BITS, K_REST, PAGE, D)
                if GROUPS == 1:
                    s = tl.sum(q.to(tl.float32) * k, 1)[None, :]
                else:
                    s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
                s *= _scales(k_scale + at8, k_top + at16, n)[None, :]
                if K_MEAN:
                    mean = tl.load(k_mean + at8 + d, d < D, 0).to(tl.float32) * tl.load(k_unit + at16).to(tl.float32)
                    s += tl.sum(q.to(tl.float32) * mean[None, :], 1)[:, None]
                s *= scale
                new_top = tl.maximum(top, tl.max(s, 1))
                p = tl.exp2(s - new_top[:, None])
                shrink = tl.exp2(top - new_top)
                total = total * shrink + tl.sum(p, 1)
                acc *= shrink[:, None]
                if V_MEAN:
                    mean = tl.load(v_mean + at8 + d, d < D, 0).to(tl.float32) * tl.load(v_unit + at16).to(tl.float32)
                    acc += tl.sum(p, 1)[:, None] * mean[None, :]
                p *= _scales(v_scale + at8, v_top + at16, n)[None, :]
                v = _levels(v_codes + at8, v_levels, v_rest, n, d, mask, V_FIRST, V_BITS, V_REST, PAGE, D)
                if GROUPS == 1:
                    acc += tl.sum(tl.trans(p) * v, 0)[None, :]
                else:
                    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision=PRECISION)
                top = new_top
        else:
            q = tl.load(query + (row * G + g)[:, None] * D + d[None, :], inside, 0.0)
            top, total, acc = attend_piece(
                q, open_table + table_row * ot, open_keys, open_values, k_top, v_top, okp, ovp, 0, 0,
                (piece - coded) * PIECE, tl.load(exact + row), scale, PER_OPEN, False, PIECE, TILE, GROUPS, PRECISION, D,
                BLOCK,
            )
        at = tl.full((), 0, tl.int64) + item
        tl.store(sums + at * 2 * G + g, top, g < G)
        tl.store(sums + at * 2 * G + G + g, total, g < G)
        tl.store(parts + (at * G + g)[:, None] * D + d[None, :], acc, (g < G)[:, None] & (d < D)[None, :])
