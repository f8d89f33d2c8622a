"""Triton kernels of `dmc.kernels.scan`: eq. 9 for keys and values together, forward and backward.

The sequence is cut into chunks of C tokens and segments of a few chunks. With P[i, j] the product of the decays
alpha after j up to i, a chunk's numerators are ``(P * omega) @ x + through * state``: small matrix products of
products, exact for alphas of 0 and 1, where differences of logarithms would not be. A program walks one segment of
one head and carries the state in registers; what it starts from comes from a first, small kernel that sums up each
segment. That kernel walks a segment from the side that matters and stops where the decay product has become 0, which
after a few closed entries it is, so most of a segment is read once, not twice; a head that merges everything is read
twice and stays exact.

The backward pass is the same recurrence run backwards in time on ``gradient / z``. Everything that depends on the
merged states is taken from products of gradients with the inputs, so the states themselves are never formed again;
only each chunk's start is kept from the forward pass (1/16 of the bytes of k and v in bf16).

Letters beside those of `dmc.functional`: C tokens of a chunk, S segments, R = B * H rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmc.kernels.tiles_triton import (
    along,
    decay_products,
    decay_products_before,
    element_of,
    load_halves,
    load_rope,
    load_state,
    load_whole,
    mix_tile,
    mix_wide_tile,
    onto,
    row_of,
    store_halves,
    store_state,
    store_whole,
    weigh,
)

CHUNK = 32
_SEGMENT = 256  # tokens that one program walks; fewer where that would leave the device idle
_SLICE = 64  # features of keys, and of values, that one program takes
_BUSY = 528  # programs that keep the largest device busy: four on each of 132 multiprocessors


class Merge(torch.autograd.Function):
    """`dmc.kernels.scan.merge` for alpha that is 0 at the first token of every document."""

    @staticmethod
    def forward(  # noqa: D102
        ctx, key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, cos: Tensor, sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        key, value = _rows_contiguous(key), _rows_contiguous(value)
        alpha, omega, cos, sin = (x.contiguous() for x in (alpha, omega, cos, sin))
        launch = _Launch(key)
        out_key, out_value = torch.empty_like(key, memory_format=torch.contiguous_format), value.new_empty(value.shape)
        save = any(ctx.needs_input_grad)
        states, weights = launch.buffers(launch.chunks if save else 1)
        ends = launch.segment_buffers()
        common = (key, value, alpha, omega)
        if launch.segments > 1:
            _segment_ends[launch.grid(launch.segments - 1)](
                *common, *ends, *launch.sizes, **launch.strides(key, value), **launch.blocks
            )
        _forward[launch.grid(launch.segments)](
            *common, cos, sin, *ends, out_key, out_value, states, weights, *launch.sizes,
            **launch.strides(key, value), SAVE=save, **launch.blocks,
        )
        if save:
            ctx.save_for_backward(*common, cos, sin, states, weights)
        return out_key, out_value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        key, value, alpha, omega, cos, sin, states, weights = ctx.saved_tensors
        grads = grad_key.contiguous(), grad_value.contiguous()
        launch = _Launch(key)
        ends = launch.segment_buffers()
        inputs = (key, value, alpha, omega, cos, sin, states, weights, *grads)
        if launch.segments > 1:
            _segment_starts[launch.grid(launch.segments - 1)](
                *inputs, *ends, *launch.sizes, **launch.strides(key, value), **launch.blocks
            )
        d_key, d_value = key.new_empty(key.shape), value.new_empty(value.shape)
        d_alpha, d_omega = (torch.empty(launch.slices, *alpha.shape, device=alpha.device) for _ in range(2))
        _backward[launch.grid(launch.segments)](
            *inputs, *ends, d_key, d_value, d_alpha, d_omega, *launch.sizes, **launch.strides(key, value),
            **launch.blocks,
        )
        return d_key, d_value, d_alpha.sum(0), d_omega.sum(0), None, None


class _Launch:
    """How a problem is cut: grid, block sizes and scratch tensors."""

    def __init__(self, key: Tensor) -> None:
        batch, heads, tokens, size = key.shape
        self.rows, self.device = batch * heads, key.device
        self.slices = triton.cdiv(size, _SLICE)
        self.chunks = triton.cdiv(tokens, CHUNK)
        per_segment = _SEGMENT // CHUNK
        while per_segment > 2 and self.rows * self.slices * triton.cdiv(self.chunks, per_segment) < _BUSY:
            per_segment //= 2
        self.segments = triton.cdiv(self.chunks, per_segment)
        self.sizes = (heads, tokens, self.segments)
        self.state_size = 2 * size
        block = min(_SLICE, max(32, triton.next_power_of_2(size)))
        self.blocks = dict(D=size, HALF=block // 2, BLOCK=block, C=CHUNK, PER_SEGMENT=per_segment, num_warps=4)

    def grid(self, segments: int) -> tuple[int, int, int]:
        return self.rows, segments, self.slices

    def buffers(self, count: int) -> tuple[Tensor, Tensor]:
        states = torch.empty(self.rows, count, self.state_size, dtype=torch.float32, device=self.device)
        return states, states.new_empty(self.rows, count)

    def segment_buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        """What segments leave: numerators, weights (going backward, each slice's part of them) and decays."""
        states, decays = self.buffers(self.segments)
        return states, decays.new_empty(self.slices, *decays.shape), decays

    @staticmethod
    def strides(key: Tensor, value: Tensor) -> dict[str, int]:
        names = ("kb", "kh", "kt", "vb", "vh", "vt")
        return dict(zip(names, (*key.stride()[:3], *value.stride()[:3]), strict=True))


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# ------------------------------------------------------------------------------------------- forward


@triton.jit
def _segment_ends(
    key, value, alpha, omega, end_states, end_weights, end_decays, H, T, S, kb, kh, kt, vb, vh, vt,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, PER_SEGMENT: tl.constexpr,
):
    """What each segment alone leaves at its end: numerators, z, and the decay through all of it."""
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key += row // H * kb + row % H * kh
    value += row // H * vb + row % H * vh
    alpha += row * T
    omega += row * T
    i = tl.arange(0, C)
    one, two = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    whole = tl.zeros((BLOCK,), tl.float32)
    weight = 0.0
    left = 1.0  # product of the decays after the chunk
    chunk = PER_SEGMENT - 1
    while (chunk >= 0) & (left > 0):
        t = (segment * PER_SEGMENT + chunk) * C + i
        decay = tl.load(alpha + t, t < T, 1.0)
        following = tl.load(alpha + t + 1, (t + 1 < T) & (i + 1 < C), 1.0)
        share = tl.load(omega + t, t < T, 0.0) * tl.cumprod(following, 0, reverse=True) * left
        x1, x2 = load_halves(key, kt, t, T, D, HALF)
        xv = load_whole(value, vt, t, T, D, BLOCK)
        one += weigh(share, x1)
        two += weigh(share, x2)
        whole += weigh(share, xv)
        weight += tl.sum(share, 0)
        left *= element_of(tl.cumprod(decay, 0), C - 1, C)
        chunk -= 1
    at = row * S + segment
    store_state(end_states + at * 2 * D, one, two, whole, D, HALF, BLOCK)
    tl.store(end_weights + tl.program_id(2) * tl.num_programs(0) * S + at, weight)
    tl.store(end_decays + at, left)


@triton.jit
def _forward(
    key, value, alpha, omega, cos, sin, end_states, end_weights, end_decays, out_key, out_value, states, weights,
    H, T, S, kb, kh, kt, vb, vh, vt,
    SAVE: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    PER_SEGMENT: tl.constexpr,
):
    """Merged and rotated keys, merged values, and, with SAVE, the state before each chunk."""
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key += row // H * kb + row % H * kh
    value += row // H * vb + row % H * vh
    alpha += row * T
    omega += row * T
    out_key += row * T * D
    out_value += row * T * D
    chunks = tl.cdiv(T, C)
    i = tl.arange(0, C)
    one, two = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    whole = tl.zeros((BLOCK,), tl.float32)
    weight = 0.0
    left = 1.0
    before = segment - 1
    while (before >= 0) & (left > 0):
        at = row * S + before
        e1, e2, ev = load_state(end_states + at * 2 * D, D, HALF, BLOCK)
        one += left * e1
        two += left * e2
        whole += left * ev
        weight += left * tl.load(end_weights + tl.program_id(2) * tl.num_programs(0) * S + at)
        left *= tl.load(end_decays + at)
        before -= 1
    for chunk in range(segment * PER_SEGMENT, tl.minimum((segment + 1) * PER_SEGMENT, chunks)):
        if SAVE:
            at = row * chunks + chunk
            store_state(states + at * 2 * D, one, two, whole, D, HALF, BLOCK)
            tl.store(weights + at, weight)
        t = chunk * C + i
        decay = tl.load(alpha + t, t < T, 1.0)
        shares = decay_products(decay, C) * tl.load(omega + t, t < T, 0.0)[None, :]
        through = tl.cumprod(decay, 0)
        z = tl.sum(shares, 1) + through * weight
        mix, rest = shares / z[:, None], through / z  # rows of them sum to 1: an entry of one token is that token
        x1, x2 = load_halves(key, kt, t, T, D, HALF)
        xv = load_whole(value, vt, t, T, D, BLOCK)
        y1 = mix_tile(mix, x1) + rest[:, None] * one[None, :]
        y2 = mix_tile(mix, x2) + rest[:, None] * two[None, :]
        c, s = load_rope(cos, sin, t, T, D, HALF)
        store_halves(out_key, D, t, T, y1 * c - y2 * s, y2 * c + y1 * s, D, HALF)
        store_whole(out_value, D, t, T, mix_tile(mix, xv) + rest[:, None] * whole[None, :], D, BLOCK)
        share, left = row_of(shares, C - 1, C), element_of(through, C - 1, C)
        one = weigh(share, x1) + left * one
        two = weigh(share, x2) + left * two
        whole = weigh(share, xv) + left * whole
        weight = tl.sum(share, 0) + left * weight


# ------------------------------------------------------------------------------------------- backward


@triton.jit
def _load_gradients(grad_key, grad_value, cos, sin, t, T, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of the merged key, rotated back, in fp32, and of the merged value."""
    r1, r2 = load_halves(grad_key, D, t, T, D, HALF)
    c, s = load_rope(cos, sin, t, T, D, HALF)
    return r1 * c + r2 * s, r2 * c - r1 * s, load_whole(grad_value, D, t, T, D, BLOCK)


@triton.jit
def _chunk(key, value, alpha, omega, states, weights, kt, vt, g1, g2, gv, chunk, T, D: tl.constexpr,
           HALF: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """What a chunk's gradients and inputs give without anything from after the chunk.

    Returns P, P * omega, the decay through the chunk up to each token, 1 / z, and the products of each gradient with
    the inputs ``[C, C]``, with the state before the chunk ``[C]`` and with the merged state of its own token ``[C]``.
    """
    t = chunk * C + tl.arange(0, C)
    decay = tl.load(alpha + t, t < T, 1.0)
    products = decay_products(decay, C)
    shares = products * tl.load(omega + t, t < T, 0.0)[None, :]
    through = tl.cumprod(decay, 0)
    inverse = 1.0 / (tl.sum(shares, 1) + through * tl.load(weights + chunk))
    x1, x2 = load_halves(key, kt, t, T, D, HALF)
    xv = load_whole(value, vt, t, T, D, BLOCK)
    on_inputs = onto(gv, xv, onto(g2, x2, onto(g1, x1, tl.zeros((C, C), tl.float32))))
    n1, n2, nv = load_state(states + chunk * 2 * D, D, HALF, BLOCK)
    on_state = along(g1, n1) + along(g2, n2) + along(gv, nv)
    on_merged = (tl.sum(shares * on_inputs, 1) + through * on_state) * inverse
    return products, shares, through, inverse, on_inputs, on_state, on_merged


@triton.jit
def _segment_starts(
    key, value, alpha, omega, cos, sin, states, weights, grad_key, grad_value, end_states, end_weights, end_decays,
    H, T, S, kb, kh, kt, vb, vh, vt,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, PER_SEGMENT: tl.constexpr,
):
    """What each segment but the first alone sends back through its first token: to the numerators, to z, and the decay."""
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1) + 1
    chunks = tl.cdiv(T, C)
    key += row // H * kb + row % H * kh
    value += row // H * vb + row % H * vh
    alpha += row * T
    omega += row * T
    states += row * chunks * 2 * D
    weights += row * chunks
    grad_key += row * T * D
    grad_value += row * T * D
    i = tl.arange(0, C)
    one, two = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    whole = tl.zeros((BLOCK,), tl.float32)
    weight = 0.0
    left = 1.0  # product of the decays before the chunk
    chunk = segment * PER_SEGMENT
    stop = tl.minimum((segment + 1) * PER_SEGMENT, chunks)
    while (chunk < stop) & (left > 0):
        t = chunk * C + i
        g1, g2, gv = _load_gradients(grad_key, grad_value, cos, sin, t, T, D, HALF, BLOCK)
        _, _, through, inverse, _, _, on_merged = _chunk(
            key, value, alpha, omega, states, weights, kt, vt, g1, g2, gv, chunk, T, D, HALF, BLOCK, C
        )
        share = left * through * inverse
        one += weigh(share, g1)
        two += weigh(share, g2)
        whole += weigh(share, gv)
        weight -= tl.sum(share * on_merged, 0)
        left *= element_of(through, C - 1, C)
        chunk += 1
    at = row * S + segment
    store_state(end_states + at * 2 * D, one, two, whole, D, HALF, BLOCK)
    tl.store(end_weights + tl.program_id(2) * tl.num_programs(0) * S + at, weight)
    tl.store(end_decays + at, left)


@triton.jit
def _backward(
    key, value, alpha, omega, cos, sin, states, weights, grad_key, grad_value, end_states, end_weights, end_decays,
    d_key, d_value, d_alpha, d_omega, H, T, S, kb, kh, kt, vb, vh, vt,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, PER_SEGMENT: tl.constexpr,
):
    """Gradients of the inputs, chunk by chunk from the segment's end."""
    row, segment = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunks = tl.cdiv(T, C)
    key += row // H * kb + row % H * kh
    value += row // H * vb + row % H * vh
    alpha += row * T
    omega += row * T
    states += row * chunks * 2 * D
    weights += row * chunks
    grad_key += row * T * D
    grad_value += row * T * D
    d_key += row * T * D
    d_value += row * T * D
    part = (tl.program_id(2) * tl.num_programs(0) + row) * T
    i = tl.arange(0, C)
    one, two = tl.zeros((HALF,), tl.float32), tl.zeros((HALF,), tl.float32)
    whole = tl.zeros((BLOCK,), tl.float32)
    weight = 0.0
    left = 1.0
    after = segment + 1
    while (after < S) & (left > 0):
        at = row * S + after
        e1, e2, ev = load_state(end_states + at * 2 * D, D, HALF, BLOCK)
        one += left * e1
        two += left * e2
        whole += left * ev
        weight += left * tl.load(end_weights + tl.program_id(2) * tl.num_programs(0) * S + at)
        left *= tl.load(end_decays + at)
        after += 1
    last = tl.minimum((segment + 1) * PER_SEGMENT, chunks) - 1
    for back in range(0, last - segment * PER_SEGMENT + 1):
        chunk = last - back
        t = chunk * C + i
        g1, g2, gv = _load_gradients(grad_key, grad_value, cos, sin, t, T, D, HALF, BLOCK)
        products, shares, through, inverse, on_inputs, on_state, on_merged = _chunk(
            key, value, alpha, omega, states, weights, kt, vt, g1, g2, gv, chunk, T, D, HALF, BLOCK, C
        )
        w = tl.load(omega + t, t < T, 0.0)
        tail = row_of(products, C - 1, C)  # decay from each token to the chunk's end
        mix, rest = tl.trans(shares * inverse[:, None]), tail * w
        x1, x2 = load_halves(key, kt, t, T, D, HALF)
        xv = load_whole(value, vt, t, T, D, BLOCK)
        d1 = mix_wide_tile(mix, g1, x1) + rest[:, None] * one[None, :]
        d2 = mix_wide_tile(mix, g2, x2) + rest[:, None] * two[None, :]
        store_halves(d_key, D, t, T, d1, d2, D, HALF)
        store_whole(d_value, D, t, T, mix_tile(mix, gv) + rest[:, None] * whole[None, :], D, BLOCK)

        # Gradients of omega_t and alpha_t: how far x_t and the state before t lie from each later state, along its
        # gradient. Differences first, so that nothing cancels where nothing merges.
        reach = products * inverse[:, None]
        after_x = along(x1, one) + along(x2, two) + along(xv, whole) + weight
        to_omega = tl.sum(reach * (on_inputs - on_merged[:, None]), 0) + tail * after_x
        tl.store(d_omega + part + t, to_omega, t < T)

        previous = tl.load(alpha + t - 1, (i > 0) & (t - 1 < T), 1.0)
        through_before = tl.cumprod(previous, 0)
        shares = decay_products_before(previous, C) * w[None, :]
        z = tl.sum(shares, 1) + through_before * tl.load(weights + chunk)  # before each token
        scaled = tl.where(z > 0, 1.0, 0.0) / tl.where(z > 0, z, 1.0)
        mix, rest = shares * scaled[:, None], through_before * scaled
        n1, n2, nv = load_state(states + chunk * 2 * D, D, HALF, BLOCK)
        after_state = tl.sum(n1 * one, 0) + tl.sum(n2 * two, 0) + tl.sum(nv * whole, 0)
        after_before = tl.sum(mix * (after_x - weight)[None, :], 1) + rest * after_state + weight
        on_before = tl.dot(on_inputs, tl.trans(mix), input_precision="tf32x3") + on_state[:, None] * rest[None, :]
        to_alpha = z * (tl.sum(reach * (on_before - on_merged[:, None]), 0) + tail * after_before)
        tl.store(d_alpha + part + t, to_alpha, t < T)

        share, left = through * inverse, element_of(through, C - 1, C)
        weight = left * weight - tl.sum(share * on_merged, 0)
        one = left * one + weigh(share, g1)
        two = left * two + weigh(share, g2)
        whole = left * whole + weigh(share, gv)
