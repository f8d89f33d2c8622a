"""Linear layers on a CPU: a loop that numba compiles, over a weight that lies in the order in which it is read.

A decode step is a few rows, which wait for the weights. oneDNN's products get them out of memory at 40 to 70 % of its rate; this
one at its rate, in the 16 bits that a model was saved in, and it reads prompts as fast.
A row comes out the same, bit for bit, whatever rows are beside it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmc.kernels.cpu.host import host
from dmc.kernels.cpu.threads import UNITS, run
from dmc.kernels.cpu.tiles import FP16, HALVES, KNOWN, PAIRED, PAIRS, SINGLES
from dmc.kernels.linear import loop as loops

_LEAST = 1 << 16  # products for which another thread is worth waking
_STATES = {PAIRS: torch.bfloat16, HALVES: torch.float32, FP16: torch.float32, SINGLES: torch.float32}
_HELD = {PAIRS: torch.bfloat16, HALVES: torch.bfloat16, FP16: torch.float16, SINGLES: torch.float32}


def takes(dtype: torch.dtype) -> bool:
    """Whether this is faster than PyTorch for states of a dtype: fp32 with vectors of AVX-512, bf16 with its products of bf16."""
    return PAIRED if dtype == torch.bfloat16 else dtype == torch.float32 and host().lanes == 16


class Panels:
    """``x Wᵀ + b``, with sums in fp32.

    A weight in fp32 is held in bf16 or fp16 where that loses nothing, as when it was saved in them.

    Args:
        weight: ``[out, in]``, fp32 or bf16; states are of the same dtype.
        bias: ``[out]`` or None.

    Attributes:
        held: dtype that the weight is held in.

    Raises:
        ValueError: if the weight is of another dtype, or bf16 on a CPU without products of bf16, or has no inputs.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        known = weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and PAIRED
        if not known or not weight.shape[1]:
            raise ValueError(f"no panels of a weight of {weight.dtype} {list(weight.shape)} on this CPU")
        self._outputs, self._inputs = weight.shape
        self._kind = PAIRS if weight.dtype == torch.bfloat16 else _shortest(weight)
        self.held, pair = _HELD[self._kind], 2 if self._kind == PAIRS else 1
        more = -self._outputs % loops.WIDTH
        panels = F.pad(weight.to(self.held), (0, -self._inputs % pair, 0, more)).unflatten(0, (-1, loops.WIDTH))
        self._weight = panels.unflatten(-1, (-1, pair)).transpose(1, 2).contiguous()  # [panels, in / pair, WIDTH, pair]
        self._bias = torch.zeros(self._outputs + more) if bias is None else F.pad(bias.float(), (0, more))
        self._odd, self._facts = self._inputs % pair, np.zeros(loops.FACTS, np.int64)
        panels, steps = self._weight.shape[:2]
        for place, value in (
            (loops.STEPS, steps), (loops.WEIGHT, self._weight.data_ptr()), (loops.BIAS, self._bias.data_ptr()),
            (loops.KIND, self._kind), (UNITS, panels),
        ):
            self._facts[place] = value

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., in] → [..., out]``; no gradients.

        Raises:
            ValueError: if x is of another dtype, size or device than the weight.
        """
        if x.dtype != _STATES[self._kind] or x.shape[-1] != self._inputs or x.device.type != "cpu":
            expected = f"{_STATES[self._kind]} of {self._inputs} numbers"
            raise ValueError(f"states are {expected} on a CPU here, got {x.dtype} of {x.shape[-1]} on {x.device}")
        lines = x.reshape(-1, self._inputs)
        if self._odd:
            lines = F.pad(lines, (0, 1))
        elif lines.stride(1) != 1:
            lines = lines.contiguous()
        out = torch.empty(len(lines), len(self._bias), dtype=x.dtype)
        facts = self._facts.copy()
        facts[loops.X], facts[loops.X_ROW] = lines.data_ptr(), lines.stride(0) * lines.element_size()
        facts[loops.ROWS], facts[loops.OUT], facts[loops.OUT_ROW] = len(lines), out.data_ptr(), out.stride(0) * out.element_size()
        run(loops.multiply, facts, most=1 + self._weight.numel() * len(lines) // _LEAST)
        if len(self._bias) > self._outputs:
            out = out[:, : self._outputs]
        return out if x.dim() == 2 else out.reshape(*x.shape[:-1], self._outputs)

    def dense(self) -> Tensor:
        """The weight ``[out, in]`` in the dtype of states."""
        whole = self._weight.transpose(1, 2).flatten(2).flatten(0, 1)
        return whole[: self._outputs, : self._inputs].to(_STATES[self._kind])


def _shortest(weight: Tensor) -> int:
    """How an fp32 weight is held."""
    for kind in (HALVES, FP16):
        if kind in KNOWN and all(torch.equal(part.to(_HELD[kind]).float(), part) for part in weight.split(4096)):
            return kind
    return SINGLES
