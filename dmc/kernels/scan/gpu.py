"""Triton kernels of `dmc.kernels.scan.merge`: eq. 9 for keys and values together, forward and backward.

A state is the mean of its entry's tokens, and with z the sum of their weights, a token moves it by

    y_t = kept_t y_{t-1} + new_t x_t,    kept_t = alpha_t z_{t-1} / z_t,    new_t = omega_t / z_t,

two shares that add up to 1 and are exactly 0 and 1 where a token starts an entry. The same recurrence backwards in time is the
gradient: ``A_t = g_t + kept_{t+1} A_{t+1}`` reaches the state, ``new_t A_t`` the token, and ``<A_t, x_t - y_{t-1}>`` its share,
from which alpha and omega follow by one more recurrence, of single numbers. There is no cancellation where nothing merges.

The sequence is cut into segments. A program walks one segment of one head's keys or values token by token and carries
the state in registers; tokens are loaded a chunk of C at a time, so that many loads are in flight. A first, small kernel computes
the state that it starts from: it sums up each segment from the end next to the result, and stops where the product of the shares
is 0, which is so after a few final entries. So most of a segment is read once; a head that merges everything is read twice and
the result is still exact. The backward pass recomputes the states of a chunk from the stored state before it.

Letters in addition to those of `dmc.functional`: C tokens of a chunk, S segments, R = B * H rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmc.kernels.backend import in_reach, interpreted
from dmc.kernels.scan.halves import (
    first_of,
    follow,
    last_of,
    load_rope,
    load_state,
    load_tokens,
    rotated_back,
    store_state,
    store_token,
)

CHUNK = 8
_SEGMENT = 64  # tokens per program; fewer if the device would be idle otherwise
_SIZES = ("H", "T", "S", "CHUNKS")  # one kernel for all of them
_BUSY = 2112  # programs that keep the largest device busy: sixteen on each of 132 multiprocessors


class Merge(torch.autograd.Function):
    """`dmc.kernels.scan.merge.merge` for alpha that is 0 at the first token of every document."""

    @staticmethod
    def forward(  # noqa: D102
        ctx, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, cos: Tensor, sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        key, value = in_reach(key), in_reach(value)
        alpha, omega, cos, sin = (x.contiguous() for x in (alpha, omega, cos, sin))
        launch = _Launch(key)
        z, kept, new = (torch.empty_like(alpha) for _ in range(3))
        _weights[(launch.rows,)](alpha, omega, z, kept, new, key.shape[2], BLOCK=launch.block, num_warps=4)
        out_key, out_value = torch.empty_like(key, memory_format=torch.contiguous_format), value.new_empty(value.shape)
        save = any(ctx.needs_input_grad)
        states = launch.states(launch.chunks if save else 1)
        ends = launch.states(launch.segments), launch.decays()
        common, strides = (key, value, kept, new), launch.strides(key, value)
        if launch.segments > 1:
            _segment_ends[launch.grid(launch.segments - 1)](*common, *ends, *launch.sizes, **strides, **launch.constants)
        _forward[launch.grid(launch.segments)](
            *common, cos, sin, *ends, out_key, out_value, states, *launch.sizes, **strides, SAVE=save, **launch.constants,
        )
        if save:
            ctx.save_for_backward(*common, cos, sin, states, alpha, z)
        return out_key, out_value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        key, value, kept, new, cos, sin, states, alpha, z = ctx.saved_tensors
        grads = in_reach(grad_key), in_reach(grad_value)
        launch = _Launch(key)
        ends = launch.states(launch.segments), launch.decays()
        strides = launch.strides(key, value) | launch.strides(*grads, letter="g")
        if launch.segments > 1:
            _segment_starts[launch.grid(launch.segments - 1)](
                kept, cos, sin, *grads, *ends, *launch.sizes, **launch.strides(*grads, letter="g"),
                **launch.constants,
            )
        d_key, d_value = key.new_empty(key.shape), value.new_empty(value.shape)
        d_share = torch.empty(2, *alpha.shape, device=alpha.device)  # of keys and of values
        _backward[launch.grid(launch.segments)](
            key, value, kept, new, cos, sin, states, *grads, *ends, d_key, d_value, d_share, *launch.sizes, **strides,
            **launch.constants,
        )
        d_alpha, d_omega = torch.empty_like(alpha), torch.empty_like(alpha)
        _decisions[(launch.rows,)](
            alpha, z, kept, new, d_share, d_alpha, d_omega, launch.rows, key.shape[2], BLOCK=launch.block, num_warps=4
        )
        return d_key, d_value, d_alpha, d_omega, None, None


class _Launch:
    """Division of a problem: grid, block sizes and scratch tensors."""

    def __init__(self, key: Tensor) -> None:
        batch, heads, tokens, size = key.shape
        self.rows, self.device, self.size = batch * heads, key.device, size
        self.chunks = triton.cdiv(tokens, CHUNK)
        per_segment = _SEGMENT // CHUNK
        while per_segment > 1 and self.rows * 2 * triton.cdiv(self.chunks, per_segment) < _BUSY:
            per_segment //= 2
        self.segments = triton.cdiv(self.chunks, per_segment)
        self.sizes = (heads, tokens, self.segments, per_segment)
        self.block = 64 if interpreted() else 1024
        self.constants = dict(
            D=size, HALF=max(1, triton.next_power_of_2(size // 2)), C=CHUNK, num_warps=1
        )

    def grid(self, segments: int) -> tuple[int, int, int]:
        return self.rows, segments, 2

    def states(self, count: int) -> Tensor:
        return torch.empty(self.rows, count, 2, self.size, dtype=torch.float32, device=self.device)

    def decays(self) -> Tensor:
        return torch.empty(self.rows, self.segments, dtype=torch.float32, device=self.device)

    @staticmethod
    def strides(key: Tensor, value: Tensor, letter: str = "") -> dict[str, int]:
        names = [f"{letter}{name}" for name in ("kb", "kh", "kt", "vb", "vh", "vt")]
        return dict(zip(names, (*key.stride()[:3], *value.stride()[:3]), strict=True))


@triton.jit
def _side(key, value, row, H, kb, kh, kt, vb, vh, vt):
    """A row's keys or values, chosen by ``program_id(2)``: (pointer, stride of a token)."""
    base, stride = key + row // H * kb + row % H * kh, kt
    if tl.program_id(2) == 1:
        base, stride = value + row // H * vb + row % H * vh, vt
    return base, stride


# ------------------------------------------------------------------------------------------- single numbers


@triton.jit(do_not_specialize=["T"])
def _weights(alpha, omega, z, kept, new, T, BLOCK: tl.constexpr):
    """z and both shares of every token of a row: ``z_t = alpha_t z_{t-1} + omega_t``."""
    row = tl.program_id(0).to(tl.int64) * T
    i = tl.arange(0, BLOCK)
    carried = 0.0  # z before the block
    for first in range(0, T, BLOCK):
        t = first + i
        inside = (i > 0) & (t - 1 < T)
        decay = tl.load(alpha + row + t - 1, inside, 1.0)
        decay, before = tl.associative_scan((decay, tl.load(omega + row + t - 1, inside, 0.0)), 0, follow)
        before = tl.load(alpha + row + t, t < T, 1.0) * (before + decay * carried)
        weight = tl.load(omega + row + t, t < T, 0.0)
        after = tl.where(t < T, before + weight, 1.0)
        tl.store(z + row + t, after, t < T)
        tl.store(kept + row + t, tl.div_rn(before, after), t < T)  # exactly 1 where they are equal
        tl.store(new + row + t, tl.div_rn(weight, after), t < T)
        carried = last_of(after, BLOCK)


@triton.jit(do_not_specialize=["T", "R"])
def _decisions(alpha, z, kept, new, d_share, d_alpha, d_omega, R, T, BLOCK: tl.constexpr):
    """Gradients of alpha and omega from those of the new tokens' shares, ``d_share [2, R, T]``.

    Through its own share a token's z adds ``c_t = -new_t / z_t * d_share_t`` to the gradient of ``alpha_t z_{t-1}``, and
    through later ones ``B_t = alpha_{t+1} (c_{t+1} + B_{t+1})``.
    """
    row = tl.program_id(0).to(tl.int64) * T
    carried = 0.0
    for back in range(0, tl.cdiv(T, BLOCK)):
        t = (tl.cdiv(T, BLOCK) - 1 - back) * BLOCK + tl.arange(0, BLOCK)
        decay = tl.load(alpha + row + t + 1, t + 1 < T, 0.0)
        later = decay * _through_own(z + row, new + row, d_share + row, t + 1, R, T)
        decay, rest = tl.associative_scan((decay, later), 0, follow, reverse=True)
        rest += decay * carried
        carried = first_of(rest, BLOCK)
        after, before = tl.load(z + row + t, t < T, 1.0), tl.load(z + row + t - 1, (t > 0) & (t < T), 0.0)
        share = _both_parts(d_share + row, t, R, T)
        tl.store(d_omega + row + t, tl.load(kept + row + t, t < T, 0.0) / after * share + rest, t < T)
        tl.store(d_alpha + row + t, before * (_through_own(z + row, new + row, d_share + row, t, R, T) + rest), t < T)


@triton.jit
def _through_own(z, new, d_share, t, R, T):
    """c of `_decisions` for tokens t; 0 outside."""
    return -tl.load(new + t, t < T, 0.0) / tl.load(z + t, t < T, 1.0) * _both_parts(d_share, t, R, T)


@triton.jit
def _both_parts(d_share, t, R, T):
    """Sum over keys and values."""
    return tl.load(d_share + t, t < T, 0.0) + tl.load(d_share + tl.full((), 1, tl.int64) * R * T + t, t < T, 0.0)


# ------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=_SIZES)
def _segment_ends(
    key, value, kept, new, end_states, end_decays, H, T, S, CHUNKS, kb, kh, kt, vb, vh, vt,
    D: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr,
):
    """The state at the end of each segment from its own tokens alone, and the factor of the state before it."""
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x, stride = _side(key, value, row, H, kb, kh, kt, vb, vh, vt)
    kept, new = kept + row * T, new + row * T
    one, two = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    left = 1.0  # product of the kept shares after the token
    chunk = CHUNKS - 1
    while (chunk >= 0) & (left > 0):
        first = (segment * CHUNKS + chunk) * C
        x1, x2 = load_tokens(x, stride, first, T, C, D, HALF)
        for back in tl.static_range(C):
            t = first + C - 1 - back
            share = left * tl.load(new + t, t < T, 0.0)
            one += share * x1[C - 1 - back]
            two += share * x2[C - 1 - back]
            left *= tl.load(kept + t, t < T, 1.0)
        chunk -= 1
    at = row * S + segment
    store_state(end_states + (at * 2 + tl.program_id(2)) * D, one, two, D, HALF)
    tl.store(end_decays + at, left)


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    key, value, kept, new, cos, sin, end_states, end_decays, out_key, out_value, states, H, T, S, CHUNKS,
    kb, kh, kt, vb, vh, vt,
    SAVE: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr,
):
    """Merged keys, rotated, or merged values, and, with SAVE, the state before each chunk."""
    row, segment, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    x, stride = _side(key, value, row, H, kb, kh, kt, vb, vh, vt)
    out, out_stride = _side(out_key, out_value, row, 1, T * D, 0, D, T * D, 0, D)
    kept, new = kept + row * T, new + row * T
    chunks = tl.cdiv(T, C)
    one, two = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    left = 1.0
    before = segment - 1
    while (before >= 0) & (left > 0):
        at = row * S + before
        e1, e2 = load_state(end_states + (at * 2 + part) * D, D, HALF)
        one += left * e1
        two += left * e2
        left *= tl.load(end_decays + at)
        before -= 1
    for chunk in range(segment * CHUNKS, tl.minimum((segment + 1) * CHUNKS, chunks)):
        if SAVE:
            store_state(states + ((row * chunks + chunk) * 2 + part) * D, one, two, D, HALF)
        first = chunk * C
        x1, x2 = load_tokens(x, stride, first, T, C, D, HALF)
        for i in tl.static_range(C):
            t = first + i
            old, share = tl.load(kept + t, t < T, 1.0), tl.load(new + t, t < T, 0.0)
            one = old * one + share * x1[i]
            two = old * two + share * x2[i]
            c, s = load_rope(cos, sin, t, T, part == 0, D, HALF)
            store_token(out, out_stride, t, T, one * c - two * s, two * c + one * s, D, HALF)


# ------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=_SIZES)
def _segment_starts(
    kept, cos, sin, grad_key, grad_value, end_states, end_decays, H, T, S, CHUNKS, gkb, gkh, gkt, gvb, gvh, gvt,
    D: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr,
):
    """The gradient at the first token of each segment after the first, from its tokens alone, and the factor of later ones."""
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1) + 1
    grad, stride = _side(grad_key, grad_value, row, H, gkb, gkh, gkt, gvb, gvh, gvt)
    kept += row * T
    one, two = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    left = 1.0  # product of the kept shares up to the token
    chunk = segment * CHUNKS
    stop = tl.minimum((segment + 1) * CHUNKS, tl.cdiv(T, C))
    while (chunk < stop) & (left > 0):
        g1, g2 = load_tokens(grad, stride, chunk * C, T, C, D, HALF)
        for i in tl.static_range(C):
            t = chunk * C + i
            left *= tl.load(kept + t, t < T, 1.0)
            a1, a2 = rotated_back(g1[i], g2[i], cos, sin, t, T, tl.program_id(2) == 0, D, HALF)
            one += left * a1
            two += left * a2
        chunk += 1
    at = row * S + segment
    store_state(end_states + (at * 2 + tl.program_id(2)) * D, one, two, D, HALF)
    tl.store(end_decays + at, left)


@triton.jit(do_not_specialize=_SIZES)
def _backward(
    key, value, kept, new, cos, sin, states, grad_key, grad_value, end_states, end_decays, d_key, d_value, d_share,
    H, T, S, CHUNKS, kb, kh, kt, vb, vh, vt, gkb, gkh, gkt, gvb, gvh, gvt,
    D: tl.constexpr, HALF: tl.constexpr, C: tl.constexpr,
):
    """Gradients of keys or values, and of the share that each new token has, chunk by chunk from the segment's end."""
    row, segment, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    x, stride = _side(key, value, row, H, kb, kh, kt, vb, vh, vt)
    grad, grad_stride = _side(grad_key, grad_value, row, H, gkb, gkh, gkt, gvb, gvh, gvt)
    d_x, d_stride = _side(d_key, d_value, row, 1, T * D, 0, D, T * D, 0, D)
    kept, new = kept + row * T, new + row * T
    d_share += (part * tl.num_programs(0) + row) * T
    chunks = tl.cdiv(T, C)
    one, two = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)  # gradient from later tokens
    left = 1.0
    after = segment + 1
    while (after < S) & (left > 0):
        at = row * S + after
        e1, e2 = load_state(end_states + (at * 2 + part) * D, D, HALF)
        one += left * e1
        two += left * e2
        left *= tl.load(end_decays + at)
        after += 1
    last = tl.minimum((segment + 1) * CHUNKS, chunks) - 1
    for back in range(0, last - segment * CHUNKS + 1):
        first = (last - back) * C
        x1, x2 = load_tokens(x, stride, first, T, C, D, HALF)
        g1, g2 = load_tokens(grad, grad_stride, first, T, C, D, HALF)
        y1, y2 = load_state(states + ((row * chunks + last - back) * 2 + part) * D, D, HALF)
        s1, s2 = (y1,), (y2,)  # the state before each token
        for i in tl.static_range(C - 1):
            t = first + i
            old, share = tl.load(kept + t, t < T, 1.0), tl.load(new + t, t < T, 0.0)
            y1 = old * y1 + share * x1[i]
            y2 = old * y2 + share * x2[i]
            s1, s2 = s1 + (y1,), s2 + (y2,)
        for j in tl.static_range(C - 1, -1, -1):
            t = first + j
            a1, a2 = rotated_back(g1[j], g2[j], cos, sin, t, T, part == 0, D, HALF)
            one += a1
            two += a2
            tl.store(d_share + t, tl.sum(one * (x1[j] - s1[j]) + two * (x2[j] - s2[j]), 0), t < T)
            share, old = tl.load(new + t, t < T, 0.0), tl.load(kept + t, t < T, 1.0)
            store_token(d_x, d_stride, t, T, share * one, share * two, D, HALF)
            one *= old
            two *= old
