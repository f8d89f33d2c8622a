"""Triton kernel of `dmc.kernels.attention.rotate`. The backward pass is the rotation by the negative angle."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmc.kernels.backend import in_reach

_TOKENS = 32  # that one program rotates, in one head


class Rotate(torch.autograd.Function):
    """`dmc.kernels.attention.rotate.rotate`."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(cos, sin)
        return _run(x, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: D102
        return _run(grad, *ctx.saved_tensors, -1.0), None, None


def _run(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = in_reach(x)
    batch, heads, tokens, size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rotate[(triton.cdiv(tokens, _TOKENS), batch * heads)](
        x, cos.contiguous(), sin.contiguous(), out, sign, heads, tokens, *x.stride()[:3], D=size,
        HALF=triton.next_power_of_2(size // 2), M=_TOKENS,
    )
    return out


@triton.jit
def _rotate(x, cos, sin, out, sign, H, T, xb, xh, xt, D: tl.constexpr, HALF: tl.constexpr, M: tl.constexpr):
    t = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, HALF)
    mask = (t < T)[:, None] & (d < D // 2)[None, :]
    at = x + row // H * xb + row % H * xh + t[:, None] * xt + d[None, :]
    one, two = tl.load(at, mask, 0.0).to(tl.float32), tl.load(at + D // 2, mask, 0.0).to(tl.float32)
    c = tl.load(cos + t[:, None] * D + d[None, :], mask, 0.0)
    s = tl.load(sin + t[:, None] * D + d[None, :], mask, 0.0) * sign
    at = out + (row * T + t[:, None]) * D + d[None, :]
    tl.store(at, (one * c - two * s).to(out.dtype.element_ty), mask)
    tl.store(at + D // 2, (two * c + one * s).to(out.dtype.element_ty), mask)
