"""Device functions of the scan's Triton kernels: loads and stores of the two halves of a token's features, all in fp32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def follow(a, b, a2, b2):
    """``y → a y + b``, and then ``y → a2 y + b2``, as one."""
    return a * a2, b * a2 + b2


@triton.jit
def load_tokens(base, stride, first, T, C: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """First and second half of C tokens, a tuple of C vectors ``[HALF]`` each; 0 outside."""
    d = tl.arange(0, HALF)
    one, two = (), ()
    for i in tl.static_range(C):
        at = base + (first + i) * stride + d
        mask = (d < D // 2) & (first + i < T)
        one = one + (tl.load(at, mask, 0.0).to(tl.float32),)
        two = two + (tl.load(at + D // 2, mask, 0.0).to(tl.float32),)
    return one, two


@triton.jit
def store_token(base, stride, t, T, one, two, D: tl.constexpr, HALF: tl.constexpr):
    """Both halves of one token; casts."""
    d = tl.arange(0, HALF)
    mask = (d < D // 2) & (t < T)
    tl.store(base + t * stride + d, one.to(base.dtype.element_ty), mask)
    tl.store(base + t * stride + D // 2 + d, two.to(base.dtype.element_ty), mask)


@triton.jit
def load_rope(cos, sin, t, T, turns, D: tl.constexpr, HALF: tl.constexpr):
    """(cos, sin) of token t for the first half of the features; 1 and 0 if ``turns`` is false."""
    d = tl.arange(0, HALF)
    mask = (d < D // 2) & (t < T) & turns
    return tl.load(cos + t * D + d, mask, 1.0), tl.load(sin + t * D + d, mask, 0.0)


@triton.jit
def rotated_back(g1, g2, cos, sin, t, T, turns, D: tl.constexpr, HALF: tl.constexpr):
    """The gradient before the rotation to t, from the gradient after it; unchanged unless ``turns``."""
    c, s = load_rope(cos, sin, t, T, turns, D, HALF)
    return g1 * c + g2 * s, g2 * c - g1 * s


@triton.jit
def load_state(state, D: tl.constexpr, HALF: tl.constexpr):
    """fp32 ``[D]`` → its two halves."""
    d = tl.arange(0, HALF)
    return tl.load(state + d, d < D // 2, 0.0), tl.load(state + D // 2 + d, d < D // 2, 0.0)


@triton.jit
def store_state(state, one, two, D: tl.constexpr, HALF: tl.constexpr):
    """The inverse of `load_state`."""
    d = tl.arange(0, HALF)
    tl.store(state + d, one, d < D // 2)
    tl.store(state + D // 2 + d, two, d < D // 2)


@triton.jit
def last_of(x, BLOCK: tl.constexpr):
    """The last element of a vector."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, x, 0.0), 0)


@triton.jit
def first_of(x, BLOCK: tl.constexpr):
    """The first element of a vector."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == 0, x, 0.0), 0)
