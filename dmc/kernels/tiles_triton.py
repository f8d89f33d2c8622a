"""Pieces of the scan's Triton kernels: products of decays, loads and stores of a slice of features, small products.

A program takes one slice of the features: ``program_id(2)`` says which.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decay_products(decay, C: tl.constexpr):
    """``[C] → [C, C]``: P[i, j] = decay[j + 1] * ... * decay[i] for i >= j, else 0."""
    i = tl.arange(0, C)
    steps = tl.where(i[:, None] > i[None, :], decay[:, None], 1.0)
    return tl.where(i[:, None] >= i[None, :], tl.cumprod(steps, 0), 0.0)


@triton.jit
def decay_products_before(previous, C: tl.constexpr):
    """Row i of the result is row i - 1 of `decay_products`, row 0 is 0; ``previous[i]`` is the decay of token i - 1."""
    i = tl.arange(0, C)
    steps = tl.where(i[:, None] > i[None, :] + 1, previous[:, None], 1.0)
    return tl.where(i[:, None] > i[None, :], tl.cumprod(steps, 0), 0.0)


@triton.jit
def load_halves(base, stride, t, T, D: tl.constexpr, HALF: tl.constexpr):
    """First and second half of rows t of a head, in the dtype they have; 0 outside."""
    d = tl.program_id(2) * HALF + tl.arange(0, HALF)
    at = base + t[:, None] * stride + d[None, :]
    mask = (t < T)[:, None] & (d < D // 2)[None, :]
    return tl.load(at, mask, 0.0), tl.load(at + D // 2, mask, 0.0)


@triton.jit
def load_whole(base, stride, t, T, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows t of a head, in the dtype they have; 0 outside."""
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    return tl.load(base + t[:, None] * stride + d[None, :], (t < T)[:, None] & (d < D)[None, :], 0.0)


@triton.jit
def store_halves(base, stride, t, T, one, two, D: tl.constexpr, HALF: tl.constexpr):
    """The inverse of `load_halves`; casts."""
    d = tl.program_id(2) * HALF + tl.arange(0, HALF)
    at = base + t[:, None] * stride + d[None, :]
    mask = (t < T)[:, None] & (d < D // 2)[None, :]
    tl.store(at, one.to(base.dtype.element_ty), mask)
    tl.store(at + D // 2, two.to(base.dtype.element_ty), mask)


@triton.jit
def store_whole(base, stride, t, T, x, D: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_whole`; casts."""
    d = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    tl.store(base + t[:, None] * stride + d[None, :], x.to(base.dtype.element_ty), (t < T)[:, None] & (d < D)[None, :])


@triton.jit
def load_rope(cos, sin, t, T, D: tl.constexpr, HALF: tl.constexpr):
    """(cos, sin) of rows t, for the first half of the features."""
    d = tl.program_id(2) * HALF + tl.arange(0, HALF)
    at = t[:, None] * D + d[None, :]
    mask = (t < T)[:, None] & (d < D // 2)[None, :]
    return tl.load(cos + at, mask, 0.0), tl.load(sin + at, mask, 0.0)


@triton.jit
def load_state(states, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """``[2 D]`` → first and second half of the key part, and the value part."""
    d = tl.program_id(2) * HALF + tl.arange(0, HALF)
    e = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    one = tl.load(states + d, d < D // 2, 0.0)
    two = tl.load(states + D // 2 + d, d < D // 2, 0.0)
    return one, two, tl.load(states + D + e, e < D, 0.0)


@triton.jit
def store_state(states, one, two, whole, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_state`."""
    d = tl.program_id(2) * HALF + tl.arange(0, HALF)
    e = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    tl.store(states + d, one, d < D // 2)
    tl.store(states + D // 2 + d, two, d < D // 2)
    tl.store(states + D + e, whole, e < D)


@triton.jit
def mix_tile(weights, x):
    """fp32 ``[C, C] @ [C, n]``, the weights in two parts where x has 16 bits: to 2^-17 of them, and no wider tile."""
    if x.dtype == tl.float32:
        return tl.dot(weights, x, input_precision="ieee")
    else:
        high = weights.to(x.dtype)
        low = (weights - high.to(tl.float32)).to(x.dtype)
        return tl.dot(low, x, tl.dot(high, x))


@triton.jit
def weigh(weights, x):
    """``[C]`` times ``[C, n]``, summed over tokens."""
    return tl.sum(weights[:, None] * x.to(tl.float32), 0)


@triton.jit
def along(x, vector):
    """``[C, n]`` times ``[n]``, summed over features."""
    return tl.sum(x.to(tl.float32) * vector[None, :], 1)


@triton.jit
def row_of(x, index, C: tl.constexpr):
    """Row ``index`` of a ``[C, n]`` tile."""
    i = tl.arange(0, C)
    return tl.sum(tl.where((i == index)[:, None], x, 0.0), 0)


@triton.jit
def element_of(x, index, C: tl.constexpr):
    """Element ``index`` of a ``[C]`` vector."""
    return tl.sum(tl.where(tl.arange(0, C) == index, x, 0.0), 0)


@triton.jit
def onto(g, x, acc):
    """``acc + g @ xᵀ``; an fp32 g in two parts where x has 16 bits."""
    if x.dtype == tl.float32:
        return tl.dot(g, tl.trans(x), acc, input_precision="ieee")
    elif g.dtype == x.dtype:
        return tl.dot(g, tl.trans(x), acc)
    else:
        high = g.to(x.dtype)
        low = (g - high.to(tl.float32)).to(x.dtype)
        return tl.dot(low, tl.trans(x), tl.dot(high, tl.trans(x), acc))


@triton.jit
def mix_wide_tile(weights, g, x):
    """`mix_tile` for an fp32 g, in two parts where x has 16 bits."""
    if x.dtype == tl.float32:
        return tl.dot(weights, g, input_precision="ieee")
    else:
        high = g.to(x.dtype)
        return tl.dot(weights.to(x.dtype), (g - high.to(tl.float32)).to(x.dtype), mix_tile(weights, high))
