"""Linear layers of the serving side: PyTorch's matmuls, with the weight in the layout that the CPU reads fastest."""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

_LOST = 2.0**-25  # of a weight, at most, when it is held in fp16: what underflows there


class Linear:
    """``x Wᵀ + b``; several of a layer's projections of the same input are stacked into one.

    On an x86 CPU the weight is kept in another layout than its own, and not in its own as well:

    - an fp32 weight in fp16 (FBGEMM), if that loses nothing but what is next to 0, as when it was saved in 16 bits;
      products and sums stay in fp32;
    - another fp32 weight in oneDNN's blocked layout, 1.5 to 2.5 times faster than the default matmul for 2 to 64 rows
      and 1.2 times for a prompt's hundreds; a bf16 weight too, where oneDNN has products of bf16 (with sums in fp32).

    Args:
        weight: ``[out, in]``.
        bias: ``[out]`` or None.

    Attributes:
        held: "fp16", "blocked" or "plain".
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias, self.held, self.weight = bias, _best(weight), weight
        if self.held == "fp16":
            self.weight = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)
        elif self.held == "blocked":
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., in] → [..., out]``."""
        if self.held == "fp16":
            return torch.ops.quantized.linear_dynamic_fp16(x, self.weight)
        if self.held == "blocked":
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def dense(self) -> Tensor:
        """The weight in its own layout and dtype, ``[out, in]``."""
        if self.held == "fp16":
            return torch.ops.quantized.linear_unpack_fp16(self.weight)[0].float()
        return self.weight.to_dense() if self.held == "blocked" else self.weight


def _best(weight: Tensor) -> str:
    """How a weight is held."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not (x86 and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)):
        return "plain"
    if weight.dtype == torch.bfloat16:
        return "blocked" if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "plain"
    if "fbgemm" in torch.backends.quantized.supported_engines and _fits_fp16(weight):
        return "fp16"
    return "blocked" if torch.backends.mkldnn.is_available() else "plain"


def _fits_fp16(weight: Tensor) -> bool:
    """Whether fp16 holds an fp32 weight as it is, but for what is next to 0."""
    return all(bool((part.half().float() - part).abs().max() <= _LOST) for part in weight.split(4096))
