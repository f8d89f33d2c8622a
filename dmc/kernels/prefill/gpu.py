"""Triton kernel of `dmc.kernels.prefill.prefill`: flash attention that starts from the query's own state.

A block of queries visits the entries up to the last one that was final before its last query; those that were final before its
first query need no mask. One search over the positions, on the device, gives their numbers. The steps of a head depend on its
own number of entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmc.kernels.backend import in_reach, interpreted

LOG2E = tl.constexpr(1.4426950408889634)


def prefill(
    query: Tensor, keys: Tensor, values: Tensor, entry_positions: Tensor, own_keys: Tensor, own_values: Tensor,
    positions: Tensor, scale: float,
) -> Tensor:
    """`dmc.kernels.prefill.prefill.prefill_attention`."""
    query, keys, values, own_keys, own_values = (in_reach(x) for x in (query, keys, values, own_keys, own_values))
    entry_positions, positions = entry_positions.contiguous(), positions.contiguous()
    rows, groups, tokens, size = query.shape
    narrow = query.dtype != torch.float32
    m, n, warps, stages = (32, 16, 4, 1) if interpreted() else BLOCKS if narrow else (32, 32, 4, 1)
    blocks = triton.cdiv(tokens, m)
    ends = torch.arange(blocks, device=query.device) * m
    ends = torch.stack([ends, (ends + m - 1).clamp(max=tokens - 1)])  # first and last query of each block
    seen = torch.searchsorted(entry_positions, positions[ends].view(1, -1).expand(rows, -1).contiguous(), out_int32=True)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _prefill[(blocks, rows * groups)](
        query, keys, values, entry_positions, own_keys, own_values, positions, seen, out, scale * LOG2E.value, groups, tokens,
        keys.shape[1], *query.stride()[:3], *keys.stride()[:2], *values.stride()[:2], *own_keys.stride()[:2],
        *own_values.stride()[:2], M=m, N=n, D=size, BLOCK=max(16, triton.next_power_of_2(size)),
        PRECISION="tf32" if narrow else "ieee", num_warps=warps, num_stages=stages,
    )
    return out


BLOCKS = (64, 64, 4, 3)  # queries, entries, warps, stages: the fastest tried for 32K tokens and heads of 128


@triton.jit
def _prefill_blocks(
    acc, total, top, q, keys, values, entry_positions, at, first, stop, scale, ENTRIES, kn, vn,
    MASKED: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    """Entries ``first`` to ``stop`` for one block of queries; MASKED if some of them became final after a query."""
    d = tl.arange(0, BLOCK)
    for start in range(first, stop, N):
        n = start + tl.arange(0, N)
        if MASKED:
            inside = (n < ENTRIES)[:, None] & (d < D)[None, :]
        else:
            inside = (n >= 0)[:, None] & (d < D)[None, :]
        k = tl.load(keys + n[:, None] * kn + d[None, :], inside, 0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if MASKED:
            newest = tl.load(entry_positions + n, n < ENTRIES, 2147483647)
            s = tl.where(newest[None, :] < at[:, None], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        v = tl.load(values + n[:, None] * vn + d[None, :], inside, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
    return acc, total, top


@triton.jit
def _prefill(
    query, keys, values, entry_positions, own_keys, own_values, positions, seen, out, scale, G, T, ENTRIES,
    qr, qg, qt, kr, kn, vr, vn, okr, okt, ovr, ovt,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    blocks = tl.num_programs(0)
    block = blocks - 1 - tl.program_id(0)  # the longest blocks first
    both = tl.program_id(1).to(tl.int64)
    row, g = both // G, both % G
    m = block * M + tl.arange(0, M)
    d = tl.arange(0, BLOCK)
    mask = (m < T)[:, None] & (d < D)[None, :]
    q = tl.load(query + row * qr + g * qg + m[:, None] * qt + d[None, :], mask, 0.0)
    own = tl.load(own_keys + row * okr + m[:, None] * okt + d[None, :], mask, 0.0)
    top = tl.sum(q.to(tl.float32) * own.to(tl.float32), 1) * scale
    total = tl.full((M,), 1.0, tl.float32)
    acc = tl.load(own_values + row * ovr + m[:, None] * ovt + d[None, :], mask, 0.0).to(tl.float32)
    at = tl.load(positions + m, m < T, 0)
    keys, values, entry_positions = keys + row * kr, values + row * vr, entry_positions + row * ENTRIES
    seen += row * 2 * blocks + block
    middle = tl.load(seen) // N * N
    acc, total, top = _prefill_blocks(
        acc, total, top, q, keys, values, entry_positions, at, 0, middle, scale, ENTRIES, kn, vn, False, N, D, BLOCK, PRECISION
    )
    acc, total, top = _prefill_blocks(
        acc, total, top, q, keys, values, entry_positions, at, middle, tl.load(seen + blocks), scale, ENTRIES, kn, vn, True, N,
        D, BLOCK, PRECISION,
    )
    tl.store(out + (both * T + m)[:, None] * D + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask)
