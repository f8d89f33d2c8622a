"""Triton kernels of the training attention: causal, a bias for each key, a band exempt from it, documents apart.

    score(i, j) = scale <q_i, k_j> + (bias_j if j < i - window else 0)        for first_i <= j <= i, else -inf

Keys and values are those of the key/value heads: a query head reads its group's, none is repeated. Nothing of size T
x T is stored: the forward pass keeps the logarithm of each softmax's sum, from which the backward pass computes the
weights again, once for the queries' gradient and once for that of keys, values and bias. The bias's gradient is the
sum over later queries of the scores' gradient and costs a row sum of a tile that is there anyway. Blocks of keys that
lie before the first document of a block of queries are never visited.

Queries may be those of the last R of the T tokens. Arithmetic is in fp32, exponentials to base 2; products take their
operands in the dtype of the query, as flash attention does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmc.kernels.backend import in_reach, interpreted


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *, starts: Tensor | None = None,
    scale: float | None = None, window: int = 0,
) -> Tensor:
    """Attention with a bias for each key; differentiable in query, key, value and bias.

    Args:
        query: ``[B, Hq, M, D]``, rotated, of the last M of the T tokens; Hq a multiple of H; bf16, fp16 or fp32; D up
            to 128.
        key, value: ``[B, H, T, D]`` in the dtype of ``query``, key rotated.
        bias: ``[B, H, T]`` fp32, added to the scores of a key with queries more than ``window`` tokens later; -inf is
            allowed. None: 0.
        starts: ``[B, T]`` bool, first tokens of documents.
        scale: of the scores, ``1 / sqrt(D)`` if None.
        window: 0: a query's own key alone is exempt (DMC). A kernel is compiled for each window.

    Returns:
        ``[B, Hq, M, D]`` in the dtype of ``query``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(query, key, value, bias, *_borders(starts), scale, window)


def _borders(starts: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """For each token, where its document begins and where the next one does: int32 ``[B, T]`` each."""
    if starts is None:
        return None, None
    tokens = starts.shape[1]
    place = torch.arange(tokens, dtype=torch.int32, device=starts.device)
    first = torch.where(starts, place, 0).cummax(1).values
    following = torch.where(starts, place, tokens).roll(-1, 1)
    following[:, -1] = tokens
    return first, following.flip(1).cummin(1).values.flip(1).int().contiguous()


LOG2E = tl.constexpr(1.4426950408889634)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: D102
        ctx, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, first: Tensor | None,
        end: Tensor | None, scale: float, window: int,
    ) -> Tensor:
        query, key, value = (in_reach(x) for x in (query, key, value))
        bias = None if bias is None else bias.float().contiguous()
        launch = _Launch(query, key, bias, first, scale, window)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        blocks = launch.blocks("forward")
        grid = (triton.cdiv(query.shape[2], blocks["M"]), query.shape[0] * query.shape[1])
        _forward[grid](
            query, key, value, bias, first, out, lse, *launch.numbers, *_strides(query, key, value), **blocks
        )
        ctx.save_for_backward(query, key, value, bias, first, end, out, lse)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        query, key, value, bias, first, end, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        launch = _Launch(query, key, bias, first, ctx.scale, ctx.window)
        (batch, query_heads, rows, size), (heads, tokens) = query.shape, key.shape[1:3]
        delta = torch.empty_like(lse)
        _delta[(triton.cdiv(delta.numel(), 32),)](
            out, grad, delta, delta.numel(), M=32, D=size, BLOCK=triton.next_power_of_2(size)
        )
        d_query, d_key, d_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
        d_bias = None if bias is None else torch.empty_like(bias)
        strides = _strides(query, key, value)
        blocks = launch.blocks("keys")
        _backward_keys[(triton.cdiv(tokens, blocks["N"]), batch * heads)](
            query, key, value, bias, first, end, grad, lse, delta, d_key, d_value, d_bias, *launch.numbers, *strides,
            **blocks,
        )
        blocks = launch.blocks("queries")
        _backward_queries[(triton.cdiv(rows, blocks["M"]), batch * query_heads)](
            query, key, value, bias, first, grad, lse, delta, d_query, *launch.numbers, *strides, **blocks
        )
        return d_query, d_key, d_value, d_bias, None, None, None, None


class _Launch:
    """What the three kernels of one problem have in common: sizes and compile-time constants."""

    def __init__(
        self, query: Tensor, key: Tensor, bias: Tensor | None, first: Tensor | None, scale: float, window: int,
    ) -> None:
        self.size, self.narrow = query.shape[-1], query.dtype != torch.float32
        self.numbers = (scale, query.shape[1], key.shape[1], query.shape[2], key.shape[2])
        self.constants = dict(
            D=self.size, BLOCK=max(16, triton.next_power_of_2(self.size)), BIASED=bias is not None,
            PACKED=first is not None, PRECISION="tf32" if self.narrow else "ieee", WINDOW=window,
        )

    def blocks(self, kernel: str) -> dict:
        """Block sizes of one kernel: M queries, N keys, and how the compiler is to schedule it."""
        if interpreted():
            m, n, warps, stages = 32, 16, 4, 1  # small, so that short sequences have several blocks
        elif not self.narrow:
            m, n, warps, stages = 32, 32, 4, 1
        else:
            m, n, warps, stages = BLOCKS[kernel]
        return dict(M=m, N=n, num_warps=warps, num_stages=stages, **self.constants)


BLOCKS = {
    # kernel: (M, N, warps, stages): the fastest tried for heads of 64 and of 128 (docs/results/kernels.md)
    "forward": (64, 64, 4, 3),
    "keys": (64, 64, 4, 2),
    "queries": (64, 64, 4, 2),
}


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of batch, head and token, for each tensor."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


@triton.jit
def _load_tile(base, stride, rows, T, CHECK: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
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
def _store_tile(base, rows, T, x, D: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    at = base + rows[:, None] * D + d[None, :]
    tl.store(at, x.to(base.dtype.element_ty), (rows < T)[:, None] & (d < D)[None, :])


# ------------------------------------------------------------------------------------------- forward


@triton.jit
def _forward_blocks(
    acc, total, top, q, key, value, bias, kt, vt, m, first, start, stop, T, scale2,
    DIAGONAL: tl.constexpr, BIASED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Keys ``start`` to ``stop`` for one block of queries; DIAGONAL where some of them are later than a
    query or exempt from the bias."""
    for n0 in range(start, stop, N):
        n = n0 + tl.arange(0, N)
        k = _load_tile(key, kt, n, T, DIAGONAL, D, BLOCK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        if BIASED:
            b = tl.load(bias + n, n < T, 0.0) * LOG2E
            if DIAGONAL:
                s += tl.where(m[:, None] - n[None, :] <= WINDOW, 0.0, b[None, :])
            else:
                s += b[None, :]
        if DIAGONAL:
            s = tl.where(n[None, :] <= m[:, None], s, float("-inf"))
        if PACKED:
            s = tl.where(n[None, :] >= first[:, None], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: weights of 0, not NaN
        p = tl.exp2(s - reference[:, None])
        shrink = tl.exp2(top - reference)
        v = _load_tile(value, vt, n, T, DIAGONAL, D, BLOCK)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
    return acc, total, top


@triton.jit
def _forward(
    query, key, value, bias, first, out, lse, scale, HQ, H, R, T, qb, qh, qt, kb, kh, kt, vb, vh, vt,
    BIASED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Output and ``lse``, the base-2 logarithm of each softmax's sum."""
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
    q = _load_tile(query + b * qb + hq * qh, qt, rows, R, True, D, BLOCK)
    acc = tl.zeros((M, BLOCK), tl.float32)
    total = tl.zeros((M,), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    start = 0
    begins = m
    if PACKED:
        begins = tl.load(first + b * T + m, m < T, 0)
        start = tl.load(first + b * T + m0) // N * N
    middle = tl.maximum(tl.maximum(m0 - WINDOW, 0) // N * N, start)
    acc, total, top = _forward_blocks(
        acc, total, top, q, key, value, bias, kt, vt, m, begins, start, middle, T, scale * LOG2E, False, BIASED, PACKED,
        PRECISION, WINDOW, N, D, BLOCK,
    )
    acc, total, top = _forward_blocks(
        acc, total, top, q, key, value, bias, kt, vt, m, begins, middle, tl.minimum(m0 + M, T), T, scale * LOG2E, True, BIASED,
        PACKED, PRECISION, WINDOW, N, D, BLOCK,
    )
    _store_tile(out + row * R * D, rows, R, acc / total[:, None], D, BLOCK)
    tl.store(lse + row * R + rows, top + tl.log2(total), rows < R)


# ------------------------------------------------------------------------------------------- backward


@triton.jit
def _delta(out, grad, delta, rows, M: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """``<output, its gradient>`` of each row."""
    m = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    o = _load_tile(out, D, m, rows, True, D, BLOCK).to(tl.float32)
    g = _load_tile(grad, D, m, rows, True, D, BLOCK).to(tl.float32)
    tl.store(delta + m, tl.sum(o * g, 1), m < rows)


@triton.jit
def _backward_keys_blocks(
    dk, dv, db, k, v, b, query, grad, first, lse, delta, qt, n, start, stop, R, T, scale2,
    DIAGONAL: tl.constexpr, BIASED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Rows ``start`` to ``stop`` of the queries of one head for one block of keys; tiles are [keys, queries]."""
    for m0 in range(start, stop, M):
        rows = m0 + tl.arange(0, M)
        m = T - R + rows
        q = _load_tile(query, qt, rows, R, True, D, BLOCK)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2
        if BIASED:
            if DIAGONAL:
                s += tl.where(m[None, :] - n[:, None] <= WINDOW, 0.0, b[:, None])
            else:
                s += b[:, None]
        p = tl.exp2(s - tl.load(lse + rows, rows < R, float("inf"))[None, :])
        if DIAGONAL:
            p = tl.where(n[:, None] <= m[None, :], p, 0.0)
        if PACKED:
            p = tl.where(n[:, None] >= tl.load(first + m, m < T, 0)[None, :], p, 0.0)
        g = _load_tile(grad, D, rows, R, True, D, BLOCK)
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - tl.load(delta + rows, rows < R, 0.0)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        if BIASED:
            if DIAGONAL:
                ds = tl.where(m[None, :] - n[:, None] <= WINDOW, 0.0, ds)
            db += tl.sum(ds, 1)
    return dk, dv, db


@triton.jit
def _backward_keys(
    query, key, value, bias, first, end, grad, lse, delta, d_key, d_value, d_bias, scale, HQ, H, R, T,
    qb, qh, qt, kb, kh, kt, vb, vh, vt,
    BIASED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradients of one block of keys, values and biases, over all query heads of the group."""
    n0 = tl.program_id(0) * N
    row = tl.program_id(1).to(tl.int64)
    batch, h = row // H, row % H
    n = n0 + tl.arange(0, N)
    k = _load_tile(key + batch * kb + h * kh, kt, n, T, True, D, BLOCK)
    v = _load_tile(value + batch * vb + h * vh, vt, n, T, True, D, BLOCK)
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
    stop -= T - R  # from here on rows of the queries
    start = tl.maximum(n0 - (T - R), 0) // M * M
    middle = tl.minimum(tl.maximum(n0 + N + WINDOW - (T - R), 0) + M - 1, tl.maximum(stop, 0) + M - 1) // M * M
    for group in range(0, HQ // H):
        hq = h * (HQ // H) + group
        at = (batch * HQ + hq) * R
        dk, dv, db = _backward_keys_blocks(
            dk, dv, db, k, v, b, query + batch * qb + hq * qh, grad + at * D, first, lse + at, delta + at, qt, n,
            start, middle, R, T, scale * LOG2E, True, BIASED, PACKED, PRECISION, WINDOW, M, D, BLOCK,
        )
        dk, dv, db = _backward_keys_blocks(
            dk, dv, db, k, v, b, query + batch * qb + hq * qh, grad + at * D, first, lse + at, delta + at, qt, n,
            middle, stop, R, T, scale * LOG2E, False, BIASED, PACKED, PRECISION, WINDOW, M, D, BLOCK,
        )
    _store_tile(d_key + row * T * D, n, T, dk * scale, D, BLOCK)
    _store_tile(d_value + row * T * D, n, T, dv, D, BLOCK)
    if BIASED:
        tl.store(d_bias + row * T + n, db, n < T)


@triton.jit
def _backward_queries_blocks(
    dq, q, g, key, value, bias, lse, delta, kt, vt, m, first, start, stop, T, scale2,
    DIAGONAL: tl.constexpr, BIASED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Keys ``start`` to ``stop`` for one block of queries."""
    for n0 in range(start, stop, N):
        n = n0 + tl.arange(0, N)
        k = _load_tile(key, kt, n, T, DIAGONAL, D, BLOCK)
        v = _load_tile(value, vt, n, T, DIAGONAL, D, BLOCK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2
        if BIASED:
            b = tl.load(bias + n, n < T, 0.0) * LOG2E
            if DIAGONAL:
                s += tl.where(m[:, None] - n[None, :] <= WINDOW, 0.0, b[None, :])
            else:
                s += b[None, :]
        p = tl.exp2(s - lse[:, None])
        if DIAGONAL:
            p = tl.where(n[None, :] <= m[:, None], p, 0.0)
        if PACKED:
            p = tl.where(n[None, :] >= first[:, None], p, 0.0)
        ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _backward_queries(
    query, key, value, bias, first, grad, lse, delta, d_query, scale, HQ, H, R, T, qb, qh, qt, kb, kh, kt, vb, vh, vt,
    BIASED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """Gradient of one block of queries."""
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
    q = _load_tile(query + b * qb + hq * qh, qt, rows, R, True, D, BLOCK)
    g = _load_tile(grad + row * R * D, D, rows, R, True, D, BLOCK)
    lse = tl.load(lse + row * R + rows, rows < R, float("inf"))
    delta = tl.load(delta + row * R + rows, rows < R, 0.0)
    start = 0
    begins = m
    if PACKED:
        begins = tl.load(first + b * T + m, m < T, 0)
        start = tl.load(first + b * T + m0) // N * N
    middle = tl.maximum(tl.maximum(m0 - WINDOW, 0) // N * N, start)
    dq = tl.zeros((M, BLOCK), tl.float32)
    dq = _backward_queries_blocks(
        dq, q, g, key, value, bias, lse, delta, kt, vt, m, begins, start, middle, T, scale * LOG2E, False, BIASED, PACKED,
        PRECISION, WINDOW, N, D, BLOCK,
    )
    dq = _backward_queries_blocks(
        dq, q, g, key, value, bias, lse, delta, kt, vt, m, begins, middle, tl.minimum(m0 + M, T), T, scale * LOG2E, True,
        BIASED, PACKED, PRECISION, WINDOW, N, D, BLOCK,
    )
    _store_tile(d_query + row * R * D, rows, R, dq * scale, D, BLOCK)
