"""Triton kernels of the training attention's backward pass; `dmc.kernels.attention.gpu` says what is computed."""

from __future__ import annotations

import triton
import triton.language as tl

from dmc.kernels.attention.forward_gpu import LOG2E, add_bias, load_tile, store_tile, visible


@triton.jit
def delta_rows(out, grad, delta, rows, M: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """``<output, its gradient>`` of each row."""
    m = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    o = load_tile(out, D, m, rows, True, D, BLOCK).to(tl.float32)
    g = load_tile(grad, D, m, rows, True, D, BLOCK).to(tl.float32)
    tl.store(delta + m, tl.sum(o * g, 1), m < rows)


@triton.jit
def _backward_keys_blocks(
    dk, dv, db, k, v, b, query, grad, first, lse, delta, qt, n, start, stop, R, T, scale2,
    DIAGONAL: tl.constexpr, BIASED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, EXEMPT: tl.constexpr,
    LAG: tl.constexpr, REACH: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Rows ``start`` to ``stop`` of the queries of one head for one block of keys; tiles are [keys, queries]."""
    for m0 in range(start, stop, M):
        rows = m0 + tl.arange(0, M)
        m = T - R + rows
        q = load_tile(query, qt, rows, R, True, D, BLOCK)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2
        if BIASED:
            s = add_bias(s, b[:, None], m[None, :] - n[:, None], DIAGONAL, EXEMPT)
        p = tl.exp2(s - tl.load(lse + rows, rows < R, float("inf"))[None, :])
        if DIAGONAL:
            p = tl.where(visible(m[None, :] - n[:, None], LAG, REACH), p, 0.0)
        if PACKED:
            p = tl.where(n[:, None] >= tl.load(first + m, m < T, 0)[None, :], p, 0.0)
        g = load_tile(grad, D, rows, R, True, D, BLOCK)
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - tl.load(delta + rows, rows < R, 0.0)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        if BIASED:
            if DIAGONAL:
                ds = tl.where(m[None, :] - n[:, None] <= EXEMPT, 0.0, ds)
            db += tl.sum(ds, 1)
    return dk, dv, db


@triton.jit
def backward_keys(
    query, key, value, bias, first, end, grad, lse, delta, d_key, d_value, d_bias, scale, HQ, H, R, T,
    qb, qh, qt, kb, kh, kt, vb, vh, vt,
    BIASED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, EXEMPT: tl.constexpr, LAG: tl.constexpr,
    REACH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of one block of keys, values and biases, over all query heads of the group. Unless REACH is -1, queries
    further behind a key do not see it."""
    n0 = tl.program_id(0) * N
    row = tl.program_id(1).to(tl.int64)
    batch, h = row // H, row % H
    n = n0 + tl.arange(0, N)
    k = load_tile(key + batch * kb + h * kh, kt, n, T, True, D, BLOCK)
    v = load_tile(value + batch * vb + h * vh, vt, n, T, True, D, BLOCK)
    b = tl.zeros((N,), tl.float32)
    if BIASED:
        b = tl.load(bias + row * T + n, n < T, 0.0) * LOG2E
    stop = T
    if PACKED:
        first += batch * T
        stop = tl.load(end + batch * T + tl.minimum(n0 + N, T) - 1)  # of the last document that a key is in
    dk = tl.zeros((N, BLOCK), tl.float32)
    dv = tl.zeros((N, BLOCK), tl.float32)
    db = tl.zeros((N,), tl.float32)
    diagonal = n0 + N + EXEMPT  # the first query that sees every key with its bias
    if REACH >= 0:
        stop = tl.minimum(stop, n0 + N + REACH)
        diagonal = stop
    stop -= T - R  # from here on rows of the queries
    start = tl.maximum(n0 + LAG - (T - R), 0) // M * M
    middle = tl.minimum(tl.maximum(diagonal - (T - R), 0) + M - 1, tl.maximum(stop, 0) + M - 1) // M * M
    for group in range(0, HQ // H):
        hq = h * (HQ // H) + group
        at = (batch * HQ + hq) * R
        dk, dv, db = _backward_keys_blocks(
            dk, dv, db, k, v, b, query + batch * qb + hq * qh, grad + at * D, first, lse + at, delta + at, qt, n,
            start, middle, R, T, scale * LOG2E, True, BIASED, PACKED, PRECISION, EXEMPT, LAG, REACH, M, D, BLOCK,
        )
        if REACH < 0:
            dk, dv, db = _backward_keys_blocks(
                dk, dv, db, k, v, b, query + batch * qb + hq * qh, grad + at * D, first, lse + at, delta + at, qt, n,
                middle, stop, R, T, scale * LOG2E, False, BIASED, PACKED, PRECISION, EXEMPT, LAG, REACH, M, D, BLOCK,
            )
    store_tile(d_key + row * T * D, n, T, dk * scale, D, BLOCK)
    store_tile(d_value + row * T * D, n, T, dv, D, BLOCK)
    if BIASED:
        tl.store(d_bias + row * T + n, db, n < T)


@triton.jit
def _backward_queries_blocks(
    dq, q, g, key, value, bias, lse, delta, kt, vt, m, first, start, stop, T, scale2,
    DIAGONAL: tl.constexpr, BIASED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, EXEMPT: tl.constexpr,
    LAG: tl.constexpr, REACH: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Keys ``start`` to ``stop`` for one block of queries."""
    for n0 in range(start, stop, N):
        n = n0 + tl.arange(0, N)
        k = load_tile(key, kt, n, T, DIAGONAL, D, BLOCK)
        v = load_tile(value, vt, n, T, DIAGONAL, D, BLOCK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        if BIASED:
            b = tl.load(bias + n, n < T, 0.0) * LOG2E
            s = add_bias(s, b[None, :], m[:, None] - n[None, :], DIAGONAL, EXEMPT)
        p = tl.exp2(s - lse[:, None])
        if DIAGONAL:
            p = tl.where(visible(m[:, None] - n[None, :], LAG, REACH), p, 0.0)
        if PACKED:
            p = tl.where(n[None, :] >= first[:, None], p, 0.0)
        ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def backward_queries(
    query, key, value, bias, recent_key, recent_value, first, grad, lse, delta, d_query, scale, HQ, H, R, T,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, rkb, rkh, rkt, rvb, rvh, rvt,
    BIASED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, EXEMPT: tl.constexpr, LAG: tl.constexpr,
    BAND: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradient of one block of queries, from the keys and, unless BAND is -1, from the recent ones."""
    m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    row = tl.program_id(1).to(tl.int64)
    b, hq = row // HQ, row % HQ
    h = hq // (HQ // H)
    key += b * kb + h * kh
    value += b * vb + h * vh
    if BIASED:
        bias += (b * H + h) * T
    rows = m0 + tl.arange(0, M)
    m0 += T - R
    m = T - R + rows
    q = load_tile(query + b * qb + hq * qh, qt, rows, R, True, D, BLOCK)
    g = load_tile(grad + row * R * D, D, rows, R, True, D, BLOCK)
    lse = tl.load(lse + row * R + rows, rows < R, float("inf"))
    delta = tl.load(delta + row * R + rows, rows < R, 0.0)
    start = 0
    begins = m
    if PACKED:
        begins = tl.load(first + b * T + m, m < T, 0)
        start = tl.load(first + b * T + m0) // N * N
    middle = tl.maximum(tl.maximum(m0 - EXEMPT, 0) // N * N, start)
    dq = tl.zeros((M, BLOCK), tl.float32)
    dq = _backward_queries_blocks(
        dq, q, g, key, value, bias, lse, delta, kt, vt, m, begins, start, middle, T, scale * LOG2E, False, BIASED, PACKED,
        PRECISION, EXEMPT, LAG, -1, N, D, BLOCK,
    )
    dq = _backward_queries_blocks(
        dq, q, g, key, value, bias, lse, delta, kt, vt, m, begins, middle, tl.minimum(m0 + M - LAG, T), T, scale * LOG2E, True,
        BIASED, PACKED, PRECISION, EXEMPT, LAG, -1, N, D, BLOCK,
    )
    if BAND >= 0:
        recent = tl.maximum(tl.maximum(m0 - BAND, 0) // N * N, start)
        dq = _backward_queries_blocks(
            dq, q, g, recent_key + b * rkb + h * rkh, recent_value + b * rvb + h * rvh, bias, lse, delta, rkt, rvt, m, begins,
            recent, tl.minimum(m0 + M, T), T, scale * LOG2E, True, False, PACKED, PRECISION, 0, 0, BAND, N, D, BLOCK,
        )
    store_tile(d_query + row * R * D, rows, R, dq * scale, D, BLOCK)
