"""What a served model does to each row between its products: norms, the gated activation, the rotation of prompts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmc.functional import rotate
from dmc.kernels.cpu.runs import runs_on_cpu


def norm(x: Tensor, weight: Tensor, eps: float, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm, in fp32 at least; in 16 bits rounded before the weight, as Hugging Face does. No gradients on a CPU.

    Args:
        x: ``[..., N]``.
        weight: ``[N]``, of the same dtype.
        eps: added to the mean of the squares.
        more: ``[..., N]``, added to x first.

    Returns:
        ``(x + more, its norm)``, both as x.
    """
    if runs_on_cpu(x, torch.bfloat16):
        from dmc.kernels.rows import cpu

        return cpu.norm(x, weight, eps, more)
    x = x if more is None else x + more
    work = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.device.type == "cpu":  # where F.rms_norm makes five passes of it
        mean = torch.linalg.vector_norm(work, dim=-1, keepdim=True).square_().mul_(1 / x.shape[-1])
        normed = work * mean.add_(eps).rsqrt_()
    else:
        normed = F.rms_norm(work, x.shape[-1:], eps=eps)
    return x, normed.to(x.dtype) * weight


def gate(x: Tensor) -> Tensor:
    """SwiGLU's ``silu(a) * b`` of ``[..., 2 N]``, a and b side by side: ``[..., N]``. No gradients on a CPU."""
    if runs_on_cpu(x, torch.bfloat16):
        from dmc.kernels.rows import cpu

        return cpu.gate(x)
    first, second = x.chunk(2, dim=-1)
    return F.silu(first) * second


def turn(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """`dmc.functional.rotate` of ``[H, T, D]`` in fp32 at least, rounded once; (cos, sin) ``[T, D]``. No gradients on a CPU."""
    if runs_on_cpu(x, torch.bfloat16):
        from dmc.kernels.rows import cpu

        return cpu.turn(x, rope)
    return rotate(x if x.dtype == torch.float64 else x.float(), rope).to(x.dtype)
