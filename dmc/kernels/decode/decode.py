"""Decode attention over pages: one query of each head over what its row of the block tables holds.

`decode_reference` is the reference implementation, `dmc.kernels.decode.gpu` has the kernels for GPUs and
`dmc.kernels.decode.cpu` those for CPUs; `decode_attention` chooses. How a page is read is its format's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.kernels.backend import Backend, choose
from dmc.kernels.decode.reference import decode_reference
from dmc.kernels.pages.paged import Paged


def decode_attention(
    query: Tensor, own_key: Tensor, own_value: Tensor, index: Tensor, paged: Paged, *, scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """One query of each head over its row's encoded pages, exact entries and its own state.

    With Triton nothing waits for the device: shapes alone say what is launched, so it can be captured in a CUDA graph
    while the tables keep their width.

    Args:
        query: ``[R, G, D]``, rotated; on a GPU products are in its dtype, sums always in fp32.
        own_key, own_value: ``[R, D]``, the open entry, rotated.
        index: ``[R]``, rows of ``paged``'s tables.
        paged: the cache.
        scale: of the scores, ``1 / sqrt(D)`` if None.
        backend: see `dmc.kernels.backend`. The CPU kernels take fp32; what they do not read, and what is neither "triton" nor
            "cpu", is the reference implementation's.

    Returns:
        ``[R, G, D]`` in the dtype of ``query``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose(query, backend, cpu=(torch.float32,))
    if chosen is Backend.CPU and paged.cpu_reads:
        from dmc.kernels.decode import cpu

        return cpu.decode(query, own_key, own_value, index, paged, scale)
    if chosen is Backend.TRITON:
        from dmc.kernels.decode.gpu import decode

        return decode(query, own_key, own_value, index, paged, scale)
    return decode_reference(query, own_key, own_value, index, paged, scale=scale)


def decode_with_statistics(
    query: Tensor, own_key: Tensor, own_value: Tensor, index: Tensor, paged: Paged, *, statistics: str,
) -> tuple[Tensor, Tensor]:
    """`decode_attention` by the loops for CPUs, which also add each entry's softmax weight, summed over G, to its score.

    Args:
        query, own_key, own_value, index: fp32, see `decode_attention`.
        paged: with scores of entries.
        statistics: "sum" adds, "last" replaces.

    Returns:
        ``(out [R, G, D], own [R])``: own is the weight of the own state.
    """
    from dmc.kernels.decode import cpu

    return cpu.with_statistics(query, own_key, own_value, index, paged, query.shape[-1] ** -0.5, statistics)
