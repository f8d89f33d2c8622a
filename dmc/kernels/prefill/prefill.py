"""Prefill attention: queries of a prompt over the entries that were final before each, and each query's own state.

A prompt needs only final entries, about T / CR of them, and not all intermediate states: every query that sees a final entry
sees it unchanged. `prefill_reference` is the reference implementation, `dmc.kernels.prefill.gpu` has the Triton kernel, and
`dmc.kernels.prefill.cpu` the CPU kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmc.kernels.backend import Backend, choose

CPU_DTYPES = torch.float32, torch.bfloat16, torch.float16


def prefill_attention(
    query: Tensor, keys: Tensor, values: Tensor, entry_positions: Tensor, own_keys: Tensor, own_values: Tensor,
    positions: Tensor, *, scale: float | None = None, backend: str | None = None,
) -> Tensor:
    """Attention of prompts in one pass, in memory linear in T and N. No gradients.

    Args:
        query: ``[R, G, T, D]``, rotated; R rows, that is (sequence, key/value head) pairs.
        keys, values: ``[R, N, D]``, final entries, rotated, in the dtype of ``query``.
        entry_positions: int32 ``[R, N]``, rising: position of each entry's newest token; entry n is seen by queries of later
            positions. Rows with fewer than N entries are filled up with positions above every position.
        own_keys, own_values: ``[R, T, D]``, the state after each query's own token, key rotated.
        positions: int32 ``[T]``, rising, of the queries.
        scale: of the scores, ``1 / sqrt(D)`` if None.
        backend: see `dmc.kernels.backend`; names other than "triton" and "cpu" run the reference implementation.

    Returns:
        ``[R, G, T, D]`` in the dtype of ``query``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    arguments = (query, keys, values, entry_positions, own_keys, own_values, positions)
    chosen = choose(query, backend, cpu=CPU_DTYPES)
    if chosen is Backend.CPU:
        from dmc.kernels.prefill import cpu

        return cpu.prefill(*arguments, scale)
    if chosen is Backend.TRITON:
        from dmc.kernels.prefill.gpu import prefill

        return prefill(*arguments, scale)
    return prefill_reference(*arguments, scale=scale)


def prefill_reference(
    query: Tensor, keys: Tensor, values: Tensor, entry_positions: Tensor, own_keys: Tensor, own_values: Tensor,
    positions: Tensor, *, scale: float,
) -> Tensor:
    """The reference implementation: all scores in memory; matmuls in the dtype of ``query``, softmax in fp32 or more."""
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = (query @ keys[:, None].transpose(-1, -2)).to(work) * scale
    later = entry_positions[:, None, None, :] >= positions[:, None]
    own = (query * own_keys[:, None]).sum(-1, keepdim=True, dtype=work) * scale
    weights = torch.cat([scores.masked_fill(later, -torch.inf), own], dim=-1).softmax(-1).to(query.dtype)
    return weights[..., :-1] @ values[:, None] + weights[..., -1:] * own_values[:, None]
