"""Triton kernel of the training attention's forward pass, and what it shares with the backward pass.

`dmc.kernels.attention.gpu` says what is computed. Constants of the kernels: a query sees the keys that are at least LAG tokens
behind it, and those at most EXEMPT behind it without their bias.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(base, stride, rows, T, CHECK: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``[n]`` of a ``[T, D]`` tensor as ``[n, BLOCK]``; 0 outside."""
    d = tl.arange(0, BLOCK)
    at = base + rows[:, None] * stride + d[None, :]
    if CHECK:
        return tl.load(at, (rows < T)[:, None] & (d < D)[None, :], 0.0)
    elif D == BLOCK:
        return tl.load(at)
    else:
        return tl.load(at, (d < D)[None, :], 0.0)


@triton.jit
def store_tile(base, rows, T, x, D: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_tile`, for a tensor without gaps."""
    d = tl.arange(0, BLOCK)
    at = base + rows[:, None] * D + d[None, :]
    tl.store(at, x.to(base.dtype.element_ty), (rows < T)[:, None] & (d < D)[None, :])


@triton.jit
def add_bias(s, b, behind, DIAGONAL: tl.constexpr, EXEMPT: tl.constexpr):
    """Scores with the bias of each key, except keys at most EXEMPT tokens behind the query."""
    if DIAGONAL:
        return s + tl.where(behind <= EXEMPT, 0.0, b)
    else:
        return s + b


@triton.jit
def visible(behind, LAG: tl.constexpr, REACH: tl.constexpr):
    """True where a key is at least LAG tokens behind the query and, unless REACH is -1, at most REACH."""
    seen = behind >= LAG
    if REACH >= 0:
        seen = seen & (behind <= REACH)
    return seen


@triton.jit
def _forward_blocks(
    acc, total, top, q, key, value, bias, kt, vt, m, first, start, stop, T, scale2,
    DIAGONAL: tl.constexpr, BIASED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, EXEMPT: tl.constexpr,
    LAG: tl.constexpr, REACH: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Keys ``start`` to ``stop`` for one block of queries; DIAGONAL if some of them are invisible
    to some query or exempt from the bias."""
    for n0 in range(start, stop, N):
        n = n0 + tl.arange(0, N)
        k = load_tile(key, kt, n, T, DIAGONAL, D, BLOCK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        if BIASED:
            b = tl.load(bias + n, n < T, 0.0) * LOG2E
            s = add_bias(s, b[None, :], m[:, None] - n[None, :], DIAGONAL, EXEMPT)
        if DIAGONAL:
            s = tl.where(visible(m[:, None] - n[None, :], LAG, REACH), s, float("-inf"))
        if PACKED:
            s = tl.where(n[None, :] >= first[:, None], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key seen yet: weights of 0, not NaN
        p = tl.exp2(s - reference[:, None])
        shrink = tl.exp2(top - reference)
        v = load_tile(value, vt, n, T, DIAGONAL, D, BLOCK)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
    return acc, total, top


@triton.jit
def forward(
    query, key, value, bias, recent_key, recent_value, first, out, lse, scale, HQ, H, R, T, qb, qh, qt, kb, kh, kt, vb, vh, vt,
    rkb, rkh, rkt, rvb, rvh, rvt,
    BIASED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, EXEMPT: tl.constexpr, LAG: tl.constexpr,
    BAND: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Output and ``lse``, the base-2 logarithm of each softmax's sum. Unless BAND is -1, the softmax covers recent keys too, at
    most BAND tokens behind the query."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * M  # the longest rows first
    row = tl.program_id(1).to(tl.int64)
    b, hq = row // HQ, row % HQ
    h = hq // (HQ // H)
    key += b * kb + h * kh
    value += b * vb + h * vh
    if BIASED:
        bias += (b * H + h) * T
    rows = m0 + tl.arange(0, M)
    m0 += T - R  # from here on positions
    m = T - R + rows
    q = load_tile(query + b * qb + hq * qh, qt, rows, R, True, D, BLOCK)
    acc = tl.zeros((M, BLOCK), tl.float32)
    total = tl.zeros((M,), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    start = 0
    begins = m
    if PACKED:
        begins = tl.load(first + b * T + m, m < T, 0)
        start = tl.load(first + b * T + m0) // N * N
    middle = tl.maximum(tl.maximum(m0 - EXEMPT, 0) // N * N, start)
    acc, total, top = _forward_blocks(
        acc, total, top, q, key, value, bias, kt, vt, m, begins, start, middle, T, scale * LOG2E, False, BIASED, PACKED,
        PRECISION, EXEMPT, LAG, -1, N, D, BLOCK,
    )
    acc, total, top = _forward_blocks(
        acc, total, top, q, key, value, bias, kt, vt, m, begins, middle, tl.minimum(m0 + M - LAG, T), T, scale * LOG2E, True,
        BIASED, PACKED, PRECISION, EXEMPT, LAG, -1, N, D, BLOCK,
    )
    if BAND >= 0:
        recent = tl.maximum(tl.maximum(m0 - BAND, 0) // N * N, start)
        acc, total, top = _forward_blocks(
            acc, total, top, q, recent_key + b * rkb + h * rkh, recent_value + b * rvb + h * rvh, bias, rkt, rvt, m, begins,
            recent, tl.minimum(m0 + M, T), T, scale * LOG2E, True, False, PACKED, PRECISION, 0, 0, BAND, N, D, BLOCK,
        )
    store_tile(out + row * R * D, rows, R, acc / total[:, None], D, BLOCK)
    tl.store(lse + row * R + rows, top + tl.log2(total), rows < R)
