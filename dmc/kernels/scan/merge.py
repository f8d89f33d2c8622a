"""The merge of DMC over a whole sequence (eq. 9), keys and values in one pass, keys rotated on the way out.

`merge_reference` is the reference implementation, `dmc.kernels.scan.gpu` has the Triton kernels, and `merge` chooses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmc import functional as fn
from dmc.kernels.backend import choose


def merge(
    key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, *, rope: tuple[Tensor, Tensor],
    starts: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Every intermediate state of the entries: keys rotated to the position of their newest token, and values.

    Differentiable in key, value, alpha and omega (once). Merging is in fp32 whatever the dtype of the keys.

    Args:
        key, value: ``[B, H, T, D]``, key before RoPE.
        alpha, omega: ``[B, H, T]``; alpha in [0, 1], that of a document's first token is taken as 0; omega > 0.
        rope: (cos, sin), each ``[T, D]``, half-split: the second half of each row repeats the first.
        starts: ``[B, T]`` bool, first tokens of documents.
        backend: see `dmc.kernels.backend`; every other name runs the reference implementation.

    Returns:
        ``(keys, values)``, each ``[B, H, T, D]`` in the dtype of ``key``.
    """
    if choose(key, backend) == "triton":
        from dmc.kernels.scan.gpu import Merge

        alpha = fn.mask_starts(alpha.float(), starts)
        return Merge.apply(key, value, alpha, omega.float(), rope[0].float(), rope[1].float())
    return merge_reference(key, value, alpha, omega, rope=rope, starts=starts)


def merge_reference(
    key: Tensor, value: Tensor, alpha: Tensor, omega: Tensor, *, rope: tuple[Tensor, Tensor],
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference implementation of `merge`, by `dmc.functional`."""
    size = key.shape[-1]
    merged, _ = fn.accumulate(torch.cat([key, value], dim=-1), alpha, omega, starts=starts)
    return fn.rotate(merged[..., :size], rope).to(key.dtype), merged[..., size:].to(value.dtype)
