"""Decode attention over pages: one query per head over its row of the block tables.

`decode_reference` is the reference implementation, `dmc.kernels.decode.gpu` has the Triton kernels, and
`dmc.kernels.decode.cpu` the CPU kernels; `decode_attention` chooses. The page's format defines how it is read.
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
    """Attention of one query per head over its row's encoded pages, full-precision entries and its own state.

    With Triton nothing waits for the device and the launch depends on shapes alone, so it can be captured in a CUDA graph
    as long as the tables keep their width.

    Args:
        query: ``[R, G, D]``, rotated; on a GPU products are in its dtype, sums always in fp32.
        own_key, own_value: ``[R, D]``, the accumulating entry, rotated.
        index: ``[R]``, rows of ``paged``'s tables.
        paged: the cache.
        scale: of the scores, ``1 / sqrt(D)`` if None.
        backend: see `dmc.kernels.backend`. The CPU kernels support fp32. Pages that they do not read, and names
            other than "triton" and "cpu", use the reference implementation.

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
    """`decode_attention` by the CPU kernels, which also write each entry's softmax weight, summed over G, to its score.

    Args:
        query, own_key, own_value, index: fp32, see `decode_attention`.
        paged: with scores of entries.
        statistics: "sum" adds, "last" replaces.

    Returns:
        ``(out [R, G, D], own [R])``: own is the weight of the own state.
    """
    from dmc.kernels.decode import cpu

    return cpu.with_statistics(query, own_key, own_value, index, paged, query.shape[-1] ** -0.5, statistics)
