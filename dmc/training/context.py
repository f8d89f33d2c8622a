"""Context parallelism: which positions of a sequence are on a rank, and all of it where a layer needs it.

Positions are dealt in zigzag order, so that causal attention costs every rank the same: the sequence is cut
into 2 C chunks for C ranks, and rank r holds chunks r and 2 C - 1 - r. Merging is a scan along the sequence,
so keys, values and decisions are gathered over the group (their gradients are reduced and scattered back),
and every rank runs the whole scan; queries stay where they are. That is exact. A ring of partial results,
as plain attention uses, would need the scan's state from the rank before, and serialise the ranks.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


def spans(length: int, ranks: int, rank: int) -> list[tuple[int, int]]:
    """The ``[first, stop)`` runs of positions of rank ``rank``, in its own order.

    Args:
        length: of the whole sequence; a multiple of ``2 * ranks`` where there is more than one rank.
    """
    if ranks == 1:
        return [(0, length)]
    chunk = length // (2 * ranks)
    return [(i * chunk, (i + 1) * chunk) for i in (rank, 2 * ranks - 1 - rank)]


def my_spans(length: int) -> list[tuple[int, int]]:
    """`spans` of this process."""
    return spans(length, mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank())


def my_part(x: Tensor, dim: int) -> Tensor:
    """This process's positions of a whole tensor, along ``dim``."""
    parts = my_spans(x.shape[dim])
    return x if len(parts) == 1 else torch.cat([x.narrow(dim, a, b - a) for a, b in parts], dim=dim)


def gather(x: Tensor, dim: int) -> Tensor:
    """The whole tensor from the ranks' positions, in order along ``dim``; differentiable.

    In backward every rank gets the all-reduce of the gradients of its own positions.
    """
    ranks = mpu.get_context_parallel_world_size()
    if ranks == 1:
        return x
    first = x.movedim(dim, 0).contiguous()
    together = gather_from_sequence_parallel_region(first, group=mpu.get_context_parallel_group())
    chunks = together.chunk(2 * ranks)  # in zigzag order: rank 0's two, rank 1's two, ...
    ordered = [chunks[2 * c] if c < ranks else chunks[2 * (2 * ranks - 1 - c) + 1] for c in range(2 * ranks)]
    return torch.cat(ordered).movedim(0, dim)
