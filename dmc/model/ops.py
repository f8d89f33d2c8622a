"""What a served model does to its states between matmuls, in PyTorch: the norm and the gated activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, computed in fp32 (fp64 of fp64) and rounded before the weight is applied, as Hugging Face does.

    Args:
        x: ``[..., N]``.
        weight: ``[N]``, in the dtype of x.
        eps: added to the mean of the squares.
    """
    work = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.device.type == "cpu":  # where F.rms_norm makes five passes over memory
        mean = torch.linalg.vector_norm(work, dim=-1, keepdim=True).square() / x.shape[-1]
        return (work * (mean + eps).rsqrt()).to(x.dtype) * weight
    return F.rms_norm(work, x.shape[-1:], eps=eps).to(x.dtype) * weight


def swiglu(x: Tensor) -> Tensor:
    """``silu(a) * b`` of ``[..., 2 N]``, which holds a and then b: ``[..., N]``."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
