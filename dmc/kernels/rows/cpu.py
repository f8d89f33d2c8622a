"""What a model does to each row between its products, on a CPU: one pass each by loops that numba compiles.

PyTorch takes a pass over memory and a microsecond for each of some nine operations of a norm.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dmc.kernels.cpu.threads import UNITS, run
from dmc.kernels.rows import loop as loops

DTYPES = (torch.float32, torch.bfloat16)
_LEAST = 1 << 14  # numbers for which another thread is worth waking


def norm(x: Tensor, weight: Tensor, eps: float, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `dmc.kernels.rows.rows.norm`."""
    alike = weight.shape == x.shape[-1:] and weight.dtype == x.dtype
    if not alike or more is not None and (more.shape != x.shape or more.dtype != x.dtype):
        added = "" if more is None else f", and {_named(more)} is to be added"
        raise ValueError(f"norm of {_named(x)}: the weight is {_named(weight)}{added}")
    x, weight = x.contiguous(), weight.contiguous()
    more = more if more is None else more.contiguous()
    out, sums, number = torch.empty_like(x), x if more is None else torch.empty_like(x), np.array([eps], np.float32)
    facts = _facts(x, out, x.shape[-1])
    facts[loops.WEIGHT], facts[loops.EPS] = weight.data_ptr(), number.ctypes.data
    if more is not None:
        facts[loops.MORE], facts[loops.SUM] = more.data_ptr(), sums.data_ptr()
    run(loops.norm, facts, most=1 + x.numel() // _LEAST)
    return sums, out


def gate(x: Tensor) -> Tensor:
    """See `dmc.kernels.rows.rows.gate`."""
    if x.shape[-1] % 2:
        raise ValueError(f"gate of {_named(x)}: two halves side by side are needed")
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    run(loops.gate, _facts(x, out, out.shape[-1]), most=1 + x.numel() // _LEAST)
    return out


def turn(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """`dmc.functional.rotate` of ``[H, T, D]`` in fp32, rounded once; any strides but of the last dimension."""
    heads, tokens, size = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    cos, sin = (table.float().contiguous() for table in rope)
    out = x.new_empty(heads, tokens, size)
    facts = _facts(x, out, size)
    facts[loops.TOKENS], facts[loops.HEAD_ROW], facts[loops.TOKEN_ROW] = tokens, x.stride(0), x.stride(1)
    facts[loops.COS], facts[loops.SIN] = cos.data_ptr(), sin.data_ptr()
    run(loops.turn, facts, most=1 + x.numel() // _LEAST)
    return out


def _named(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _facts(x: Tensor, out: Tensor, size: int) -> np.ndarray:
    facts = np.zeros(loops.FACTS, np.int64)
    facts[UNITS], facts[loops.SIZE] = out.numel() // max(1, size), size
    facts[loops.HALVES], facts[loops.X], facts[loops.OUT] = x.dtype == torch.bfloat16, x.data_ptr(), out.data_ptr()
    return facts
