"""Triton kernels of `dmc.kernels.decisions.decide`: one program per block of tokens of one head, forward and backward.

The noise is a hash of its coordinates, so the backward pass computes it again instead of reading it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dmc.kernels.backend import interpreted
from dmc.kernels.decisions import noise

_BLOCK = 1024
_SIZES = ["H", "T", "first_head", "low", "high", "lb", "lh", "lt", "wb", "wh", "wt", "kb"]
_MASK = tl.constexpr(0xFFFFFFFF)


class Soft(torch.autograd.Function):
    """Logits of alpha and of omega (or None), the rest as in `soft_decisions` → alpha, log_keep, omega, sums ``[2, H, n]``."""

    @staticmethod
    def forward(ctx, logits, weights, kept, drawn, offset, temperature):  # noqa: ANN001, ANN205, D102
        batch, heads, tokens = logits.shape
        block = 64 if interpreted() else _BLOCK
        ctx.grid = batch * heads, triton.cdiv(tokens, block)
        kept = kept.contiguous().view(torch.uint8)
        state = noise.layer_seed(drawn.seed, drawn.step, drawn.layer)
        # Two halves: a number that does not always fit signed 32 bits would compile kernels of two types.
        ctx.constants = dict(
            samples=drawn.samples, tokens=drawn.tokens, H=heads, T=tokens, first_head=drawn.first_head, low=state & 0xFFFF,
            high=state >> 16, offset=float(offset), temperature=float(temperature), kb=kept.stride(0), OMEGA=weights is not None,
            BLOCK=block, num_warps=4,
        )
        alpha, log_keep = (torch.empty(logits.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
        omega = None if weights is None else torch.empty_like(alpha)
        sums = torch.empty(2, heads, batch, ctx.grid[1], dtype=torch.float32, device=logits.device)
        weights = logits if weights is None else weights  # without omega nothing of it is read or written
        _soft[ctx.grid](
            logits, weights, kept, alpha, log_keep, alpha if omega is None else omega, sums, *logits.stride(), *weights.stride(),
            **ctx.constants,
        )
        sums = sums.flatten(2)
        ctx.mark_non_differentiable(sums)
        ctx.save_for_backward(logits, kept, omega)
        return alpha, log_keep, omega, sums

    @staticmethod
    def backward(ctx, d_alpha, d_log_keep, d_omega, _):  # noqa: ANN001, ANN205, D102
        logits, kept, omega = ctx.saved_tensors
        d_logits = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        d_weights = None if omega is None else torch.empty_like(d_logits)
        d_alpha, d_log_keep = d_alpha.contiguous(), d_log_keep.contiguous()
        through = (d_logits,) * 3 if omega is None else (omega, d_omega.contiguous(), d_weights)
        _soft_backward[ctx.grid](
            logits, kept, d_alpha, d_log_keep, *through[:2], d_logits, through[2], *logits.stride(), **ctx.constants,
        )
        return d_logits, d_weights, None, None, None, None


@triton.jit
def _mix(x):
    """`dmc.kernels.decisions.noise._mix`, int64."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


@triton.jit
def _relaxed(logits, samples, tokens, t, T, b, h, first_head, low, high, offset, temperature):
    """(logits of tokens t, and with their noise, over the temperature)."""
    state = (high.to(tl.int64) << 16) | low
    hashed = _mix(tl.load(samples + b) ^ state)
    hashed = _mix(hashed + (first_head + h).to(tl.int64) * 0x85EBCA77)
    hashed = _mix(hashed + tl.load(tokens + t, t < T, 0) * 0xC2B2AE3D)
    uniform = ((hashed >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23
    logit = tl.load(logits, t < T, 0.0)
    return logit, (logit - offset + (tl.log(uniform) - tl.log(1.0 - uniform))) / temperature


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit(do_not_specialize=_SIZES)
def _soft(
    logits, weights, kept, alpha, log_keep, omega, sums, lb, lh, lt, wb, wh, wt, samples, tokens, H, T, first_head, low, high,
    offset, temperature, kb, OMEGA: tl.constexpr, BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    b, h = (row // H).to(tl.int64), row % H
    t = part * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * T + t
    logit, x = _relaxed(
        logits + b * lb + h.to(tl.int64) * lh + t.to(tl.int64) * lt, samples, tokens, t, T, b, h, first_head, low, high, offset,
        temperature,
    )
    decided = (tl.load(kept + b * kb + t, t < T, 1) == 0) & (t < T)
    merged = tl.where(decided, _sigmoid(x), 0.0)
    tl.store(alpha + at, merged, t < T)
    tl.store(log_keep + at, tl.minimum(-x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x))), t < T)
    if OMEGA:
        weight = tl.load(weights + b * wb + h.to(tl.int64) * wh + t.to(tl.int64) * wt, t < T, 0.0)
        tl.store(omega + at, _sigmoid(weight + offset), t < T)
    parts = tl.num_programs(1)
    to = sums + (h * (tl.num_programs(0) // H) + row // H) * parts + part  # [2, H, B, parts]
    tl.store(to, tl.sum(tl.where(t < T, 1.0 - merged, 0.0), 0))
    tl.store(to + tl.num_programs(0) * parts, tl.sum(tl.where((t < T) & ~(decided & (logit > offset)), 1.0, 0.0), 0))


@triton.jit(do_not_specialize=_SIZES)
def _soft_backward(
    logits, kept, d_alpha, d_log_keep, omega, d_omega, d_logits, d_weights, lb, lh, lt, samples, tokens, H, T, first_head, low,
    high, offset, temperature, kb, OMEGA: tl.constexpr, BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    b, h = (row // H).to(tl.int64), row % H
    t = part * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * T + t
    _, x = _relaxed(
        logits + b * lb + h.to(tl.int64) * lh + t.to(tl.int64) * lt, samples, tokens, t, T, b, h, first_head, low, high, offset,
        temperature,
    )
    merged = _sigmoid(x)
    through = tl.where(tl.load(kept + b * kb + t, t < T, 1) == 0, tl.load(d_alpha + at, t < T, 0.0), 0.0) * (1.0 - merged)
    tl.store(d_logits + at, merged * (through - tl.load(d_log_keep + at, t < T, 0.0)) / temperature, t < T)
    if OMEGA:
        weight = tl.load(omega + at, t < T, 0.0)
        tl.store(d_weights + at, tl.load(d_omega + at, t < T, 0.0) * weight * (1.0 - weight), t < T)
