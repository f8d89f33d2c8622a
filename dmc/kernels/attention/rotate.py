"""Rotary embedding in one pass over the tensor; `dmc.functional.rotate` is the reference implementation."""

from __future__ import annotations

from torch import Tensor

from dmc import functional as fn
from dmc.kernels.backend import choose


def rotate(x: Tensor, rope: tuple[Tensor, Tensor], *, backend: str | None = None) -> Tensor:
    """x rotated in fp32 and rounded once to its own dtype; differentiable.

    Args:
        x: ``[B, H, T, D]``.
        rope: (cos, sin), each ``[T, D]``, half-split: the second half of each row repeats the first.
        backend: see `dmc.kernels.backend`; every other name runs the reference implementation.
    """
    if choose(x, backend) == "triton":
        from dmc.kernels.attention.rotate_gpu import Rotate

        return Rotate.apply(x, rope[0].float(), rope[1].float())
    return fn.rotate_rounded(x, rope)
