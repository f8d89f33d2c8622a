"""Loads and stores of bf16, fp16 and fp32 in Triton kernels.

bf16 is rounded here bit by bit: to the nearest, ties to even, on every device and in the interpreter, whose own
conversion truncates.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def as_bits(x: Tensor) -> Tensor:
    """bf16 as int16, for `load_float` and `store_float`; others as they are."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


@triton.jit
def load_float(pointer, mask):
    """fp32 from fp32, fp16, or bf16 given as int16; 0 outside of the mask."""
    if pointer.dtype.element_ty == tl.int16:
        return (tl.load(pointer, mask, 0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return tl.load(pointer, mask, 0.0).to(tl.float32)


@triton.jit
def store_float(pointer, x, mask):
    """The inverse of `load_float`, rounding to the nearest."""
    if pointer.dtype.element_ty == tl.int16:
        tl.store(pointer, bf16_bits(x), mask)
    else:
        tl.store(pointer, x.to(pointer.dtype.element_ty), mask)


@triton.jit
def bf16_bits(x):
    """The bf16 nearest to fp32, ties to even, as int16."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 32767 + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)
